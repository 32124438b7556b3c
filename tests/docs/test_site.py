"""The documentation site: its own extensions, and that its pages cover what there is. `make docs` builds it."""

import dataclasses
import re
import sys
import tomllib
from pathlib import Path

import markdown
import pytest

import datamodules
from lightning_attn import tasks
from lightning_attn.networks.images.heads.detection import DetectorSpec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def extensions_of_the_site(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])


def pages_of(entry) -> list[str]:
    match entry:
        case str():
            return [entry]
        case dict():
            return [page for part in entry.values() for page in pages_of(part)]
    return [page for part in entry for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once():
    configuration = tomllib.loads((ROOT / "zensical.toml").read_text())
    listed = pages_of(configuration["project"]["nav"])
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_options_of_every_task_and_data_module_are_in_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "reference/options").glob("*.md"))
    named = set(re.findall(r"^\[options: [\w.]+\.(\w+) \w+\]$", text, re.MULTILINE))
    public = {name for name in tasks.__all__ if name.endswith("Task")} - {"BaseTask"}
    public |= {name for name in datamodules.__all__ if name.endswith("DataModule")}
    bases = {"DetectionDataModule", "SegmentationDataModule"}
    assert public - bases == named & public


def test_tables_of_options_have_every_field_with_its_default():
    from options import options_of

    lines = options_of("lightning_attn.tasks.DetectionTask", "model")
    detector = lines[lines.index("#### `model.detector`") :]
    detector = detector[: detector.index("", 2)]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]*)` \|", "\n".join(detector), re.MULTILINE))
    fields = dataclasses.fields(DetectorSpec)
    assert list(rows) == [field.name for field in fields]
    assert rows["fpn_channels"] == str(DetectorSpec.fpn_channels)
    assert rows["head"] == "faster_rcnn"
    assert '| `terms` | string | `"1111"` |' in "\n".join(lines), "with the quotes that YAML needs"
    required = options_of("lightning_attn.datamodules.COCODataModule", "data")
    assert "| `root` | string | required | Folder of the data. |" in required
    assert any("`exif`" in line for line in required), "options of base classes, which `**options` takes"


def test_formulas_become_mathml():
    html = markdown.markdown(
        "With $E_3 = u^\\top V^C x_k$ for $5.\n\n$$\ny_q = \\sum_k A(q, k)\n$$\n\n| a |\n| --- |\n| $x$ |\n",
        extensions=["tables", "pymdownx.arithmatex", "mathml"],
        extension_configs={"pymdownx.arithmatex": {"generic": True}},
    )
    assert html.count("<math") == 3
    assert html.count('display="block"') == 1
    assert "for $5." in html
    assert "arithmatex" not in html
