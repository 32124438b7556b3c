import json

import numpy as np
import pytest

pytest.importorskip("torchvision.datasets")

from benchmarks.measure import Side, Timing
from benchmarks.segmentation_loading import OURS, PILLOW, TENSORS, Problem, judge, loaders, main, table

SMALL = Problem(images=4, height=40, width=80, crop=32, batch_size=2)


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


def test_the_faster_peer_is_the_bound():
    sides = sides_of((1.0, 1.0, 1.0), (3.0, 3.0, 3.0), (2.0, 2.0, 2.0))
    target = judge(1, sides)
    assert (target.value, target.verdict) == (0.5, "met")
    assert judge(1, sides_of((2.5,) * 3, (3.0,) * 3, (2.0,) * 3)).verdict == "not met"
    assert judge(1, sides | {TENSORS: Side(error="no")}).value == pytest.approx(1 / 3)
    assert judge(1, {OURS: sides[OURS], PILLOW: Side(error="no"), TENSORS: Side(error="no")}).verdict == "not measured"
    header, cells = table({1: sides | {TENSORS: Side(error="no")}}, images=6)
    assert header[:3] == ["workers", "side", "images/s"]
    assert [row[2] for row in cells] == ["6.0", "2.0", "no"]


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.segmentation_loading.WORKERS", (0,))
    main(["--repetitions", "1", "--threads", "1", "--output", str(tmp_path)], SMALL)
    assert "images/s" in capsys.readouterr().out
    run = json.loads((tmp_path / "segmentation_loading.json").read_text())
    assert set(run["results"]["0"]) == {OURS, PILLOW, TENSORS}
    assert all(side["error"] is None for side in run["results"]["0"].values())
    assert run["problem"]["images"] == 4
    assert OURS in (tmp_path / "segmentation_loading.md").read_text()
