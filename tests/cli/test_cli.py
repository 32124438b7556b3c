"""The command as a user meets it: stages, composition, run directories, and what it says about mistakes."""

import csv
import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import sacrebleu
import torch
import yaml

from lightning_attn.attention.cpu.linear import linear
from lightning_attn.cli import main
from lightning_attn.cli.messages import message_of
from lightning_attn.errors import InputError
from lightning_attn.tasks import TranslationTask
from lightning_attn.training.checkpoints import read_checkpoint

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_metrics(run_path: Path, name: str) -> list[float]:
    with (run_path / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_all_stages_fill_one_run_directory(run, tiny_config, corpus, in_folder):
    printed = run("fit", "-c", tiny_config)
    assert "FLOPs" not in printed, "none are counted, which is no number to print"
    assert " parameters, all trained" in printed
    path = in_folder / "checkpoints" / "translation" / "tiny"
    names = {file.name for file in path.iterdir()}
    assert {"best.ckpt", "last.ckpt", "metrics.csv", "config_fit.yaml", "run.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((path / "run.json").read_text())["command"] == shlex.join(sys.argv)
    assert read_yaml(path / "hparams.yaml")["self_attention"]["terms"] == "1111"
    assert len(read_metrics(path, "train/loss")) == 4
    assert len(read_metrics(path, "val/bleu")) == 2

    stored = ["-c", path / "config_fit.yaml", "--ckpt_path", path / "best.ckpt"]
    printed = run("validate", *stored)
    assert printed.count("val/bleu ") == 1, "scores are printed once"
    assert "Validate metric" not in printed
    printed = run("test", *stored)
    run("predict", *stored)
    metrics = json.loads((path / "test_metrics.json").read_text())
    assert f"BLEU {metrics['test/bleu']:.2f} (nrefs:1|case:mixed|eff:no|tok:13a" in printed
    assert f"chrF {metrics['test/chrf']:.2f}, loss {metrics['test/loss']:.4f} nats per token" in printed
    assert "Test metric" not in printed, "scores are printed once"
    assert (path / "attention.png").stat().st_size > 1000
    shown = json.loads((path / "predictions" / "test_examples.json").read_text())["examples"]
    sources = (corpus / "test.en").read_text().splitlines()
    assert [one["id"] for one in shown] == [0, 1, 2, 3, 4]
    assert [one["source"] for one in shown] == sources[:5]
    maps = json.loads((path / "predictions" / "test_attention.json").read_text())["maps"]
    assert [one["title"] for one in maps] == [
        "Self-attention of the last encoder layer",
        "Encoder-decoder attention of the last layer",
    ]
    assert all([*one["weights"]] == ["E1", "E2", "E3", "E4", "whole"] for one in maps)
    resampled = json.loads((path / "predictions" / "test_bootstrap.json").read_text())
    assert resampled["num_samples"] == 31
    assert len(resampled["scores"]["test/bleu"]) == 1000
    assert min(resampled["scores"]["test/bleu"]) <= metrics["test/bleu"] <= max(resampled["scores"]["test/bleu"])
    # The official scorer on the written file gives the logged number.
    hypotheses = (path / "predictions" / "hypotheses.txt").read_text().splitlines()
    assert hypotheses == (path / "predictions" / "test_hypotheses.txt").read_text().splitlines()
    references = (corpus / "test.de").read_text().splitlines()
    assert len(hypotheses) == len(references) == 31
    assert [one["hypothesis"] for one in shown] == hypotheses[:5]
    assert [one["reference"] for one in shown] == references[:5]
    assert sacrebleu.corpus_bleu(hypotheses, [references]).score == pytest.approx(metrics["test/bleu"], abs=1e-9)
    assert sacrebleu.corpus_chrf(hypotheses, [references]).score == pytest.approx(metrics["test/chrf"], abs=1e-9)
    for stage in ("validate", "test", "predict"):
        assert (path / f"config_{stage}.yaml").is_file()


def test_nothing_is_overwritten(run, tiny_config, in_folder):
    runs = in_folder / "checkpoints" / "translation"
    for _ in range(2):
        run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    assert sorted(path.name for path in runs.iterdir()) == ["tiny", "tiny-2"]
    stored = ["-c", runs / "tiny" / "config_fit.yaml", "--ckpt_path", runs / "tiny" / "last.ckpt"]
    for _ in range(2):
        run("test", *stored, "--model.num_examples", 0)
    assert (runs / "tiny" / "test_metrics-2.json").is_file()
    run("test", *stored, "--model.num_examples", 1)
    assert (runs / "tiny" / "config_test-2.yaml").is_file(), "another configuration; the same is not kept twice"
    assert not (runs / "tiny" / "config_test-3.yaml").exists()
    assert (runs / "tiny" / "predictions" / "test_hypotheses-2.txt").is_file()
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2, "--run.name", "named", "--run.root", "elsewhere")
    assert (in_folder / "elsewhere" / "translation" / "named" / "last.ckpt").is_file()


def test_later_files_and_the_command_line_win(run, tiny_config, in_folder):
    run(
        *("fit", "-c", tiny_config, "-c", CONFIGS / "attention" / "self_0110.yaml"),
        *("-c", CONFIGS / "trainer" / "debug.yaml", "--model.cross_attention.terms", "0111", "--trainer.max_steps", 2),
    )
    resolved = read_yaml(in_folder / "checkpoints" / "translation" / "tiny" / "config_fit.yaml")
    arguments = resolved["model"]["init_args"]
    assert (arguments["self_attention"]["terms"], arguments["cross_attention"]["terms"]) == ("0110", "0111")
    assert arguments["self_attention"]["num_heads"] == 2, "an overlay changes only what it names"
    assert resolved["trainer"]["max_steps"] == 2
    assert "ckpt_path" not in resolved


def test_callbacks_of_overlays_are_appended_and_ours_stay(run, tiny_config, in_folder):
    """A later `callbacks:` replaces the list; `callbacks+:` appends. The checkpoints of the project survive both."""
    ema = "{class_path: pytorch_lightning.callbacks.EMAWeightAveraging, init_args: {decay: 0.5}}"
    Path("one.yaml").write_text(f"trainer:\n  callbacks:\n    - {ema}\n")
    Path("two.yaml").write_text("trainer:\n  callbacks+:\n    - {class_path: pytorch_lightning.callbacks.Timer}\n")
    run("fit", "-c", tiny_config, "-c", "one.yaml", "-c", "two.yaml")
    path = in_folder / "checkpoints" / "translation" / "tiny"
    callbacks = read_yaml(path / "config_fit.yaml")["trainer"]["callbacks"]
    assert [c["class_path"].rsplit(".", 1)[-1] for c in callbacks] == ["EMAWeightAveraging", "Timer"]
    checkpoint = torch.load(path / "last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert averaged.keys() == current.keys()
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)


def test_moving_average_is_what_a_test_uses(run, tiny_config, in_folder):
    Path("average.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_attn.callbacks.UniformWeightAveraging\n"
        "      init_args: {start_step: 2, every_n_steps: 2}\n"
    )
    run("fit", "-c", tiny_config, "-c", "average.yaml", "--run.checkpoint_every_n_steps", 1)
    path = in_folder / "checkpoints" / "translation" / "tiny"
    checkpoint = torch.load(path / "last.ckpt", weights_only=True)
    assert int(checkpoint["averaging_state"]["n_averaged"]) == 2, "steps 2 and 4"
    task = TranslationTask.load(path / "last.ckpt")
    for name, value in task.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name])


def test_command_line_wins_over_the_checkpoint(run, tiny_config, in_folder):
    """LightningCLI itself lets the checkpoint's hyperparameters win silently."""
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny"
    stored = ["-c", path / "config_fit.yaml", "--ckpt_path", path / "last.ckpt"]
    printed = run("test", *stored, "--model.decoding.beam_size", 3, "--model.num_examples", 0)
    assert read_yaml(path / "config_test.yaml")["model"]["init_args"]["decoding"]["beam_size"] == 3
    assert "model.decoding.beam_size: 2 in the checkpoint, 3 now" in printed
    # The same shapes, another function: allowed, and said.
    printed = run("test", *stored, "--model.self_attention.window", 3, "--model.num_examples", 0)
    assert "model.self_attention.window: None in the checkpoint, 3 now" in printed


def test_checkpoint_of_another_shape_is_refused_with_the_difference(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny"
    stored = ["-c", path / "config_fit.yaml", "--ckpt_path", path / "last.ckpt"]
    printed = run("test", *stored, "--model.cross_attention.terms", "0010", status=2)
    assert "network.decoder.0.cross_attention.position_bias (2, 8): only in the checkpoint" in printed
    assert "model.cross_attention.terms: '1111' in the checkpoint, '0010' now" in printed
    run("test", *stored, "--data.vocabulary_size", 280)  # the vocabulary of an evaluation is the checkpoint's
    printed = run("fit", *stored, "--data.vocabulary_size", 280, "--trainer.max_steps", 3, status=2)
    assert "(300, 16) in the checkpoint, (280, 16) now" in printed


def test_schedule_moves_every_step(run, tiny_config, in_folder):
    """LightningCLI steps schedulers from YAML once an epoch."""
    run(
        *("fit", "-c", tiny_config, "--model.schedule.name", "inverse_sqrt", "--model.schedule.warmup_steps", 2),
        *("--model.schedule.warmup_start", 0.5, "--model.optimizer.learning_rate", 0.004),
    )
    rates = read_metrics(in_folder / "checkpoints" / "translation" / "tiny", "lr-Adam")
    assert rates == pytest.approx([0.002, 0.003, 0.004, 0.004 * (2 / 3) ** 0.5])


def test_offsets_are_logged_with_a_learning_rate_of_their_own(run, tiny_config, in_folder):
    overlay = CONFIGS / "attention" / "self_deformable_0010.yaml"
    run(
        *("fit", "-c", tiny_config, "-c", overlay, "--model.schedule.name", "inverse_sqrt"),
        *("--model.schedule.warmup_steps", 2, "--model.schedule.warmup_start", 0.5),
        *("--model.optimizer.learning_rate", 0.004, "--trainer.limit_val_batches", 0),
    )
    path = in_folder / "checkpoints" / "translation" / "tiny"
    expected = [0.002, 0.003, 0.004, 0.004 * (2 / 3) ** 0.5]
    assert read_metrics(path, "lr-Adam/network") == pytest.approx(expected)
    assert read_metrics(path, "lr-Adam/offsets") == pytest.approx([rate / 10 for rate in expected])


def test_checkpoints_load_with_weights_only(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["task"]["arguments"]["self_attention"]["terms"] == "1111"
    assert "hyper_parameters" not in checkpoint


def test_resume_in_the_middle_of_an_epoch_sees_every_batch_once(run, tiny_config, in_folder):
    """An interrupted run and its continuation end with the parameters of a run that was not interrupted."""
    steps = ["--trainer.val_check_interval", 1000, "--run.checkpoint_every_n_steps", 1]
    runs = in_folder / "checkpoints" / "translation"
    run("fit", "-c", tiny_config, *steps, "--trainer.max_steps", 40, "--run.name", "straight")
    assert torch.load(runs / "straight" / "last.ckpt", weights_only=True)["epoch"] >= 1, "spans two epochs"
    run("fit", "-c", tiny_config, *steps, "--trainer.max_steps", 7, "--run.name", "first")
    run(
        *("fit", "-c", tiny_config, *steps, "--trainer.max_steps", 40, "--run.name", "second"),
        *("--ckpt_path", runs / "first" / "last.ckpt"),
    )
    straight, resumed = (
        torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("straight", "second")
    )
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.self_attention.terms", "0000"], "set mechanism: none"),
        (["--model.self_attention.terms", "11"], "terms must be four bits"),
        (["--model.cross_attention.terms", "2222"], "got '2222'"),
        (["--model.cross_attention.mechanism", "none"], "the paper has no such setting"),
        (["--model.cross_attention.mechanism", "dynamic"], "cannot be used in encoder-decoder attention"),
        (["--model.cross_attention.convolution", "deformable"], "Use convolution: regular"),
        (["--model.self_attention.num_heads", "5"], "dim=16 cannot be divided among num_heads=5"),
        (["--model.self_attention.window", "4"], "use 3 or 5"),
        (["--model.optimizer.learning_rate", "-1"], "learning_rate must be a positive finite number"),
        (["--model.self_atention.terms", "0110"], "Did you mean 'self_attention'?"),
        (["--trainer.max_step", "3"], "Did you mean 'max_steps'?"),
        (["--model.optimizer.learning_rat", "3"], "Did you mean 'learning_rate'?"),
        (["--model.self_attention.num_head", "2"], "Did you mean 'num_heads'?"),
        (["--data.rooot", "x"], "Did you mean 'root'?"),
        (["--model", "TranslationTaks"], "there is no class 'TranslationTaks'. Did you mean 'TranslationTask'?"),
        (["--data", "Nope.Nope"], "there is no class 'Nope.Nope' (No module named 'Nope')"),
        (["--trainer.callbacks", "EarlyStoping"], "Did you mean 'EarlyStopping'?"),
        (["--optimizer.learning_rate", "1"], "Did you mean --model.optimizer.learning_rate?"),
        (["--model.optimizer", "adamw"], "Give its options one by one, such as --model.optimizer.name VALUE"),
        (["--model.self_attention", "none"], "such as --model.self_attention.mechanism VALUE"),
        (["--model.optimizer.typ", "adamw"], "There are name, learning_rate, betas"),
        (["--ckpt_path", "nowhere.ckpt"], "There is no checkpoint at nowhere.ckpt"),
        (["--data.root", "/nowhere"], "/nowhere does not exist"),
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.vocabulary_size", "100000"], "--data.vocabulary_size"),
        (["--run.name", "../up"], "run.name must be the name of a folder"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(run, tiny_config, in_folder, flags, message):
    printed = run("fit", "-c", tiny_config, *flags, status=2)
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed[printed.index("error:") :].splitlines()) <= 8
    assert not list(in_folder.rglob("*.ckpt"))
    assert not list(in_folder.glob("checkpoints/*/*")), "an empty run directory was left behind"


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("model:\n  init_args:\n    self_attention:\n      terms: 0010\n", "Quote it in YAML"),
        ("model:\n  init_args:\n    self_attention:\n      terms: 1111\n", "Quote it in YAML"),
        ("model:\n  init_args:\n    encoder_layer: 2\n", "Did you mean 'encoder_layers'?"),
        ("trainer:\n  max_step: 2\n", "Did you mean 'max_steps'?"),
        ("trainer: [\n", "config: overlay.yaml is no YAML file"),
    ],
)
def test_mistakes_in_yaml(run, tiny_config, overlay, message):
    Path("overlay.yaml").write_text(overlay)
    assert message in run("fit", "-c", tiny_config, "-c", "overlay.yaml", status=2)


def test_damaged_checkpoints_are_refused_before_anything_is_built(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    whole = path.read_bytes()
    cut = Path("cut.ckpt")
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert "is not a complete checkpoint" in run("test", "-c", tiny_config, "--ckpt_path", cut, status=2)
    damaged = bytearray(whole)
    with zipfile.ZipFile(path) as archive:
        tensors = (info for info in archive.infolist() if "/data/" in info.filename)
        start = max(tensors, key=lambda info: info.file_size).header_offset
    damaged[start : start + 30] = bytes(30)
    cut.write_bytes(damaged)
    assert "damaged" in run("test", "-c", tiny_config, "--ckpt_path", cut, status=2)
    damaged = bytearray(whole)
    damaged[start + 1000] ^= 1  # a bit of a weight, which nothing but the checksum tells
    cut.write_bytes(damaged)
    assert "is damaged (archive/data/" in run("test", "-c", tiny_config, "--ckpt_path", cut, status=2)
    torch.save({"weights": torch.zeros(1)}, cut)
    assert "has no 'state_dict'" in run("test", "-c", tiny_config, "--ckpt_path", cut, status=2)


def test_checkpoint_of_another_task_is_refused(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["task"] |= {"name": "detection", "class_path": "elsewhere.DetectionTask"}
    torch.save(checkpoint, "other.ckpt")
    printed = run("test", "-c", tiny_config, "--ckpt_path", "other.ckpt", status=2)
    assert "is of the task 'detection'" in printed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_says_so_and_keeps_the_older_checkpoint(run, tiny_config, in_folder, monkeypatch, number):
    """The disk is full from the second writing of last.ckpt on."""
    original = torch.save
    written = []

    def save(checkpoint, file):
        written.append(file.name)
        if len(written) > 1:
            file.write(b"half")
            raise OSError(number, os.strerror(number))
        original(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    printed = run("fit", "-c", tiny_config, "--run.checkpoint_every_n_steps", 1, status=2)
    assert f"{os.strerror(number)}" in printed
    assert "--ckpt_path" in printed
    assert "last.ckpt" in printed
    path = in_folder / "checkpoints" / "translation" / "tiny"
    assert torch.load(path / "last.ckpt", weights_only=True)["global_step"] == 1
    assert sorted(file.name for file in path.glob("*.ckpt*")) == ["last.ckpt"]
    assert not list(path.glob(".*.part"))


def test_names_with_a_dot(run, tiny_config, in_folder):
    runs = in_folder / "checkpoints" / "translation"
    for _ in range(2):
        run("fit", "-c", tiny_config, "--trainer.max_steps", 1, "--run.name", "v1.0")
    assert sorted(path.name for path in runs.iterdir()) == ["v1.0", "v1.0-2"]
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2, "--run.name", "v1.0", "--ckpt_path", "last")
    steps = [read_checkpoint(runs / name / "last.ckpt")["global_step"] for name in ("v1.0", "v1.0-2")]
    assert steps == [1, 2], "the newer one went on"


def test_results_go_where_they_are_wanted(run, tiny_config, in_folder, monkeypatch):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny"
    run("test", "--ckpt_path", path / "last.ckpt", "--run.name", "mine")
    run("test", "-c", tiny_config, "--ckpt_path", path / "last.ckpt", "--run.root=elsewhere")
    run("fit", "--ckpt_path", path / "last.ckpt", "--trainer.max_steps", 3, "--run.root", "elsewhere")
    assert (path.with_name("mine") / "test_metrics.json").is_file()
    assert (in_folder / "elsewhere/translation/tiny/test_metrics.json").is_file()
    assert read_checkpoint(in_folder / "elsewhere/translation/tiny-2/last.ckpt")["global_step"] == 3
    assert not (path / "test_metrics.json").exists()
    assert read_checkpoint(path / "last.ckpt")["global_step"] == 2

    renamed = path.rename(in_folder / "renamed")
    run("fit", "--ckpt_path", renamed / "last.ckpt", "--trainer.max_steps", 3)
    assert read_checkpoint(renamed / "last.ckpt")["global_step"] == 3, "it goes on where it lies"

    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != renamed and writable(path, mode))
    printed = run("predict", "--ckpt_path", renamed / "last.ckpt", status=2)
    assert "renamed cannot be written to" in printed
    assert "--run.root FOLDER" in printed
    assert not (renamed / "predictions").exists()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "export/model.json")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    printed = run("export", "--ckpt_path", renamed / "last.ckpt", status=2)
    assert "export/model.json: Read-only file system. If results cannot be written there" in printed


def test_what_a_checkpoint_without_a_run_lacks(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    checkpoint = read_checkpoint("checkpoints/translation/tiny/last.ckpt")
    torch.save({name: value for name, value in checkpoint.items() if name != "run"}, "bare.ckpt")
    torch.save(checkpoint | {"run": {"name": "tiny"}}, "half.ckpt")
    for name in ("bare.ckpt", "half.ckpt"):
        printed = run("predict", "--ckpt_path", name, "--data.predict_file", "-", status=2)
        assert f"'{name}' holds no configuration of a run. Give the configuration: -c FILE" in printed
    assert "'last' means the newest of a run. Give" in run("test", "--ckpt_path", "last", status=2)
    run("test", f"-c={tiny_config}", "--ckpt_path", "bare.ckpt")
    assert "takes the network as it is before any training" in run("test", "-c", tiny_config)
    assert "no subcommand: give one of those above" in run(status=2)


def test_help_shows_the_options_of_the_attention(run):
    printed = run("fit", "--model.help", "TranslationTask")
    assert "--model.self_attention.terms" in printed or "--self_attention.terms" in printed


def test_the_other_names_of_the_command():
    (script,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "lightning-attn")
    assert script.load() is main
    done = subprocess.run(
        [sys.executable, "-m", "lightning_attn", "fit", "--trainer.max_step", "1"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 2
    assert "Did you mean 'max_steps'?" in done.stderr


MISTAKES = """
from datamodules import WMT14DataModule
from lightning_attn.errors import InputError
from lightning_attn.errors import InputError
from lightning_attn.tasks import TranslationTask

ERRORS = {"input": InputError("pairs: give more of them"), "value": ValueError("`pairs`: not for users")}


class Task(TranslationTask):
    def __init__(self, mistake: str = "", **arguments):
        super().__init__(**arguments)
        self.mistake = mistake.removeprefix("built ")
        if mistake.startswith("built"):
            raise ERRORS[self.mistake]

    def training_step(self, batch, batch_idx):
        raise ERRORS[self.mistake]


class Batches:
    def __init__(self, mistake):
        self.mistake = mistake

    def __call__(self, samples):
        raise ERRORS[self.mistake]


class Data(WMT14DataModule):
    def __init__(self, mistake: str = "", **arguments):
        super().__init__(**arguments)
        self.mistake = mistake

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = Batches(self.mistake)
        return loader
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "mistakes.Task", "--model.mistake"],
        ["--data.num_workers", 1, "--data", "mistakes.Data", "--data.mistake"],
    ],
    ids=["task", "worker"],
)
def test_which_errors_of_a_users_class_keep_their_traceback(run, tiny_config, options, monkeypatch):
    Path("mistakes.py").write_text(MISTAKES)
    monkeypatch.delitem(sys.modules, "mistakes", raising=False)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    printed = run("fit", "-c", tiny_config, *options, "input", status=2)
    assert printed[printed.index("error: ") :] == "error: pairs: give more of them\n"
    with pytest.raises(ValueError, match="not for users"):
        run("fit", "-c", tiny_config, *options, "value")
    if options[0] == "--model":
        assert "error: pairs: give more of them\n" in run("fit", "-c", tiny_config, *options, "built input", status=2)
        with pytest.raises(ValueError, match=r"^`pairs`: not for users$"):
            run("fit", "-c", tiny_config, *options, "built value")
    monkeypatch.setenv("LIGHTNING_ATTN_TRACEBACK", "1")
    with pytest.raises(InputError, match="give more of them"):
        run("fit", "-c", tiny_config, *options, "input")


def test_errors_from_below_keep_their_traceback(run, tiny_config, monkeypatch):
    def broken(self, *args, **kwargs):
        raise ValueError("not for users")

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    with pytest.raises(ValueError, match="not for users"):
        run("fit", "-c", tiny_config)


def test_faults_within_an_operator_keep_theirs_too():
    with pytest.raises(RuntimeError) as caught:
        linear(torch.zeros(2, 3), torch.zeros(4, 5))
    assert message_of(caught.value) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.val_check_interval", 10**6], "`val_check_interval` (1000000) must be less than or equal"),
        (["--trainer.callbacks", "LearningRateFinder", "--trainer.callbacks.mode", "x"], "`mode` should be either of"),
        (
            ["--trainer.callbacks", "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{}"],
            "Empty dict",
        ),
    ],
)
def test_what_lightning_says_of_options(run, tiny_config, options, message):
    assert message in run("fit", "-c", tiny_config, "--trainer.check_val_every_n_epoch", 1, *options, status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "one.ckpt", "two.ckpt", "--outptu", "x"], "Did you mean 'output'?"),
        (["average"], "arguments are required: checkpoints"),
        (["export"], "arguments are required: ckpt_path"),
        (
            ["export", "--ckpt_path", "one.ckpt", "--format", "zip"],
            "One of 'safetensors', 'program', 'onnx' is expected",
        ),
        (["export", "--ckpt_path", "one.ckpt", "--size", "3"], "expected 2 arguments"),
        (["compare", "--out", "x", "one", "two"], "unrecognized arguments: --out"),
    ],
)
def test_mistakes_in_commands_without_a_trainer(run, arguments, message):
    Path("one.ckpt").touch()
    printed = run(*arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= 4


@pytest.mark.parametrize("command", ["average", "export", "compare", "profile", "attention-map"])
def test_help_of_commands_without_a_trainer(run, command):
    printed = run(command, "--help")
    assert printed.startswith(f"usage: python train.py {command} ")
    assert "--output OUTPUT" in printed
    assert "(type: " in printed or command == "compare"


def test_a_checkpoint_alone_is_enough(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, "--model.num_examples", 0, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny"
    checkpoint = torch.load(path / "last.ckpt", weights_only=True)
    assert checkpoint["run"]["name"] == "tiny"
    assert checkpoint["run"]["configuration"]["data"]["init_args"]["vocabulary_size"] == 300
    assert checkpoint["run"]["origin"]["torch"] == torch.__version__.split("+")[0]

    moved = path.rename(in_folder / "moved")
    (moved / "config_fit.yaml").unlink()
    run("test", "--ckpt_path", moved / "last.ckpt", "--model.decoding.beam_size", 1)
    resolved = yaml.safe_load((moved / "config_test.yaml").read_text())
    assert resolved["model"]["init_args"]["num_examples"] == 0
    assert resolved["model"]["init_args"]["decoding"]["beam_size"] == 1, "what is given goes first"
    assert resolved["trainer"]["max_steps"] != 2, "how it was trained is not how it is tested"
    assert (moved / "test_metrics.json").is_file()

    (moved / "run.json").unlink()
    run("predict", f"--ckpt_path={moved / 'last.ckpt'}")
    assert (path / "predictions" / "hypotheses.txt").is_file(), "a checkpoint outside of a run gets one of its name"


def test_translation_needs_no_training_text(run, tiny_config, corpus, in_folder):
    run("fit", "-c", tiny_config)
    path = in_folder / "checkpoints" / "translation" / "tiny"
    run("test", "--ckpt_path", path / "last.ckpt")
    evaluation = in_folder / "evaluation"
    evaluation.mkdir()
    for language in ("en", "de"):
        shutil.copy(corpus / f"test.{language}", evaluation)
    run("test", "--ckpt_path", path / "last.ckpt", "--data.root", evaluation)
    scores = [json.loads((path / f"test_metrics{number}.json").read_text()) for number in ("", "-2")]
    assert scores[0] == scores[1]
    sentences = in_folder / "sentences.en"
    sentences.write_text("a small sentence\n")
    run("predict", "--ckpt_path", path / "last.ckpt", "--data.root", in_folder, "--data.predict_file", sentences)
    assert len((path / "predictions" / "hypotheses.txt").read_text().splitlines()) == 1
    refused = run("fit", "--ckpt_path", path / "last.ckpt", "--data.root", evaluation, status=2)
    assert "train" in refused


def test_typed_lines_are_translated_one_by_one(run, tiny_config, in_folder):
    """Each answer is there before the next line is; nothing else is printed among them."""
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    checkpoint = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    task = TranslationTask.load(checkpoint)
    command = [
        sys.executable,
        REPOSITORY / "train.py",
        "predict",
        "--ckpt_path",
        checkpoint,
        "--data.predict_file",
        "-",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sentences = ["The woman reads a book.", "", "The man sees the dog \u00fcber\u2028all."]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        answers = []
        for sentence in sentences:
            process.stdin.write(f"{sentence}\n".encode())
            process.stdin.flush()
            answers.append(process.stdout.readline().decode().removesuffix("\n"))
        rest, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()
    assert rest == b""
    assert answers == task.predict(sentences)


def test_typed_lines_that_cannot_be_translated(run, tiny_config, in_folder, monkeypatch):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 1)
    checkpoint = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    typed = ["predict", "--ckpt_path", checkpoint, "--data.predict_file", "-"]
    for content, message in (
        (b"a dog\n\xff\n", "stdin, line 2: not UTF-8"),
        (b"a dog\n" + 2000 * b"dog " + b"\n", "standard input, line 2 has"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert message in run(*typed, "--data.on_long_line", "stop", status=2)


def test_training_goes_on_from_a_checkpoint_alone(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    path = in_folder / "checkpoints" / "translation" / "tiny"
    run("fit", "--ckpt_path", path / "last.ckpt", "--trainer.max_steps", 3)
    checkpoint = torch.load(path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["run"]["configuration"]["trainer"]["limit_val_batches"] == 1
