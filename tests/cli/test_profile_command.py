"""The subcommand `profile`: runs on every miniature configuration, without data, and writes JSON and CSV that agree."""

import csv
import json
import re
from pathlib import Path

import pytest

from lightning_attn.cli import main

REPOSITORY = Path(__file__).parents[2]
MINIATURE = sorted((REPOSITORY / "configs" / "miniature").glob("*.yaml"))
FASTER_RCNN = REPOSITORY / "configs" / "detection" / "faster_rcnn_r50_fpn_coco.yaml"
TRANSLATION = REPOSITORY / "configs" / "miniature" / "translation.yaml"


@pytest.fixture
def profile(tmp_path, monkeypatch, capsys):
    """Runs the subcommand in an empty folder without a cache, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments, status=None):
        arguments = ["profile", *map(str, arguments)]
        if status is None:
            main(arguments)
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == status
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("configuration", MINIATURE, ids=lambda path: path.stem)
def test_miniature_configurations_without_their_data(profile, configuration, tmp_path):
    options = ["-c", configuration, "--batch_size", 1, "--repetitions", 2, "--output", "all.json"]
    printed = profile(*options, "--device", "cpu")
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    for expected in ("Totals", "m-adds", "paper's", "peak memory", "per second", "Not counted", "(itself)"):
        assert expected in printed
    assert not (tmp_path / "cache").exists(), "nothing is drawn"
    found = json.loads(Path("all.json").read_text())
    assert found["parts"][0]["multiply_adds"] == found["forward"]["multiply_adds"] > 1e6
    assert found["training_step"]["multiply_adds"] > 2 * found["forward"]["multiply_adds"]
    assert found["forward"]["latency"]["runs"] == 2
    assert found["parts"][0]["shares"]["multiply_adds"] == 1
    assert found["training_step"]["peak_memory"] is None or found["training_step"]["peak_memory"] > 1e6
    assert {"versions", "device", "date", "commit", "command", "legend", "configuration"} <= set(found)
    assert "--batch_size 1" in found["command"]
    assert not list(tmp_path.glob("checkpoints")), "it is no run"


def test_json_and_csv_agree_and_nothing_is_overwritten(profile):
    options = ["-c", TRANSLATION, "--device", "meta", "--batch_size", 1]
    Path("all.json").write_text("mine")
    printed = profile(*options, "--output", "all.json", "--model.self_attention.terms", "0010")
    assert "Written to all-2.json" in printed
    assert Path("all.json").read_text() == "mine"
    profile("--model.self_attention.terms", "0010", *options, "--output", "parts.csv")
    parts = json.loads(Path("all-2.json").read_text())["parts"]
    with Path("parts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [part["name"] for part in parts]
    for row, part in zip(rows, parts, strict=True):
        for name in ("parameters", "multiply_adds", "paper_multiply_adds", "own_multiply_adds", "depth"):
            assert int(row[name]) == part[name]
        assert row["seconds"] == ""
        assert part["seconds"] is None
        for name in ("parameters", "multiply_adds", "paper_multiply_adds"):
            assert float(row[f"{name}_share"]) == part["shares"][name]
    assert not any(row["name"].endswith("query_proj") for row in rows), "an attention is one part"


def test_a_full_size_detector_on_the_meta_device(profile):
    printed = profile("-c", FASTER_RCNN, "--device", "meta", "--batch_size", 1, "--output", "all.json", "--depth", 1)
    assert "COCO's 80 categories, as data/coco holds no annotations" in re.sub(r"\s+", " ", printed)
    assert "time, median" not in printed
    found = json.loads(Path("all.json").read_text())
    assert found["forward"]["paper_multiply_adds"] / 1e9 == pytest.approx(281.4, rel=0.01)
    assert found["forward"]["latency"] is None
    assert "1 x 800x1333 pixels" in printed
    layer = next(part for part in found["parts"] if part["name"] == "backbone.body.layer3.0.attention.attention")
    assert layer["kind"] == "TransformerAttention"
    assert "layer3" not in printed  # deeper than --depth


def test_size_and_overlay(profile):
    overlay = REPOSITORY / "configs" / "attention" / "self_none.yaml"
    with_attention = profile("-c", TRANSLATION, "--device", "meta", "--size", 7, 9, "--batch_size", 3)
    without = profile("-c", TRANSLATION, "-c", overlay, "--device", "meta", "--size", 7, 9, "--batch_size", 3)
    assert "3 pairs of 7 and 9 tokens" in with_attention
    assert "self_attention" in with_attention
    assert "self_attention" not in without


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model: none is given. Give a configuration: -c configs/miniature/detection.yaml"),
        (["-c", TRANSLATION, "--device", "gpu"], "device: 'gpu' is none of auto, cpu, cuda, meta"),
        (["-c", TRANSLATION, "--repetitions", 0], "repetitions: 0 is too small; give 1 or more"),
        (["-c", TRANSLATION, "--batch_size", -1], "batch_size: -1 is too small"),
        (["-c", TRANSLATION, "--depth", -1], "depth: -1 is too small; give 0 or more"),
        (["-c", TRANSLATION, "--size", 5], "expected 2 arguments"),
        (["-c", TRANSLATION, "--size", 0, 5], "size: 0 5 must both be at least 1"),
        (["-c", TRANSLATION, "--output", "table.xls"], "output: table.xls must end in .json"),
        (["-c", TRANSLATION, "--repetition", 5], "repetition"),
        (["-c", TRANSLATION, "--model.dimm", 5], "dimm"),
        (["-c", "nothing.yaml"], "config: nothing.yaml is not there"),
        (
            ["-c", FASTER_RCNN, "--data.train_split", "train", "--device", "meta"],
            "num_classes: the number of categories is not known, as data/coco holds no annotations. Give it "
            "(--num_classes 80), or the folder of the data (--data.root FOLDER)",
        ),
        (
            ["-c", FASTER_RCNN.with_name("bccd.yaml"), "--device", "meta"],
            "num_classes: the number of categories is not known",
        ),
        (
            ["-c", FASTER_RCNN, "--data.min_size", 0, "--data.max_size", 0, "--device", "meta"],
            "size: COCODataModule neither resizes nor crops its images, so that they have no one size. Give height and "
            "width in pixels (--size 800 1333)",
        ),
    ],
    ids=str,
)
def test_mistakes(profile, arguments, message):
    printed = profile(*arguments, status=2)
    assert message in printed
    assert printed.startswith("error: ")
    assert "Traceback" not in printed


def test_a_gpu_that_is_not_there(profile, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device: torch sees no GPU on this machine. Give --device cpu" in profile(
        "-c", TRANSLATION, "--device", "cuda", status=2
    )
