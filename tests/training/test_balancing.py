"""Weights of losses, compared with the formulas of the papers and with gradients taken one by one."""

import math
import sys

import pytest
import torch

from lightning_attn.errors import InputError
from lightning_attn.training.balancing import (
    BalancingSpec,
    GradientSummary,
    build_balancing,
    gradient_statistics,
    gradients_of,
)

WEIGHTS = {"a": 2.0, "b": 0.5}


def unchanged(value):
    return value


def losses(a, b):
    return {"a": torch.tensor(a, requires_grad=True), "b": torch.tensor(b, requires_grad=True)}


def test_fixed_weights():
    balancing = build_balancing(BalancingSpec(), WEIGHTS)
    assert balancing.total(losses(3.0, 8.0), unchanged).item() == 2 * 3 + 0.5 * 8
    assert balancing.total({"b": torch.tensor(8.0)}, unchanged).item() == 4
    assert not balancing.state_dict()


def test_learnt_weights_are_best_where_all_weighted_losses_are_a_half():
    """The minimum of w exp(-s) L + s / 2 is at s = log(2 w L)."""
    balancing = build_balancing(BalancingSpec("uncertainty"), WEIGHTS)
    optimizer = torch.optim.SGD(balancing.parameters(), lr=0.2)
    assert balancing.current() == WEIGHTS
    for _ in range(400):
        optimizer.zero_grad()
        balancing.total(losses(3.0, 8.0), unchanged).backward()
        optimizer.step()
    for name, loss in (("a", 3.0), ("b", 8.0)):
        assert balancing.log_variances[name].item() == pytest.approx(math.log(2 * WEIGHTS[name] * loss), abs=1e-3)
        assert balancing.current()[name].item() * loss == pytest.approx(0.5, abs=1e-3)


def test_a_task_without_a_batch_has_no_gradient():
    balancing = build_balancing(BalancingSpec("uncertainty"), WEIGHTS)
    balancing.total({"a": torch.tensor(3.0)}, unchanged).backward()
    assert balancing.log_variances["a"].grad is not None
    assert balancing.log_variances["b"].grad is None


def test_a_loss_that_falls_slowly_gets_more_weight():
    """Eq. 7 of Liu et al. 2019, from the means of two epochs."""
    balancing = build_balancing(BalancingSpec("dynamic_average", temperature=2.0), WEIGHTS)
    epochs = [[(4.0, 8.0), (2.0, 8.0)], [(2.0, 6.0), (1.0, 8.0)], [(1.0, 7.0)]]
    for batches in epochs[:2]:
        assert balancing.total(losses(1.0, 1.0) | losses(*batches[0]), unchanged) > 0
        balancing.sums.zero_()
        balancing.counts.zero_()
        for one in batches:
            assert {name: float(value) for name, value in balancing.current().items()} == WEIGHTS
            balancing.total(losses(*one), unchanged)
        balancing.end_epoch()
    powers = [math.exp(1.5 / 3 / 2), math.exp(7 / 8 / 2)]
    for place, name in enumerate(WEIGHTS):
        expected = WEIGHTS[name] * 2 * powers[place] / sum(powers)
        assert float(balancing.current()[name]) == pytest.approx(expected)
    copy = build_balancing(BalancingSpec("dynamic_average", temperature=2.0), WEIGHTS)
    copy.load_state_dict(balancing.state_dict())
    for one in (balancing, copy):
        one.total(losses(*epochs[2][0]), unchanged)
        one.end_epoch()
    assert copy.current() == balancing.current()


def test_epochs_without_a_task_leave_its_ratio_at_one():
    balancing = build_balancing(BalancingSpec("dynamic_average"), WEIGHTS)
    for _ in range(3):
        balancing.total({"a": torch.tensor(2.0)}, unchanged)
        balancing.end_epoch()
    assert {name: float(value) for name, value in balancing.current().items()} == pytest.approx(WEIGHTS)
    assert all(bool(value.isfinite().all()) for value in balancing.state_dict().values())


def test_norms_and_angles_of_gradients():
    torch.manual_seed(0)
    layer, unused = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.ones(2))
    x = torch.randn(5, 4)
    parameters = [*layer.parameters(), unused]
    found = {"a": layer(x).square().mean(), "b": layer(x).sin().sum(), "c": -2 * layer(x).square().mean()}
    norms, cosines = gradient_statistics(list(found), gradients_of(found, parameters, unchanged))
    separate = {}
    for name, loss in found.items():
        gradients = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        separate[name] = torch.cat([one.flatten() for one in gradients])
    assert cosines.keys() == {"a_b", "a_c", "b_c"}
    for name, gradient in separate.items():
        torch.testing.assert_close(norms[name], gradient.norm())
    expected = torch.nn.functional.cosine_similarity(separate["a"], separate["b"], dim=0)
    torch.testing.assert_close(cosines["a_b"], expected)
    assert cosines["a_c"].item() == pytest.approx(-1)
    assert all(parameter.grad is None for parameter in parameters)
    torch.stack([*found.values()]).sum().backward()  # the graphs are still there


@pytest.mark.parametrize("aggregator", ["upgrad", "mgda", "dualproj", "aligned_mtl", "imtl_g"])
def test_conflicts_of_gradients_are_settled_as_by_torchjd(aggregator):
    """The gradient of the weighted sum is what TorchJD's own backward pass leaves, times the number of losses."""
    torchjd = pytest.importorskip("torchjd")
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(6, 3), torch.randn(5, 6)
    names = {"upgrad": "UPGrad", "mgda": "MGDA", "dualproj": "DualProj", "aligned_mtl": "AlignedMTL", "imtl_g": "IMTLG"}

    def found():
        y = layer(x)
        return {"a": (y + 1).square().mean(), "b": (y - 2).square().mean()}

    weighted = [WEIGHTS[name] * loss for name, loss in found().items()]
    autojac = pytest.importorskip("torchjd.autojac")
    autojac.backward(weighted)
    autojac.jac_to_grad(layer.parameters(), getattr(torchjd.aggregation, names[aggregator])())
    expected = [2 * parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()

    balancing = build_balancing(BalancingSpec("torchjd", aggregator=aggregator), WEIGHTS)
    assert balancing.needs_gradients
    losses_now = found()
    gradients = gradients_of(losses_now, list(layer.parameters()), unchanged)
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) < 0, "they disagree"
    balancing.total(losses_now, unchanged, gradients).backward()
    for parameter, one in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-6)
    factors = {name: float(value) / WEIGHTS[name] for name, value in balancing.current().items()}
    assert max(abs(value - 1) for value in factors.values()) > 0.01
    # Without a gradient there is nothing to settle, and the weights stay.
    balancing.total(losses_now, unchanged, torch.zeros_like(gradients))
    assert {name: float(value) / WEIGHTS[name] for name, value in balancing.current().items()} == factors


def test_torchjd_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(InputError, match=r"pip install 'torchjd\[quadprog-projector\]'"):
        build_balancing(BalancingSpec("torchjd"), WEIGHTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "torchjd", "aggregator": "best"}, "balancing.aggregator must be one of"),
        ({"aggregator": "mgda"}, "not used by name='fixed'"),
        ({"name": "best"}, "balancing.name must be one of"),
        ({"name": "dynamic_average", "temperature": 0.0}, "balancing.temperature must be a positive"),
        ({"temperature": 3.0}, "not used by name='fixed'"),
    ],
)
def test_options_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        BalancingSpec(**arguments)


def test_the_summary_of_gradients():
    """By hand: norms 3, 4 and 0, weights 2 and 0.5; cosines 0 and -1."""
    summary = GradientSummary()
    for rows in ([[3.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [-4.0, 0.0]]):
        norms, cosines = gradient_statistics(("a", "b"), torch.tensor(rows))
        summary.add({"a": 2.0, "b": torch.tensor(0.5)}, norms, cosines)
    assert summary.steps == 2
    expected = {"weight": 2.0, "gradient_share": 6 / (6 + 2), "cosine": -0.5, "negative_cosines": 0.5}
    assert summary.means()["a"] == pytest.approx(expected)
    assert summary.means()["b"] == pytest.approx(expected | {"weight": 0.5, "gradient_share": 2 / (6 + 2)})


def test_the_summary_of_steps_with_one_loss_each():
    summary = GradientSummary()
    for name, row in (("a", [1.0, 0.0]), ("b", [0.0, 3.0]), ("a", [3.0, 0.0])):
        summary.add(WEIGHTS, *gradient_statistics([name], torch.tensor([row])))
    found = summary.means()
    assert found["a"] == {"weight": 2.0, "gradient_share": 4 / (4 + 1.5), "cosine": None, "negative_cosines": None}
    assert found["b"]["gradient_share"] == 1.5 / (4 + 1.5)
