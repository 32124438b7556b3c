"""Detection and segmentation with one backbone in one run, compared with the same networks alone."""

import contextlib
import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from joint_training import NoteGradients

from datamodules import CityscapesDataModule, COCODataModule
from lightning_attn.cli import main
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.tasks import BaseTask, CheckpointError, DetectionTask, MultitaskTask, ScheduleSpec, SegmentationTask

TASKS = {"detection": DetectionTask, "segmentation": SegmentationTask}
SAME_RANDOMNESS = ["--trainer.callbacks+", "joint_training.SameRandomness"]
NO_VALIDATION = ["--trainer.limit_val_batches", 0, "--trainer.num_sanity_val_steps", 0]


@pytest.fixture(scope="module")
def trained(multitask_config, tmp_path_factory) -> Path:
    """The directory of a run with statistics of batch normalisation."""
    folder = tmp_path_factory.mktemp("joint")
    with contextlib.chdir(folder):
        batch = ["--model.backbone.norm", "batch", "--model.statistics", "per_task"]
        main([*map(str, ["fit", "-c", multitask_config, *batch, "--trainer.max_steps", 6])])
    return folder / "checkpoints/multitask/tiny"


@pytest.fixture
def images(coco) -> list[Path]:
    return sorted((coco / "test2017").iterdir())[:3]


def stored(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(one, other) -> bool:
    """Whether results are bitwise equal."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool((one == other).all()) if hasattr(one, "all") else one == other


# The network


def test_the_backbone_is_one_at_two_strides(trained):
    joint = MultitaskTask.load(trained / "last.ckpt")
    detector, segmenter = (joint.tasks()[name].built_network.backbone.body for name in TASKS)
    for (name, one), (other_name, other) in zip(detector.named_parameters(), segmenter.named_parameters(), strict=True):
        assert name == other_name
        assert one is other
    image = torch.rand(1, 3, 64, 64)
    assert [body(image)["c5"].shape[2] for body in (detector, segmenter)] == [2, 8]
    weights = stored(trained / "last.ckpt")
    names = {name.removeprefix("backbone.") for name in weights if name.startswith("backbone.")}
    statistics = {name for name, _ in detector.named_buffers() if name in detector.state_dict()}
    assert names == {name for name, _ in detector.named_parameters()}
    assert len(statistics) > 10
    for name in TASKS:
        prefix = f"members.{name}.network.backbone.body."
        assert {key.removeprefix(prefix) for key in weights if key.startswith(prefix)} == statistics
    assert not torch.equal(*(weights[f"members.{name}.network.backbone.body.bn1.running_mean"] for name in TASKS))


def test_a_loaded_member_is_that_of_the_joint_network(trained, images):
    joint = MultitaskTask.load(trained / "last.ckpt")
    together = joint.predict(images)
    assert [found.keys() for found in together] == [TASKS.keys()] * 3
    for name, kind in TASKS.items():
        alone = kind.load(trained / "last.ckpt", task=name)
        assert type(alone) is kind
        assert same([found[name] for found in together], alone.predict(images))
    assert any(len(found["detection"]) for found in together)
    with pytest.raises(CheckpointError, match="task='segmentation'"):
        SegmentationTask.load(trained / "last.ckpt")
    with pytest.raises(CheckpointError, match="has no task 'depth': it has the tasks detection, segmentation"):
        SegmentationTask.load(trained / "last.ckpt", task="depth")
    with pytest.raises(CheckpointError, match="which is no DetectionTask"):
        DetectionTask.load(trained / "last.ckpt", task="segmentation")


def test_scores_are_those_of_each_task_alone(run, trained, coco, cityscapes, in_folder):
    printed = run("test", "--ckpt_path", trained / "last.ckpt", "--run.name", "scores", "--run.root", "runs")
    assert "Test metric" not in printed, "scores are printed once"
    assert printed.count("pixel_accuracy") == printed.count("test/joint ") == 1
    joint = json.loads(Path("runs/multitask/scores/test_metrics.json").read_text())
    data = {
        "detection": COCODataModule(str(coco), test_split="test2017", min_size=48, max_size=80),
        "segmentation": CityscapesDataModule(str(cityscapes), test_split="test"),
    }
    for name, kind in TASKS.items():
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            default_root_dir=in_folder / name,
            use_distributed_sampler=False,
        )
        trainer.test(kind.load(trained / "last.ckpt", task=name), datamodule=data[name])
        alone = json.loads((in_folder / name / "test_metrics.json").read_text())
        of_member = {key: value for key, value in joint.items() if key.startswith(f"test/{name}/")}
        assert of_member == {key.replace("test/", f"test/{name}/"): value for key, value in alone.items()}
        folders = (in_folder / name, Path("runs/multitask/scores") / name)
        if name == "detection":  # whose scores are all 0 so early
            found = [json.loads((folder / "predictions/test_detections.json").read_text()) for folder in folders]
            assert found[0]
            assert found[0] == found[1]
        written = [sorted(path.rglob("*")) for path in folders]
        assert {path.name for path in written[0]} - {"test_metrics.json"} == {path.name for path in written[1]}


def test_every_member_predicts_into_its_own_folder(run, trained, images, in_folder):
    run("predict", "--ckpt_path", trained / "last.ckpt", "--run.name", "found", "--run.root", "runs")
    directory = Path("runs/multitask/found")
    assert len(json.loads((directory / "detection/predictions/images.json").read_text())) == 5
    assert len(list((directory / "segmentation/predictions/labels").iterdir())) == 5
    folder = images[0].parent
    own = ["--data.predict_folder", folder, "--run.name", "own", "--run.root", "runs"]
    run("predict", "--ckpt_path", trained / "last.ckpt", *own)
    assert len(list(Path("runs/multitask/own/segmentation/predictions/labels").iterdir())) == len(
        list(folder.iterdir())
    )


def test_an_exported_member_is_a_model_of_its_own(run, trained, images, segmentation_config, in_folder):
    """Its weights, its arguments and classes, and a program; the test of a single task takes it."""
    path = trained / "last.ckpt"
    for name, kind in TASKS.items():
        run("export", "--ckpt_path", path, "--task", name, "--output", in_folder / name)
        exported = kind.load(in_folder / name / "model.safetensors")
        assert same(exported.predict(images), kind.load(path, task=name).predict(images))
    run(
        "export",
        "--ckpt_path",
        path,
        "--task",
        "segmentation",
        "--format",
        "program",
        "--size",
        32,
        48,
        "--output",
        "p",
    )
    assert sorted(one.name for one in Path("p").iterdir())[-2:] == ["programs.json", "segmenter.pt2"]
    assert "has no task 'depth'" in run("export", "--ckpt_path", path, "--task", "depth", status=2)
    model = in_folder / "segmentation/model.safetensors"
    run("test", "-c", segmentation_config, "--ckpt_path", model, "--model.backbone.norm", "batch")
    for one in (model, path):  # by the configuration of the joint training
        run("test", "--ckpt_path", one, "--run.root", "runs", "--run.name", "own")
    alone, joint = (
        json.loads(Path(f"runs/{task}/own/test_metrics.json").read_text()) for task in ("segmentation", "multitask")
    )
    assert alone["test/miou"] == joint["test/segmentation/miou"]
    run("average", path, trained / "best.ckpt", "--output", in_folder / "mean.ckpt")
    mean, *both = (stored(one) for one in (in_folder / "mean.ckpt", path, trained / "best.ckpt"))
    torch.testing.assert_close(mean["backbone.conv1.weight"], sum(one["backbone.conv1.weight"] for one in both) / 2)
    run("export", "--ckpt_path", path, "--output", "whole")
    assert same(MultitaskTask.load("whole/model.safetensors").predict(images), MultitaskTask.load(path).predict(images))


# Training


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_what_is_logged_and_which_checkpoints_are_kept(trained):
    names = {name for row in rows(trained) for name in row}
    for name in TASKS:
        assert {f"train/{name}/loss", f"train/{name}/weight", f"train/{name}/gradient_norm"} <= names
    assert {"val/detection/ap", "val/segmentation/miou", "val/joint"} <= names
    assert "train/gradient_cosine/detection_segmentation" in names
    for row in rows(trained):
        if "train/loss" in row:
            parts = [float(row[f"train/{name}/loss"]) for name in TASKS]
            assert float(row["train/loss"]) == pytest.approx(sum(parts))
            assert -1 <= float(row["train/gradient_cosine/detection_segmentation"]) <= 1
        if "val/joint" in row:
            scores = [float(row["val/detection/ap"]), float(row["val/segmentation/miou"])]
            assert float(row["val/joint"]) == pytest.approx(sum(scores) / 2)
    kept = {path.name for path in trained.glob("*.ckpt")}
    assert kept == {"last.ckpt", "best.ckpt", "best_detection.ckpt", "best_segmentation.ckpt"}


def test_the_gradients_are_summed_up_at_the_end(run, multitask_config):
    """The same means as those of the logged values."""
    printed = run("fit", "-c", multitask_config, "--model.weights", "{segmentation: 0.5}", *NO_VALIDATION)
    directory = Path("checkpoints/multitask/tiny")
    logged = [row for row in rows(directory) if "train/gradient_cosine/detection_segmentation" in row]
    cosines = [float(row["train/gradient_cosine/detection_segmentation"]) for row in logged]
    norms = {name: sum(float(row[f"train/{name}/gradient_norm"]) for row in logged) for name in TASKS}
    norms["segmentation"] *= 0.5
    written = json.loads((directory / "gradients.json").read_text())
    assert written["steps"] == len(logged) == 4
    for name, weight in (("detection", 1.0), ("segmentation", 0.5)):
        found = written["tasks"][name]
        assert found["weight"] == weight
        assert found["cosine"] == pytest.approx(sum(cosines) / 4, rel=1e-4)
        assert found["negative_cosines"] == sum(cosine < 0 for cosine in cosines) / 4
        assert found["gradient_share"] == pytest.approx(norms[name] / sum(norms.values()), rel=1e-4)
    assert "Gradients in the backbone, mean of 4 logged steps" in printed
    off = ["--model.gradient_report", "false", "--run.name", "off"]
    assert "Gradients in" not in run("fit", "-c", multitask_config, *off, *NO_VALIDATION)


def test_the_best_network_is_that_of_the_largest_mean_change_to_the_baselines(run, multitask_config):
    baselines = yaml.safe_dump({"model": {"init_args": {"baselines": {"detection": 0.02, "segmentation": 0.5}}}})
    Path("baselines.yaml").write_text(baselines)
    run("fit", "-c", multitask_config, "-c", "baselines.yaml")
    directory = Path("checkpoints/multitask/tiny")
    found = [row for row in rows(directory) if "val/joint" in row]
    for row in found:
        changes = [float(row["val/detection/ap"]) / 0.02 - 1, float(row["val/segmentation/miou"]) / 0.5 - 1]
        assert float(row["val/joint"]) == pytest.approx(sum(changes) / 2)
    best = max(found, key=lambda row: float(row["val/joint"]))
    step = torch.load(directory / "best.ckpt", weights_only=True)["global_step"]
    assert step == int(best["step"]) + 1


@pytest.mark.parametrize(
    ("name", "config"), [("detection", "detection_config"), ("segmentation", "segmentation_config")]
)
def test_weight_0_is_a_training_of_the_other_task(run, request, multitask_config, name, config):
    """Bitwise, and the head without a weight is as it was."""
    other = next(one for one in TASKS if one != name)
    sgd = {"name": "sgd", "learning_rate": 0.05, "weight_decay": 1e-4, "base_batch_size": 0}
    steps = {"name": "multistep", "milestones": [0.75], "warmup_steps": 1}
    optimizer = ["--model.optimizer", json.dumps(sgd), "--model.schedule", json.dumps(steps)]
    Path("zero.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"weights": {other: 0.0}}}}))
    joint = ["fit", "-c", multitask_config, "-c", "zero.yaml", *optimizer, *SAME_RANDOMNESS, *NO_VALIDATION]
    run(*joint, "--trainer.max_steps", 1, "--run.name", "start", "--model.optimizer.learning_rate", 1e-30)
    start = Path("checkpoints/multitask/start/last.ckpt")
    initial = ["--run.initial_weights", start, "--run.name", "run"]
    run(*joint, *initial)
    alone = ["-c", request.getfixturevalue(config), "--trainer.max_steps", 4]
    run("fit", *alone, *optimizer, *SAME_RANDOMNESS, *NO_VALIDATION, *initial)
    together = stored(Path("checkpoints/multitask/run/last.ckpt"))
    for key, value in stored(Path(f"checkpoints/{name}/run/last.ckpt")).items():
        shared = key.replace("network.backbone.body.", "backbone.")
        found = together.get(shared, together.get(f"members.{name}.{key}"))
        assert torch.equal(found, value), key
    before = stored(start)
    untouched = [key for key in together if key.startswith(f"members.{other}.")]
    moved = [key for key in together if key not in untouched]
    assert len(untouched) > 5
    assert all(torch.equal(together[key], before[key]) for key in untouched)
    assert not all(torch.equal(together[key], before[key]) for key in moved)


def test_freezing_leaves_a_task_as_it_was(run, trained, images, in_folder):
    """With the backbone and its head frozen, detection finds what it found before, statistics included."""
    options = ["--run.initial_weights", trained / "last.ckpt", "--run.name", "frozen", "--trainer.max_steps", 3]
    run("fit", "-c", trained / "config_fit.yaml", *options, "--model.freeze", "[backbone, detection]", *NO_VALIDATION)
    path = in_folder / "checkpoints/multitask/frozen/last.ckpt"
    before, after = (MultitaskTask.load(one).predict(images) for one in (trained / "last.ckpt", path))
    assert same([one["detection"] for one in before], [one["detection"] for one in after])
    weights = [stored(one) for one in (trained / "last.ckpt", path)]
    changed = {key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])}
    assert changed
    assert all(key.startswith("members.segmentation.network.head.") for key in changed)


def test_alternating_trains_one_head_in_each_step(run, multitask_config):
    ratio = {"order": "alternating", "ratio": {"segmentation": 3.0}, "epoch": 8}
    Path("order.yaml").write_text(yaml.safe_dump({"data": {"init_args": ratio}}))
    noted = ["--trainer.callbacks+", "joint_training.NoteGradients", "--trainer.max_steps", 8]
    run("fit", "-c", multitask_config, "-c", "order.yaml", *noted, *NO_VALIDATION)
    turns = []
    for names in NoteGradients.found:
        heads = {name.split(".")[1] for name in names if ".head." in name}
        assert len(heads) == 1
        assert any(".backbone." in name for name in names)
        turns += heads
    assert [turns.count(name) for name in TASKS] == [2, 6]
    logged = [row for row in rows(Path("checkpoints/multitask/tiny")) if "train/loss" in row]
    assert [[name for name in TASKS if f"train/{name}/loss" in row] for row in logged] == [[name] for name in turns]


def test_learnt_weights_and_those_of_an_average(run, multitask_config):
    learnt = ["--model.balancing.name", "uncertainty", "--run.name", "learnt"]
    run("fit", "-c", multitask_config, *learnt, *NO_VALIDATION)
    weights = stored(Path("checkpoints/multitask/learnt/last.ckpt"))
    variances = {name: weights[f"balancing.log_variances.{name}"].item() for name in TASKS}
    logged = [row for row in rows(Path("checkpoints/multitask/learnt")) if "train/loss" in row]
    for name in TASKS:
        assert float(logged[0][f"train/{name}/weight"]) == 1
        assert variances[name] > 0, "a loss above a half"
        assert math.exp(-variances[name]) < float(logged[-1][f"train/{name}/weight"]) < 1
    averaged = ["--model.balancing.name", "dynamic_average", "--data.epoch", 2, "--trainer.max_steps", 6]
    run("fit", "-c", multitask_config, *averaged, "--run.name", "dynamic", *NO_VALIDATION)
    logged = [row for row in rows(Path("checkpoints/multitask/dynamic")) if "train/loss" in row]
    losses = [[float(row[f"train/{name}/loss"]) for name in TASKS] for row in logged]
    ratios = [(losses[2][task] + losses[3][task]) / (losses[0][task] + losses[1][task]) for task in range(2)]
    powers = [math.exp(ratio / 2) for ratio in ratios]
    for task, name in enumerate(TASKS):
        assert float(logged[3][f"train/{name}/weight"]) == 1
        assert float(logged[4][f"train/{name}/weight"]) == pytest.approx(2 * powers[task] / sum(powers))


def test_weights_that_settle_conflicts(run, multitask_config):
    """In each step by the angle that is logged with them; a resumed training is the unbroken one."""
    pytest.importorskip("torchjd")
    # Two gradients that agree are left alone by the projection; of two that do not, each loses what harms the other.
    settled = ["--model.balancing.name", "torchjd", "--trainer.log_every_n_steps", 1]
    settled += ["--model.schedule.milestones", "[0.99]"]  # no step of these, however many there are
    run("fit", "-c", multitask_config, *settled, "--trainer.max_steps", 5, "--run.name", "whole", *NO_VALIDATION)
    logged = [row for row in rows(Path("checkpoints/multitask/whole")) if "train/loss" in row]
    for row in logged:
        norms = [float(row[f"train/{name}/gradient_norm"]) for name in TASKS]
        cosine = float(row["train/gradient_cosine/detection_segmentation"])
        ratios = [norms[1] / norms[0], norms[0] / norms[1]]
        expected = [1 + max(0.0, -cosine * ratio) for ratio in ratios]
        weights = [float(row[f"train/{name}/weight"]) for name in TASKS]
        assert weights == pytest.approx(expected, rel=1e-3)
        losses = [float(row[f"train/{name}/loss"]) for name in TASKS]
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-4)
    run("fit", "-c", multitask_config, *settled, "--trainer.max_steps", 3, "--run.name", "half", *NO_VALIDATION)
    half = Path("checkpoints/multitask/half/last.ckpt")
    run("fit", "-c", multitask_config, *settled, "--trainer.max_steps", 5, "--ckpt_path", half, *NO_VALIDATION)
    whole, resumed = stored(Path("checkpoints/multitask/whole/last.ckpt")), stored(half)
    assert "balancing.factors" in whole
    assert same(resumed, whole)


def test_a_task_without_validation_data_is_trained_all_the_same(run, multitask_config):
    """Frozen statistics too: those of the backbone are constants, stored once."""
    no_split = ["--data.members.segmentation.init_args.val_split", "", "--model.backbone.norm", "frozen"]
    printed = run("fit", "-c", multitask_config, *no_split)
    said = "No validation data of segmentation: best.ckpt is chosen by detection alone, and there is no best_segment"
    assert printed.count(said) == 1
    assert "No best.ckpt" not in printed
    assert "best.ckpt is not written" not in printed
    directory = Path("checkpoints/multitask/tiny")
    assert (directory / "best.ckpt").is_file()
    scored = [row for row in rows(directory) if "val/joint" in row]
    assert len(scored) == 2
    for row in scored:
        assert float(row["val/joint"]) == float(row["val/detection/ap"])
        assert not any(name.startswith("val/segmentation/") for name in row)
    assert not (directory / "best_segmentation.ckpt").exists()
    validated = run("validate", "--ckpt_path", directory / "best.ckpt")
    assert "members.segmentation has no validation split, and is not scored." in validated
    assert validated.count("val/detection/ap ") == 1
    assert "val/segmentation" not in validated
    names = [name for name in stored(directory / "last.ckpt") if "running_mean" in name]
    assert names
    assert all(name.startswith("backbone.") for name in names)


# Initial weights


def test_weights_go_from_one_task_to_the_joint_training_and_back(
    run, trained, multitask_config, segmentation_config, cityscapes
):
    """Statistics of the backbone too, of which each task then has a copy."""
    batch = ["--model.backbone.norm", "batch"]
    still = ["--trainer.max_steps", 1, "--model.optimizer.learning_rate", 1e-30, *NO_VALIDATION]
    run("fit", "-c", segmentation_config, *batch, "--run.name", "single", *NO_VALIDATION)
    single = stored(Path("checkpoints/segmentation/single/last.ckpt"))
    joint = [*batch, "--model.statistics", "per_task", "--model.freeze", "[backbone]"]
    begun = ["--run.initial_weights", "checkpoints/segmentation/single/last.ckpt", "--run.name", "begun"]
    run("fit", "-c", multitask_config, *joint, *still, *begun)
    found = stored(Path("checkpoints/multitask/begun/last.ckpt"))
    for key, value in single.items():
        if key.startswith("network.backbone.body."):
            name = key.removeprefix("network.backbone.body.")
            kept = [key for key in (f"backbone.{name}", f"members.detection.{key}") if key in found]
            assert len(kept) == 1
            assert torch.equal(found[kept[0]], value), key
    # And back: detection alone from the joint training.
    back = ["--run.initial_weights", trained / "last.ckpt", "--run.name", "back"]
    run("fit", "-c", trained / "config_fit.yaml", *still, *back)


# A task of the user's own


def test_a_task_of_ones_own_is_a_member(run, multitask_config, in_folder):
    """It builds its network in the constructor, and is scored by means over samples."""
    shutil.copy(Path(__file__).parents[2] / "examples/digits.py", in_folder / "own_digits.py")
    own = {
        "attention": {"terms": "0010", "convolution": "deformable", "num_heads": 2},
        "backbone": {"name": "bottleneck14", "width": 8, "norm": "group"},
        "optimizer": {},
        "schedule": {},
    }
    config = yaml.safe_load(multitask_config.read_text())
    model, data = (config[part]["init_args"] for part in ("model", "data"))
    digits = {"class_path": "own_digits.DigitsTask", "init_args": own}
    model["tasks"] = {"digits": digits, "detection": model["tasks"]["detection"]}
    of_digits = {"class_path": "own_digits.DigitsDataModule"}
    data |= {"members": {"digits": of_digits, "detection": data["members"]["detection"]}, "epoch": 3}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    run("fit", "-c", "own.yaml", "--trainer.limit_val_batches", 2)
    directory = Path("checkpoints/multitask/own")
    scored = [row for row in rows(directory) if "val/digits/accuracy" in row]
    assert len(scored) == 2
    for row in scored:
        mean = (float(row["val/digits/accuracy"]) + float(row["val/detection/ap"])) / 2
        assert float(row["val/joint"]) == pytest.approx(mean)
    assert (directory / "best_digits.ckpt").is_file()
    alone = BaseTask.load(directory / "last.ckpt", task="digits", trust=("own_digits",))
    joint = MultitaskTask.load(directory / "last.ckpt", trust=("own_digits",))
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(alone(image), joint.tasks()["digits"](image))
    with pytest.raises(CheckpointError, match=r"names the class own_digits\.DigitsTask"):
        MultitaskTask.load(directory / "last.ckpt")
    source = Path("own_digits.py").read_text()
    Path("own_wrong.py").write_text(source.replace("val/accuracy", "val/loss"))
    wrong = yaml.safe_load(Path("own.yaml").read_text().replace("own_digits.DigitsTask", "own_wrong.DigitsTask"))
    Path("wrong.yaml").write_text(yaml.safe_dump(wrong))
    printed = run("fit", "-c", "wrong.yaml", "--trainer.limit_val_batches", 2, status=2)
    assert "monitored by 'val/loss', which is no score of its evaluators: accuracy" in printed
    own["backbone"]["width"] = 16
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert "the tasks' backbones differ in" in run("fit", "-c", "own.yaml", status=2)


def test_the_profile_of_a_joint_network(run, multitask_config):
    """It has the backbone's parameters once, and the multiply-adds of both networks."""
    size = ["--size", 64, 96, "--device", "meta", "--batch_size", 1]
    run("profile", "-c", multitask_config, *size, "--output", "joint.json")
    joint = json.loads(Path("joint.json").read_text())
    config = yaml.safe_load(multitask_config.read_text())
    alone = []
    for name in TASKS:
        model, data = (config[part]["init_args"] for part in ("model", "data"))
        one = model["tasks"][name]
        one["init_args"] |= {option: model[option] for option in ("attention", "backbone")}
        Path("alone.yaml").write_text(yaml.safe_dump({"model": one, "data": data["members"][name]}))
        run("profile", "-c", "alone.yaml", *size, "--output", f"{name}.json")
        alone.append(json.loads(Path(f"{name}.json").read_text()))
    assert joint["forward"]["multiply_adds"] == sum(one["forward"]["multiply_adds"] for one in alone)
    shared = next(part["parameters"] for part in alone[0]["parts"] if part["name"] == "backbone")
    assert joint["parameters"] == sum(one["parameters"] for one in alone) - shared
    run("profile", "-c", multitask_config, *size, "--num_classes", 33, "--output", "again.json")
    assert json.loads(Path("again.json").read_text())["parameters"] == joint["parameters"], "the data has its classes"


# What is refused


def test_options_that_do_not_fit(multitask_config, run, coco):
    def refused(*options, **sections):
        Path("change.yaml").write_text(yaml.safe_dump(sections or {}))
        return run("fit", "-c", multitask_config, "-c", "change.yaml", *options, status=2)

    assert "Set statistics: per_task, or backbone.norm: frozen or group" in refused("--model.backbone.norm", "batch")
    assert "keeps none" in refused("--model.statistics", "per_task")
    assert "'depth' is none of detection, segmentation, backbone" in refused("--model.freeze", "[depth]")
    assert "none of the tasks detection, segmentation is left" in refused("--model.freeze", "[detection, segmentation]")
    idle = ["--data.order", "alternating", "--data.epoch", 1]
    assert "segmentation has none in any epoch" in refused(*idle)
    assert "at most 10,000,000" in refused("--data.epoch", 10**11)
    settled = ["--model.balancing.name", "torchjd"]
    assert "which there are not with a frozen backbone" in refused(*settled, "--model.freeze", "[backbone]")
    assert "compile: true, whose graphs are gone" in refused(*settled, "--model.compile", "true")
    assert "Set order: together, or choose another balancing" in refused(*settled, "--data.order", "alternating")
    order = ["--data.order", "alternating", "--model.freeze", "[detection]"]
    assert "give steps to detection, which is not trained" in refused(*order)
    assert "is for order: alternating" in refused(data={"init_args": {"ratio": {"detection": 2.0}}})
    renamed = {"members": {"depth": {"class_path": "COCODataModule", "init_args": {"root": str(coco)}}}}
    assert "the tasks are detection, segmentation" in refused(data={"init_args": renamed})
    text = {"tasks": {"translation": {"class_path": "TranslationTask"}}}
    assert "TranslationTask has no backbone to share" in refused(model={"init_args": text})
    own = {"tasks": {"detection": {"class_path": "DetectionTask", "init_args": {"optimizer": {"learning_rate": 1.0}}}}}
    assert "give it once (--model.optimizer)" in refused(model={"init_args": own})
    other = {"detection": {"class_path": "DetectionTask", "init_args": {"attention": {"terms": "1000"}}}}
    assert "give it once (--model.attention)" in refused(model={"init_args": {"tasks": other}})
    for name in ("backbone", "a.b", "keys"):
        assert f"{name!r} is no name" in refused(
            model={"init_args": {"tasks": {name: {"class_path": "DetectionTask"}}}}
        )


def written(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_an_overlay_changes_a_task_and_leaves_the_others(run, multitask_config, in_folder):
    narrower = written(
        in_folder / "narrower.yaml",
        """
model:
  class_path: MultitaskTask
  init_args: {tasks: {segmentation: {init_args: {segmenter: {head_channels: 8}}}}}
data:
  class_path: MultitaskDataModule
  init_args: {members: {detection: {init_args: {batch_size: 1}}}}
""",
    )

    before = parsed(run, "-c", multitask_config)
    after = parsed(run, "-c", multitask_config, "-c", narrower)
    segmentation = after["model"]["init_args"]["tasks"]["segmentation"]["init_args"]
    assert segmentation["segmenter"].pop("head_channels") == 8
    detection = after["data"]["init_args"]["members"]["detection"]["init_args"]
    assert detection.pop("batch_size") == 1
    del before["model"]["init_args"]["tasks"]["segmentation"]["init_args"]["segmenter"]["head_channels"]
    del before["data"]["init_args"]["members"]["detection"]["init_args"]["batch_size"]
    assert after == before


def test_a_task_can_be_left_out(run, multitask_config, trained, in_folder):
    """By an overlay over files, and over the configuration in a checkpoint."""
    overlays = Path(__file__).parents[2] / "configs/multitask"
    alone = ["-c", multitask_config, "-c", overlays / "detection_alone.yaml"]
    printed = run("fit", *alone, "--run.name", "alone")
    assert "segmentation" not in printed
    directory = in_folder / "checkpoints/multitask/alone"
    run("test", "--ckpt_path", directory / "last.ckpt")
    scores = json.loads((directory / "test_metrics.json").read_text())
    assert {name.split("/")[1] for name in scores if name.startswith("test/")} == {"detection", "joint"}
    assert (directory / "detection/predictions").is_dir()
    alone_now = ["--ckpt_path", trained / "last.ckpt", "-c", overlays / "detection_alone.yaml"]
    error = run("test", *alone_now, status=2)
    assert "The checkpoint is of the tasks detection, segmentation, but the configuration is for detection" in error
    error = run("fit", *alone, "-c", overlays / "segmentation_alone.yaml", status=2)
    assert "there is none; give" in error
    misspelt = written(
        in_folder / "misspelt.yaml", "model: {class_path: MultitaskTask, init_args: {tasks: {segmentatoin: null}}}"
    )
    error = run("fit", "-c", multitask_config, "-c", misspelt, status=2)
    assert "tasks.segmentatoin: 'segmentatoin' is none of the members, which are detection, segmentation" in error


def parsed(run, *arguments):
    printed = run("fit", *arguments, "--print_config")
    return yaml.safe_load(printed[printed.index("seed_everything") :])


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("segmenter", "null", "model.tasks.segmentation.segmenter: 'None' is neither a section"),
        ("segmenter.norm", "bath", "model.tasks.segmentation.segmenter.norm: Expected"),
        ("num_pictures", "x", "model.tasks.segmentation.num_pictures: Expected"),
        ("", "NoTask", "model.tasks.segmentation: there is no class 'NoTask'"),
        ("", "", "model.tasks.segmentation: there is no class ''"),
    ],
)
def test_messages_name_the_member(run, multitask_config, option, value, told):
    name = f"--model.tasks.segmentation{'.' if option else ''}{option}"
    assert told in run("fit", "-c", multitask_config, name, value, status=2)


def test_a_task_is_left_out_on_the_command_line_as_by_a_file(run, multitask_config, in_folder):
    overlay = written(
        in_folder / "overlay.yaml",
        "{model: {init_args: {tasks: {segmentation: null}}}, data: {init_args: {members: {segmentation: null}}}}",
    )
    by_file = parsed(run, "-c", multitask_config, "-c", overlay)
    assert by_file["model"]["init_args"]["tasks"]["segmentation"] is None
    assert by_file["model"]["init_args"]["tasks"]["detection"]["class_path"] == "lightning_attn.tasks.DetectionTask"
    options = ["--model.tasks.segmentation", "null", "--data.init_args.members.segmentation=null"]
    assert parsed(run, *options, "-c", multitask_config) == by_file
    earlier = ["--model.tasks.segmentation.segmenter.dropout", 0.3]  # the last option of a member wins
    assert parsed(run, *earlier, *options, "-c", multitask_config) == by_file
    assert parsed(run, "-c", multitask_config, "-c", overlay.read_text()) == by_file


@pytest.mark.parametrize(
    ("options", "member"),
    [
        (["--model.tasks.detecton", "null"], "model.tasks.detecton"),
        (["--data.members.detecton=null"], "data.members.detecton"),
        (["--model.tasks.detecton.init_args.num_pictures", 1], "model.tasks.detecton"),
        (["--model.tasks.detecton.compile", "true"], "model.tasks.detecton"),
        (["--data.init_args.members.detecton.batch_size=1"], "data.members.detecton"),
        (["-c", "{model: {init_args: {tasks: {detecton: {init_args: {num_pictures: 1}}}}}}"], "model.tasks.detecton"),
    ],
)
def test_a_misspelt_member_is_named(run, multitask_config, options, member):
    error = run("fit", "-c", multitask_config, *options, status=2)
    expected = f"error: {member}: 'detecton' is none of the members, which are detection, segmentation."
    assert f"{expected} Did you mean 'detection'? A further one needs its class first (--{member} CLASS)." in error


def test_a_member_of_the_command_line(run, multitask_config):
    options = ["--model.tasks.other", "DetectionTask", "--model.tasks.other.num_pictures", 3]
    tasks = parsed(run, "-c", multitask_config, *options)["model"]["init_args"]["tasks"]
    assert list(tasks) == ["detection", "segmentation", "other"]
    assert tasks["other"]["init_args"]["num_pictures"] == 3


@pytest.mark.parametrize(
    ("argument", "option", "value", "said"),
    [
        ("attention", "terms", "1111", "terms '1111', there '0010'"),
        ("backbone", "name", "resnet50", "name 'resnet50', there 'bottleneck14'"),
        ("optimizer", "learning_rate", 0.02, "learning_rate 0.02, there 0.05"),
        ("schedule", "milestones", "[0.6666666666666666, 0.9166666666666666]", "there (0.75,)"),
    ],
)
def test_a_members_default_is_refused_where_it_is_given(run, multitask_config, argument, option, value, said):
    """As any other value is that contradicts the joint training's; by an option and by a file."""
    by_file = (
        f"{{model: {{init_args: {{tasks: {{detection: {{init_args: {{{argument}: {{{option}: '{value}'}}}}}}}}}}}}}}"
    )
    by_file = by_file if argument == "attention" else by_file.replace("'", "")
    for given in ([f"--model.tasks.detection.{argument}.{option}", value], ["-c", by_file]):
        error = run("fit", "-c", multitask_config, *given, status=2)
        assert f"model.tasks.detection.{argument} is not that of the joint training" in error
        assert said in error
        assert f"Leave it out, and give it once (--model.{argument})." in error


def test_a_members_default_is_refused_in_python_too():
    small = ResNetSpec(name="bottleneck14", width=8, norm="group")
    MultitaskTask({"detection": DetectionTask(), "segmentation": SegmentationTask()}, backbone=small)
    with pytest.raises(ValueError, match=r"backbone: .*is not that of the joint training"):
        MultitaskTask({"detection": DetectionTask(backbone=ResNetSpec())}, backbone=small)
    given = {"detection": DetectionTask(schedule=ScheduleSpec(**vars(DetectionTask().schedule)))}
    with pytest.raises(ValueError, match=r"tasks\.detection\.schedule: .*has no effect"):
        MultitaskTask(given, backbone=small)


def test_a_stored_configuration_is_taken_again(run, trained, in_folder):
    """It has what the joint training has for all tasks once, so that it may be changed there."""
    stored_tasks = yaml.safe_load((trained / "config_fit.yaml").read_text())["model"]["init_args"]["tasks"]
    for name in TASKS:
        assert (
            stored_tasks[name]["init_args"]
            .keys()
            .isdisjoint(("attention", "backbone", "optimizer", "schedule", "compile"))
        )
    again = ["-c", trained / "config_fit.yaml", "--model.attention.terms", "1000", "--run.name", "again"]
    run("fit", *again, "--trainer.max_steps", 1, *NO_VALIDATION)
    task = MultitaskTask.load(in_folder / "checkpoints/multitask/again/last.ckpt")
    assert [one.attention.terms for one in task.tasks().values()] == ["1000", "1000"]


def test_a_run_is_resumed_with_what_it_trained(run, trained):
    """The optimizer has no state of anything else."""
    for options in (["--model.weights", "{detection: 0}"], ["--model.freeze", "[backbone]"]):
        error = run("fit", "--ckpt_path", trained / "last.ckpt", *options, "--trainer.max_steps", 9, status=2)
        assert "weights and freeze: the run that is resumed trained detection, segmentation with weights: {}" in error
        assert "(--run.initial_weights)" in error


def test_mistakes_in_a_members_data_are_said_to_be_its(run, multitask_config):
    error = run("fit", "-c", multitask_config, "--data.members.detection.init_args.root", "/nope", status=2)
    assert "members.detection: root: the folder /nope does not exist" in error
    assert "--data.members.detection.init_args.root FOLDER" in error


def test_mistakes_in_a_task_name_the_members_option(run, multitask_config):
    error = run("fit", "-c", multitask_config, "--model.tasks.segmentation.segmenter.norm", "sync", status=2)
    assert "Use batch or group (--model.tasks.segmentation.init_args.segmenter.norm batch)." in error


def test_ranks_that_are_spawned_end_as_others_do(run_process, multitask_config):
    spawned = ["--trainer.devices", 2, "--trainer.strategy", "ddp_spawn", "--trainer.max_steps", 2, *NO_VALIDATION]
    done = run_process("fit", "-c", multitask_config, *spawned)
    assert "Training ended at step 2" in done.stderr + done.stdout


def test_single_data_is_refused(run, multitask_config, coco):
    data = {"class_path": "COCODataModule", "init_args": {"root": str(coco)}}
    Path("data.yaml").write_text(yaml.safe_dump({"data": data}))
    printed = run("fit", "-c", multitask_config, "-c", "data.yaml", status=2)
    assert "needs data with members, and COCODataModule has none" in printed


def test_classes_of_members_must_be_trusted(run, trained, in_folder, monkeypatch):
    """As those of any task: nothing is imported otherwise."""
    (in_folder / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(in_folder))
    for place in ("arguments", "stored", "configuration", "nested"):
        checkpoint = torch.load(trained / "last.ckpt", weights_only=True)
        if place == "arguments":
            checkpoint["task"]["arguments"]["tasks"]["detection"]["class_path"] = "evil.Task"
        elif place == "stored":
            checkpoint["members"]["detection"]["task"]["class_path"] = "evil.Task"
        elif place == "nested":
            checkpoint["task"]["arguments"]["tasks"]["detection"]["init_args"]["attention"]["mechanism"] = "evil.Task"
        else:
            tasks = checkpoint["run"]["configuration"]["model"]["init_args"]["tasks"]
            tasks["detection"]["class_path"] = "evil.Task"
        torch.save(checkpoint, "bad.ckpt")
        if place == "configuration":
            assert "names the class evil.Task" in run("test", "--ckpt_path", "bad.ckpt", status=2)
        else:
            with pytest.raises(CheckpointError, match=r"names the class evil.Task"):
                BaseTask.load("bad.ckpt", task="detection" if place == "stored" else None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda members: members["detection"].pop("task"),
        lambda members: members["detection"].update(backbone_name=""),
        lambda members: members["detection"].update(state_dict={}),
        lambda members: members.update(detection=3),
        lambda members: members.update({7: members["detection"]}),
    ],
)
def test_damaged_members_are_refused(trained, tmp_path, damage):
    checkpoint = torch.load(trained / "last.ckpt", weights_only=True)
    damage(checkpoint["members"])
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="is damaged: members"):
        MultitaskTask.load(tmp_path / "bad.ckpt")


def test_a_member_of_another_backbone_is_refused():
    """Whatever a task says of its own backbone must be what the joint training says."""
    wide, narrow = (ResNetSpec(name="bottleneck14", norm="group", width=width) for width in (16, 8))
    with pytest.raises(ValueError, match=r"backbone: .*width=16.*describe it once"):
        MultitaskTask({"segmentation": SegmentationTask(backbone=wide)}, backbone=narrow)
    same_one = MultitaskTask({"segmentation": SegmentationTask(backbone=wide)}, backbone=wide)
    assert same_one.tasks()["segmentation"].arguments["backbone"]["width"] == 16
