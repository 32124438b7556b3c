"""Files in a cell's folder that no run writes, studies that cannot be meant, and places that hold other things."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cell_command import TRAIN
from PIL import Image
from report_cells import fill, write_study
from rich.console import Console

from lightning_attn.errors import ExistingFileError, InputError
from lightning_attn.study.grid import Study
from lightning_attn.study.report.images import size_of, thumbnail
from lightning_attn.study.report.svg import Scale, standalone
from lightning_attn.study.report.writing import write_report
from lightning_attn.study.runner import Runner
from lightning_attn.study.states import CellFolder, read_statuses
from lightning_attn.study.tables import as_data, cells_table, groups_table


@pytest.fixture
def made(tmp_path):
    """A study of two groups that are done, and the folder of its first cell."""
    study = write_study(tmp_path, groups=("none", "0110"), seeds=(0, 1), findings=None)
    fill(study, tmp_path / "cells")
    return study, tmp_path / "cells", tmp_path / "cells" / study.name / study.cells[0].name


def show(study, root):
    """The first cell's status, after everything that shows it has been made."""
    statuses = read_statuses(study, root / study.name)
    json.dumps(as_data(study, statuses), allow_nan=False)
    with Path(os.devnull).open("w") as file:
        Console(file=file, width=40).print(cells_table(study, statuses), groups_table(study, statuses))
    write_report([study], root, root / study.name / "report", "python train.py")
    return statuses[0]


@pytest.mark.parametrize(
    "change",
    [
        *({"started": None}, {"started": "x"}, {"ended": []}, {"ended": float("nan")}, {"started": 10**400}),
        *({"exit_code": []}, {"code": []}, {"host": 5}, {"stage": "x"}, {"runner": "1"}),
    ],
)
def test_attempts_that_cannot_be_are_none(made, change):
    study, root, folder = made
    stored = json.loads((folder / "cell.json").read_text())
    assert len(CellFolder(folder).attempts()) == 2
    stored["attempts"][-1] |= change
    (folder / "cell.json").write_text(json.dumps(stored))
    assert CellFolder(folder).attempts() == []
    assert show(study, root).score is not None


def test_clocks_that_are_set_back_give_no_negative_times(made):
    study, root, folder = made
    stored = json.loads((folder / "cell.json").read_text())
    stored["attempts"][0]["ended"] = stored["attempts"][0]["started"] - 5000
    (folder / "cell.json").write_text(json.dumps(stored))
    assert show(study, root).seconds == 22.0  # of the test alone


@pytest.mark.parametrize("score", ["1" + "0" * 400, "1e308", "-1e400", "NaN", '"0.5"', "[]", "true"])
def test_scores_that_are_none_are_said(made, score):
    study, root, folder = made
    (folder / "translation/run/test_metrics.json").write_text(f'{{"test/bleu": {score}}}')
    status = show(study, root)
    assert (status.state, status.score) == ("failed", None)
    assert "test_metrics.json" in status.reason


@pytest.mark.parametrize("name", ["test_metrics.json", "run.json", "metrics.csv"])
@pytest.mark.parametrize("kind", ["dangling", "pipe", "folder"])
def test_other_things_than_files_are_not_waited_for(made, name, kind):
    study, root, folder = made
    path = folder / "translation/run" / name
    path.unlink()
    {"dangling": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    state = show(study, root).state
    assert state != "done" or name == "metrics.csv"


@pytest.mark.parametrize("name", ["cell.json", "profile.json", "output.log", ".lock", "slurm_job"])
def test_pipes_in_the_folder_are_not_waited_for(made, name):
    study, root, folder = made
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert show(study, root).state == "done"


def test_curves_without_steps_or_of_huge_ones(made):
    study, root, folder = made
    metrics = folder / "translation/run/metrics.csv"
    for content in ("epoch,val/bleu\n1,2\n", f"step,val/bleu\n{'1' * 400},0.5\n2,0.25\n", "step,val/bleu\n1,inf\n"):
        metrics.write_text(content)
        assert show(study, root).state == "done"


def test_halves_of_surrogate_pairs_are_shown(made):
    study, root, folder = made
    run = folder / "translation/run"
    words = dict.fromkeys(("source", "reference", "hypothesis"), "a \ud83d")
    (run / "predictions/test_examples.json").write_text(json.dumps({"examples": [{"id": 1} | words]}))
    (run / "test_metrics.json").write_text(json.dumps({"\ud800": 1}))
    show(study, root).reason.encode()  # as a terminal does


def test_markup_of_the_terminal_is_text(tmp_path):
    study = write_study(tmp_path, groups=("none",), metric="test/[/x]", mode="max", findings=None)
    study = Study.read(_changed(study.path, reference=[{"cell": "none", "[/y]": 1.0}]))
    statuses = read_statuses(study, tmp_path)
    with (tmp_path / "printed").open("w") as file:
        console = Console(file=file, width=120)
        console.print(cells_table(study, statuses, "[/z]"), groups_table(study, statuses))
    printed = (tmp_path / "printed").read_text()
    assert all(word in printed for word in ("test/[/x]", "[/y]", "[/z]"))


def _changed(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    b:", "    a:", "'a' is there twice"),
        ("seeds: [0]", "seeds: [0]\nseeds: [1]", "'seeds' is there twice"),
        ("{model.q: 1}", "{model.q: 2020-01-01}", "quote it"),
        ("{model.q: 1}", "{model.q: &x [*x]}", "cannot be given"),
        ("seeds: [0]", "seeds: [4294967296]", "4294967295"),
        ("seeds: [0]", f"scale: 1{'0' * 400}", "must be a positive number"),
        ("base: base.yaml", "base: itself.yaml", "contains itself"),
    ],
)
def test_studies_that_cannot_be_meant(tmp_path, old, new, message):
    text = "base: base.yaml\naxes:\n  g:\n    a: {model.q: 1}\n    b: {model.q: 2}\nseeds: [0]\nmetric: test/bleu\n"
    (tmp_path / "base.yaml").write_text("model: {1: a, b: c}\n")  # keys without an order
    (tmp_path / "itself.yaml").write_text("model: &m {a: *m}\n")
    path = tmp_path / "study.yaml"
    path.write_text(text + "description:\n")
    assert Study.read(path).description == ""
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        Study.read(path)


def test_a_report_takes_the_place_of_no_other_files(made):
    study, root, _ = made
    output = root / "paper"
    (output / "plots").mkdir(parents=True)
    (output / "plots/mine.png").write_text("precious")
    (output / "groups.csv").write_text("precious")
    with pytest.raises(ExistingFileError, match=r"groups\.csv"):
        write_report([study], root, output, "train.py")
    assert (output / "groups.csv").read_text() == "precious"
    assert not (output / "index.html").exists()
    (output / "groups.csv").unlink()
    for _ in range(2):
        write_report([study], root, output, "train.py")
    assert (output / "plots/mine.png").read_text() == "precious"


def test_drawings_of_any_numbers_and_characters():
    for low, high in ((-1.7e308, 1.7e308), (0.0, 5e-324), (1e-300, 2e-300), (5.0, 5.0)):
        scale = Scale(low, high, 0.0, 100.0)
        assert 0 <= scale.clip(low) <= 100
        assert 1 <= len(scale.ticks()) <= 20
    drawing = standalone("", "a\x01\x1b\ud800b", "", 10, 10)
    assert "a\ufffd\ufffd\ufffdb" in drawing


def test_pictures_are_png_or_jpeg(tmp_path):
    """Pillow runs Ghostscript for EPS, whatever a file is called."""
    path = tmp_path / "0.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    assert (size_of(path), thumbnail(path, 5000)) == (0, "")
    Image.new("RGB", (8, 8)).save(path)
    assert size_of(path) == 64
    assert thumbnail(path, 5000)


@pytest.fixture
def study(in_folder):
    """Two cells of two seconds."""
    Path("train.py").write_text(TRAIN)
    Path("base.yaml").write_text("model: {class_path: none}\n")
    Path("study.yaml").write_text(
        "base: base.yaml\naxes: {g: {a: {model.quality: 1, model.pause: 0.1, trainer.max_steps: 20}}}\nseeds: [0, 1]\n"
        "metric: test/bleu\n"
    )
    return Study.read("study.yaml")


def test_cells_are_not_trained_with_files_that_were_edited(study):
    """They would be in a folder that is named by what the files said before."""
    Path("base.yaml").write_text("model: {class_path: none, dim: 5}\n")
    with Path("printed").open("w") as file:
        runner = Runner(study, Path("cells"), [sys.executable, "train.py"], console=Console(file=file))
        assert [one.state for one in runner.run(study.cells)] == ["waiting", "waiting"]
    assert "have changed" in Path("printed").read_text()
    assert not Path("events.log").exists()


def test_an_output_that_is_closed_ends_the_cells_saving(study):
    """As in `study run ... | head -1`."""
    command = [sys.executable, "train.py", "study", "run", "study.yaml", "--root", ".", "--no-profile"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) != 0
    folders = [CellFolder(Path("study") / cell.name) for cell in study.cells]
    assert not any(folder.is_taken() for folder in folders)
    assert all(attempt.ended is not None for folder in folders for attempt in folder.attempts())
    assert {one.state for one in read_statuses(study, Path("study"))} <= {"interrupted", "waiting"}


def test_any_number_of_jobs(study):
    assert Runner(study, Path("cells"), ["train"], jobs=10**12).jobs == 2
