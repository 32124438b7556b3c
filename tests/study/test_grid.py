import copy
import re
from pathlib import Path

import pytest
import yaml

from lightning_attn.study.grid import Study

REPOSITORY = Path(__file__).parents[2]

STUDY = {
    "base": ["base.yaml"],
    "axes": {
        "attention": {"none": "none.yaml", "0010": {"model.terms": "0010"}},
        "size": {"small": {"model.dim": 8}, "large": [{"model.dim": 16}, "long.yaml"]},
    },
    "exclude": [{"attention": "none", "size": "large"}],
    "seeds": [0, 1, 2],
    "metric": "test/bleu",
    "budget": "2 h",
    "time_per_cell": "90 s",
    "reference": [{"cell": {"attention": "none", "size": "small"}, "BLEU": 20.9}],
    "findings": [
        {
            "claim": "E3 helps",
            "cells": [{"attention": "0010", "size": "small"}, {"attention": "none", "size": "small"}],
            "expected": "greater",
        }
    ],
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model: {dim: 4}\ntrainer: {max_steps: 10}\n")
    Path("none.yaml").write_text("model: {mechanism: none}\n")
    Path("long.yaml").write_text("trainer: {max_steps: 20}\n")

    def call(*changes):
        content = copy.deepcopy(STUDY)
        for *path, name, value in changes:
            place = content
            for key in path:
                place = place[key]
            place[name] = value
        Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return Path("study.yaml")

    return call


def test_cells_are_all_combinations_but_those_excluded(write):
    study = Study.read(write())
    assert study.groups == [("none", "small"), ("0010", "small"), ("0010", "large")]
    assert [(cell.group, cell.seed) for cell in study.cells] == [
        (group, seed) for group in study.groups for seed in (0, 1, 2)
    ]
    assert [cell.total_steps for cell in study.cells] == [10] * 6 + [20] * 3
    assert (study.budget, study.time_per_cell, study.mode) == (7200.0, 90.0, "max")


def test_a_cell_is_the_public_command(write):
    cell = Study.read(write()).cells[-1]
    assert cell.readable_name == "attention=0010_size=large_seed=2"
    options = ["--model.terms", "0010", "--model.dim", "16", "--seed_everything", "2"]
    place = ["--run.root", "folder", "--run.name", "run", "--ckpt_path"]
    files = ["-c", "base.yaml", "-c", "long.yaml"]
    assert cell.arguments("fit", Path("folder")) == ["fit", *files, *options, *place, "auto"]
    assert cell.arguments("test", Path("folder")) == ["test", *files, *options, *place, "best"]
    line = cell.shell_line(["python", "train.py"], Path("a folder"))
    assert line.startswith("python train.py fit -c base.yaml")
    assert line.count(" && ") == 1
    assert "--run.root 'a folder'" in line


def test_the_digest_follows_what_is_trained_and_nothing_else(write):
    def digests(**changes):
        return {cell.readable_name: cell.digest for cell in Study.read(write(*changes.get("changes", ()))).cells}

    before = digests()
    assert len(set(before.values())) == len(before)
    assert all(len(one) == 8 and int(one, 16) >= 0 for one in before.values())
    Path("base.yaml").write_text("# a comment\ntrainer: {max_steps: 10}\nmodel:\n  dim: 4\n")
    assert digests(changes=[("description", "other words"), ("findings", [])]) == before
    Path("none.yaml").write_text("model: {mechanism: none, more: 1}\n")
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {
        f"attention=none_size=small_seed={seed}" for seed in range(3)
    }


def test_options_win_over_files_as_in_the_command(write):
    Path("long.yaml").write_text("trainer: {max_steps: 20}\nmodel: {dim: 99}\n")
    changed = Study.read(write(("axes", "size", "large", [{"trainer.max_steps": 7}, "long.yaml"])))
    assert changed.cells[-1].total_steps == 7


def test_options_of_every_cell_win_over_files_and_are_a_part_of_the_digest(write):
    study = Study.read(write(("options", {"trainer.max_steps": 7})))
    assert {cell.total_steps for cell in study.cells} == {7}
    assert all("--trainer.max_steps 7" in " ".join(cell.arguments("fit", Path("cell"))) for cell in study.cells)
    before = Study.read(write())
    assert not {cell.digest for cell in study.cells} & {cell.digest for cell in before.cells}


def test_studies_of_one_folder_share_the_cells_that_both_have(write):
    """A joint training has a score for each task: one study compares those of one, another those of the other."""
    one = Study.read(write(("cells", "joint"), ("metric", "test/detection/ap")))
    others = write(("cells", "joint"), ("metric", "test/segmentation/miou"), ("exclude", []), ("findings", []))
    other = Study.read(others)
    assert {one.folder, other.folder} == {"joint"}
    assert [one.member, other.member, Study.read(write()).member] == ["detection", "segmentation", ""]
    names = {cell.name for cell in one.cells}
    assert names < {cell.name for cell in other.cells}
    assert Study.read(write()).folder == "study"


def test_select(write):
    study = Study.read(write())
    assert {cell.group for cell in study.select(["size=small"])} == {("none", "small"), ("0010", "small")}
    assert [cell.name for cell in study.select(["attention=0010", "size=large", "seed=0", "seed=2"])] == [
        cell.name for cell in study.cells[-3:] if cell.seed != 1
    ]
    assert study.select([]) == list(study.cells)
    for word, message in [
        ("size", "'size' is not AXIS=LABEL"),
        ("colour=red", "attention, size, seed"),
        ("size=huge", "size has no 'huge'; it has small, large"),
    ]:
        with pytest.raises(ValueError, match=message):
            study.select([word])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("axis", {}), "study.yaml: axis: there is no such key.*Did you mean 'axes'"),
        (("cells", "../joint"), "cells: must be the name of a folder for the cells, such as joint, got '../joint'"),
        (("cells", "report"), "cells: must be the name of a folder"),
        (("base", []), "base: name at least one"),
        (("base", ["bose.yaml"]), "base: bose.yaml is not there.*Did you mean base.yaml"),
        (("axes", {}), "axes: must hold labelled values"),
        (("axes", "attention", {8: "none.yaml"}), "axes.attention.8: the label is read as the int 8: quote it"),
        (("axes", "attention", "a/b", "none.yaml"), "axes.attention.a/b: a label has letters"),
        (("axes", "attention", "x", {"run.name": "y"}), "axes.attention.x.run.name: is no option such as"),
        (("axes", "attention", "x", {"model.dim": 1}), "axes.size: sets model.dim, which the axis attention sets too"),
        (("axes", "seed", {"x": "none.yaml"}), "axes.seed: an axis is named by .* not 'seed'"),
        (("options", {"model.dim": 8}), "axes.size: sets model.dim, which options sets for every cell"),
        (("options", {"run.name": "y"}), "options.run.name: is no option such as"),
        (("options", 3), "options: must hold options"),
        (("seeds", 3), "seeds: must be a list of different numbers"),
        (("seeds", [1, 1]), "seeds: must be a list of different numbers"),
        (("metric", "bleu"), "metric: must be a score"),
        (("metric", "test/unheard"), "mode: say whether"),
        (("scale", 0), "scale: must be a positive number, got 0"),
        (("budget", "2 hours"), "budget: must be a time such as .*got '2 hours'"),
        (("exclude", [{"attention": "0011"}]), r"exclude\[0\].attention: attention has no label '0011'"),
        (("exclude", [{"attention": ["none", "0010"]}]), "exclude: no cell is left"),
        (("reference", 0, "cell", "none"), r"reference\[0\].cell: must give a label for each of attention, size"),
        (("reference", 0, "BLEU", "high"), r"reference\[0\].BLEU: must be a number, got 'high'"),
        (("reference", 0, "cell", "size", "large"), r"reference\[0\].cell: .* is excluded"),
        (("findings", 0, "expected", "better"), r"findings\[0\].expected: must be greater, less, equal"),
        (("findings", 0, "expected", "equal"), r"findings\[0\].margin: must be at least 0, and more where equality"),
        (("findings", 0, "cells", []), r"findings\[0\].cells: must be two cells"),
        (("findings", 0, "cell", []), r"findings\[0\].cell: there is no such key.*Did you mean 'cells'"),
        (
            ("options", {"trainer.val_check_interval": 11, "trainer.check_val_every_n_epoch": None}),
            "test_checkpoint: best is chosen in validations, but trainer.val_check_interval 11 is more than .* 10",
        ),
        (("test_checkpoint", "newest"), "test_checkpoint: 'newest' is neither best nor last"),
    ],
)
def test_errors_name_file_key_value_and_fix(write, change, message):
    with pytest.raises(ValueError, match=message) as error:
        Study.read(write(change))
    assert str(error.value).startswith("study.yaml: ")


def test_files_that_are_missing_or_no_yaml(write):
    write()
    with pytest.raises(FileNotFoundError, match=r"study: stady.yaml is not there.*Did you mean study.yaml"):
        Study.read("stady.yaml")
    Path("study.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"study\.yaml is no YAML file"):
        Study.read("study.yaml")
    with pytest.raises(ValueError, match="name of the folder of reports"):
        Study.read(write().rename("report.yaml"))
    Path("study.yaml").write_text("- a")
    with pytest.raises(ValueError, match="holds a list"):
        Study.read("study.yaml")


def test_the_example_of_the_documentation(tmp_path):
    text = (REPOSITORY / "docs/studies.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_study.yaml").write_text(example.replace("configs/", f"{REPOSITORY}/configs/"))
    study = Study.read(tmp_path / "my_study.yaml")
    assert (len(study.groups), len(study.cells), len(study.findings)) == (3, 9, 2)
    assert f"my_study: {len(study.cells)} waiting; {len(study.cells)} to run, about 27 min" in text
    assert all(cell.readable_name in text for cell in study.cells[:2])


def test_names_of_the_package_s_configurations(tmp_path):
    """As `-c` takes them, so that a study works without a checkout."""
    path = tmp_path / "own.yaml"
    axes = {"attention": {"0010": "attention/self_0010", "none": "configs/attention/self_none.yaml"}}
    path.write_text(yaml.safe_dump({"base": "miniature/translation", "axes": axes, "metric": "test/bleu"}))
    study = Study.read(path)
    assert [file.stem for file in study.cells[0].files] == ["translation", "self_0010"]
