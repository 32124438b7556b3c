"""Every writer of files on a disk that fills at any byte: an error that names a file, and everything as it was."""

import contextlib
import errno
import random
import resource
import shutil
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch

from datamodules.miniature.detection import write_miniature_detection
from datamodules.miniature.segmentation import write_miniature_segmentation
from datamodules.miniature.street_detection import write_miniature_street_detection
from datamodules.miniature.translation import write_miniature_corpus
from datamodules.translation.parallel_text import Cleaning, FilePair
from datamodules.translation.token_cache import Preparation
from lightning_attn.export.checkpoint import export_checkpoint
from lightning_attn.io import (
    remove_parts,
    write_figure,
    write_file,
    write_json,
    write_table,
    written_together,
)
from lightning_attn.tasks.prediction_files import PartialResults
from lightning_attn.training.checkpoint_averaging import average_checkpoints
from lightning_attn.training.checkpoints import AtomicCheckpointIO
from lightning_attn.training.loggers import MetricsLogger
from lightning_attn.visualization.pictures import save_picture

PARTS = ("train", "val", "test")


@contextlib.contextmanager
def limited(size):
    """No file grows beyond a size in bytes; the operating system says so where it is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder):
    """Of every file but the notes of the token cache, which only save time."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "files")
    return {path.relative_to(folder): path.read_bytes() for path in found}


def figure():
    drawn = matplotlib.figure.Figure()
    drawn.add_subplot().plot([1, 2])
    return drawn


def noise():
    return np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)


def log(folder):
    logger = MetricsLogger(folder)
    logger.log_metrics({"loss": 0.1}, 0)
    logger.log_metrics({"loss": 0.2}, 1)
    logger.save()


def predict(folder):
    results = PartialResults(folder, 0, {"of": "this"})
    for number in range(5):
        results.add({"id": number, "text": "ü" * 100})
    results.close()


def prepare(folder, corpus):
    files = (FilePair(corpus / "train.en", corpus / "train.de"),)
    Preparation(files, "en", "de", 300, Cleaning()).build(folder, processes=1, show_progress=False)


WRITERS = {
    "file": lambda folder, _: write_file(folder / "new", lambda file: file.write(bytes(1000))),
    "replaced file": lambda folder, _: write_file(folder / "old", lambda file: file.write(bytes(1000)), replace=True),
    "table": lambda folder, _: write_table(folder / "new.csv", ["a"], [[number] for number in range(300)]),
    "json": lambda folder, _: write_json(folder / "new.json", list(range(300))),
    "figure": lambda folder, _: write_figure(folder / "new.svg", figure()),
    "manifest": lambda folder, _: write_json(folder / "new.json", dict.fromkeys(map(str, range(100))), replace=True),
    "checkpoint": lambda folder, _: AtomicCheckpointIO().save_checkpoint({"w": torch.ones(9999)}, folder / "old"),
    "corpus": lambda folder, _: write_miniature_corpus(folder / "set", {"train": 40, "valid": 2, "test": 2}),
    "detection": lambda folder, _: write_miniature_detection(folder / "set", dict.fromkeys(PARTS, 1)),
    "segmentation": lambda folder, _: write_miniature_segmentation(folder / "set", dict.fromkeys(PARTS, 1)),
    "streets": lambda folder, _: write_miniature_street_detection(folder / "set", dict.fromkeys(PARTS, 1)),
    "picture": lambda folder, _: save_picture(noise(), folder / "new.png"),
    "cache": prepare,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_changes_nothing(name, tmp_path, corpus):
    write = WRITERS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("what was there")
    sound = tmp_path / "sound"
    shutil.copytree(folder, sound)
    write(sound, corpus)
    largest = max(path.stat().st_size for path in sound.rglob("*") if path.is_file())
    chance = random.Random(0)
    for size in {0, 1, largest - 1, *(chance.randrange(largest) for _ in range(5))}:
        before = contents(folder)
        with pytest.raises(OSError, match=r"File too large|cannot be written") as error, limited(size):
            write(folder, corpus)
        assert error.value.errno == errno.EFBIG
        assert str(tmp_path) in str(error.value), "it names the place"
        assert contents(folder) == before
    write(folder, corpus)
    assert contents(folder).keys() >= {Path("old")}


@pytest.mark.parametrize(("write", "file"), [(log, "metrics.csv"), (predict, "rank-0.jsonl")])
def test_files_that_grow(tmp_path, write, file):
    """What was written stays, and the next call goes on."""
    write(tmp_path / "sound")
    size = (tmp_path / "sound" / file).stat().st_size
    for limit in (0, 1, size // 2, size - 1):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with pytest.raises(OSError, match=rf"File too large: '{folder}") as error, limited(limit):
            write(folder)
        assert error.value.errno == errno.EFBIG
        left = (folder / file).read_bytes() if (folder / file).exists() else b""
        assert (tmp_path / "sound" / file).read_bytes().startswith(left)


def test_an_export_is_whole_or_not_there(run, tiny_config, in_folder):
    run("fit", "-c", tiny_config)
    (checkpoint,) = in_folder.glob("checkpoints/*/tiny/last.ckpt")
    export_checkpoint(checkpoint, "sound")
    sizes = sorted(path.stat().st_size for path in Path("sound").iterdir())
    for size in (0, sizes[0] - 1, sizes[0], sizes[1] - 1):
        with pytest.raises(OSError, match="File too large: 'exported"), limited(size):
            export_checkpoint(checkpoint, "exported")
        assert not Path("exported").exists()
        with pytest.raises(OSError, match="File too large"), limited(size):
            average_checkpoints([checkpoint, checkpoint], "mean/of.safetensors")
        assert not Path("mean").exists()
    export_checkpoint(checkpoint, "exported")
    assert contents(Path("exported")).keys() == contents(Path("sound")).keys()


def write_texts(folder, names):
    with written_together(folder) as scratch:
        for name in names:
            (scratch / name).write_text(names)


def test_files_that_are_written_together(tmp_path):
    folder = tmp_path / "folder"
    write_texts(folder, "ac")
    with pytest.raises(FileExistsError, match=r"is not overwritten: '.*/c'"):
        write_texts(folder, "bcd")
    assert {str(path): content for path, content in contents(folder).items()} == {"a": b"ac", "c": b"ac"}
    (folder / ".killed.part").mkdir()
    remove_parts(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c"]


def test_messages_name_the_file_and_the_fix(run_process, tiny_config, in_folder):
    with limited(100):
        printed = run_process("fit", "-c", tiny_config, status=2).stderr
    assert "run.json: File too large (a limit of the shell: ulimit -f). Nothing older was lost." in printed
    assert "then resume with --ckpt_path auto" in printed
    assert not list(in_folder.glob("checkpoints/*/*")), "an empty run is no run"


@pytest.mark.parametrize(("stage", "result"), [("fit", None), ("test", "test_metrics.json"), ("predict", None)])
def test_a_run_directory_that_is_removed_meanwhile(run, tiny_config, in_folder, monkeypatch, stage, result):
    """A training ends, as half of a run looks like a run, and a prediction, whose file it was; a test is written."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run("fit", "-c", tiny_config)
    (folder,) = in_folder.glob("checkpoints/*/tiny")
    Path("callbacks.yaml").write_text("trainer:\n  callbacks: [{class_path: crashing.RemoveDirectory}]\n")
    more = ["--trainer.max_steps", 8, "--trainer.log_every_n_steps", 1] if stage == "fit" else []
    arguments = ["-c", tiny_config, "--ckpt_path", folder / "last.ckpt", "-c", "callbacks.yaml", *more]
    printed = run(stage, *arguments, status=0 if result else 2)
    if result:
        assert (folder / result).exists()
    else:
        assert f"{folder}" in printed
        assert "something has removed it meanwhile" in printed
        assert not folder.exists()


def test_a_temporary_folder_that_cannot_be_used(run_process, tiny_config):
    with limited(0):
        done = run_process("fit", "-c", tiny_config, status=2)
    assert "No usable temporary directory" in done.stderr
    assert "variable TMPDIR" in done.stderr
    assert "Traceback" not in done.stderr
