import itertools
import math

import pytest
import torch
from torch import nn

from lightning_attn.attention import DeformableConv
from lightning_attn.tasks import OptimizerSpec, ScheduleSpec


def rates(spec: ScheduleSpec, peak: float, steps: int, total: float = math.inf) -> list[float]:
    optimizer = OptimizerSpec(learning_rate=peak).build([torch.nn.Parameter(torch.zeros(1))])
    scheduler = spec.build(optimizer, total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_paper_schedule():
    """1e-7 -> 0.001 over 4,000 steps, then 0.001 x (iter / 4000) ** -0.5 (paper, section 3)."""
    seen = rates(ScheduleSpec("inverse_sqrt", warmup_steps=4000, warmup_start=1e-4), 1e-3, 16001)
    assert seen[0] == pytest.approx(1e-7)
    assert seen[2000] == pytest.approx((1e-7 + 1e-3) / 2)
    assert seen[4000] == pytest.approx(1e-3)
    assert seen[16000] == pytest.approx(0.5e-3)


def test_cosine_ends_at_zero():
    seen = rates(ScheduleSpec("cosine", warmup_steps=10, warmup_start=0.0), 2.0, 111, total=110)
    assert seen[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert seen[60] == pytest.approx(1.0)
    assert seen[110] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(seen[10:]))


def test_paper_detection_schedule():
    """0.02, a tenth of it from epoch 8 and a hundredth from epoch 11 of 12 (the paper), after a warm-up."""
    per_epoch = 30
    seen = rates(ScheduleSpec("multistep", warmup_steps=10, warmup_start=0.1), 0.02, 12 * per_epoch, 12 * per_epoch)
    assert seen[:11] == pytest.approx([0.002 + 0.0018 * step for step in range(11)])
    assert seen[10 : 8 * per_epoch] == pytest.approx([0.02] * (8 * per_epoch - 10))
    assert seen[8 * per_epoch : 11 * per_epoch] == pytest.approx([0.002] * 3 * per_epoch)
    assert seen[11 * per_epoch :] == pytest.approx([0.0002] * per_epoch)
    # As torch has it, with milestones in steps.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8 * per_epoch, 11 * per_epoch])
    for step in range(12 * per_epoch):
        if step >= 10:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(seen[step])
        optimizer.step()
        scheduler.step()


def test_milestones_are_shares_of_any_run():
    spec = ScheduleSpec("multistep", warmup_steps=0, milestones=(0.25, 0.5, 0.75), gamma=0.5)
    for total in (4, 400):
        assert [spec.factor(quarter * total // 4, total) for quarter in range(5)] == [1, 0.5, 0.25, 0.125, 0.125]
        assert spec.factor(total // 4 - 1, total) == 1
    assert ScheduleSpec("multistep", warmup_steps=0, milestones=()).factor(9, 10) == 1


def test_paper_segmentation_schedule():
    """0.005 x (1 - iter / max) ** 0.9 (the paper), which is also torch's."""
    seen = rates(ScheduleSpec("poly", warmup_steps=0), 0.005, 61, total=60)
    assert seen == pytest.approx([0.005 * (1 - step / 60) ** 0.9 for step in range(61)])
    assert seen[60] == 0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.005)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=60, power=0.9)
    for rate in seen:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        scheduler.step()


def test_poly_starts_after_the_warm_up():
    seen = rates(ScheduleSpec("poly", warmup_steps=4, warmup_start=0.0, power=2), 1.0, 15, total=14)
    assert seen[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert seen[4:] == pytest.approx([(1 - step / 10) ** 2 for step in range(11)])


@pytest.mark.parametrize("name", ["cosine", "multistep", "poly"])
def test_courses_that_need_an_end(name):
    with pytest.raises(ValueError, match=rf"'{name}' needs .*: set trainer\.max_steps or trainer\.max_epochs"):
        rates(ScheduleSpec(name, warmup_steps=0), 1.0, 1)
    assert ScheduleSpec(name, warmup_steps=0).factor(20, 10) == pytest.approx(0.01 if name == "multistep" else 0)


def test_learning_rate_scales_with_the_global_batch():
    """The paper's 0.02 is for 8 GPUs x 2 images; offsets keep their tenth."""
    spec = OptimizerSpec("sgd", learning_rate=0.02, momentum=0.8, base_batch_size=16)
    small = spec.scaled(2)
    assert small == OptimizerSpec("sgd", learning_rate=0.0025, momentum=0.8, base_batch_size=2)
    assert small.scaled(2) == small
    assert small.scaled(16) == spec
    _, offsets = small.parameter_groups(with_offsets())
    assert offsets["lr"] == pytest.approx(0.00025)
    assert spec.scaling_note(2) == "Learning rate 0.0025 for a global batch of 2: 0.02 for 16, scaled in proportion."
    as_it_is = OptimizerSpec(learning_rate=0.3)
    assert as_it_is.scaled(7) is as_it_is
    assert as_it_is.scaling_note(7) == (
        "Learning rate 0.3 as configured, for a global batch of 7 (optimizer.base_batch_size is 0: no scaling)."
    )


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_are_torchs(name, fused):
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    own = {"momentum": 0.5} if name == "sgd" else {"betas": (0.8, 0.9), "eps": 1e-3}
    spec = OptimizerSpec(name, learning_rate=0.1, weight_decay=0.1, **own)
    ours = spec.build([weights[0]], fused=fused)
    adam = {"betas": (0.8, 0.9), "eps": 1e-3}
    kind, options = {
        "adam": (torch.optim.Adam, adam),
        "adamw": (torch.optim.AdamW, adam),
        "sgd": (torch.optim.SGD, {"momentum": 0.5}),
    }[name]
    theirs = kind([weights[1]], lr=0.1, weight_decay=0.1, **options)
    for _ in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = weight.detach() ** 2
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def with_offsets() -> nn.Sequential:
    """Two deformable convolutions at different depths; the first layer is frozen."""
    network = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(DeformableConv(4, 4, ndim=1)), DeformableConv(4, 4, ndim=1, modulated=True)
    )
    network[0].requires_grad_(False)
    return network


def test_offsets_are_a_group_of_their_own():
    network = with_offsets()
    rest, offsets = OptimizerSpec(learning_rate=0.5, offset_lr_factor=0.02).parameter_groups(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (rest["name"], offsets["name"]) == ("network", "offsets")
    assert [names[id(p)] for p in rest["params"]] == ["1.0.weight", "1.0.bias", "2.weight", "2.bias"]
    assert [names[id(p)] for p in offsets["params"]] == [
        *("1.0.offset.weight", "1.0.offset.bias", "2.offset.weight", "2.offset.bias")
    ]
    assert offsets["lr"] == pytest.approx(0.01)


def test_without_offsets_there_is_one_group():
    network = nn.Linear(3, 3)
    (group,) = OptimizerSpec().parameter_groups(network)
    assert group == {"params": list(network.parameters())}
    network = with_offsets()
    for convolution in (network[1][0], network[2]):
        convolution.offset.requires_grad_(False)  # frozen offsets need no group
    (group,) = OptimizerSpec().parameter_groups(network)
    assert len(group["params"]) == 4


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_offsets_keep_their_factor_all_along_the_schedule_and_all_other_settings(name):
    spec = OptimizerSpec(name, learning_rate=0.5, weight_decay=0.3)
    optimizer = spec.build(spec.parameter_groups(with_offsets()), fused=True)
    schedule = ScheduleSpec("cosine", warmup_steps=3, warmup_start=0.1)
    scheduler = schedule.build(optimizer, 10)
    for step in range(11):
        rest, offsets = optimizer.param_groups
        assert rest["lr"] == pytest.approx(0.5 * schedule.factor(step, 10))
        assert offsets["lr"] == pytest.approx(0.05 * schedule.factor(step, 10))
        optimizer.step()
        scheduler.step()
    same = [
        {key: group[key] for key in group.keys() - {"params", "name", "lr", "initial_lr"}} for group in (rest, offsets)
    ]
    assert same[0] == same[1]
    assert same[0]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerSpec("adem"), "optimizer name must be one of"),
        (lambda: OptimizerSpec(learning_rate=math.nan), "learning_rate must be a positive finite number, got nan"),
        (
            lambda: OptimizerSpec(offset_lr_factor=0.0),
            r"offset_lr_factor must be .*got 0\.0; the paper's value is 0\.1",
        ),
        (
            lambda: OptimizerSpec(offset_lr_factor=math.inf),
            "offset_lr_factor must be a positive finite number, got inf",
        ),
        (lambda: OptimizerSpec(base_batch_size=-1), "base_batch_size must be at least 0, got -1: the global batch"),
        (lambda: OptimizerSpec().scaled(0), "global_batch_size must be at least 1, got 0"),
        (lambda: ScheduleSpec("step"), "schedule name must be one of .*'multistep', 'poly'"),
        (
            lambda: ScheduleSpec(milestones=(8, 11)),
            r"milestones must .* got \[8, 11\]: they are shares of the run, not",
        ),
        (lambda: ScheduleSpec(milestones=(0.9, 0.7)), "milestones must rise"),
        (lambda: ScheduleSpec(milestones=(0.0, 0.7)), "milestones must rise and lie between 0 and 1"),
        (lambda: ScheduleSpec(milestones=(math.nan,)), "milestones must rise"),
        (lambda: ScheduleSpec(gamma=0.0), "gamma must be a factor above 0 and at most 1, got 0.0"),
        (lambda: ScheduleSpec(power=math.inf), "power must be a positive finite number, got inf"),
        (lambda: OptimizerSpec("sgd", betas=(0.8, 0.9)), r"betas=\(0.8, 0.9\): not used by name='sgd'. Leave out"),
        (lambda: OptimizerSpec(momentum=0.5), "momentum=0.5: not used by name='adam'.*or choose name: sgd"),
        (lambda: ScheduleSpec(power=2.0), "power=2.0: not used by name='inverse_sqrt'.*or choose name: poly"),
        (lambda: ScheduleSpec("poly", gamma=0.5), "gamma=0.5: not used by name='poly'"),
        (lambda: ScheduleSpec(warmup_steps=0), "at least 1 for inverse_sqrt, got 0"),
        (lambda: ScheduleSpec(warmup_start=2), "warmup_start must be a factor between 0 and 1"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
