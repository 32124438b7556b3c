import json

import pytest
import torch
from lightning_attn.networks.images.segmentation import SegmenterSpec

from benchmarks.measure import Memory, Side, Timing
from benchmarks.segmentation import (
    ATTENTIONS,
    Problem,
    _together,
    answer,
    inference_step,
    main,
    measure,
    table,
    targets,
    training_step,
)
from lightning_attn.networks.images.backbone import ResNetSpec

SMALL = Problem(ResNetSpec("bottleneck14", width=8), SegmenterSpec(head_channels=16), height=33, width=41, heads=2)
PROBLEMS = {"training": SMALL, "inference": SMALL}


@pytest.mark.parametrize("side", ATTENTIONS)
def test_sides_are_the_attentions_that_they_are_called(side):
    network = SMALL.network(side)
    names = [name for name, _ in network.named_parameters()]
    assert any(name.startswith("head.attention") for name in names) == (not side.startswith("none"))
    assert any(".offset." in name for name in names) == side.endswith("deformable")
    assert any("query_proj" in name for name in names) == side.startswith("1111")
    gates = [parameter for name, parameter in network.named_parameters() if name.endswith("gamma")]
    assert all(float(gate.detach()) == pytest.approx(0.1) for gate in gates)
    assert len(gates) == (0 if side == "none" else 3)


def test_a_training_step_trains_and_an_inference_labels(monkeypatch):
    trained = []
    monkeypatch.setattr(
        Problem,
        "network",
        lambda problem, side, build=Problem.network: trained.append(build(problem, side)) or trained[-1],
    )
    step = training_step(SMALL, "0011")
    before = {name: value.clone() for name, value in trained[0].state_dict().items()}
    step()
    changed = {name for name, value in trained[0].state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in trained[0].named_parameters()} <= changed
    (labels,) = inference_step(SMALL, "1111")()
    assert labels.shape == (33, 41)


def test_a_fresh_process_answers():
    sides = measure("inference", SMALL, ["1111"], rounds=1, threads=1, report=lambda text: None)
    assert sides["1111"].error is None
    assert sides["1111"].memory.peak > 50e6
    bad = Problem(SMALL.backbone, SMALL.segmenter, height=0, width=41)
    assert "neither H nor W zero" in measure("inference", bad, ["1111"], 1, 1, lambda text: None)["1111"].error


def test_rounds_are_put_together():
    first = _together(Side(), Side(Timing((9.0, 2.0, 3.0)), Memory(10, 50)))
    both = _together(first, Side(Timing((8.0, 4.0)), Memory(10, 40)))
    assert both.timing.seconds == (2.0, 3.0, 4.0), "the first step of a process is not counted"
    assert both.memory.peak == 50
    once = _together(Side(), Side(Timing((9.0,)), Memory(1, 2)))
    assert once.timing.seconds == (9.0,), "unless it is the only one"


def test_tables_and_verdicts_come_from_the_numbers():
    sides = {
        "none": Side(Timing((2.0,)), Memory(int(1e9), int(3e9))),
        "1111": Side(Timing((5.0,)), Memory(int(1e9), int(25e9))),
        "0010": Side(error="ended by signal 9"),
    }
    assert table(sides)[1] == [
        ["none", "2.0", "3.00", "2.00", "1.00"],
        ["1111", "5.0", "25.00", "24.00", "2.50"],
        ["0010", "ended by signal 9", "", "", ""],
    ]
    (bound,) = targets("training", sides)
    assert (bound.value, bound.verdict) == (25.0, "not met")


def test_a_run_leaves_its_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        "benchmarks.segmentation.run_child", lambda module, arguments, **options: answer(json.loads(arguments[1]))
    )
    main(["--sides", "none,0010", "--rounds", "1", "--output", str(tmp_path)], PROBLEMS)
    assert "time / none" in capsys.readouterr().out
    run = json.loads((tmp_path / "segmentation.json").read_text())
    assert set(run["parts"]["training"]) == {"none", "0010"}
    assert len(run["parts"]["training"]["none"]["timing"]["seconds"]) == 2
    assert list(run["parts"]["inference"]) == ["1111"]
    assert "bottleneck14, one image of 33x41" in (tmp_path / "segmentation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--sides", "2222"], "--sides 2222: there are none,0010"), (["--parts", "x"], "--parts x: there are training")],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments, PROBLEMS)
    assert message in capsys.readouterr().err
