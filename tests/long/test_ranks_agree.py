"""The same scores from 1, 2 and 3 processes, over data that they cannot share evenly."""

import csv
import re

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(6000)]


def scores(printed, prefix):
    """Of the table that Lightning prints at the end."""
    found = re.findall(rf"│\s+({prefix}/[^│]+?)\s+│\s+(\S+)\s+│", printed)
    assert found, printed
    return {name: float(value) for name, value in found}


def last_validation(run):
    """What `metrics.csv` has of it."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if k.startswith("val/") and v} for row in csv.DictReader(file)]
    return [row for row in rows if row][-1]


@pytest.mark.parametrize("config", ["tiny_config", "detection_config", "segmentation_config"])
def test_scores(request, run_process, in_folder, config):
    path = request.getfixturevalue(config)
    whole = ["--trainer.limit_val_batches", 1.0]
    long = ["--trainer.max_steps", 24, "--trainer.val_check_interval", 12]

    def on(ranks):
        return ["--trainer.devices", ranks, *(["--trainer.strategy", "ddp"] if ranks > 1 else [])]

    runs = {}
    for ranks in (1, 2, 3):
        run_process("fit", "-c", path, *on(ranks), *whole, *long, "--run.name", f"on-{ranks}")
        (runs[ranks],) = in_folder.glob(f"checkpoints/*/on-{ranks}")
        of_fit = last_validation(runs[ranks])
        checkpoint = ["--ckpt_path", runs[ranks] / "last.ckpt"]
        expected = scores(run_process("validate", *checkpoint, *on(1), *whole).stdout, "val")
        assert of_fit == pytest.approx(expected, rel=1e-5, nan_ok=True), f"the last validation of fit on {ranks}"
    checkpoint = ["--ckpt_path", runs[3] / "last.ckpt"]
    for stage, prefix in (("validate", "val"), ("test", "test")):
        found = {
            ranks: scores(run_process(stage, *checkpoint, *on(ranks), *whole).stdout, prefix) for ranks in (1, 2, 3)
        }
        assert found[2] == pytest.approx(found[1], rel=1e-5, nan_ok=True)
        assert found[3] == pytest.approx(found[1], rel=1e-5, nan_ok=True)
        assert any(value > 0 for value in found[1].values()), "something that could differ"
        print(f"\n{config}, {stage}: {len(found[1])} scores equal on 1, 2 and 3 ranks: {found[1]}")
