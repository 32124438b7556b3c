"""What a run ends with, what is kept of it, and how runs are compared."""

import csv
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.loggers.logger import DummyLogger

from datamodules.translation import token_cache
from lightning_attn.cli.comparison import compare_runs
from lightning_attn.tasks import SegmentationTask
from lightning_attn.training.checkpoints import read_checkpoint

RUN = Path("checkpoints/translation/tiny")


def test_a_training_says_how_it_ended_and_what_is_next(run, tiny_config):
    printed = run("fit", "-c", tiny_config)
    assert "Training ended at step 4: max_steps 4 is reached." in printed
    with (RUN / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    best = min(rows, key=lambda row: float(row["val/loss"]))
    assert f"Best val/loss {float(best['val/loss']):.5g} at step " in printed
    assert f"test --ckpt_path {(RUN / 'best.ckpt').absolute()}" in printed
    assert f"predict --ckpt_path {(RUN / 'best.ckpt').absolute()}" in printed
    printed = run("fit", "-c", tiny_config, "--trainer.val_check_interval", 100, "--trainer.limit_train_batches", 50)
    assert "There is no best.ckpt: no validation took place in 4 steps (val_check_interval 100)" in printed
    printed = run("fit", "-c", tiny_config, "--data.valid_files", "")
    assert "No best.ckpt will be written, as there is no validation" in printed
    assert "There is no best.ckpt: there is no validation" in printed


def test_early_stopping_is_named(run, tiny_config):
    options = ["--trainer.max_steps", 40, "--trainer.val_check_interval", 1, "--model.optimizer.learning_rate", 1e-9]
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2, "min_delta": 1.0}}
    Path("stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stopping]}}))
    printed = run("fit", "-c", tiny_config, "-c", "stop.yaml", *options)
    assert "val/loss was not better in 2 validations (EarlyStopping)" in printed


def test_the_best_few_are_kept_beside_others(run, tiny_config):
    own = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.monitor", "val/loss"]
    own += ["--trainer.callbacks.save_top_k", 2, "--trainer.callbacks.dirpath", "own"]
    options = ["--trainer.max_steps", 6, "--trainer.val_check_interval", 1, "--run.save_top_k", 3]
    run("fit", "-c", tiny_config, *options, *own)
    assert len(list(RUN.glob("top-*.ckpt"))) == 3
    assert (RUN / "best.ckpt").is_file()
    assert (RUN / "last.ckpt").is_file()
    assert len(list(Path("own").glob("*.ckpt"))) == 2


def test_a_finished_training_says_that_there_is_nothing_to_do(run, tiny_config):
    run("fit", "-c", tiny_config)
    printed = run("fit", "-c", tiny_config, "--ckpt_path", "last")
    assert "Nothing was trained: at step 4, max_steps 4 is reached. Raise --trainer.max_steps" in printed
    assert "Training ended" not in printed
    printed = run("fit", "-c", tiny_config, "--ckpt_path", "last", "--trainer.max_steps", 6)
    assert "Training ended at step 6: max_steps 6 is reached." in printed


def test_another_logger_stands_beside_metrics_csv(run, tiny_config):
    run("fit", "-c", tiny_config, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs")
    assert (RUN / "metrics.csv").is_file()
    assert list(Path("logs").rglob("metrics.csv"))


def test_no_logging_of_steps(run, tiny_config):
    run("fit", "-c", tiny_config, "--trainer.log_every_n_steps", 0)


def test_a_configuration_beside_a_checkpoint_changes_what_is_stored(run, tiny_config):
    run("fit", "-c", tiny_config)
    Path("more.yaml").write_text("data:\n  init_args:\n    eval_max_tokens: 300\ntrainer:\n  limit_test_batches: 1\n")
    printed = run("test", "--ckpt_path", RUN / "last.ckpt", "-c", "more.yaml", "--model.num_examples", 0)
    assert "BLEU" in printed
    written = yaml.safe_load((RUN / "config_test.yaml").read_text())
    assert written["data"]["init_args"]["eval_max_tokens"] == 300
    assert written["model"]["init_args"]["dim"] == 16, "as in the checkpoint"
    assert written["trainer"]["limit_test_batches"] == 1


def test_the_learning_rate_finder_finds_its_field(run, tiny_config):
    finder = ["--trainer.callbacks", "LearningRateFinder", "--trainer.callbacks.num_training_steps", 24]
    printed = run("fit", "-c", tiny_config, *finder, "--trainer.callbacks.early_stop_threshold", "null")
    assert "Training ended at step 4" in printed
    found = float(re.search(r"Learning rate set to (\S+)", printed).group(1))
    assert found != 0.01
    checkpoint = torch.load(RUN / "last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == found
    assert checkpoint["task"]["arguments"]["optimizer"]["learning_rate"] == pytest.approx(found)


def test_best_by_another_score(run, tiny_config):
    run("fit", "-c", tiny_config, "--run.monitor", "val/chrf")
    state = next(iter(torch.load(RUN / "best.ckpt", weights_only=True)["callbacks"]))
    assert "'monitor': 'val/chrf', 'mode': 'max'" in state
    printed = run("fit", "-c", tiny_config, "--run.monitor", "val/strange", status=2)
    assert "whether more or less of 'val/strange' is better is not known; give --run.monitor_mode" in printed


def test_early_stopping_the_wrong_way_round_is_refused(run, tiny_config):
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/bleu"]
    printed = run("fit", "-c", tiny_config, *stopping, status=2)
    assert "EarlyStopping watches val/bleu, of which the max is best, with mode 'min'" in printed
    run("fit", "-c", tiny_config, *stopping, "--trainer.callbacks.mode", "max")


def test_options_win_wherever_files_stand(run, tiny_config):
    run("fit", "--trainer.max_steps", 2, "-c", tiny_config, "--run.name", "two")
    assert torch.load(RUN.with_name("two") / "last.ckpt", weights_only=True)["global_step"] == 2


def test_another_name_stays_beside_the_run_of_the_checkpoint(run, tiny_config):
    run("fit", "-c", tiny_config, "--run.root", "there")
    run("predict", "--ckpt_path", "there/translation/tiny/last.ckpt", "--run.name", "other")
    assert Path("there/translation/other/predictions/hypotheses.txt").is_file()
    assert not Path("checkpoints").exists()


def test_the_batch_size_finder_finds_the_tokens_of_a_batch(run, tiny_config):
    finder = ["--trainer.callbacks", "BatchSizeFinder", "--trainer.callbacks.batch_arg_name", "max_tokens"]
    finder += ["--trainer.callbacks.init_val", 64, "--trainer.callbacks.max_trials", 2]
    # Lightning begins nothing with a batch of as many tokens as there are sentences.
    printed = run("fit", "-c", tiny_config, *finder, "--data.max_tokens", 200)
    assert "Batch size 64 succeeded, trying batch size 128" in printed
    assert "Training ended at step 4" in printed


def test_the_batch_size_finder_says_that_the_learning_rate_is_for_another_batch(run, segmentation_config):
    finder = ["--trainer.callbacks", "BatchSizeFinder", "--trainer.callbacks.init_val", 4]
    finder += ["--trainer.callbacks.max_trials", 1, "--trainer.callbacks.steps_per_trial", 1]
    with pytest.warns(UserWarning, match="scaled for a global batch size of 2, .* to a global batch size of 4"):
        run("fit", "-c", segmentation_config, *finder)


SERVICE = """
from pytorch_lightning.loggers.logger import DummyLogger


class WandbLogger(DummyLogger):
    made = []

    def __init__(self, project: str, id: str | None = None, save_dir: str = "."):
        super().__init__()
        self.id, self.folder = id or f"id{len(self.made)}", save_dir
        self.made.append(self)

    @property
    def version(self):
        return self.id
"""


def test_a_logger_of_a_service_goes_on_with_its_run(run, tiny_config):
    """Under the same id when the run goes on, and its files lie in the run directory."""
    Path("service.py").write_text(SERVICE)
    logger = ["--trainer.logger", "service.WandbLogger", "--trainer.logger.project", "x"]
    run("fit", "-c", tiny_config, *logger)
    made = sys.modules["service"].WandbLogger.made
    first = made[-1]
    assert first.folder == str((RUN / ".").absolute())
    run("fit", "-c", tiny_config, *logger, "--ckpt_path", "last", "--trainer.max_steps", 6)
    assert (made[-1].id, made[-1].folder) == (first.id, first.folder)
    run(
        "fit",
        "-c",
        tiny_config,
        *logger,
        "--trainer.logger.id",
        "mine",
        "--ckpt_path",
        "last",
        "--trainer.max_steps",
        8,
    )
    assert made[-1].id == "mine"
    run("fit", "-c", tiny_config, *logger)
    assert made[-1].id != first.id, "another run"


def test_runs_are_compared(run, tiny_config):
    run("fit", "-c", tiny_config, "--run.name", "one")
    run("fit", "-c", tiny_config, "--run.name", "two", "--model.cross_attention.terms", "0011")
    folder = Path("checkpoints/translation")
    run("test", "--ckpt_path", folder / "two/last.ckpt", "--model.num_examples", 0)
    comparison = compare_runs([folder / "one", folder / "two"])
    assert comparison.differences() == [("model.cross_attention.terms", "1111", "0011")]
    scores = {name: values for name, *values in comparison.scores()}
    assert scores["steps"][0] == scores["steps"][1]
    with (folder / "two/metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert scores["val/loss, best"][1].startswith(f"{min(losses):.5g} at ")
    tested = json.loads((folder / "two/test_metrics.json").read_text())
    assert scores["test/loss"] == ["-", f"{tested['test/loss']:.5g}"]
    printed = run("compare", folder / "one", folder / "two", "--output", "curves.png")
    assert "model.cross_attention.terms" in printed
    with Image.open("curves.png") as figure:
        assert min(figure.size) > 200
    run("compare", folder / "one", folder / "two", "--output", "table.csv")
    with Path("table.csv").open() as file:
        assert next(csv.reader(file)) == ["", "one", "two"]


@pytest.fixture(scope="module")
def count_opens():
    """Calls a function and returns how often Python opened a file for reading meanwhile."""
    opened = []
    watching = []

    def watch(event, arguments):
        if watching and event == "open" and not set("wxa") & set(str(arguments[1])):
            opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | Path) else "")

    sys.addaudithook(watch)  # which cannot be removed

    def call(path, function, *arguments):
        opened.clear()
        watching.append(True)
        try:
            function(*arguments)
        finally:
            watching.clear()
        return opened.count(str(path))

    return call


def test_a_command_reads_a_checkpoint_once(run, tiny_config, count_opens):
    run("fit", "-c", tiny_config)
    copies = [Path(shutil.copy(RUN / "best.ckpt", f"{number}.ckpt")).absolute() for number in range(4)]
    once = count_opens(copies[0], read_checkpoint, copies[0])
    assert once > 0
    assert count_opens(copies[1], run, "test", "--ckpt_path", copies[1]) == once
    assert count_opens(copies[2], run, "fit", "-c", tiny_config, "--ckpt_path", copies[2]) == once
    initial = ["--run.initial_weights", copies[3], "--data.vocabulary", copies[3]]
    assert count_opens(copies[3], run, "fit", "-c", tiny_config, *initial) == once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_training_leaves_nothing_half_done(run, tiny_config, monkeypatch, tmp_path, number):
    def interrupted(*_, **__):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(token_cache, "train_vocabulary", interrupted)
    cache = tmp_path / "new_cache"
    earlier = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, which the command respects
    try:
        run("fit", "-c", tiny_config, "--data.cache_dir", cache, status=128 + number)
    finally:
        signal.signal(number, earlier)
    assert not list(cache.glob(".*"))
    assert not list(Path("checkpoints").rglob("run.json"))


def test_pictures_go_to_every_kind_of_logger():
    class WandbLogger(DummyLogger):
        def log_image(self, key, images, step):
            shown.append((key, images[0].shape, step))

    class MLFlowLogger(DummyLogger):
        run_id = "1"

        @property
        def experiment(self):
            return SimpleNamespace(log_image=lambda run, picture, file: shown.append((run, picture.shape, file)))

    shown = []
    task = SegmentationTask()
    task.trainer = SimpleNamespace(loggers=[WandbLogger(), MLFlowLogger()], global_step=7)
    task.log_picture("val/street", np.zeros((4, 6, 3), dtype=np.uint8))
    assert shown == [("val/street", (4, 6, 3), 7), ("1", (4, 6, 3), "val/street-7.png")]


def test_help_says_what_the_words_for_checkpoints_mean(run):
    printed = " ".join(run("fit", "--help").split())
    assert "for fit also 'auto', which is 'last'" in printed
    assert "hpc" not in printed


def test_a_joint_run_is_compared_with_one_of_a_task_alone(tmp_path, monkeypatch):
    """Options and scores of the same task are in one row, and those of a task that the other lacks are left out."""
    detection = {"class_path": "lightning_attn.tasks.DetectionTask", "init_args": {"detector": {"fc_dim": 16}}}
    segmentation = {"class_path": "lightning_attn.tasks.SegmentationTask", "init_args": {"num_pictures": 2}}
    shared = {"attention": {"terms": "1111"}, "optimizer": {"learning_rate": 0.1}}
    boxes = {"class_path": "COCODataModule", "init_args": {"batch_size": 2}}
    streets = {"class_path": "CityscapesDataModule", "init_args": {"batch_size": 3}}
    joint = {
        "model": {
            "class_path": "lightning_attn.tasks.MultitaskTask",
            "init_args": {"tasks": {"boxes": detection, "labels": segmentation}, **shared},
        },
        "data": {"class_path": "MultitaskDataModule", "init_args": {"members": {"boxes": boxes, "labels": streets}}},
    }
    of_one = {"detector": {"fc_dim": 32}, **shared, "optimizer": {"learning_rate": 0.2}}
    alone = {"model": detection | {"init_args": of_one}, "data": boxes}
    monkeypatch.chdir(tmp_path)
    for name, configuration, scores, logged in (
        ("joint", joint, {"test/boxes/ap": 0.5, "test/joint": 0.4}, "val/boxes/ap"),
        ("alone", alone, {"test/ap": 0.25}, "val/ap"),
    ):
        Path(name).mkdir()
        Path(name, "config_fit.yaml").write_text(yaml.safe_dump(configuration))
        Path(name, "test_metrics.json").write_text(json.dumps(scores))
        Path(name, "metrics.csv").write_text(f"epoch,step,{logged}\n0,1,{scores.get('test/ap', 0.5)}\n")
    comparison = compare_runs(["joint", "alone"])
    assert comparison.names == ("joint", "alone (as boxes)")
    assert comparison.differences() == [
        ("data.class_path", "MultitaskDataModule", "-"),
        ("data.members.labels.class_path", "CityscapesDataModule", "-"),
        ("model.class_path", "lightning_attn.tasks.MultitaskTask", "-"),
        ("model.optimizer.learning_rate", "0.1", "0.2"),
        ("model.tasks.boxes.detector.fc_dim", "16", "32"),
        ("model.tasks.labels.class_path", "lightning_attn.tasks.SegmentationTask", "-"),
    ]
    assert comparison.scores()[1:] == [
        ("val/boxes/ap, best", "0.5 at 2", "0.25 at 2"),
        ("test/boxes/ap", "0.5", "0.25"),
        ("test/joint", "0.4", "-"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "1 run has nothing to be compared with"),
        (["nothing", "nowhere"], "nothing is no run directory"),
        ([".", "."], "holds no config_fit.yaml"),
    ],
)
def test_what_cannot_be_compared(run, arguments, message):
    assert message in run("compare", *arguments, status=2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config_fit.yaml", "a: ["),
        ("config_fit.yaml", "[1]"),
        ("test_metrics.json", '{"a":'),
        ("test_metrics.json", "[1]"),
        ("metrics.csv", "epoch,step,val/loss\n1,,3\n"),
    ],
)
def test_damaged_files_of_runs_are_named(run, tmp_path, name, content):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config_fit.yaml").write_text("model: {dim: 2}\n")
    (tmp_path / "two" / name).write_text(content)
    assert f"{tmp_path / 'two' / name} cannot be read" in run("compare", tmp_path / "one", tmp_path / "two", status=2)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("one", "two"), ("one", "two")),
        (("a/run", "b/run"), ("a", "b")),
        (
            ("s/self_attention=0010_seed=0_7dc39098/x/run", "s/self_attention=1111_seed=0_d90c20fe/x/run"),
            ("attention=0010_seed=0", "attention=1111_seed=0"),
        ),
        (("s/self_attention=0010_seed=0_7dc39098/x/run", "s/self_attention=0010_seed=12_d90c20fe/x/run"),
            ("seed=0", "seed=12")),
        # The same labels with another configuration.
        (("s/a=1_seed=0_7dc39098/x/run", "s/a=1_seed=0_d90c20fe/x/run"), ("seed=0_7dc39098", "seed=0_d90c20fe")),
        (("s/a=1_seed=0_7dc39098/x/run", "t/a=1_seed=0_7dc39098/x/run"), ("s", "t")),
        (("run", "deep/run"), ("run", "deep/run")),
    ],
)  # fmt: skip
def test_compared_runs_are_called_by_what_differs(tmp_path, monkeypatch, folders, expected):
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config_fit.yaml").write_text("{}")
    assert compare_runs(folders).names == expected
