"""The report of studies: numbers against their definition, hostile and broken files, what the page may hold."""

import base64
import csv
import datetime
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_cells import GROUPS, REFERENCE, START, fill, write, write_study

from lightning_attn.errors import ExistingFileError
from lightning_attn.study.grid import Study
from lightning_attn.study.report.charts import Row, forest_scale, front_of
from lightning_attn.study.report.collecting import collect
from lightning_attn.study.report.formatting import count, duration, fixed, signed
from lightning_attn.study.report.images import map_overlay, matrix, sentence_heat, thumbnail
from lightning_attn.study.report.labels import Label, place_labels
from lightning_attn.study.report.svg import Scale, element
from lightning_attn.study.report.writing import write_report
from lightning_attn.study.states import read_statuses
from lightning_attn.study.tables import as_data, groups_table

REPOSITORY = Path(__file__).parents[2]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)' &amp; ${x} {{ 7*7 }}"


class Elements(HTMLParser):
    """What a page consists of, as a browser sees it."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.texts = []
        self.hidden = False
        self.feed(text)
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.texts.append(data)

    def all(self, tag, **attributes):
        return [one for name, one in self.found if name == tag and attributes.items() <= one.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a finished study, its folder and what is collected."""
    base = tmp_path_factory.mktemp("made")
    study = write_study(base)
    fill(study, base / "cells")
    page = write_report([study], base / "cells", base / "out", "python train.py")
    return study, base / "cells", page, collect(study, base / "cells" / study.name)


def report(study, base, name="out"):
    return Elements(write_report([study], base / "cells", base / name, "python train.py").read_text())


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def stored(study, root, group, file):
    """A file of each seed of a group."""
    cells = [cell for cell in study.cells if cell.group == (group,)]
    return [json.loads((root / study.name / cell.name / "translation/run" / file).read_text()) for cell in cells]


def test_tables_hold_the_scores_of_the_runs(made):
    study, root, page, _ = made
    rows = rows_of(page.parent / "groups.csv")
    assert [row["self_attention"] for row in rows] == list(GROUPS)
    for row in rows:
        scores = [one["test/bleu"] for one in stored(study, root, row["self_attention"], "test_metrics.json")]
        assert float(row["mean"]) == pytest.approx(np.mean(scores))
        assert float(row["spread"]) == pytest.approx(np.std(scores, ddof=1))
        assert float(row["reference BLEU"]) == REFERENCE[row["self_attention"]][0]
    assert len(rows_of(page.parent / "cells.csv")) == 51
    assert [row["claim"] for row in rows_of(page.parent / "findings.csv")] == [one.claim for one in study.findings]


def test_intervals_of_the_test_set_are_those_of_averaged_replicates(made):
    study, root, page, _ = made

    def mean(group):
        files = stored(study, root, group, "predictions/test_bootstrap.json")
        return np.mean([one["scores"]["test/bleu"] for one in files], axis=0)

    row = next(row for row in rows_of(page.parent / "groups.csv") if row["self_attention"] == "0110")
    expected = np.quantile(mean("0110"), [0.025, 0.975])
    assert [float(row["test_low"]), float(row["test_high"])] == pytest.approx(expected)
    assert row["num_test_samples"] == "500"
    plain, beyond = (rows_of(page.parent / "findings.csv")[place] for place in (0, 3))
    expected = np.quantile(mean("0110") - mean("0100"), [0.025, 0.975])
    assert [float(plain["test_low"]), float(plain["test_high"])] == pytest.approx(expected)
    # The shared part of the test set cancels: far narrower than of a single group.
    assert expected[1] - expected[0] < 0.5 * (float(row["test_high"]) - float(row["test_low"]))
    expected = np.quantile((mean("0011") - mean("none")) - (mean("1111") - mean("0011")), [0.025, 0.975])
    assert [float(beyond["test_low"]), float(beyond["test_high"])] == pytest.approx(expected)


@pytest.mark.parametrize("change", ["missing", "other samples", "other length", "no numbers"])
def test_there_is_no_interval_of_the_test_set_unless_all_runs_have_the_same_samples(tmp_path, change):
    study = write_study(tmp_path, groups=("0100", "0110", "1111"), findings=[
        {"claim": "helps", "cells": ["0110", "0100"], "expected": "greater"}
    ])  # fmt: skip
    fill(study, tmp_path / "cells", parts=("bootstrap",))
    cell = next(cell for cell in study.cells if cell.group == ("0110",) and cell.seed == 1)
    path = tmp_path / "cells" / study.name / cell.name / "translation/run/predictions/test_bootstrap.json"
    content = json.loads(path.read_text())
    if change == "missing":
        path.unlink()
    elif change == "other samples":
        write(path, content | {"samples": "ffffffff"})
    elif change == "other length":
        write(path, content | {"scores": {"test/bleu": content["scores"]["test/bleu"][:500]}})
    else:
        write(path, content | {"scores": {"test/bleu": ["a", {}]}})
    record = collect(study, tmp_path / "cells" / study.name)
    assert [one.test_interval is None for one in record.groups] == [False, True, False]
    assert record.findings[0].test_interval is None
    assert record.findings[0].judgement.difference.n == 3  # the seeds are judged all the same


def test_the_files_of_a_task_of_a_joint_training_are_in_its_own_folder(tmp_path):
    """Two studies of one folder: each compares one task's scores, and finds that task's files."""
    shared = {"groups": ("0100", "0110"), "seeds": (0, 1), "findings": None, "reference": None, "cells": "joint"}
    detection = write_study(tmp_path, "of_boxes", metric="test/detection/ap", scale=100, **shared)
    segmentation = write_study(tmp_path, "of_pixels", metric="test/segmentation/miou", scale=100, **shared)
    root = tmp_path / "cells"
    fill(detection, root, task="multitask")
    assert sorted(one.name for one in (root / "joint").iterdir()) == sorted(one.name for one in segmentation.cells)
    record = collect(detection, root / detection.folder)
    assert record.score_name == "AP"
    assert all(one.test_interval is not None for one in record.groups)
    assert all(cell.examples and cell.attention for group in record.groups for cell in group.cells)
    other = collect(segmentation, root / segmentation.folder)
    assert all(one.test_interval is None for one in other.groups)
    assert {one.status.reason for one in other.cells} == {
        "test_metrics.json has no test/segmentation/miou; it has test/chrf, test/detection/ap"
    }
    page = write_report([detection], root, root / "page", "python train.py")
    assert page.is_file()


def test_undefined_replicates_are_left_out(tmp_path):
    study = write_study(tmp_path, groups=("0110",), seeds=(0,), findings=None)
    fill(study, tmp_path / "cells", parts=())
    path = tmp_path / "cells" / study.name / study.cells[0].name / "translation/run/predictions/test_bootstrap.json"
    values = [None, *range(101)]
    write(path, {"seed": 0, "num_samples": 9, "samples": "0", "scores": {"test/bleu": values}})
    interval = collect(study, tmp_path / "cells" / study.name).groups[0].test_interval
    assert (interval.low, interval.high, interval.num_samples) == pytest.approx((2.5, 97.5, 9))


def test_page_needs_nothing_from_elsewhere(made):
    page = made[2]
    text = page.read_text()
    elements = Elements(text)
    assert page.stat().st_size < 5_000_000
    for _, attributes in elements.found:
        for name, value in attributes.items():
            if name in ("src", "srcset", "data", "poster", "action", "xlink:href"):
                assert value.startswith("data:image/")
            if name == "href":
                assert value.startswith(("#", "data:")) or (page.parent / value).is_file(), value
    assert not re.search(r"url\((?!data:|#)", text)
    assert not re.search(r"@import|https?://(?!www\.w3\.org)", text)
    policy = elements.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_script_is_small_and_alone(made):
    scripts = [
        body
        for kind, body in re.findall(r"<script([^>]*)>(.*?)</script>", made[2].read_text(), re.S)
        if "json" not in kind
    ]
    assert len(scripts) == 1
    assert len(scripts[0].encode()) < 10_000


def test_ids_are_unique_and_what_refers_to_them_exists(made):
    elements = Elements(made[2].read_text())
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for name in ("aria-labelledby", "aria-describedby", "aria-controls", "data-tokens", "data-filter"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_plots_are_drawn_as_svg_and_png(made):
    folder = made[2].parent / "plots"
    names = {path.stem for path in folder.iterdir()}
    assert names == {
        *("accuracy_paper", "accuracy_done", "accuracy_latency", "paper", "findings"),
        *("curves_val_bleu", "curves_train_loss", "curves_val_loss"),
    }
    for name in names:
        drawing = ET.parse(folder / f"{name}.svg").getroot()
        words = "".join(drawing.itertext())
        assert "var(" not in words
        if name.startswith(("accuracy", "paper")):
            assert all(group in words for group in GROUPS)
        with Image.open(folder / f"{name}.png") as picture:
            width, height = (float(drawing.get(side)) for side in ("width", "height"))
            assert picture.width / picture.height == pytest.approx(width / height, rel=0.01)
            assert len(np.unique(np.array(picture.convert("L")))) > 10  # not blank


def test_every_row_says_where_it_is_from(made):
    study, _, page, _ = made
    text = Elements(page.read_text()).text
    for cell in study.cells[:5]:
        folder = page.parent.parent / "cells" / study.name / cell.name
        assert cell.shell_line(["python", "train.py"], folder) in text
    assert "python train.py fit -c base.yaml --seed_everything 2" in text  # of its log
    for row in rows_of(page.parent / "cells.csv"):
        assert (row["commit"], row["torch"], row["device"], row["host"]) == (
            "265695659c25",
            "2.14.1",
            "GPU (cuda)",
            "maxwell",
        )
        assert datetime.datetime.fromisoformat(row["started"]).timestamp() >= START


def test_costs_are_of_one_sample(made):
    row = next(row for row in rows_of(made[2].parent / "groups.csv") if row["self_attention"] == "0010")
    assert float(row["paper_multiply_adds"]) == pytest.approx(1.87e9)
    assert float(row["multiply_adds"]) == pytest.approx(1.71e9)
    assert float(row["forward_seconds"]) == pytest.approx(0.13 / 50)
    assert float(row["forward_lower_quartile"]) == pytest.approx(0.96 * 0.13 / 50)
    assert float(row["forward_upper_quartile"]) == pytest.approx(1.08 * 0.13 / 50)


def test_unsteady_times_are_said_to_be(made):
    text = Elements(made[2].read_text()).text
    assert "The measured time of 1 group is unsteady (0001): its quartiles are further apart than a third" in text
    assert text.count("2.29 to 3.22 ms unsteady") == 1  # 0.88 and 1.24 of 0.13 s / 50
    assert text.count(" ms unsteady") == 1
    drawing = (made[2].parent / "plots/accuracy_latency.svg").read_text()
    points = {int(one.get("data-g")): one for one in ET.fromstring(drawing).iter() if one.get("data-g")}

    def x_of(group):
        return next(float(one.get("cx")) for one in points[GROUPS.index(group)] if "mark" in one.get("class", ""))

    pixels_per_ms = (x_of("1111") - x_of("none")) / (4.6 - 2.0)
    path = next(one.get("d") for one in points[GROUPS.index("0001")] if "H" in one.get("d", ""))
    start, end = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", path).groups())
    assert start == pytest.approx(x_of("none") + pixels_per_ms * (0.88 * 2.6 - 2.0), abs=0.3)
    assert end == pytest.approx(x_of("none") + pixels_per_ms * (1.24 * 2.6 - 2.0), abs=0.3)


def test_what_runs_have_written_is_shown_as_text(tmp_path):
    study = write_study(
        tmp_path,
        groups=("0110", "1111"),
        description=EVIL,
        reference=[{"cell": "0110", EVIL: 3.0, f"GFLOPs {EVIL}": 4.0}],
        findings=[{"claim": EVIL, "cells": ["0110", "1111"], "expected": "greater"}],
    )
    fill(
        study, tmp_path / "cells", parts=("profile", "bootstrap", "curves", "attention", "examples", "maps", "pictures")
    )
    for cell in study.cells:
        folder = tmp_path / "cells" / study.name / cell.name
        run = folder / "translation/run"
        content = json.loads((folder / "cell.json").read_text())
        write(folder / "cell.json", content | {"attempts": [one | {"host": EVIL} for one in content["attempts"]]})
        origin = json.loads((run / "run.json").read_text())
        write(run / "run.json", origin | {"git": EVIL, "torch": EVIL, "device": EVIL, "command": EVIL})
        profile = json.loads((folder / "profile.json").read_text())
        write(folder / "profile.json", profile | {"sample": EVIL, "device": EVIL})
        maps = json.loads((run / "predictions/test_attention.json").read_text())["maps"]
        for one in maps:
            one["title"] = EVIL
        maps[0]["queries"][0] = maps[0]["keys"][0] = EVIL
        maps[1]["image"] = '../../../x"><script>.jpg'
        write(run / "predictions/test_attention.json", {"maps": maps})
        example = dict.fromkeys(("source", "reference", "hypothesis", "id"), EVIL)
        write(run / "predictions/test_examples.json", {"examples": [example]})
        pictures = run / "predictions/test_pictures"
        (pictures / "000000.png").rename(pictures / '"><script>alert(1)<.png')
    failed = tmp_path / "cells" / study.name / study.cells[0].name
    (failed / "translation/run/test_metrics.json").write_text(json.dumps({EVIL: 1}))
    (failed / "output.log").write_text(EVIL)
    elements = report(study, tmp_path)
    assert [one.get("type") for one in elements.all("script") if one.get("type") != "application/json"] == [None]
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert all(one.get("src", "").startswith("data:image/") for one in elements.all("img"))
    assert elements.text.count("alert(1)") > 20  # shown, not dropped
    assert "{{ 7*7 }}" in elements.text
    for path in (tmp_path / "out/plots").glob("*.svg"):
        assert not [one for one in ET.parse(path).getroot().iter() if one.tag.endswith(("script", "img", "image"))]


def test_maps_of_pictures_lie_where_their_keys_do(tmp_path):
    """By the box of all keys that a test writes, in parts of its picture; an older one's map is all of its picture."""
    study = write_study(tmp_path, groups=("0010", "1111"), seeds=(0,), findings=None)
    fill(study, tmp_path / "cells", parts=("maps",))
    path = tmp_path / "cells" / study.name / study.cells[0].name / "translation/run/predictions/test_attention.json"
    maps = json.loads(path.read_text())["maps"]
    (one,) = [one for one in maps if one["kind"] == "map"]
    rows, columns = np.array(one["weights"]["whole"]).shape
    placed = {"key_box": [-0.02, -0.03, 1.04, 1.05], "query_at": [0.25, 0.75]}
    write(path, {"maps": [one | placed]})
    elements = report(study, tmp_path)
    boxes = [item["style"] for item in elements.all("img") if "left:" in item.get("style", "")]
    assert set(boxes) == {"left:-2.000%;top:-3.000%;width:104.000%;height:105.000%"}
    assert [item["style"] for item in elements.all("span") if item.get("style") == "left:25.0%;top:75.0%"]
    wide, high = next(
        map(float, item["style"].removeprefix("aspect-ratio:").split("/"))
        for item in elements.all("span")
        if item.get("style", "").startswith("aspect-ratio:") and item["style"] != f"aspect-ratio:{columns}/{rows}"
    )
    assert wide / high == pytest.approx(columns / 1.04 / (rows / 1.05), rel=1e-3), "that of the picture"


@pytest.mark.parametrize("box", [[0, 0, 0, 1], [0, 0, 1], "x", [None] * 4, [1e300, 0, 1, 1]])
def test_boxes_that_are_none_are_not_used(tmp_path, box):
    study = write_study(tmp_path, groups=("0010", "1111"), seeds=(0,), findings=None)
    fill(study, tmp_path / "cells", parts=("maps",))
    for path in (tmp_path / "cells").rglob("test_attention.json"):
        maps = [one | {"key_box": box, "query_at": box} for one in json.loads(path.read_text())["maps"]]
        write(path, {"maps": maps})
    elements = report(study, tmp_path)
    assert not [item for item in elements.all("img") if "left:" in item.get("style", "")]


def test_broken_and_half_written_cells_are_shown_as_such(tmp_path):
    study = write_study(tmp_path, groups=("0010", "0110", "1111", "none", "0100", "0111"), seeds=(0,), findings=None)
    fill(
        study, tmp_path / "cells", parts=("profile", "bootstrap", "curves", "attention", "examples", "maps", "pictures")
    )
    folders = [tmp_path / "cells" / study.name / cell.name for cell in study.cells]
    for path in folders[0].rglob("*.json"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # cut
    for path in folders[1].rglob("*.json"):
        path.write_text("[" * 100_000)  # too deep
    for path in (
        *folders[2].rglob("*.json"),
        *folders[2].rglob("*.csv"),
        *folders[2].rglob("*.png"),
        *folders[2].rglob("*.jpg"),
    ):
        path.write_bytes(b"\xff\x00\x9f" * 50)  # no text, and no picture
    for path in folders[3].rglob("*.json"):
        path.write_text("[1, null, {}]")  # another form
    shutil.rmtree(folders[4])
    folders[4].mkdir()
    predictions = folders[5] / "translation/run/predictions"
    for name in ("test_bootstrap.json", "test_attention.jpg"):
        (predictions / name).unlink()
        os.mkfifo(predictions / name)  # reading it would never end
    (predictions / "test_examples.json").unlink()
    (predictions / "test_examples.json").symlink_to("/nowhere")
    write(folders[5] / "profile.json", {"batch_size": 1e400, "forward": {"multiply_adds": -1, "latency": [3]}})
    (folders[5] / "translation/run/metrics.csv").write_text("step,val/bleu,train/loss\n9,3.5,1\n19,abc,1\n")
    elements = report(study, tmp_path)
    for words in ("profile.json cannot be read (JSONDecodeError)", "(RecursionError)", "(UnicodeDecodeError)"):
        assert words in elements.text
    assert "metrics.csv cannot be read in full (ValueError)" in elements.text
    assert "1111, seed 0: test_metrics.json cannot be read" in elements.text
    rows = rows_of(tmp_path / "out/cells.csv")
    assert [row["state"] for row in rows] == ["failed", "failed", "failed", "failed", "waiting", "done"]


SITUATIONS = {
    "nothing run": ({}, None, ["51 waiting", "Nothing has been run yet: python train.py study run", "5 not run"]),
    "one cell": (
        {"groups": ("1111",), "seeds": (0,), "findings": None},
        {},
        ["1 group of self_attention, 1 seed each", "1 done", "one run", "the study expects none"],
    ),
    "one seed": ({"seeds": (0,)}, {}, ["17 done", "5 undecided"]),
    "less is better": (
        {"metric": "test/loss", "findings": None},
        {},
        ["less is better", "On the lower left envelope"],
    ),
    "no reference, no profile": (
        {"reference": None, "findings": None},
        {"parts": ()},
        ["No cost is known", "17 of 17 tested groups have no profile"],
    ),
    "no profile": ({}, {"parts": ("curves",)}, ["GFLOPs of the paper's network", "measures it."]),
    "two axes": (
        {
            "axes": {
                "attention": {group: {"model.terms": group} for group in ("0010", "0110", "1111")},
                "rate": {"low": {"model.rate": 1}, "high": {"model.rate": 2}},
            },
            "reference": [{"cell": {"attention": "0110", "rate": "high"}, "BLEU": 27.6, "GFLOPs": 2.69}],
            "findings": None,
        },
        {},
        ["6 groups of attention × rate", "rate: low", "rate: high", "attention=1111, rate=high"],
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_unusual_studies(tmp_path, situation):
    changes, filling, expected = SITUATIONS[situation]
    study = write_study(tmp_path, **changes)
    if filling is not None:
        fill(study, tmp_path / "cells", **filling)
    elements = report(study, tmp_path)
    for words in expected:
        assert words in elements.text
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", elements.text.lower()).split()
    for path in (tmp_path / "out/plots").glob("*.svg"):
        assert not re.search(r"\b(nan|inf)\b", path.read_text())


def test_all_failed(tmp_path):
    study = write_study(tmp_path)
    for cell in study.cells:
        folder = tmp_path / "cells" / study.name / cell.name
        folder.mkdir(parents=True)
        attempt = {"stage": "fit", "started": START, "ended": START + 5, "exit_code": 2, "code": "0", "host": "h"}
        own = {"asked_to_stop": False, "runner": 1, "runner_started": "1"}
        write(folder / "cell.json", {"attempts": [attempt | own], "cell": cell.labels, "seed": cell.seed})
        (folder / "output.log").write_text(f"$ fit\nerror: {cell.seed} is no seed\n")
    elements = report(study, tmp_path)
    assert "51 failed" in elements.text
    assert "51 cells with problems" in elements.text
    assert "error: 2 is no seed" in elements.text
    assert "no cell has been tested" in elements.text


def test_running_twice_replaces_the_report_and_what_is_out_of_date(tmp_path):
    study = write_study(tmp_path, groups=("0110", "1111"), findings=None)
    fill(study, tmp_path / "cells")
    report(study, tmp_path)
    assert (tmp_path / "out/plots/accuracy_done.svg").is_file()
    for path in (tmp_path / "cells").rglob("profile.json"):
        path.unlink()
    assert "accuracy_done" not in str(report(study, tmp_path).found)
    assert not (tmp_path / "out/plots/accuracy_done.svg").exists()
    assert not (tmp_path / "out/plots/accuracy_done.png").exists()


def test_pages_of_others_are_kept(tmp_path):
    study = write_study(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("<h1>Mine</h1>")
    with pytest.raises(ExistingFileError, match=r"site/index.html is no report of a study, and is kept. Give another"):
        write_report([study], tmp_path / "cells", tmp_path / "site", "python train.py")
    assert (tmp_path / "site/index.html").read_text() == "<h1>Mine</h1>"


def test_command(run):
    study = write_study(Path("studies"), "one", groups=("0110", "1111"), findings=None)
    write_study(Path("studies"), "two", groups=("0110",), findings=None)
    fill(study, Path("cells"))
    assert "Written to cells/one/report/index.html" in run("study", "report", "studies/one.yaml", "--root", "cells")
    run("study", "report", "studies/one.yaml", "studies/two.yaml", "--root", "cells")
    elements = Elements(Path("cells/report/index.html").read_text())
    assert [one["id"] for one in elements.all("article")] == ["s0", "s1"]
    assert {one["href"] for one in elements.all("a")} >= {"#s0", "#s1", "one/groups.csv", "two/groups.csv"}
    assert Path("cells/report/one/plots/accuracy_paper.png").is_file()
    run("study", "report", "studies/two.yaml", "--root", "cells", "--output", "elsewhere")
    assert Path("elsewhere/cells.csv").is_file()
    printed = run("study", "report", "studies/one.yaml", "studies/one.yaml", "--root", "cells", status=2)
    assert "one is given twice" in printed
    assert "studies/three.yaml is not there" in run("study", "report", "studies/three.yaml", status=2)


def test_two_hundred_cells_with_large_pictures_stay_small_and_need_no_torch(tmp_path):
    groups = [f"{letter}_{group}" for letter in "abcd" for group in GROUPS][:67]
    study = write_study(tmp_path, groups=groups, reference=None, findings=None)
    parts = ("profile", "bootstrap", "curves", "attention", "examples", "maps", "pictures")
    fill(study, tmp_path / "cells", parts=parts, cells=study.cells[:200], large=True)
    script = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from lightning_attn.cli import main
main(["study", "report", "figure.yaml", "--root", "cells"])
assert "torch" not in sys.modules and "pytorch_lightning" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "cells/figure/report/index.html"
    assert page.stat().st_size < 5_000_000
    elements = Elements(page.read_text())
    assert "200 done" in elements.text
    assert "were left out to keep the page small" in elements.text
    assert len(elements.all("img")) > 100
    points = [one for one in elements.all("g") if "pt" in one.get("class", "").split()]
    assert len(points) == 2 * 3 * 67  # wide and narrow, of three costs


def test_an_envelope_of_single_runs_is_dotted(tmp_path, made):
    study = write_study(tmp_path, seeds=(0,))
    fill(study, tmp_path / "cells", parts=("profile",))
    elements = report(study, tmp_path)
    assert "Best single run" in elements.text
    assert "best single run" in elements.text
    assert "Dotted stairs: single runs" in elements.text
    for folder, is_dotted in ((tmp_path / "out", True), (made[2].parent, False)):
        drawing = (folder / "plots/accuracy_paper.svg").read_text()
        assert ('class="front single"' in drawing) == is_dotted
        assert 'class="front"' in (folder / "plots/paper.svg").read_text()
    assert "Dotted stairs" not in Elements(made[2].read_text()).text


@pytest.mark.parametrize(
    ("metric", "expected"), [("test/bleu", "BLEU"), ("test/ap", "AP"), ("test/miou", "mean IoU"), ("test/chrf", "chrF")]
)
def test_a_score_is_spelled_the_same_with_and_without_reference(tmp_path, metric, expected):
    printed = {"test/ap": "mAP", "test/miou": "mIoU"}.get(metric, expected)
    reference = [{"cell": "0110", printed: 3.0, "GFLOPs": 4.0}]
    for number, given in enumerate((reference, None)):
        study = write_study(tmp_path, f"s{number}", groups=("0110",), metric=metric, reference=given, findings=None)
        record = collect(study, tmp_path / "cells")
        assert record.score_name == expected
        assert record.is_same_score == (given is not None)


def test_findings_say_what_is_drawn_and_what_is_missing(tmp_path, made):
    assert "upper bar: 95 % interval over seeds" in Elements(made[2].read_text()).text
    study = write_study(tmp_path, seeds=(0,))
    fill(study, tmp_path / "cells", parts=("bootstrap",), cells=[one for one in study.cells if one.group[0] != "none"])
    text = report(study, tmp_path).text
    assert "upper bar" not in text
    assert "grey bar: 95 % interval of the test set" in text
    assert "no run of none" in text
    drawing = "".join(ET.parse(tmp_path / "out/plots/findings.svg").getroot().itertext())
    assert re.search(r"undecided: one run · expected within ±0.5 · difference [+−]\d\.\d\d", drawing)
    assert "not run: no run of none · expected greater" in drawing
    assert "over seeds" not in drawing


def test_intervals_of_findings_are_cut_beyond_three_times_the_largest_difference():
    def row(mean, low, high, margin=0.0):
        return Row("", mean, low, high, math.nan, math.nan, margin, "warn", "")

    inside = forest_scale([row(1.0, -1.0, 2.9), row(0.2, 0.1, 0.3)], 0, 100)
    assert inside.low <= -1.0
    assert 2.9 <= inside.high < 3.3
    cut = forest_scale([row(1.0, -50.0, 50.0)], 0, 100)
    assert -3.5 < cut.low <= -3
    assert 3 <= cut.high < 3.5


def test_curves_are_over_steps_done(made):
    drawing = ET.parse(made[2].parent / "plots/curves_val_loss.svg").getroot()
    words = ["".join(one.itertext()) for one in drawing.iter() if one.tag.endswith("text")]
    assert words.count("400") == len(GROUPS)
    assert "399" not in words


def test_waiting_cells_are_one_line_that_opens(tmp_path):
    study = write_study(tmp_path, groups=("0110", "1111"), seeds=(0, 1, 2), findings=None)
    fill(study, tmp_path / "cells", parts=(), cells=study.cells[:2])
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 300}\n")
    edited = Study.read(study.path)
    fill(edited, tmp_path / "cells", parts=(), cells=edited.cells[3:4])
    text = report(edited, tmp_path).text
    assert "5 waiting" in text
    assert "2 waiting have an older configuration's folder, which is kept and not used here." in text
    assert f"0110, seed 0: an older configuration's folder is kept: {study.cells[0].name}" in text
    assert "0 process" not in text
    assert edited.cells[5].shell_line(["python", "train.py"], tmp_path / "cells/figure" / edited.cells[5].name) in text


@pytest.mark.parametrize("more_is_better", [True, False])
def test_front_is_what_no_other_point_beats(more_is_better):
    random = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(float, one)) for one in random.integers(0, 6, (9, 2))]
        sign = 1 if more_is_better else -1

        def beats(one, other, sign=sign):
            cheaper, better = one[0] <= other[0], sign * one[1] >= sign * other[1]
            return cheaper and better and one != other

        best = {point for point in points if not any(beats(other, point) for other in points)}
        found = front_of(points, more_is_better=more_is_better)
        assert {points[place] for place in found} == best
        assert len(found) == len(best)  # of equal points, one


def test_labels_cover_neither_each_other_nor_points():
    random = np.random.default_rng(3)
    centres = [(60 + 500 * x, 40 + 300 * y) for x, y in random.random((17, 2))]
    labels = [Label(x, y, 40.0, 13.0) for x, y in centres]
    points = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    boxes = place_labels(labels, points, [], (0, 0, 640, 400))

    def overlap(one, other):
        return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    assert not [1 for box in boxes for point in points if overlap(box, point)]
    assert all(left >= 0 and top >= 0 and right <= 640 and bottom <= 400 for left, top, right, bottom in boxes)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, ["0", "2.5", "5.0", "7.5", "10.0"]),
        (1.75, 2.73, ["1.75", "2.00", "2.25", "2.50", "2.75"]),
        (-0.1, 0.1, ["−0.10", "−0.05", "0", "0.05", "0.10"]),
        (5, 5, []),
    ],
)
def test_ticks_are_round_and_in_range(low, high, expected):
    scale = Scale(low, high, 0, 100, num_ticks=5)
    ticks = scale.ticks()
    assert all(scale.low <= value <= scale.high for value, _ in ticks)
    assert all(float(shown.replace("−", "-").replace(",", "")) == pytest.approx(value) for value, shown in ticks)
    if low < high:
        assert [shown for _, shown in ticks] == expected


def test_numbers_for_people():
    assert [fixed(value, 2) for value in (27.346, -0.001, -1.5, None, float("nan"))] == [
        "27.35",
        "0.00",
        "−1.50",
        "–",
        "–",
    ]
    assert [signed(value, 1) for value in (1.25, -1.25, 0.0)] == ["+1.2", "−1.2", "0.0"]
    assert [count(value) for value in (2.0e9, 281.4e9, 999, 1.2e6)] == ["2.00 G", "281 G", "999", "1.20 M"]
    assert [duration(value) for value in (0.004, 2.5e-5, 59, 245, 7800)] == [
        *("4.00 ms", "25.0 µs", "59 s", "4 min 5 s", "2 h 10 min")
    ]


def test_elements_are_escaped():
    drawn = element("text", "a < b & c", title='say "x"', x=1.25)
    assert drawn == '<text title="say &#34;x&#34;" x="1.2">a &lt; b &amp; c</text>'
    assert element("g", drawn).count("&lt;") == 1  # not twice


def pixels(uri):
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))


def test_heat_maps_have_a_pixel_for_each_weight():
    weights = matrix([[1.0, 0.0, None], [0.25, 0.25, 0.5]])
    picture = pixels(sentence_heat(weights))
    assert picture.shape == (2, 3, 4)
    assert picture[0, 2, 3] == 0  # hidden
    assert (picture[..., 3] == 255).sum() == 5
    assert (picture[1, 0] == picture[1, 1]).all()
    brightness = picture[..., :3].sum(-1)
    assert brightness[0, 1] < brightness[1, 0] < brightness[1, 2] < brightness[0, 0]
    overlay = pixels(map_overlay(matrix([[0.5, 1.0, 2.0, 40.0]])))
    assert overlay[0, :2, 3].tolist() == [0, 0]  # at most the mean: the picture below is seen
    assert 0 < overlay[0, 2, 3] < overlay[0, 3, 3]


@pytest.mark.parametrize("value", [None, [], [[]], [[1, 2], [3]], [["a"]], "x", [1, 2], [[[1]]], {"a": 1}])
def test_what_is_no_matrix(value):
    assert matrix(value) is None


def test_thumbnails(tmp_path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (400, 800, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    uri = thumbnail(tmp_path / "noise.png", 20_000)
    height, width, _ = pixels(uri).shape
    assert len(uri) < 50_000  # noise is the worst case
    assert width / height == pytest.approx(2, rel=0.02)
    (tmp_path / "text.png").write_text("no picture")
    assert thumbnail(tmp_path / "text.png", 20_000) == ""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    assert thumbnail(tmp_path / "bomb.png", 20_000) == ""


def test_reports_are_made_of_the_current_code_alone(made):
    """A cell of other code is shown, and left out of means."""
    study, root, _, _ = made
    base = root.parent / "stale"
    shutil.copytree(root, base / "cells")
    cell = study.cells[0]
    path = base / "cells" / study.name / cell.name / "cell.json"
    path.write_text(path.read_text().replace('"code": "', '"code": "0'))
    elements = report(Study.read(study.path), base)
    assert "1 stale, by other code: shown below, left out of means and verdicts." in elements.text
    assert rows_of(base / "out/groups.csv")[0]["n"] == "2"
    assert {row["older_code"] for row in rows_of(base / "out/groups.csv")} == {""}
    data = as_data(study, read_statuses(study, base / "cells" / study.name))
    assert (data["older_code"], data["groups"][0]["n"]) == (None, 2)


def test_of_cells_that_are_all_of_other_code_the_most_common_one_counts(made):
    study, root, _, _ = made
    base = root.parent / "older"
    shutil.copytree(root, base / "cells")
    for place, cell in enumerate(study.cells):
        path = base / "cells" / study.name / cell.name / "translation/run/run.json"
        write(path, json.loads(path.read_text()) | {"code": "feedfeedfeed" if place % 10 else "000000000000"})
    elements = report(Study.read(study.path), base)
    words = "No cell is of the present code: means and verdicts are of 45 stale ones, all of code feedfeedfeed."
    assert words in elements.text
    rows = rows_of(base / "out/groups.csv")
    assert sum(int(row["n"]) for row in rows) == 45
    assert [row["n"] for row in rows[:4]] == ["2", "3", "3", "2"]
    assert {row["older_code"] for row in rows} == {"feedfeedfeed"}
    assert {row["older_code"] for row in rows_of(base / "out/findings.csv")} == {"feedfeedfeed"}
    # What the terminal shows is of the same cells.
    statuses = read_statuses(study, base / "cells" / study.name)
    data = as_data(study, statuses)
    assert data["older_code"] == "feedfeedfeed"
    assert [one["mean"] for one in data["groups"]] == pytest.approx([float(row["mean"]) for row in rows])
    shown = groups_table(study, statuses).caption
    assert shown == "None of these cells is of the present code: this is of 45 stale, of code feedfeedfeed."
    new = write_study(base, "new")
    page = write_report([Study.read(study.path), new], base / "cells", base / "several", "python train.py")
    assert "45 of 51, by older code" in Elements(page.read_text()).text


def test_pictures_are_those_of_the_newest_test(tmp_path):
    study = write_study(tmp_path, groups=("0110",), seeds=(0,), findings=None)
    fill(study, tmp_path / "cells", parts=("pictures",))
    predictions = next((tmp_path / "cells").rglob("test_pictures")).parent
    shutil.copytree(predictions / "test_pictures", predictions / "test_pictures-2")
    (predictions / "test_pictures-2/000000.png").rename(predictions / "test_pictures-2/newer.png")
    os.utime(predictions / "test_pictures", (START, START))
    found = collect(study, tmp_path / "cells" / study.name).cells[0].pictures
    assert {path.parent.name for path in found.values()} == {"test_pictures-2"}
    assert sorted(found) == ["000001", "000002", "newer"]
