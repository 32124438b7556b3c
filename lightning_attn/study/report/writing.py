"""Writes a report: the page, its tables as CSV, its plots as SVG and PNG."""

import csv
import datetime
import io
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import resvg_py

from lightning_attn.errors import ExistingFileError
from lightning_attn.io import write_file, write_text
from lightning_attn.study.grid import Study
from lightning_attn.study.report.collecting import CellRecord, StudyRecord, collect
from lightning_attn.study.report.page import MARK, render
from lightning_attn.study.report.reading import read_head
from lightning_attn.study.report.svg import standalone
from lightning_attn.study.report.view import View, view_of

__all__ = ["PAGE", "write_report"]

PAGE = "index.html"

_TABLES = ("cells.csv", "groups.csv", "findings.csv")
_ZOOM, _MOST_PIXELS = 2.0, 2.2e6  # of PNG files


def write_report(
    studies: Sequence[Study], root: Path, output: Path, command: str, *, generated: datetime.datetime | None = None
) -> Path:
    """Writes the report of studies, in the place of an older one.

    Args:
        studies: One or more.
        root: Folder of all studies.
        output: Folder of the report.
        command: How the command is called, such as `python train.py`.
        generated: Date of the report; None for now.

    Returns:
        The page.

    Raises:
        FileExistsError: If there is another page in its place, or other files and no report, which are kept.
    """
    page = output / PAGE
    is_new = not page.exists()
    if page.exists() and MARK not in read_head(page, 2048):
        raise ExistingFileError(
            f"output: {page} is no report of a study, and is kept. Give another folder: --output DIR."
        )
    views = [
        view_of(collect(study, root / study.folder), place, command, is_alone=len(studies) == 1)
        for place, study in enumerate(studies)
    ]
    folders = [f"{study.name}/" if len(studies) > 1 else "" for study in studies]
    text = render(views, files=folders, generated=generated or datetime.datetime.now(datetime.UTC))
    if is_new:
        _keep_others([output / folder for folder in folders])
    write_text(page, text, replace=True)  # first: by it what lies beside it is known as ours
    for view, folder in zip(views, folders, strict=True):
        _write_tables(view.record, output / folder)
        _write_plots(view, output / folder / "plots")
    return page


def _keep_others(folders: Sequence[Path]) -> None:
    """Refuses folders that hold tables or plots of others, whose place a report would take."""
    for folder in folders:
        plots = [path for kind in ("svg", "png") for path in sorted((folder / "plots").glob(f"*.{kind}"))]
        for path in (*(folder / name for name in _TABLES), *(path for path in plots if _is_ours(path))):
            if path.exists():
                raise ExistingFileError(
                    f"output: {path} is there without a report, and is kept. Move it away, or give another folder: "
                    "--output DIR."
                )


def _is_ours(plot: Path) -> bool:
    """Whether a plot is called as those of a report are."""
    return plot.stem in ("paper", "findings") or plot.stem.startswith(("accuracy_", "curves_"))


def _write_tables(record: StudyRecord, folder: Path) -> None:
    study = record.study
    axes = list(study.axes)
    cells = [
        *axes,
        *("seed", "state", "reason", "score", "validation", "step", "total_steps", "seconds", "started", "ended"),
        *("commit", "code", "device", "host", "lightning_attn", "torch", "pytorch_lightning", "python", "folder"),
        *("command", "damages"),
    ]
    _write_csv(folder / "cells.csv", cells, (_cell_row(one, folder) for one in record.cells))
    names = list(dict.fromkeys(name for group in record.groups for name in group.reference))
    groups = [
        *axes,
        *("n", "mean", "spread", "low", "high", "test_low", "test_high", "num_test_samples"),
        *(
            "paper_multiply_adds",
            "multiply_adds",
            "forward_seconds",
            "forward_lower_quartile",
            "forward_upper_quartile",
            "parameters",
        ),
        *(f"reference {name}" for name in names),
        "older_code",
    ]
    rows = []
    for group in record.groups:
        summary, test, cost = group.summary, group.test_interval, group.cost
        rows.append(
            [
                *group.group,
                *(summary.n, summary.mean, summary.spread, summary.low, summary.high),
                *((test.low, test.high, test.num_samples) if test else (None, None, None)),
                *((cost.paper, cost.done, cost.latency) if cost else (None,) * 3),
                *((cost.latency_low, cost.latency_high, cost.parameters) if cost else (None,) * 3),
                *(group.reference.get(name) for name in names),
                record.older_code if summary.n else "",
            ]
        )
    _write_csv(folder / "groups.csv", groups, rows)
    findings = [
        *("claim", "minuend", "subtrahend", "beyond", "expected", "margin", "verdict", "note", "n", "difference"),
        *("spread", "low", "high", "p_holm", "test_low", "test_high", "num_test_samples", "older_code"),
    ]
    rows = []
    for one in record.findings:
        judgement, finding, test = one.judgement, one.judgement.finding, one.test_interval
        difference = judgement.difference
        beyond = " - ".join(map(study.title, finding.beyond)) if finding.beyond else ""
        rows.append(
            [
                *(finding.claim, study.title(finding.minuend), study.title(finding.subtrahend), beyond),
                *(finding.expected, finding.margin, judgement.verdict, judgement.note),
                *(difference.n, difference.mean, difference.spread, difference.low, difference.high, judgement.p),
                *((test.low, test.high, test.num_samples) if test else (None, None, None)),
                record.older_code if difference.n else "",
            ]
        )
    _write_csv(folder / "findings.csv", findings, rows)


def _cell_row(one: CellRecord, folder: Path) -> list[Any]:
    status, origin = one.status, one.origin
    versions = origin.versions
    return [
        *status.cell.group,
        *(status.cell.seed, status.state, status.reason, status.score, status.validation, status.step),
        *(status.cell.total_steps, status.seconds, _date(origin.started), _date(origin.ended)),
        *(origin.commit, origin.code, origin.device, origin.host),
        *(versions.get(name) for name in ("lightning_attn", "torch", "pytorch_lightning", "python")),
        *(status.folder.path, " ; ".join(origin.commands), "; ".join(one.damages)),
    ]


def _date(seconds: float | None) -> str:
    try:
        return (
            ""
            if seconds is None
            else datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
        )
    except (ValueError, OverflowError, OSError):
        return ""


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(header)
    for row in rows:
        # NaN and infinity are what could not be computed, such as the spread of one run.
        writer.writerow(["" if isinstance(value, float) and value - value != 0 else value for value in row])
    write_text(path, stream.getvalue(), replace=True)


def _write_plots(view: View, folder: Path) -> None:
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        if _is_ours(old) and old.stem not in view.plots:  # of an older report, such as before cells became stale
            old.unlink(missing_ok=True)
    for name, panel in view.plots.items():
        drawing = standalone(panel.drawing, panel.title, panel.description, panel.width, panel.height)
        write_text(folder / f"{name}.svg", drawing, replace=True)
        zoom = min(_ZOOM, math.sqrt(_MOST_PIXELS / (panel.width * panel.height)))
        write_file(folder / f"{name}.png", partial(_write_png, drawing, zoom), replace=True)


def _write_png(drawing: str, zoom: float, file: BinaryIO) -> None:
    """The drawing as PNG, with the font that matplotlib ships: the same on every system."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
    picture = resvg_py.svg_to_bytes(
        svg_string=drawing,
        zoom=zoom,
        skip_system_fonts=True,
        font_files=[str(fonts / name) for name in names],
        font_family="DejaVu Sans",
        sans_serif_family="DejaVu Sans",
    )
    file.write(bytes(picture))
