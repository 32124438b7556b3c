"""Linear layers by oneDNN against torch's own."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lightning_attn.attention.cpu import linear as linear_module
from lightning_attn.attention.cpu.linear import HAS_ONEDNN, Linear, PackedLinear, linear

one_dnn = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN: linear is F.linear")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (0, 8), (2, 0, 3, 8), (3, 64, 8), (71, 8), (3, 437, 8)])
def test_values_and_gradients_are_those_of_torch(shape, bias):
    ours, theirs = Linear(8, 6, bias=bias), nn.Linear(8, 6, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        y = module(x)
        (y * torch.randn_like(y)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    close(ours(torch.ones(4, 8)), theirs(torch.ones(4, 8)))


@pytest.mark.parametrize("rows", [5, 71])
def test_inputs_that_are_not_contiguous(rows):
    weight, bias = torch.randn(8, 6).t().requires_grad_(), torch.randn(6)
    x = torch.randn(8, 2 * rows).t()[::2].requires_grad_()
    y = linear(x, weight, bias)
    close(y, F.linear(x, weight, bias))
    gradient = torch.tensor(2.0).expand_as(y)
    ours, theirs = (torch.autograd.grad(f(x, weight), (x, weight), gradient) for f in (linear, F.linear))
    for actual, expected in zip(ours, theirs, strict=True):
        close(actual, expected)


def test_only_what_needs_a_gradient_gets_one():
    x, weight = torch.randn(3, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    close(weight.grad, x.sum(dim=0).expand(6, 8))
    y = linear(x.requires_grad_(), weight.detach())
    y.sum().backward()
    close(x.grad, weight.sum(dim=0).expand(3, 8))
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


def test_second_derivatives():
    x, weight = torch.randn(66, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)

    def penalty(function):
        (gradient,) = torch.autograd.grad(function(x, weight).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), (x, weight))

    for actual, expected in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_transforms_and_other_types_take_torchs_own():
    module, x = Linear(8, 6), torch.randn(3, 4, 8)
    expected = F.linear(x, module.weight, module.bias)
    close(torch.func.vmap(module)(x), expected)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))).tangent, F.linear(x, module.weight))
    close(torch.compile(module, fullgraph=True, backend="eager")(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert module.double()(x.double()).dtype == torch.float64
    assert Linear(8, 6, device="meta")(torch.empty(3, 8, device="meta")).shape == (3, 6)
    with torch.backends.mkldnn.flags(enabled=False):
        close(linear(x, module.weight.float(), module.bias.float()), expected)


@one_dnn
def test_torchs_counter_sees_the_same_products():
    x = torch.randn(71, 8, requires_grad=True)  # oneDNN multiplies 64 of the rows
    counts = []
    for module in (Linear(8, 6), nn.Linear(8, 6)):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 71 * 8 * 6] * 2


@one_dnn
def test_few_numbers_of_rows_are_given_to_one_dnn(monkeypatch):
    given = []
    operator = torch.ops.mkldnn._linear_pointwise

    def watched(x, weight, *others):
        given.append((len(x.flatten(0, -2)), tuple(weight.shape)))
        return operator(x, weight, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    module = Linear(2, 3)
    for rows in range(2, 2049, 3):
        x = torch.randn(1, rows, 2, requires_grad=True)
        module(x).sum().backward()
        with torch.no_grad():
            module(x)
    # From 64 to 1,024, then eight to the next power of two; forward, and backward with the weight transposed.
    assert set(given) == {
        (rows, shape) for rows in [*range(64, 1024, 64), *range(1024, 2049, 128)] for shape in ((3, 2), (2, 3))
    }
    given.clear()
    packed = PackedLinear(module.weight, module.bias)
    for rows in range(1, 257):
        packed(torch.randn(rows, 2))
        assert rows <= given[-1][0] < max(rows + 4, rows * 9 / 8)
    assert len(set(given)) == 16 + 8 + 8


def test_not_a_number_stays_one():
    module = Linear(8, 6)
    x = torch.zeros(66, 8)
    x[1, 3] = torch.nan
    for layer in (module, PackedLinear(module.weight, module.bias)):
        y = layer(x)
        assert y[1].isnan().all()
        assert y.isfinite().sum() == 65 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed(dtype, bias):
    module = nn.Linear(8, 6, bias=bias, dtype=dtype)
    packed = PackedLinear(module.weight, module.bias)
    assert packed.packed == (HAS_ONEDNN and dtype == torch.float32)
    for shape in ((1, 8), (200, 8), (2, 3, 8), (0, 8), (5, 41, 8)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = packed(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, module(x).detach())


@one_dnn
@pytest.mark.parametrize("absent", ["_linear_pointwise", "_reorder_linear_weight"])
def test_a_torch_without_one_of_the_operators_takes_its_own(monkeypatch, absent):
    operators = {"_linear_pointwise", "_reorder_linear_weight"}
    there = {name: getattr(torch.ops.mkldnn, name) for name in operators - {absent}}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**there))
    source = importlib.util.spec_from_file_location("linear_without_an_operator", linear_module.__file__)
    without = importlib.util.module_from_spec(source)
    source.loader.exec_module(without)  # a second copy: other tests keep the first
    x, module = torch.randn(5, 8), without.Linear(8, 6)
    packed = without.PackedLinear(module.weight, module.bias)
    assert not packed.packed
    for y in (module(x), packed(x)):
        assert torch.equal(y, F.linear(x, module.weight, module.bias))


def test_packed_under_autocast():
    module = nn.Linear(8, 6)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        packed, expected = PackedLinear(module.weight, module.bias), module(x)
        torch.testing.assert_close(packed(x), expected)
    torch.testing.assert_close(packed(x), expected)


def test_a_copied_module_is_its_own():
    module = Linear(8, 6)
    other = copy.deepcopy(module)
    nn.init.zeros_(other.weight)
    assert not torch.equal(module(torch.ones(1, 8)), other(torch.ones(1, 8)))
