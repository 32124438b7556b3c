"""The detection benchmark runs in a small form, compares like with like, and reports what it measured."""

import dataclasses
import json

import pytest
import torch
from detection_problems import FROZEN, SMALL
from torch import nn

from benchmarks.case import Run
from benchmarks.detection import (
    BENCHMARK,
    DEFORMABLE_ALONE,
    REGULAR_ALONE,
    attention_steps,
    convolutions_alone,
    detectors,
    memory_steps,
)
from benchmarks.detection_problem import ATTENTIONS, build_backbone
from benchmarks.report import tabulate
from benchmarks.results import Comparison, Memory, Result, Side, Timing
from benchmarks.runner import main
from lightning_attn.attention import DeformableConv

PROBLEMS = {"detection.overhead": SMALL, "detection.attention": FROZEN, "detection.memory": FROZEN}
CASES = {
    case.name: dataclasses.replace(case, problem=PROBLEMS.get(case.name, case.problem)) for case in BENCHMARK.cases
}


def side(*seconds, peak=None):
    return Side(timing=Timing(seconds) if seconds else None, memory=None if peak is None else Memory(10**9, peak))


def test_boxes_of_a_problem_lie_in_its_images():
    batch = dataclasses.replace(SMALL, images=3, boxes=20).batch()
    assert len(batch) == len(batch.images) == len(batch.targets) == 3
    for image, target in zip(batch.images, batch.targets, strict=True):
        assert image.shape == (3, 48, 64)
        assert image.dtype == torch.uint8
        boxes = target["boxes"]
        assert (boxes[:, 2:] - boxes[:, :2] > 4).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([64, 48, 64, 48])).all()
        assert set(target["labels"].tolist()) == {1, 2, 3}


# attention


def test_all_sides_compute_the_same_losses_at_the_start():
    losses = {name: step() for name, step in attention_steps(FROZEN, list(ATTENTIONS)).items() if name in ATTENTIONS}
    assert set(losses) == {"none", "0010", "1111 stride 2", "1111", "0010 deformable", "none deformable"}
    assert all(value > 0 for value in losses["none"].values())
    for name, found in losses.items():
        assert found == pytest.approx(losses["none"], rel=1e-4), name
        assert CASES["detection.attention"].difference(losses["none"], found) < 1e-4


def test_sides_are_the_attentions_that_they_are_called():
    def count(side, name):
        modules = detectors(FROZEN, [side])[side].modules()
        return sum(type(module).__name__ == name for module in modules)

    # conv4 and conv5 have a block each
    assert [count(name, "TransformerAttention") for name in ATTENTIONS] == [0, 2, 2, 2, 2, 0]
    assert [count(name, "DeformableConv") for name in ATTENTIONS] == [0, 0, 0, 0, 2, 2]
    strides = {FROZEN.attention(name).kv_stride for name in ("1111", "1111 stride 2")}
    assert strides == {1, 2}


def test_attention_is_timed_with_its_convolutions():
    case = dataclasses.replace(CASES["detection.attention"], sides=("0010 deformable", "0010"), repetitions=2)
    [part] = case.measure(case, Run())
    result = Result(case.name, case.title, comparisons=[part])
    case.set_targets(result)
    assert list(part.sides) == ["none", "0010 deformable", "0010", DEFORMABLE_ALONE, REGULAR_ALONE]
    assert all(len(one.timing.seconds) == 2 for one in part.sides.values())
    assert part.difference < 1e-4
    assert set(part.figures["results"]) == {"none", "0010 deformable", "0010"}
    [target] = part.targets
    assert target.name == "0010 / none"
    assert target.value == part.sides["0010"].timing.median / part.sides["none"].timing.median
    share = part.sides[DEFORMABLE_ALONE].timing.median / part.sides["0010 deformable"].timing.median
    [note] = case.notes(result)
    assert f"0010 deformable: its deformable convolutions are {100 * share:.0f} % of it" in note


def test_convolutions_alone_reach_every_parameter():
    networks = detectors(FROZEN, ["none", "none deformable"])
    deformable, regular = networks["none deformable"], networks["none"]
    for run in convolutions_alone(deformable, regular, FROZEN.batch()).values():
        run()
    for network, kind in ((deformable, DeformableConv), (regular, nn.Conv2d)):
        body = network.get_submodule("backbone.body")
        alone = [body.layer3[0].conv2, body.layer4[0].conv2]
        assert all(isinstance(module, kind) for module in alone)
        used = {id(parameter) for module in alone for parameter in module.parameters()}
        assert {id(parameter) for parameter in network.parameters() if parameter.grad is not None} == used


# memory


@pytest.mark.parametrize("name", ["backbone", "detector"])
def test_memory_of_a_process(name, here):
    case = dataclasses.replace(CASES["detection.memory"], sides=(name,))
    [part] = case.measure(case, Run(isolate=here))
    one = part.sides[name]
    assert one.memory.peak >= one.memory.before > 100_000_000
    assert len(one.timing.seconds) >= 1


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process():
    case = dataclasses.replace(CASES["detection.memory"], sides=("detector",))
    [part] = case.measure(case, Run(threads=1))
    one = part.sides["detector"]
    assert one.memory is not None, one.error
    assert one.memory.peak >= one.memory.before > 100_000_000


@pytest.mark.parametrize("name", ["backbone", "detector"])
def test_memory_is_that_of_a_training_step(name, monkeypatch):
    networks = []
    sgd = torch.optim.SGD
    monkeypatch.setattr(
        torch.optim, "SGD", lambda p, **options: networks.append(list(p)) or sgd(networks[-1], **options)
    )
    step = memory_steps(FROZEN, [name])[name]
    before = [parameter.detach().clone() for parameter in networks[0]]
    step()
    changed = [not torch.equal(a, b) for a, b in zip(before, networks[0], strict=True)]
    assert sum(changed) > 0.7 * len(changed), "attention waits for its factor, which starts at zero"


def test_damping_is_on_the_last_normalisation_of_a_block():
    backbone = build_backbone(FROZEN, FROZEN.attention("none"))
    assert backbone.layer1[0].bn3.weight.unique().tolist() == pytest.approx([0.2])
    assert backbone.layer1[0].bn2.weight.unique().tolist() == [1.0]


# all together


def judged(name, sides):
    result = Result(name, "", comparisons=[Comparison(sides=sides)])
    CASES[name].set_targets(result)
    return result, [(target.name, target.value, target.verdict) for target in result.comparisons[0].targets]


def test_ratios_and_verdicts_come_from_the_numbers():
    sides = {"none": side(2.0), "0010": side(2.1), "1111 stride 2": side(3.2), "1111": side(9.0)}
    _, targets = judged("detection.attention", sides)
    assert targets == [("0010 / none", 1.05, "met"), ("1111 stride 2 / none", 1.6, "not met")]
    result, targets = judged("detection.attention", sides | {"0010": Side(error="RuntimeError: no")})
    assert targets[0] == ("0010 / none", None, "not measured")
    table = tabulate(CASES["detection.attention"], result)
    assert table.header == ["side", "s", "quartiles", "time / none"]
    assert table.cells == [
        ["none", "2.00", "2.00-2.00", "1.000"],
        ["0010", "RuntimeError: no", "", ""],
        ["1111 stride 2", "3.20", "3.20-3.20", "1.600"],
        ["1111", "9.00", "9.00-9.00", "4.500"],
    ]
    sides = {"backbone": side(2.0, peak=25 * 10**9), "detector": Side(error="ended by signal 9")}
    result, targets = judged("detection.memory", sides)
    assert targets == [("backbone, GB", 25.0, "not met"), ("detector, GB", None, "not measured")]
    assert tabulate(CASES["detection.memory"], result).cells == [
        ["backbone", "2.00", "2.00-2.00", "25.00", "24000"],
        ["detector", "ended by signal 9", "", "", ""],
    ]
    _, targets = judged("detection.memory", {"backbone": side(2.0, peak=9 * 10**9)})
    assert targets == [("backbone, GB", 9.0, "met")]


def test_a_run_leaves_its_files(tmp_path, capsys):
    arguments = ["--sides", "0010", "--no-memory", "--repetitions", "2", "--threads", "1"]
    main(dataclasses.replace(BENCHMARK, cases=tuple(CASES.values())), [*arguments, "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"detection.json", "detection.md"}
    figures = json.loads((tmp_path / "detection.json").read_text(encoding="utf-8"))
    assert [part["case"] for part in figures["results"]] == ["detection.overhead", "detection.attention"]
    assert figures["results"][1]["problem"]["backbone"]["norm"] == "frozen"
    text = (tmp_path / "detection.md").read_text(encoding="utf-8")
    for heading in ("## detection.overhead", "## detection.attention", "Trainer / bare loop"):
        assert heading in text
    assert "bottleneck14 of width 8; batch of 1, images of 48x64; times of each side: 2" in text
    printed = capsys.readouterr().out
    assert "Trainer / bare loop" in printed
    assert "0010 / none" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "overheads"], "detection has no case overheads: there are overhead,attention,memory,torchvision"),
        (["--sides", "1110"], "--sides 1110: there are Trainer,none,0010,1111 stride 2"),
        (["--cases", "torchvision"], "detection.torchvision needs --config FILE"),
        (["--minutes", "0"], "0 is not a number above 0"),
        (["--cases", "torchvision", "--config", "nothing.yaml"], "--config: "),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(BENCHMARK, arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
