import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapes_data import label_path, name_of, truth_from_predictions
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.segmentation.classes import CITYSCAPES_CLASSES
from lightning_attn.attention import AttentionSpec
from lightning_attn.cli import main
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.tasks import SegmentationTask


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, segmentation_config) -> Path:
    """A run directory."""
    root = tmp_path_factory.mktemp("runs")
    arguments = ["fit", "-c", segmentation_config, "--run.root", root, "--trainer.max_steps", 60]
    arguments += ["--trainer.val_check_interval", 60]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        main([str(argument) for argument in arguments])
    return root / "segmentation" / "tiny"


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """A copy of the run directory for one test."""
    return shutil.copytree(trained_once, tmp_path / "tiny")


def stored(trained: Path) -> list[object]:
    return ["-c", trained / "config_fit.yaml", "--ckpt_path", trained / "last.ckpt"]


def ids_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


def test_training_moves_what_it_trains_and_follows_its_schedule(trained_once):
    for name in ("best.ckpt", "last.ckpt", "metrics.csv", "config_fit.yaml"):
        assert (trained_once / name).is_file(), name
    with (trained_once / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in trained]
    parts = [float(row["train/loss_head"]) + float(row["train/loss_auxiliary"]) for row in trained]
    assert parts == pytest.approx(losses, rel=1e-5)
    (optimizer,) = torch.load(trained_once / "last.ckpt", weights_only=True)["optimizer_states"]
    states = optimizer["state"].values()
    assert len(states) == sum(p.requires_grad for p in SegmentationTask.load(trained_once / "last.ckpt").parameters())
    assert {int(state["step"]) for state in states} == {60}
    assert sum(bool(state["exp_avg"].any()) for state in states) > len(states) / 2
    rates = [float(row["lr-AdamW/network"]) for row in rows if row["lr-AdamW/network"]]
    peak = 0.02 * 2 / 8  # for 8 images, trained with 2
    assert rates[0] == pytest.approx(peak / 2)
    assert rates[31] == pytest.approx(peak * (1 - 30 / 59) ** 0.9)
    (validated,) = [row for row in rows if row["val/miou"]]
    scores = [float(value) for name, value in validated.items() if name.startswith("val/iou/") and value]
    assert 5 <= len(scores) < 19, "classes that do not occur are left out"
    assert float(validated["val/miou"]) == pytest.approx(sum(scores) / len(scores), rel=1e-5)


def test_validation_shows_pictures_in_tensorboard(trained_once):
    events = EventAccumulator(str(trained_once), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    assert len(tags) == 2
    assert all(event.step == 60 for tag in tags for event in events.Images(tag))


def test_scores_are_those_of_the_written_files(run, cityscapes, trained, tmp_path):
    """Counted pixel by pixel from the files that `predict` wrote and those of the truth."""
    run("predict", *stored(trained))
    folder = trained / "predictions" / "labels"
    cityscapes = truth_from_predictions(cityscapes, folder, tmp_path / "truth")
    run("validate", *stored(trained), "--data.root", cityscapes)
    printed = run("test", *stored(trained), "--data.root", cityscapes)
    results = json.loads((trained / "test_metrics.json").read_text())
    assert len(list(folder.iterdir())) == 5
    pairs = [
        (
            ids_of(folder / f"{name_of('test', number)}_pred_labelIds.png"),
            ids_of(label_path(cityscapes, "test", number)),
        )
        for number in range(5)
    ]
    known = [one.id for one in CITYSCAPES_CLASSES]
    assert all(np.isin(found, known).all() for found, _ in pairs)
    scores = {}
    for one in CITYSCAPES_CLASSES:
        common = sum(((found == one.id) & (truth == one.id)).sum() for found, truth in pairs)
        either = sum((((found == one.id) & np.isin(truth, known)) | (truth == one.id)).sum() for found, truth in pairs)
        scores[one.name] = float(common / either) if either else None
    assert results["test/iou_per_class"] == {
        name: score if score is None else pytest.approx(score, abs=1e-12) for name, score in scores.items()
    }
    there = [score for score in scores.values() if score is not None]
    assert results["test/miou"] == pytest.approx(sum(there) / len(there), abs=1e-6)
    assert max(there) > 0, "a comparison of zeros would say nothing"
    assert len(list((trained / "predictions" / "test_pictures").glob("*.png"))) == 2
    resampled = json.loads((trained / "predictions" / "test_bootstrap.json").read_text())
    assert resampled["num_samples"] == 5
    assert min(resampled["scores"]["test/miou"]) <= results["test/miou"] <= max(resampled["scores"]["test/miou"])
    weights = json.loads((trained / "predictions" / "test_attention.json").read_text())["maps"][0]
    assert Image.open(trained / "predictions" / weights["image"]).size[0] > 0
    whole = np.array(weights["weights"]["whole"], dtype=float)  # not a number: keys in the padding
    shown = np.nansum(whole) / whole.size
    assert shown + weights["padding"] == pytest.approx(1.0, abs=1e-3), "relative to uniform weights"
    assert len(list((trained / "predictions" / "predict_pictures").glob("*.png"))) == 2
    assert "Scores of 5 images" in printed
    assert printed.count("pixel_accuracy") == 1, "scores are printed once"

    run("predict", *stored(trained), "--data.test_split", "val")
    assert len(list((trained / "predictions" / "labels-2").iterdir())) == 3, "nothing is overwritten"


def test_a_folder_of_images(run, trained, tmp_path):
    """Without data beside it; of sizes and modes that the training data has not; in folders."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    Image.new("L", (90, 30)).save(folder / "grey.png")
    Image.fromarray(np.full((50, 31, 3), 200, np.uint8)).save(folder / "deep" / "colour.jpg")
    run("predict", *stored(trained), "--data.predict_folder", folder, "--data.root", tmp_path / "nothing")
    written = {path.name: ids_of(path).shape for path in (trained / "predictions" / "labels").iterdir()}
    assert written == {"grey_pred_labelIds.png": (30, 90), "colour_pred_labelIds.png": (50, 31)}


def test_damaged_pictures_lose_nothing_but_themselves(run, trained, photos):
    arguments = ["--data.predict_folder", photos, "--data.eval_batch_size", 2, "--data.root", photos]
    printed = run("predict", *stored(trained), *arguments, status=2)
    assert "3 images could not be used and were skipped" in printed
    folder = trained / "predictions"
    with (folder / "bad_images.csv").open(encoding="utf-8") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["cut.png", "more/cut.png", "text.jpg"]
    written = sorted(path.name for path in (folder / "labels").iterdir())
    names = ("a", "frame.0001", "frame.0002", "more_frame.0001")
    assert written == [f"{name}_pred_labelIds.png" for name in names]
    for name, photo in zip(written, ("a.png", "frame.0001.png", "frame.0002.png", "more/frame.0001.png"), strict=True):
        with Image.open(photos / photo) as image:
            assert ids_of(folder / "labels" / name).shape == image.size[::-1]


def test_ways_of_inference_can_be_chosen_for_a_checkpoint(run, trained):
    run("test", *stored(trained))
    chosen = ["--model.inference.mode", "sliding", "--model.inference.tile", 33, "--model.inference.flip", "true"]
    printed = run("test", *stored(trained), *chosen, "--model.inference.scales", "[0.75, 1.0]")
    assert "model.inference.tile: 769 in the checkpoint, 33 now" in printed
    whole, tiled = (json.loads((trained / name).read_text()) for name in ("test_metrics.json", "test_metrics-2.json"))
    assert sum(map(sum, tiled["test/confusion"])) == sum(map(sum, whole["test/confusion"]))
    assert tiled["test/confusion"] != whole["test/confusion"]


def test_the_number_of_workers_changes_nothing(run, segmentation_config):
    states = []
    for workers in (0, 2):
        quick = ["--run.name", f"w{workers}", "--trainer.limit_val_batches", 0, "--trainer.logger", "false"]
        run("fit", "-c", segmentation_config, "--data.num_workers", workers, *quick)
        path = Path(f"checkpoints/segmentation/w{workers}/last.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_other_classes_are_refused(run, trained):
    printed = run("validate", *stored(trained), "--data.classes", "[road, car]", status=2)
    assert "The checkpoint was trained for 19 classes: road (7), sidewalk (8)" in printed
    assert "but the data has 2 classes: road (7), car (26)" in printed


def test_a_checkpoint_alone_is_enough(trained):
    task = SegmentationTask.load(trained / "last.ckpt")
    assert task.known_classes.names[0] == "road"
    assert task.known_classes.colours[0] == (128, 64, 128)
    with torch.inference_mode():
        (logits,) = task.built_network([torch.zeros(3, 40, 56, dtype=torch.uint8)])
    assert logits.shape == (19, 40, 56)


def test_predict_says_what_the_command_writes(run, cityscapes, trained):
    task = SegmentationTask.load(trained / "last.ckpt")
    paths = sorted((cityscapes / "leftImg8bit" / "test").glob("*/*.png"))
    found = task.predict(paths)
    run("predict", "--ckpt_path", trained / "last.ckpt")
    for path, labels in zip(paths, found, strict=True):
        (written,) = (trained / "predictions" / "labels").glob(f"{path.name.removesuffix('_leftImg8bit.png')}_*")
        ids = np.array(task.known_classes.ids)[labels]
        assert np.array_equal(ids, ids_of(written))
    assert len(np.unique(found[0])) > 1, "a single class everywhere would say nothing"
    with Image.open(paths[0]) as image:
        assert np.array_equal(task.predict([image])[0], found[0])


def test_sizes_are_checked_before_the_data_is_read():
    with pytest.raises(ValueError, match="head_channels=100 does not fit the attention"):
        SegmentationTask(attention=AttentionSpec(num_heads=8), segmenter=SegmenterSpec(head_channels=100))
    with pytest.raises(ValueError, match="num_pictures must be at least 0, got -1"):
        SegmentationTask(num_pictures=-1)


@pytest.mark.parametrize("part", ["backbone", "segmenter"])
def test_synchronised_statistics_need_gpus(run, segmentation_config, part):
    printed = run("fit", "-c", segmentation_config, f"--model.{part}.norm", "sync", status=2)
    assert f"{part}.norm='sync' synchronises statistics of GPUs, but this run has none" in printed
    assert f"Use batch or group (--model.{part}.norm batch)." in printed
