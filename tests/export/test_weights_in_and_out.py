"""Weights that are handed on: the mean of checkpoints, averaged or current ones, and those of another run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchvision.models import get_model

from lightning_attn.tasks import CheckpointError, DetectionTask, SegmentationTask, TranslationTask
from lightning_attn.training.checkpoint_averaging import average_checkpoints
from lightning_attn.training.checkpoints import read_checkpoint

QUICK = ["--trainer.limit_val_batches", 0, "--run.checkpoint_every_n_steps", 1]
AVERAGING = ["--trainer.callbacks+", "lightning_attn.callbacks.ExponentialAveraging"]


def read(path):
    return torch.load(path, weights_only=True)


def weights_of(path):
    return read(path)["state_dict"]


# The mean of checkpoints


@pytest.fixture
def two(run, segmentation_config, in_folder):
    """Checkpoints of one run after two and after five steps; with batch normalisation, which has integers."""
    runs = in_folder / "checkpoints" / "segmentation"
    batch_norm = ["--model.backbone.norm", "batch", "--model.segmenter.norm", "batch"]
    for name, steps in (("early", 2), ("late", 5)):
        run("fit", "-c", segmentation_config, *QUICK, *batch_norm, "--trainer.max_steps", steps, "--run.name", name)
    return [runs / name / "last.ckpt" for name in ("early", "late")]


def test_the_mean_of_checkpoints(run, two, in_folder):
    printed = run("average", *two)
    path = two[0].with_name("average.ckpt")
    assert f"The mean of 2 checkpoints was written to {path}" in printed
    early, late, mean = (weights_of(one) for one in (*two, path))
    differing = 0
    for name, value in mean.items():
        if value.is_floating_point():
            expected = ((early[name].double() + late[name].double()) / 2).to(value.dtype)
            differing += not torch.equal(early[name], late[name])
            assert torch.equal(value, expected), name
        else:
            assert torch.equal(value, late[name]), name
    assert differing > 10
    assert not {"optimizer_states", "loops", "callbacks"} & read(path).keys()
    assert read(path)["averaged"] == [str(one) for one in two]

    run("test", "--ckpt_path", path)  # needs nothing else
    assert "test/miou" in json.loads((path.parent / "test_metrics.json").read_text())
    assert torch.equal(SegmentationTask.load(path).state_dict()[name], mean[name])
    assert average_checkpoints(two).name == "average-2.ckpt"

    run("average", *two, "--output", "mean.safetensors")
    assert all(
        torch.equal(value, mean[name]) for name, value in read_checkpoint("mean.safetensors")["state_dict"].items()
    )
    for model in (path, "mean.safetensors"):
        printed = run("fit", "--ckpt_path", model, status=2)
        assert "holds a model without the state of a training" in printed
        assert f"--run.initial_weights {in_folder / model}" in printed


def test_checkpoints_that_have_no_mean(run, two, tiny_config, in_folder):
    assert "1 checkpoint is no number to average over" in run("average", two[0], status=2)
    assert "there is no checkpoint at" in run("average", two[0], "nothing.ckpt", status=2).lower()
    assert "is there already, and nothing is overwritten" in run("average", *two, "--output", two[1], status=2)
    checkpoint = read(two[1])
    names = checkpoint["classes"]["names"]
    torch.save(checkpoint | {"classes": checkpoint["classes"] | {"names": ["way", *names[1:]]}}, "classes.ckpt")
    printed = run("average", two[0], "classes.ckpt", status=2)
    assert "mean different things by their outputs" in printed
    assert "'way'" in printed
    run("fit", "-c", tiny_config, *QUICK, "--trainer.max_steps", 1)
    printed = run("average", two[0], in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt", status=2)
    assert "hold different networks" in printed
    assert not list(Path().glob("**/average*.ckpt"))


# Averaged or current weights


def test_either_set_of_weights_can_be_evaluated(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, *QUICK, *AVERAGING, "--trainer.max_steps", 5)
    path = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    stored = read(path)
    averaged, current = stored["state_dict"], stored["current_model_state"]
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)
    for choice, expected in (("averaged", averaged), ("current", current)):
        state = TranslationTask.load(path, weights=choice).state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    losses = []
    for choice in ("averaged", "current"):
        run("test", "--ckpt_path", path, "--run.weights", choice)
    for name in ("test_metrics.json", "test_metrics-2.json"):
        losses.append(json.loads((path.parent / name).read_text())["test/loss"])
    assert losses[0] != losses[1]
    task = TranslationTask.load(path, weights="current")
    del stored["current_model_state"]
    torch.save(stored, "plain.ckpt")
    with pytest.raises(CheckpointError, match="holds one set of weights: it was trained without averaging"):
        type(task).load("plain.ckpt", weights="current")


# Weights of another run


def test_a_run_begins_with_the_weights_of_another(run, detection_config, in_folder):
    """The same network: all of them, and not a step has been done."""
    run("fit", "-c", detection_config, *QUICK, "--trainer.max_steps", 3, "--run.name", "first")
    first = in_folder / "checkpoints" / "detection" / "first" / "last.ckpt"
    still = ["--model.optimizer.learning_rate", 1e-30, "--model.optimizer.weight_decay", 0]
    arguments = [*QUICK, *still, "--trainer.max_steps", 1, "--run.name", "second", "--run.initial_weights", first]
    printed = run("fit", "-c", detection_config, *arguments)
    assert "Initial weights: " in printed
    second = in_folder / "checkpoints" / "detection" / "second" / "last.ckpt"
    assert read(second)["global_step"] == 1
    weights = weights_of(second)
    for name, value in weights_of(first).items():
        torch.testing.assert_close(weights[name], value, atol=1e-20, rtol=0)
    # Going on, the run's own weights count.
    printed = run("fit", "-c", detection_config, *arguments, "--ckpt_path", "last", "--trainer.max_steps", 2)
    assert "Initial weights: " not in printed


def test_weights_for_another_attention(run, detection_config, in_folder):
    """What fits is taken, if that is asked for, and the rest is listed."""
    run("fit", "-c", detection_config, *QUICK, "--trainer.max_steps", 3, "--run.name", "first")
    first = in_folder / "checkpoints" / "detection" / "first" / "last.ckpt"
    arguments = ["fit", "-c", detection_config, *QUICK, "--model.attention.terms", "1111", "--run.name", "other"]
    arguments += ["--run.initial_weights", first, "--trainer.max_steps", 1, "--model.optimizer.learning_rate", 1e-30]
    refused = run(*arguments, status=2)
    assert "does not fit the network" in refused
    assert "position_bias" in refused
    assert "--run.initial_weights_strict false" in refused
    printed = run(*arguments, "--run.initial_weights_strict", "false", "--model.optimizer.weight_decay", 0)
    assert "position_bias (2, 16): only in the network" in printed
    (path,) = (in_folder / "checkpoints" / "detection").glob("other*/last.ckpt")
    here, there = weights_of(path), weights_of(first)
    shared = here.keys() & there.keys()
    assert len(shared) > 50
    for name in shared:
        torch.testing.assert_close(here[name], there[name], atol=1e-20, rtol=0)
    assert DetectionTask.load(path).attention.terms == "1111"


def test_weights_of_another_task_are_refused(run, tiny_config, detection_config, in_folder):
    run("fit", "-c", tiny_config, *QUICK, "--trainer.max_steps", 1)
    path = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    other = ["fit", "-c", detection_config, *QUICK, "--run.initial_weights", path]
    assert "does not fit the network" in run(*other, status=2)
    assert "nothing in" in run(*other, "--run.initial_weights_strict", "false", status=2)


def test_a_run_begins_with_torchvisions_detector(run, detection_config, coco, in_folder):
    """The paper's backbone and head, with attention and deformable convolutions, on three of COCO's categories."""
    torch.manual_seed(1)
    peers = {
        labels: get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=labels)
        for labels in (91, 7)
    }
    for labels, peer in peers.items():
        torch.save(peer.state_dict(), f"{labels}.pth")
    arguments = ["fit", "-c", detection_config, *QUICK, "--trainer.max_steps", 1, "--run.name", "begun"]
    arguments += ["--model.backbone.name", "resnet50", "--model.backbone.width", 64, "--model.backbone.norm", "frozen"]
    arguments += ["--model.detector.fpn_channels", 256, "--model.detector.fc_dim", 1024]
    arguments += ["--model.optimizer.learning_rate", 1e-30, "--model.optimizer.weight_decay", 0]
    arguments += ["--model.attention.num_heads", 8, "--data.batch_size", 1]
    refused = run(*arguments, "--run.initial_weights", "7.pth", status=2)
    assert "7.pth does not fit the network" in refused
    assert "cls_score.weight (4, 1024): only in the network" in refused
    printed = run(*arguments, "--run.initial_weights", "7.pth", "--run.initial_weights_strict", "false")
    assert "of the attention start anew; not taken, or new:" in printed
    printed = run(*arguments, "--run.initial_weights", "91.pth")  # strictly
    assert "of the attention start anew." in printed
    path = max((in_folder / "checkpoints" / "detection").glob("begun*/last.ckpt"), key=lambda one: one.stat().st_mtime)
    ids, compared, weights = read(path)["categories"]["ids"], 0, weights_of(path)
    for name, value in peers[91].state_dict().items():
        if not name.endswith("num_batches_tracked"):
            if "cls_score" in name:
                value = value[[0, *ids]]
            elif "box_predictor.bbox_pred" in name:
                value = value.unflatten(0, (91, 4))[[0, *ids]].flatten(0, 1)
            ours = name if name.startswith("backbone.body.") else f"head.{name.removeprefix('backbone.')}"
            torch.testing.assert_close(weights[f"network.{ours}"], value, atol=1e-20, rtol=0)
            compared += 1
    assert compared > 200


# Safetensors


def test_an_exported_model_is_the_same(run, detection_config, coco, in_folder):
    """In Python, on the command line, and as what another run begins with."""
    run("fit", "-c", detection_config, *QUICK, *AVERAGING, "--trainer.max_steps", 3)
    checkpoint = in_folder / "checkpoints" / "detection" / "tiny" / "last.ckpt"
    printed = run("export", "--ckpt_path", checkpoint)
    path = checkpoint.parent / "export" / "model.safetensors"
    assert f"The model was written to {path} and model.json" in printed
    described = json.loads(path.with_suffix(".json").read_text())
    assert described["task"]["arguments"]["attention"]["terms"] == "0010"
    assert described["categories"]["names"]
    assert described["preprocessing"] == read(checkpoint)["preprocessing"]
    assert not {"optimizer_states", "current_model_state", "averaging_state"} & described.keys()
    with safe_open(path, framework="pt") as tensors:  # the package's own reader
        names = {name.removeprefix("state_dict/") for name in tensors.keys()}  # noqa: SIM118
        assert names == weights_of(checkpoint).keys()
        for name in sorted(names)[::10]:
            assert torch.equal(tensors.get_tensor(f"state_dict/{name}"), weights_of(checkpoint)[name])

    images = sorted((coco / "test2017").iterdir())
    assert DetectionTask.load(path).predict(images) == DetectionTask.load(checkpoint).predict(images)
    run("test", "--ckpt_path", checkpoint)
    run("test", "--ckpt_path", path)
    scores = [json.loads(one.read_text()) for one in sorted(Path("checkpoints/detection").glob("*/test_metrics.json"))]
    assert len(scores) == 2
    assert scores[0] == scores[1]
    begun = ["--trainer.max_steps", 1, "--run.initial_weights", path, "--run.name", "begun"]
    assert "Initial weights: " in run("fit", "-c", detection_config, *QUICK, *begun)
    assert run("export", "--ckpt_path", checkpoint, "--weights", "current", "--output", "current")
    current = DetectionTask.load("current/model.safetensors").state_dict()
    assert all(torch.equal(value, current[name]) for name, value in read(checkpoint)["current_model_state"].items())


def test_a_vocabulary_is_exported_too(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, *QUICK, "--trainer.max_steps", 2)
    checkpoint = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    run("export", "--ckpt_path", checkpoint, "--output", "mine")
    sentences = ["The woman reads a book."]
    assert TranslationTask.load("mine/model.safetensors").predict(sentences) == TranslationTask.load(
        checkpoint
    ).predict(sentences)
    assert "is there already, and nothing is overwritten" in run(
        "export", "--ckpt_path", checkpoint, "--output", "mine", status=2
    )
    Path("mine/model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.json is damaged"):
        TranslationTask.load("mine/model.safetensors")
    Path("mine/model.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.json is not there, which says what the weights"):
        TranslationTask.load("mine/model.safetensors")
    Path("bad.json").write_text("{}")
    Path("bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is damaged"):
        TranslationTask.load("bad.safetensors")
    assert "there is no checkpoint at" in run("export", "--ckpt_path", "nothing.ckpt", status=2).lower()
