"""docs/extending.md: a task, a mechanism and a DataModule of the user's own, without an edit of the packages."""

import inspect
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from small_sizes import SMALL_DIGITS as SMALL
from torch import nn

import datamodules
from datamodules import WMT14DataModule
from datamodules.detection.datamodule import DetectionDataModule
from datamodules.sampling.sample_batches import sample_loader
from datamodules.segmentation.datamodule import SegmentationDataModule
from examples.digits import DigitsDataModule, DigitsTask
from examples.mean_attention import MeanAttention
from examples.tab_separated import TabSeparatedDataModule
from lightning_attn.attention import AttentionSpec, build_attention
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.tasks import BaseTask, CheckpointError, DetectionTask, OptimizerSpec, ScheduleSpec

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = EXAMPLES / "digits.yaml"


def test_the_task_is_short():
    assert len((EXAMPLES / "digits.py").read_text().splitlines()) <= 60


def test_a_task_of_one_s_own(run, in_folder):
    """Trains, is stopped and goes on, is tested from its checkpoint alone, and is loaded in Python."""
    run("fit", "-c", DIGITS, *SMALL, "--trainer.max_epochs", 2, "--run.name", "mine")
    run("fit", "-c", DIGITS, *SMALL, "--trainer.max_epochs", 4, "--run.name", "mine", "--ckpt_path", "last")
    path = in_folder / "checkpoints" / "classification" / "mine"
    run("test", "--ckpt_path", path / "best.ckpt", "--trust", "examples")
    accuracy = json.loads((path / "test_metrics.json").read_text())["test/accuracy"]

    task = DigitsTask.load(path / "best.ckpt")
    data = DigitsDataModule()
    data.setup("test")
    with torch.inference_mode():
        right = [task(sample["image"][None]).argmax().item() == sample["label"] for sample in data.samples[::5]]
    assert accuracy == pytest.approx(sum(right) / len(right), abs=1e-9)
    with pytest.raises(NotImplementedError, match=r"DigitsTask must define predict\(self, inputs\) .* return a list"):
        task.predict([])


def test_a_missing_package_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    error = run("fit", "-c", DIGITS, *SMALL, status=2)
    assert "error: The digits are scikit-learn's: pip install scikit-learn." in error


@pytest.mark.ddp
@pytest.mark.timeout(1800)
def test_a_task_of_one_s_own_on_two_ranks(run_process, run, in_folder):
    """The same mean, also where one of the ranks has no samples."""
    two = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    run_process("fit", "-c", DIGITS, *SMALL, "--trainer.max_epochs", 1, *two)
    path = in_folder / "checkpoints" / "classification" / "digits"
    run("test", "--ckpt_path", path / "last.ckpt", "--trust", "examples")
    run_process("test", "--ckpt_path", path / "last.ckpt", "--trust", "examples", *two)
    one, other = (json.loads((path / name).read_text()) for name in ("test_metrics.json", "test_metrics-2.json"))
    task, data = DigitsTask.load(path / "last.ckpt"), DigitsDataModule()
    data.setup("test")
    with torch.inference_mode():
        right = [task(sample["image"][None]).argmax().item() == sample["label"] for sample in data.samples[::5]]
    assert one == other
    assert one["test/accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-9)


def test_batches_of_samples():
    module = pl.LightningDataModule()
    samples = [{"ids": i, "pair": (torch.full((2,), float(i)), str(i))} for i in range(7)]
    found = [batch["ids"].tolist() for batch in sample_loader(module, samples, batch_size=3, shuffle=False)]
    assert found == [[0, 1, 2], [3, 4, 5], [6]]
    drawn = [batch["ids"].tolist() for batch in sample_loader(module, samples, batch_size=3, shuffle=True, seed=1)]
    assert sorted(itertools.chain(*drawn)) == list(range(7))
    assert drawn != found
    empty = sample_loader(module, samples, batch_size=3, shuffle=False).dataset.batch([])
    assert empty["ids"].shape == (0,)
    assert empty["pair"][0].shape == (0, 2)
    assert empty["pair"][1] == []


# A mechanism


CUSTOM = AttentionSpec(mechanism="examples.mean_attention.MeanAttention", options={"dropout": 0.0})


def test_a_mechanism_of_one_s_own_in_every_slot():
    torch.manual_seed(0)
    block = build_attention(CUSTOM, 8, 2)
    assert isinstance(block.attention.attention, MeanAttention)
    gated = build_attention(CUSTOM, 8, 2, role="head")
    nn.init.ones_(gated.gamma)
    x = torch.randn(2, 8, 5, 6)
    mean = x.mean((2, 3)) @ gated.attention.value_proj.weight.T
    expected = x + gated.attention.out_proj(mean)[:, :, None, None]
    torch.testing.assert_close(gated(x), expected)
    deformable = build_attention(AttentionSpec(**CUSTOM.as_dict() | {"convolution": "deformable"}), 8)
    assert deformable(torch.randn(2, 5, 8)).shape == (2, 5, 8)


def test_a_mechanism_of_one_s_own_decodes_as_it_trains():
    """Token by token, the numbers of the causal pass."""
    torch.manual_seed(0)
    attention = build_attention(CUSTOM, 8, role="causal").eval()
    x = torch.randn(3, 6, 8)
    cache = attention.new_cache()
    steps = []
    for position in range(6):
        if position == 3:
            x = x[[2, 0, 0]]
            cache.reorder(torch.tensor([2, 0, 0]))
        steps.append(attention(x[:, position : position + 1], cache=cache))
    torch.testing.assert_close(torch.cat(steps[3:], 1), attention(x)[:, 3:])


def test_an_overlay_names_a_mechanism_of_one_s_own(run, segmentation_config, in_folder):
    quick = ["--trainer.max_steps", 2, "--trainer.limit_val_batches", 1]
    run("fit", "-c", segmentation_config, "-c", EXAMPLES / "mean_attention.yaml", *quick)
    checkpoint = torch.load(in_folder / "checkpoints/segmentation/tiny/last.ckpt", weights_only=True)
    assert any("attention.attention.value_proj" in name for name in checkpoint["state_dict"])
    assert checkpoint["task"]["arguments"]["attention"]["options"] == {"dropout": 0.1}
    printed = run(
        "validate", "--ckpt_path", in_folder / "checkpoints/segmentation/tiny/last.ckpt", "--trust", "examples"
    )
    assert "error" not in printed


class Fixed(nn.Module):
    """Takes no size."""


class WithoutCache(nn.Module):
    def __init__(self, dim, ndim, num_heads, causal):
        super().__init__()


class WithoutMask(WithoutCache):
    def forward(self, x):
        return x


class Flat(WithoutCache):
    """Gives another shape than it gets."""

    def forward(self, x, *, key_padding_mask=None):
        return x.flatten(2)


@pytest.mark.parametrize(
    ("mechanism", "role", "message"),
    [
        ("nowhere.Attention", "self", r"'nowhere\.Attention' cannot be imported \(No module named 'nowhere'\)"),
        ("examples.mean_attention.Other", "self", "cannot be imported .*has no attribute 'Other'"),
        ("examples.digits.DigitsDataModule", "self", r"is not a subclass of torch\.nn\.Module"),
        ("test_examples.Fixed", "self", r"cannot be constructed: .*It is called with dim, ndim, num_heads, causal"),
        ("test_examples.WithoutCache", "causal", r"must define new_cache\(\) for use in a decoder"),
        (
            "test_examples.WithoutMask",
            "self",
            "cannot be called: .*'key_padding_mask'. Its forward takes x, and the key",
        ),
        ("examples.mean_attention.MeanAttention", "cross", "cannot be used as encoder-decoder attention"),
    ],
)
def test_mechanisms_that_cannot_be_used(mechanism, role, message):
    with pytest.raises(ValueError, match=message):
        build_attention(AttentionSpec(mechanism=mechanism), 8, role=role)


def test_a_mechanism_that_changes_the_shape():
    head = build_attention(AttentionSpec(mechanism="test_examples.Flat"), 8, 2, role="head")
    with pytest.raises(
        ValueError, match=r"'test_examples.Flat' returned \(1, 8, 6\) for an input of shape \(1, 8, 2, 3\)"
    ):
        head(torch.randn(1, 8, 2, 3))


def test_options_are_for_mechanisms_of_one_s_own():
    with pytest.raises(ValueError, match="are for a custom mechanism; for mechanism='transformer'"):
        AttentionSpec(options={"dropout": 0.1})
    with pytest.raises(ValueError, match=r"mechanism must be one of .* or the import path of a class"):
        AttentionSpec(mechanism="dynamik")


# A DataModule


def test_data_of_one_s_own(run, tiny_config, corpus, in_folder):
    lines = [(corpus / f"train.{language}").read_text().splitlines() for language in ("en", "de")]
    Path("pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in zip(*lines, strict=True)))
    text = tiny_config.read_text()
    start = text.index("data:")
    data = "data:\n  class_path: examples.tab_separated.TabSeparatedDataModule\n"
    data += "  init_args: {pairs: pairs.tsv, root: made, max_tokens: 400, vocabulary_size: 300}\n"
    Path("mine.yaml").write_text(text[:start] + data + text[text.index("trainer:") :])
    run("fit", "-c", "mine.yaml", "--trainer.max_steps", 2)
    assert len(Path("made/valid.en").read_text().splitlines()) == -(-len(lines[0]) // 10)
    Path("pairs.tsv").write_text(Path("pairs.tsv").read_text().replace("\t", "\u2028\t", 1))
    run("fit", "-c", "mine.yaml", "--trainer.max_steps", 1)
    Path("pairs.tsv").write_text("no tab\n")
    with pytest.raises(ValueError, match=r"pairs.tsv, line 1 has no tab"):
        run("fit", "-c", "mine.yaml")
    assert (in_folder / "checkpoints/translation/mine/last.ckpt").is_file()


# The tables of hooks


@pytest.mark.parametrize(
    ("kind", "owners", "own"),
    [
        ("task", (BaseTask, DetectionTask, DigitsTask), ("predict_step", "export_graphs")),
        ("DataModule", (DetectionDataModule, SegmentationDataModule, DigitsDataModule, pl.LightningDataModule), ()),
    ],
)
def test_documented_hooks_are_those_of_the_code(kind, owners, own):
    """In every class of the project that has them; further arguments have defaults."""
    text = (EXAMPLES.parent / "docs" / "extending.md").read_text()
    table = text[text.index(f"| hook of a {kind} |") :].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    documented = [one for cell in cells for one in re.findall(r"`(\w+)\((.*?)\)`", cell)]
    assert len(documented) > 10
    for name, arguments in documented:
        names = [one for one in arguments.split(", ") if one]
        signatures = [inspect.signature(getattr(owner, name)) for owner in owners if hasattr(owner, name)]
        found = [list(one.parameters.values())[1:] for one in signatures]
        found = [one for one in found if [parameter.name for parameter in one] != ["args", "kwargs"]]  # Lightning's
        assert found or name in own, f"no class has {name}"
        for parameters in found:
            assert [one.name for one in parameters[: len(names)]] == names, name
            assert all(one.default is not one.empty for one in parameters[len(names) :]), name


def test_one_signature_of_prepare_files():
    datamodules.import_all()
    pending = [pl.LightningDataModule]
    found = {}
    while pending:
        one = pending.pop()
        pending += one.__subclasses__()
        if "prepare_files" in vars(one):
            found[one.__name__] = [*inspect.signature(one.prepare_files).parameters]
    assert {"MiniatureTranslationDataModule", TabSeparatedDataModule.__name__, "COCODataModule"} <= found.keys()
    assert all(parameters == ["self", "splits"] for parameters in found.values()), found


def test_the_splits_that_prepare_files_gets(corpus):
    class Noting(WMT14DataModule):
        def prepare_files(self, splits):
            self.noted = list(splits)

    data = Noting(corpus, vocabulary_size=300, preparation_processes=1)
    data.prepare_data()
    assert data.noted == ["train", "valid", "test"]


# What a subclass has left out


class Incomplete(BaseTask):
    def __init__(self) -> None:
        super().__init__(OptimizerSpec(), ScheduleSpec())


class LateNetwork(DigitsTask):
    """Builds its network for the data, and does not say how without."""

    def __init__(
        self, attention: AttentionSpec, backbone: ResNetSpec, optimizer: OptimizerSpec, schedule: ScheduleSpec
    ) -> None:
        super().__init__(attention, backbone, optimizer, schedule)
        self.kept = [self.network, self.classifier]
        del self.network, self.classifier

    def configure_model(self) -> None:
        if not hasattr(self, "network"):
            self.network, self.classifier = self.kept


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("fit", "Incomplete must define training_step(self, batch, batch_idx), and return the loss, for 'fit'"),
        (
            "validate",
            "Incomplete must define validation_step(self, batch, batch_idx), and return a dictionary with a value",
        ),
        ("test", "Incomplete must define test_step(self, batch, batch_idx), and return a dictionary with a value"),
        ("predict", "Incomplete must define predict_step(self, batch, batch_idx), and write the results into self.out"),
    ],
)
def test_missing_steps_are_named(run, stage, message):
    options = ["--model", "test_examples.Incomplete", "--data", "examples.digits.DigitsDataModule"]
    assert message in run(stage, *options, status=2)


class Predicting(DigitsTask):
    def predict_step(self, batch, batch_idx):
        (self.output_directory / "found.txt").write_text("found")


class WithoutLoaders(pl.LightningDataModule):
    """Defines none."""


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        ("fit", "train_dataloader"),
        ("validate", "val_dataloader"),
        ("test", "test_dataloader"),
        ("predict", "predict_dataloader"),
    ],
)
def test_missing_loaders_are_named(run, in_folder, stage, method):
    own = DIGITS.read_text().replace("examples.digits.DigitsTask", "test_examples.Predicting")
    Path("own.yaml").write_text(own.replace("examples.digits.DigitsDataModule", "test_examples.WithoutLoaders"))
    printed = run(stage, "-c", "own.yaml", *SMALL, status=2)
    assert f"error: WithoutLoaders must define {method}(self), and return a DataLoader of the " in printed
    shuffle = stage == "fit"
    assert f"sample_batches.sample_loader(self, samples, batch_size=8, shuffle={shuffle})." in printed


class WrongMonitor(DigitsTask):
    monitor = "val/acuracy"


def test_a_value_that_is_not_logged(run, in_folder):
    Path("wrong.yaml").write_text(
        DIGITS.read_text().replace("examples.digits.DigitsTask", "test_examples.WrongMonitor")
    )
    printed = run(
        "fit", "-c", "wrong.yaml", *SMALL, "--trainer.val_check_interval", 1, "--trainer.limit_val_batches", 1, status=2
    )
    assert "monitor='val/acuracy'" in printed
    assert "Traceback" not in printed


def test_a_network_that_load_cannot_build(run, in_folder):
    config = Path("late.yaml")
    config.write_text(DIGITS.read_text().replace("examples.digits.DigitsTask", "test_examples.LateNetwork"))
    run("fit", "-c", config, *SMALL, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 1)
    path = in_folder / "checkpoints" / "classification" / "late" / "last.ckpt"
    with pytest.raises(NotImplementedError, match=r"LateNetwork must define build_from_checkpoint\(self, checkpoint\)"):
        LateNetwork.load(path)
    stored = torch.load(path, weights_only=True)
    stored["task"]["class_path"] = "examples.digits.DigitsTask"
    stored["state_dict"]["classifier.bias"] = torch.zeros(11)
    torch.save(stored, "wrong.ckpt")
    with pytest.raises(
        CheckpointError, match=r"does not fit the network:\n  classifier\.bias: \(11,\) in the checkpoint"
    ):
        DigitsTask.load("wrong.ckpt")
