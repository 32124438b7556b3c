import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("torchvision.datasets")

from benchmarks.report import tabulate
from benchmarks.results import Comparison, Result, Side, Timing
from benchmarks.runner import main
from benchmarks.segmentation_loading import BENCHMARK, OURS, PILLOW, TENSORS, Problem, judge, loaders

SMALL = Problem(images=4, height=40, width=80, crop=32, batch_size=2, workers=(0,))


def test_sides_do_the_same(tmp_path):
    """Crops of their size with labels, not the same ones, since their random numbers differ."""
    problem = Problem(images=4, height=40, width=80, crop=32, smallest=1.0, largest=1.0, batch_size=2)
    assert problem.write(tmp_path) > 1000
    made = loaders(tmp_path, problem, 0)
    ours = [(np.stack(batch.images), np.stack(batch.labels)) for batch in made.pop(OURS)]
    for batches in (ours, *([(images.numpy(), labels.numpy()) for images, labels in one] for one in made.values())):
        assert [(images.shape, labels.shape) for images, labels in batches] == [((2, 3, 32, 32), (2, 32, 32))] * 2
        assert all(images.dtype == labels.dtype == np.uint8 for images, labels in batches)
        labels = np.concatenate([labels.ravel() for _, labels in batches])
        assert 5 < len(np.unique(labels)) <= 20
        assert set(labels.tolist()) <= {*range(19), 255}


def sides_of(ours, pillow, tensors):
    return {
        name: Side(timing=Timing(seconds)) for name, seconds in ((OURS, ours), (PILLOW, pillow), (TENSORS, tensors))
    }


def judged(sides):
    result = Result("", "", problem={"images": 6}, comparisons=[Comparison("1 workers", sides)])
    judge(result)
    [target] = result.comparisons[0].targets
    return result, target


def test_the_faster_peer_is_the_bound():
    sides = sides_of((1.0, 1.0, 1.0), (3.0, 3.0, 3.0), (2.0, 2.0, 2.0))
    _, target = judged(sides)
    assert (target.value, target.verdict) == (0.5, "met")
    assert judged(sides_of((2.5,) * 3, (3.0,) * 3, (2.0,) * 3))[1].verdict == "not met"
    assert judged(sides_of((2.5, 2.0, 2.5), (3.0,) * 3, (2.0, 2.4, 2.4)))[1].verdict == "met within noise"
    result, target = judged(sides | {TENSORS: Side(error="no")})
    assert target.value == pytest.approx(1 / 3)
    no_peer = {OURS: sides[OURS], PILLOW: Side(error="no"), TENSORS: Side(error="no")}
    assert judged(no_peer)[1].verdict == "not measured"
    table = tabulate(BENCHMARK.cases[0], result)
    assert table.header == ["side", "ms", "quartiles", "images/s", f"time / {OURS}"]
    assert [row[3] for row in table.cells] == ["6.0", "2.0", ""]
    both = dataclasses.replace(result, comparisons=result.comparisons * 2)
    assert tabulate(BENCHMARK.cases[0], both).cells[0][:2] == ["1 workers", OURS]


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    [case] = BENCHMARK.cases
    benchmark = dataclasses.replace(BENCHMARK, cases=(dataclasses.replace(case, problem=SMALL),))
    main(benchmark, ["--repetitions", "2", "--threads", "1", "--output", str(tmp_path)])
    assert "images/s" in capsys.readouterr().out
    [result] = json.loads((tmp_path / "segmentation_loading.json").read_text())["results"]
    [comparison] = result["comparisons"]
    assert comparison["name"] == "0 workers"
    assert set(comparison["sides"]) == {OURS, PILLOW, TENSORS}
    assert all(side["error"] is None for side in comparison["sides"].values())
    assert result["problem"]["images"] == 4
    assert OURS in (tmp_path / "segmentation_loading.md").read_text()
