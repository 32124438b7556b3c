import dataclasses
import json

import pytest
import torch

from benchmarks.case import Run, cost_in_process
from benchmarks.report import tabulate
from benchmarks.results import Comparison, Memory, Result, Side, Timing
from benchmarks.runner import main
from benchmarks.segmentation import ATTENTIONS, BENCHMARK, Problem, inference_steps, training_steps
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec

SMALL = Problem(ResNetSpec("bottleneck14", width=8), SegmenterSpec(head_channels=16), height=33, width=41, heads=2)
SMALL_CASES = [dataclasses.replace(case, problem=SMALL) for case in BENCHMARK.cases]
TRAINING, INFERENCE = SMALL_CASES


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
    step = training_steps(SMALL, ["0011"])["0011"]
    before = {name: value.clone() for name, value in trained[0].state_dict().items()}
    step()
    changed = {name for name, value in trained[0].state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in trained[0].named_parameters()} <= changed
    (labels,) = inference_steps(SMALL, ["1111"])["1111"]()
    assert labels.shape == (33, 41)


def test_memory_of_an_inference(here):
    cost = cost_in_process(INFERENCE, "1111", Run(threads=1, isolate=here))
    assert cost.error is None
    assert len(cost.timing.seconds) == 1, "it takes minutes"
    assert cost.memory.peak > 50e6


def test_tables_and_verdicts_come_from_the_numbers():
    sides = {
        "none": Side(Timing((2.0,)), Memory(int(1e9), int(3e9))),
        "1111": Side(Timing((5.0,)), Memory(int(1e9), int(25e9))),
        "0010": Side(error="ended by signal 9"),
    }
    result = Result(TRAINING.name, TRAINING.title, comparisons=[Comparison(sides=sides)])
    TRAINING.set_targets(result)
    table = tabulate(TRAINING, result)
    assert table.header == ["side", "s", "quartiles", "time / none", "GB in all", "MB added"]
    assert table.cells == [
        ["none", "2.00", "2.00-2.00", "1.000", "3.00", "2000"],
        ["1111", "5.00", "5.00-5.00", "2.500", "25.00", "24000"],
        ["0010", "ended by signal 9", "", "", "", ""],
    ]
    (bound,) = result.comparisons[0].targets
    assert (bound.value, bound.verdict) == (25.0, "not met")


def test_a_run_leaves_its_files(tmp_path, capsys, here):
    arguments = ["--sides", "none,0010", "--repetitions", "1", "--threads", "1", "--output", str(tmp_path)]
    main(dataclasses.replace(BENCHMARK, cases=tuple(SMALL_CASES)), arguments, isolate=here)
    assert "time / none" in capsys.readouterr().out
    training, inference = json.loads((tmp_path / "segmentation.json").read_text())["results"]
    [training], [inference] = training["comparisons"], inference["comparisons"]
    assert set(training["sides"]) == {"none", "0010"}
    assert len(training["sides"]["none"]["timing"]["seconds"]) == 2
    assert list(inference["sides"]) == ["1111"]
    assert "bottleneck14, one image of 33x41" in (tmp_path / "segmentation.md").read_text()


def test_bad_sides_are_named(capsys):
    with pytest.raises(SystemExit):
        main(BENCHMARK, ["--sides", "2222"])
    assert "--sides 2222: there are none,0010" in capsys.readouterr().err
