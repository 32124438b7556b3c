import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_data import CATEGORIES, COUNTS, annotation_path, change_coco, truth_from_detections, write_coco
from data_layouts import write_yolo
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_attn.attention import AttentionSpec
from lightning_attn.cli import main
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.tasks import CheckpointError, DetectionTask, OptimizerSpec, ScheduleSpec


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, detection_config) -> Path:
    """A run directory."""
    root = tmp_path_factory.mktemp("runs")
    arguments = ["fit", "-c", detection_config, "--run.root", root, "--trainer.max_steps", 60]
    arguments += ["--trainer.val_check_interval", 60, "--trainer.accumulate_grad_batches", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        main([str(argument) for argument in arguments])
    return root / "detection" / "tiny"


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """A copy of the run directory for one test."""
    return shutil.copytree(trained_once, tmp_path / "tiny")


def peer(truth: Path, detections: Path) -> list[float]:
    """The twelve numbers of pycocotools on the written file."""
    ground_truth = COCO(truth)
    scorer = COCOeval(ground_truth, ground_truth.loadRes(str(detections)), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return scorer.stats.tolist()


def test_training_scales_the_rate_and_moves_what_it_trains(trained_once):
    for name in ("best.ckpt", "last.ckpt", "metrics.csv", "config_fit.yaml"):
        assert (trained_once / name).is_file(), name
    with (trained_once / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    parts = [
        [float(v) for name, v in row.items() if name.startswith("train/loss_")] for row in rows if row["train/loss"]
    ]
    assert [sum(part) for part in parts] == pytest.approx(losses, rel=1e-5)
    (optimizer,) = torch.load(trained_once / "last.ckpt", weights_only=True)["optimizer_states"]
    momenta = [state["momentum_buffer"] for state in optimizer["state"].values()]
    trainable = [p for p in DetectionTask.load(trained_once / "last.ckpt").parameters() if p.requires_grad]
    assert len(momenta) == len(trainable) == sum(len(group["params"]) for group in optimizer["param_groups"])
    assert sum(bool(momentum.any()) for momentum in momenta) > len(momenta) / 2
    rates = [float(row["lr-SGD/network"]) for row in rows if row["lr-SGD/network"]]
    # 2 images, 1 rank, 2 batches accumulated: half of the 8 that the rate is meant for, and half of it at the start.
    assert rates[0] == pytest.approx(0.05 * 4 / 8 / 2)
    assert rates[-1] == pytest.approx(0.0025)


def test_validation_shows_pictures_in_tensorboard(trained_once):
    events = EventAccumulator(str(trained_once), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    assert len(tags) == 2, "as many as num_pictures says, and none of Lightning's check before training"
    for tag in tags:
        assert tag.startswith("val/")
        (shown,) = events.Images(tag)
        assert shown.step == 36, "12 epochs of 5 batches, two of them a step"
        assert shown.width > shown.height, "found and true boxes beside each other"


def test_validate_test_predict(run, coco, trained, tmp_path):
    stored = ["-c", trained / "config_fit.yaml", "--ckpt_path", trained / "last.ckpt"]
    run("predict", *stored)
    written = json.loads((trained / "predictions" / "detections.json").read_text())
    coco = truth_from_detections(coco, "test2017", written, tmp_path / "truth")
    stored += ["--data.root", coco]
    printed = run("validate", *stored)
    assert printed.count("val/ap50 ") == printed.count("val/ar100 ") == 1, "scores are printed once"
    assert "Validate metric" not in printed
    printed = run("test", *stored)
    assert "Scores of 5 images" in printed
    assert printed.count("ap50") == 1, "scores are printed once"
    assert "Test metric" not in printed
    results = json.loads((trained / "test_metrics.json").read_text())
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    names += ("ar_small", "ar_medium", "ar_large")
    expected = peer(annotation_path(coco, "test2017"), trained / "predictions" / "test_detections.json")
    ours = [-1.0 if results[f"test/{name}"] is None else results[f"test/{name}"] for name in names]
    assert ours == pytest.approx(expected, abs=1e-6)
    assert max(expected) > 0, "a comparison of zeros would say nothing"
    assert results["test/num_images"] == 5
    assert len(list((trained / "predictions" / "test_pictures").glob("*.png"))) == 2
    resampled = json.loads((trained / "predictions" / "test_bootstrap.json").read_text())
    assert resampled["num_samples"] == 5
    assert min(resampled["scores"]["test/ap"]) <= results["test/ap"] <= max(resampled["scores"]["test/ap"])
    weights = json.loads((trained / "predictions" / "test_attention.json").read_text())["maps"][0]
    assert Image.open(trained / "predictions" / weights["image"]).size[0] > 0
    whole = np.array(weights["weights"]["whole"], dtype=float)  # not a number: keys in the padding
    shown = np.nansum(whole) / whole.size
    assert shown + weights["padding"] == pytest.approx(1.0, abs=1e-3), "relative to uniform weights"

    assert written == json.loads((trained / "predictions" / "test_detections.json").read_text())


def test_a_folder_of_images(run, coco, trained, tmp_path):
    """Without annotations beside them; of sizes and modes that the training data has not."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (200, 30)).save(folder / "grey.png")
    Image.fromarray(np.full((50, 70, 3), 200, np.uint8)).save(folder / "colour.jpg")
    stored = ["-c", trained / "config_fit.yaml", "--ckpt_path", trained / "last.ckpt"]
    run("predict", *stored, "--data.predict_folder", folder, "--data.root", tmp_path / "nothing")
    images = json.loads((trained / "predictions" / "images.json").read_text())
    assert sorted(image["file_name"] for image in images) == ["colour.jpg", "grey.png"]
    found = json.loads((trained / "predictions" / "detections.json").read_text())
    assert {one["category_id"] for one in found} <= set(CATEGORIES)
    grey = next(image["id"] for image in images if image["file_name"] == "grey.png")
    boxes = np.array([one["bbox"] for one in found if one["image_id"] == grey])
    assert (boxes[:, 0] + boxes[:, 2]).max() > 80, "boxes are in pixels of the file, not of the resized image"
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 200 + 1e-3
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 30 + 1e-3


def test_the_number_of_workers_changes_nothing(run, detection_config):
    states = []
    for workers in (0, 2):
        quick = ["--run.name", f"w{workers}", "--trainer.limit_val_batches", 0, "--trainer.logger", "false"]
        printed = run("fit", "-c", detection_config, "--data.num_workers", workers, *quick)
        assert "Learning rate 0.0125 for a global batch of 2: 0.05 for 8" in printed
        path = Path(f"checkpoints/detection/w{workers}/last.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_other_categories_are_refused(run, coco, detection_config, trained, tmp_path):
    other = write_coco(tmp_path / "other")
    for split in COUNTS:
        change_coco(other, split, lambda content: content["categories"][0].update(name="toaster"))
    printed = run(
        "validate",
        "-c",
        trained / "config_fit.yaml",
        "--ckpt_path",
        trained / "last.ckpt",
        "--data.root",
        other,
        status=2,
    )
    assert "The checkpoint was trained for 3 categories: " in printed
    assert "toothbrush (90)" in printed
    assert "toaster (90)" in printed


def test_the_same_categories_under_other_ids(run, coco, trained, tmp_path):
    """YOLO's ids are 0, 1, 2, ..., which the network knows nothing of: names and their order decide."""
    stored = ["-c", trained / "config_fit.yaml", "--ckpt_path", trained / "last.ckpt"]
    run("predict", *stored)
    expected = (trained / "predictions" / "detections.csv").read_text()
    yolo = write_yolo(coco, tmp_path / "yolo", {"train2017": "train", "test2017": "test"})
    data = [
        "--data",
        "YOLODetectionDataModule",
        "--data.root",
        yolo,
        "--data.val_split",
        "",
        "--data.test_split",
        "test",
    ]
    printed = run("predict", *stored, *data)
    assert "Ids of categories are the data's: 3 categories" in printed
    assert "(0), " in printed
    assert (trained / "predictions" / "detections.csv").read_text() == expected
    assert expected.count("\n") > 10


def test_a_checkpoint_alone_is_enough(trained):
    task = DetectionTask.load(trained / "last.ckpt")
    assert task.known_classes.ids == tuple(sorted(CATEGORIES)) or set(task.known_classes.ids) == set(CATEGORIES)
    stored = torch.load(trained / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, stored["state_dict"][name]) for name, value in task.state_dict().items())
    with torch.inference_mode():
        (found,) = task.built_network([torch.zeros(3, 40, 40, dtype=torch.uint8)])
    assert set(found) == {"boxes", "labels", "scores"}
    stored.pop("categories")
    torch.save(stored, trained / "without.ckpt")
    with pytest.raises(CheckpointError, match="has no categories"):
        DetectionTask.load(trained / "without.ckpt")


def test_predict_says_what_the_command_writes(run, coco, trained):
    """Boxes of files that are resized, in their own pixels, whatever the form of the image and the batch."""
    task = DetectionTask.load(trained / "last.ckpt")
    paths = sorted((coco / "test2017").iterdir())
    found = task.predict(paths)
    # Attention sees the padding that a smaller image has beside a larger one.
    run("predict", "--ckpt_path", trained / "last.ckpt", "--data.eval_batch_size", 1)
    names = {image["file_name"]: image["id"] for image in json.loads((trained / "predictions/images.json").read_text())}
    records = json.loads((trained / "predictions" / "detections.json").read_text())
    assert sum(map(len, found)) == len(records) > 20
    for path, objects in zip(paths, found, strict=True):
        written = [record for record in records if record["image_id"] == names[path.name]]
        for one, record in zip(objects, written, strict=True):
            assert one["category"] == task.known_classes.names[task.known_classes.ids.index(record["category_id"])]
            assert one["score"] == pytest.approx(record["score"], abs=1e-5)
            x1, y1, x2, y2 = one["box"]
            assert [x1, y1, x2 - x1, y2 - y1] == pytest.approx(record["bbox"], abs=1e-2)
    with Image.open(paths[0]) as image:
        image.load()
    assert task.predict([image]) == task.predict([np.array(image.convert("RGB"))]) == task.predict([str(paths[0])])
    task.train()
    task.predict(paths[:2], batch_size=2)
    assert task.training, "the mode is the caller's"


def test_damaged_pictures_lose_nothing_but_themselves(run, trained, photos):
    """The pictures drawn of the others are as many as there are, whatever their names."""
    arguments = ["--data.predict_folder", photos, "--model.num_pictures", 9]
    printed = run("predict", "--ckpt_path", trained / "last.ckpt", *arguments, status=2)
    assert "3 images could not be used and were skipped" in printed
    bad = ("cut.png", "more/cut.png", "text.jpg")
    good = ("a.png", "frame.0001.png", "frame.0002.png", "more/frame.0001.png")
    folder = trained / "predictions"
    with (folder / "bad_images.csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert tuple(row["file_name"] for row in listed) == bad
    for row in listed:
        assert row["file_name"] in row["reason"]
        assert "image id" not in row["reason"], "the user never gave one"
    names = {image["id"]: image["file_name"] for image in json.loads((folder / "images.json").read_text())}
    assert sorted(names.values()) == sorted(good)
    records = json.loads((folder / "detections.json").read_text())
    assert {names[record["image_id"]] for record in records} == set(good)
    with (folder / "detections.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        x, y, width, height = record["bbox"]
        assert row["file_name"] == names[record["image_id"]]
        assert row["category"] == CATEGORIES[record["category_id"]]
        corners = [float(row[key]) for key in ("x1", "y1", "x2", "y2")]
        assert corners == pytest.approx([x, y, x + width, y + height], abs=0.006)
    assert not (folder / "detections_so_far").exists()
    drawn = sorted(path.name for path in (folder / "predict_pictures").iterdir())
    assert drawn == ["a.png", "frame.0001.png", "frame.0002.png", "more_frame.0001.png"]


def test_a_damaged_picture_whose_name_is_not_utf_8(run, trained, photos):
    for name in (b"caf\xe9.png", b"caf\xe9 2.png"):
        source = photos / ("cut.png" if b"2" in name else "a.png")
        Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).write_bytes(source.read_bytes())
    run("predict", "--ckpt_path", trained / "last.ckpt", "--data.predict_folder", photos, status=2)
    folder = trained / "predictions"
    with (folder / "bad_images.csv").open(encoding="utf-8") as file:
        assert "caf\ufffd 2.png" in [row["file_name"] for row in csv.DictReader(file)]
    assert "caf\ufffd.png" in {image["file_name"] for image in json.loads((folder / "images.json").read_text())}


def test_all_that_was_skipped_in_training_is_listed_in_the_end(run, detection_config, tmp_path):
    root = write_coco(tmp_path / "own")
    victims = [sorted((root / split).iterdir())[1] for split in ("train2017", "val2017")]
    for path in victims:
        path.write_bytes(path.read_bytes()[:150])  # the header is whole
    printed = run("fit", "-c", detection_config, "--data.root", root, "--data.on_bad_image", "skip")
    end = printed[printed.rindex("images could not be used") - 3 :]
    assert "2 images could not be used and were skipped" in end
    assert all(path.name in end for path in victims)
    assert printed.count("Skipped: ") == len(victims), "each once, not in each epoch"


def test_predictions_are_written_as_they_come(run, trained, coco, monkeypatch):
    """A prediction that is broken off has what it found until then."""
    step, calls = DetectionTask.predict_step, []

    def broken_off(task, batch, batch_idx):
        if calls:
            raise KeyboardInterrupt
        calls.append(batch)
        step(task, batch, batch_idx)

    monkeypatch.setattr(DetectionTask, "predict_step", broken_off)
    run("predict", "--ckpt_path", trained / "last.ckpt", "--data.predict_folder", coco / "test2017", status=130)
    (part,) = (trained / "predictions" / "detections_so_far").iterdir()
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert [line["file_name"] for line in lines] == calls[0].names


def test_what_is_wrong_is_written_after_a_test(run, coco, trained, tmp_path):
    run("test", "--ckpt_path", trained / "last.ckpt")
    records = json.loads((trained / "predictions" / "test_detections.json").read_text())
    root = truth_from_detections(coco, "test2017", records, tmp_path / "found")
    arguments = ["--data.root", root, "--run.name", "errors", "--run.root", tmp_path, "--model.picture_score", 0.0]
    run("test", "--ckpt_path", trained / "last.ckpt", *arguments)
    folder = tmp_path / "detection" / "errors" / "predictions" / "test_errors"
    truth = json.loads(annotation_path(root, "test2017").read_text())
    with (folder / "confusion.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["object"] for row in rows] == [*(CATEGORIES[number] for number in sorted(CATEGORIES)), "no object"]
    objects = sum(int(value) for row in rows[:-1] for name, value in row.items() if name != "object")
    assert objects == len(truth["annotations"])
    with (folder / "images.csv").open(encoding="utf-8") as file:
        images = list(csv.DictReader(file))
    assert {row["file_name"] for row in images} == {image["file_name"] for image in truth["images"]}
    errors = [sum(int(row[key]) for key in ("wrong category", "not detected", "no object")) for row in images]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0
    worst = sorted(path.name for path in (folder / "worst_images").iterdir())
    assert worst[0] == f"001_{Path(images[0]['file_name']).stem}.png"
    for name in ("confusion.png", "precision_recall.png"):
        with Image.open(folder / name) as figure:
            assert min(figure.size) > 300


def test_mirror_images_scales_and_tiles_by_option(run, trained, coco, tmp_path):
    found = {}
    for name, options in {
        "once": (),
        "flip": ("--model.inference.flip", "true"),
        "tiles": ("--model.inference.mode", "sliding", "--model.inference.tile", 32),
    }.items():
        where = ["--run.name", name, "--run.root", tmp_path]
        run(
            "predict",
            "--ckpt_path",
            trained / "last.ckpt",
            "--data.predict_folder",
            coco / "test2017",
            *options,
            *where,
        )
        found[name] = json.loads((tmp_path / "detection" / name / "predictions" / "detections.json").read_text())
    assert found["flip"] != found["once"] != found["tiles"]
    assert all(len(records) > 0 for records in found.values())


def test_validation_without_a_box_is_told_and_keeps_the_latest(run, coco, detection_config, tmp_path, caplog):
    root = shutil.copytree(coco, tmp_path / "data")
    change_coco(root, "val2017", lambda content: content["annotations"].clear())
    arguments = ["--data.root", root, "--run.root", tmp_path / "runs", "--trainer.max_steps", 4]
    run("fit", "-c", detection_config, *arguments, "--trainer.val_check_interval", 2)
    folder = tmp_path / "runs" / "detection" / "tiny"
    steps = [torch.load(folder / name, weights_only=True)["global_step"] for name in ("best.ckpt", "last.ckpt")]
    assert steps == [4, 4]
    assert "val/ap is not a number: the validation data has nothing to score" in caplog.text


def test_training_without_validation(run, detection_config, tmp_path):
    arguments = ["--data.val_split", "", "--run.root", tmp_path / "runs", "--trainer.max_steps", 2]
    run("fit", "-c", detection_config, *arguments, "--trainer.val_check_interval", 2)
    folder = tmp_path / "runs" / "detection" / "tiny"
    assert (folder / "last.ckpt").is_file()
    assert not (folder / "best.ckpt").exists()


def test_what_is_done_about_orientations_is_part_of_a_checkpoint(run, coco, detection_config, tmp_path):
    arguments = ["--data.exif", "ignore", "--run.root", tmp_path, "--trainer.max_steps", 1]
    run("fit", "-c", detection_config, *arguments, "--trainer.limit_val_batches", 0)
    task = DetectionTask.load(tmp_path / "detection" / "tiny" / "last.ckpt")
    assert task.exif == "ignore"
    data = Image.Exif()
    data[0x0112] = 3
    photo = tmp_path / "photo.png"
    with Image.open(sorted((coco / "test2017").iterdir())[0]) as image:
        image.save(photo, exif=data)
        plain = image.convert("RGB")
    assert task.predict([photo]) == task.predict([plain])
    task.preprocessing["exif"] = "apply"
    assert task.predict([photo]) == task.predict([plain.transpose(Image.Transpose.ROTATE_180)])


def test_predict_refuses_what_is_no_image(trained, tmp_path):
    task = DetectionTask.load(trained / "last.ckpt")
    assert task.predict([]) == []
    with pytest.raises(TypeError, match=r"give a list, \[image\] for one"):
        task.predict("picture.png")
    with pytest.raises(
        TypeError, match=r"An image must be a Pillow image, a path, or uint8 .* got float64 \[4, 4, 3\]"
    ):
        task.predict([np.zeros((4, 4, 3))])
    with pytest.raises(TypeError, match="got NoneType"):
        task.predict([None])
    with pytest.raises(FileNotFoundError, match=r"nothing\.png does not exist"):
        task.predict([tmp_path / "nothing.png"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        task.predict([], batch_size=0)
    with pytest.raises(RuntimeError, match="not built yet: start a Trainer"):
        DetectionTask().predict([])


def test_offsets_are_a_group_of_their_own_with_a_tenth_of_the_rate():
    task = DetectionTask(
        attention=AttentionSpec(terms="0010", convolution="deformable"),
        backbone=ResNetSpec(name="bottleneck14", width=16),
        detector=DetectorSpec(fpn_channels=16, fc_dim=16),
        optimizer=OptimizerSpec(name="sgd", learning_rate=0.02),
        schedule=ScheduleSpec("constant", warmup_steps=0),
    )
    with pytest.raises(RuntimeError, match="not built yet: start a Trainer"):
        task.built_network  # noqa: B018
    task.build_from_checkpoint({"categories": {"names": ["a", "b"], "ids": [3, 9]}})
    groups = {group["name"]: group for group in task.optimizer.parameter_groups(task)}
    assert groups["offsets"]["lr"] == pytest.approx(0.002)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    assert {names[id(parameter)].rsplit(".", 2)[-2] for parameter in groups["offsets"]["params"]} == {"offset"}
    assert len(groups["offsets"]["params"]) == 4  # weight and bias of conv4's and conv5's only block


def test_sizes_are_checked_before_the_data_is_read():
    with pytest.raises(ValueError, match="cannot be divided among num_heads=7"):
        DetectionTask(attention=AttentionSpec(num_heads=7))
    with pytest.raises(ValueError, match="picture_score must be between 0 and 1, got 2"):
        DetectionTask(picture_score=2)


def test_scaling_by_the_batch_needs_a_batch(run, tiny_config):
    printed = run("fit", "-c", tiny_config, "--model.optimizer.base_batch_size", 16, status=2)
    assert "token batches have none" in printed


def test_synchronised_statistics_need_gpus(run, detection_config):
    printed = run("fit", "-c", detection_config, "--model.backbone.norm", "sync", status=2)
    assert "this run has none. Use batch or group" in printed
