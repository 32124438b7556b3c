"""The notebooks of examples/: their cells run, and they are stored without outputs.

The cells are executed here as plain Python, in one namespace: they use no magic commands, and a kernel would need
twenty packages more.
"""

import ast
import json
from pathlib import Path

import pytest

from datamodules.miniature.segmentation import write_miniature_segmentation

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))


def cells_of(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def execute(path, **parameters):
    """Runs a notebook's cells, with `parameters` instead of those of the cell with this tag; returns what it shows."""
    names, values = {}, []
    for number, cell in enumerate(cells_of(path, "code")):
        tree = ast.parse("".join(cell["source"]))
        shows = isinstance(tree.body[-1], ast.Expr)
        if shows:  # the last value of a cell, which a notebook would show
            tree.body[-1] = ast.Assign([ast.Name("shown", ast.Store())], tree.body[-1].value)
        exec(compile(ast.fix_missing_locations(tree), f"{path.name}, code cell {number}", "exec"), names)
        if shows:
            values.append(names.pop("shown"))
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    return values


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    cells = cells_of(path, "code")
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert path.stat().st_size < 20_000


def test_from_training_to_attention_maps(in_folder, monkeypatch, capfd):
    monkeypatch.setattr(
        "datamodules.miniature.segmentation_datamodule.write_miniature_segmentation",
        lambda root: write_miniature_segmentation(root, {"train": 8, "val": 2, "test": 2}),
    )
    (in_folder / "configs").symlink_to(REPOSITORY / "configs")
    values = execute(REPOSITORY / "examples" / "attention_maps.ipynb", STEPS=2, DATA="small", FOLDER="runs")
    run = in_folder / "runs" / "segmentation" / "attention_maps"
    assert (run / "maps" / "index.html").stat().st_size > 100_000
    pictures = [value for value in values if hasattr(value, "size")]
    assert len(pictures) == 2
    assert all(picture.size[0] > 500 for picture in pictures)
    printed = capfd.readouterr().out
    assert "head: a map of 13 x 25 at stride 8, of which (12, 24) lie in the image" in printed
    assert [line.split()[0] for line in printed.splitlines() if "greatest weight" in line] == [
        *("E1", "E2", "E3", "E4", "whole")
    ]
