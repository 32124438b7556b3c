"""Checks all data before a long run: `python -m lightning_attn.datamodules.check -c CONFIG`.

Every image and label is decoded, on all cores. Statistics of the data are printed as tables and plotted, and every
file that cannot be used is named. The exit status is 2 if there is one.
"""

import dataclasses
import functools
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from lightning_attn.datamodules.data_option import data_parser, parse_data
from lightning_attn.datamodules.detection.annotations import TargetStatus, read_annotated
from lightning_attn.datamodules.detection.datamodule import DetectionDataModule
from lightning_attn.datamodules.images.files import ImageError, image_header, read_image
from lightning_attn.datamodules.images.folders import listed
from lightning_attn.datamodules.images.transforms import resized_sizes
from lightning_attn.datamodules.machine import available_cores
from lightning_attn.datamodules.multitask import MultitaskDataModule
from lightning_attn.datamodules.sampling.planned_batches import ignore_stop_signals
from lightning_attn.datamodules.segmentation.classes import IGNORED
from lightning_attn.datamodules.segmentation.datamodule import SegmentationDataModule
from lightning_attn.datamodules.translation.vocabulary import UNK_ID
from lightning_attn.datamodules.translation.wmt14 import WMT14DataModule
from lightning_attn.errors import InputError
from lightning_attn.io import write_figure

__all__ = ["SplitReport", "check_data", "draw_reports"]

_MOST_CLASSES = 30  # bars of a figure
_COLOUR = "#0072b2"
_SMALL, _LARGE = 32.0, 96.0  # sides that separate small, medium and large objects in COCO's scores, in pixels


@dataclasses.dataclass
class SplitReport:
    """Statistics and problems of a split.

    Attributes:
        name: Name of the split.
        facts: Rows of a table: quantity and value.
        classes: Frequency of each class: boxes, or percentage of the pixels.
        unit: Unit of `classes`.
        images_with: Number of images that show each class.
        distributions: Values to plot as histograms, by their description.
        problems: Files that cannot be used, with the reason.
    """

    name: str
    facts: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    classes: dict[str, float] = dataclasses.field(default_factory=dict)
    unit: str = ""
    images_with: dict[str, int] = dataclasses.field(default_factory=dict)
    distributions: dict[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


def check_data(
    module: pl.LightningDataModule, workers: int | None = None, advance: Callable[[str, int], None] | None = None
) -> list[SplitReport]:
    """Checks all splits of a DataModule.

    Args:
        module: The DataModule; its `prepare_data` and `setup` are called. Of a `MultitaskDataModule`, those of each
            member.
        workers: Processes that decode; None for one per core.
        advance: Called with the split and the number of files that were decoded since the last call.

    Raises:
        ValueError: If the DataModule is not one of detection, segmentation or translation, or its data cannot be read
            at all.
        OSError: If the data do not exist.
    """
    if isinstance(module, MultitaskDataModule):
        return [
            dataclasses.replace(report, name=f"{name}: {report.name}")
            for name, member in module.members.items()
            for report in check_data(member, workers, advance)
        ]
    progress = advance or (lambda *_: None)
    processes = available_cores() if workers is None else workers
    if isinstance(module, DetectionDataModule):
        return [_of_detection(module, split, processes, progress) for split in _splits(module)]
    if isinstance(module, SegmentationDataModule):
        return [_of_segmentation(module, split, processes, progress) for split in _splits(module)]
    if isinstance(module, WMT14DataModule):
        return list(_of_translation(module))
    raise InputError(
        f"{type(module).__name__} cannot be checked: it is not a DataModule of detection, segmentation or translation."
    )


def _splits(module: DetectionDataModule | SegmentationDataModule) -> Iterator[str]:
    """The splits of a DataModule, each after its `setup`."""
    module.prepare_data()
    for one in (module, *getattr(module, "members", ())):
        one.on_bad_image = "skip"  # to list all of them
    for split, stage in (("train", "fit"), ("val", "validate"), ("test", "test")):
        if module.split_names[split] and (split != "test" or module.has_test_split):
            module.setup(stage)
            yield split


# Images


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Result of decoding a file."""

    number: int
    problem: str = ""
    turned: bool = False
    values: dict[int, int] = dataclasses.field(default_factory=dict)  # pixels of each label


class _Files(Dataset[_Decoded]):
    """The files of a split, decoded one at a time."""

    def __init__(self, count: int, decode: Callable[[int], _Decoded]) -> None:
        self.count = count
        self.decode = decode

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> _Decoded:
        try:
            return self.decode(number)
        except (ImageError, OSError) as error:
            return _Decoded(number, problem=str(error))


def _decoded(files: _Files, split: str, processes: int, advance: Callable[[str, int], None]) -> Iterator[_Decoded]:
    loader = DataLoader(
        files,
        batch_size=16,
        collate_fn=list,
        num_workers=processes if len(files) > 64 else 0,
        worker_init_fn=ignore_stop_signals,
    )
    for batch in loader:
        advance(split, len(batch))
        yield from batch


def _sizes_text(sizes: npt.NDArray[np.int64]) -> str:
    """Widths and heights: the most frequent, and the range."""
    counts = Counter(f"{width}x{height}" for height, width in sizes.tolist())
    usual, number = counts.most_common(1)[0]
    low, high = sizes.min(axis=0), sizes.max(axis=0)
    if len(counts) == 1:
        return f"all {usual}"
    return f"{len(counts):,} sizes, {low[1]} to {high[1]} wide, {low[0]} to {high[0]} high; {number:,} are {usual}"


def _range_text(values: npt.NDArray[Any]) -> str:
    if not len(values):
        return "-"
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"mean {np.mean(values):.1f}, median {middle:.0f}, {low:.0f} to {high:.0f}"


def _of_detection(
    module: DetectionDataModule, split: str, processes: int, advance: Callable[[str, int], None]
) -> SplitReport:
    annotations = module.annotations(split)
    report = SplitReport(module.split_names[split], problems=dict(annotations.unreadable))
    turned = 0
    decode = functools.partial(_decode_image, module, split)
    for one in _decoded(_Files(len(annotations), decode), report.name, processes, advance):
        turned += one.turned
        if one.problem:
            report.problems[annotations.names[one.number]] = one.problem
    lengths = module.training_size if split == "train" else (module.min_size, module.max_size)
    statuses = annotations.statuses(*lengths)
    names = annotations.categories.names
    counts = np.bincount(annotations.labels[statuses != TargetStatus.CROWD], minlength=len(names) + 1)[1:]
    report.classes, report.unit = dict(zip(names, counts.tolist(), strict=True)), "boxes"
    pairs = annotations.images_of_labels(statuses != TargetStatus.CROWD)
    present = np.bincount(pairs[:, 1], minlength=len(names) + 1)[1:]
    report.images_with = dict(zip(names, present.tolist(), strict=True))
    per_image = np.diff(annotations.starts)
    resized = resized_sizes(annotations.sizes, *lengths)
    scale = (resized / annotations.sizes)[annotations.image_indices()]
    sides = np.sqrt(np.maximum(0, np.prod(annotations.bboxes[:, 2:] * scale[:, ::-1], axis=1)))
    original = np.sqrt(np.maximum(0, annotations.areas))
    report.distributions = {
        "boxes per image": per_image,
        "side of a box (square root of its area) in pixels at the input of the network": sides,
        "longer side of an image in pixels": annotations.sizes.max(axis=1),
    }
    small, large = int((original < _SMALL).sum()), int((original > _LARGE).sum())
    report.facts = [
        ("images", f"{len(annotations):,}"),
        ("sizes", _sizes_text(annotations.sizes)),
        ("sizes at the input of the network", _sizes_text(resized)),
        ("turned upright by EXIF", f"{turned:,}"),
        ("annotations", f"{len(annotations.labels):,}"),
        ("small, medium, large", f"{small:,}, {len(original) - small - large:,}, {large:,}"),
        ("boxes per image", _range_text(per_image)),
        ("images without a box", f"{int((per_image == 0).sum()):,}"),
        ("boxes cut at a border", f"{int(annotations.cut_at_borders().sum()):,}"),
    ]
    report.facts += [
        (f"boxes {status.description}", f"{int((statuses == status).sum()):,}")
        for status in TargetStatus
        if status == TargetStatus.TARGET or (statuses == status).any()
    ]
    absent = [name for name, count in report.classes.items() if not count]
    if absent:
        report.facts.append(("classes without a box", listed(absent, 20)))
    return report


def _decode_image(module: DetectionDataModule, split: str, number: int) -> _Decoded:
    annotations, folder = module.annotations(split), module.images_folder(split)
    header = read_annotated(annotations, number, image_header, folder, module.exif)
    read_annotated(annotations, number, read_image, folder, module.exif)
    return _Decoded(number, turned=header.turned)


def _of_segmentation(
    module: SegmentationDataModule, split: str, processes: int, advance: Callable[[str, int], None]
) -> SplitReport:
    files = module.files(split)
    report = SplitReport(module.split_names[split])
    counts, images_with = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
    turned = empty = 0
    for one in _decoded(
        _Files(len(files), functools.partial(_decode_labelled, module, split)), report.name, processes, advance
    ):
        turned += one.turned
        if one.problem:
            report.problems[files.images[one.number]] = one.problem
        empty += not one.problem and set(one.values) <= {IGNORED}
        for label, count in one.values.items():
            counts[label] += count
            images_with[label] += 1
    names = module.classes.names
    total = max(1, int(counts.sum()))
    report.classes = {name: 100 * counts[label] / total for label, name in enumerate(names)}
    report.unit = "% of the pixels"
    sizes = files.sizes(module.exif)
    report.distributions = {"longer side of an image in pixels": sizes.max(axis=1)}
    report.facts = [
        ("images", f"{len(files):,}"),
        ("sizes", _sizes_text(sizes)),
        ("turned upright by EXIF", f"{turned:,}"),
        ("ignored pixels", f"{100 * counts[IGNORED] / total:.2f} %"),
        ("images without a labelled pixel", f"{empty:,}"),
    ]
    report.images_with = {name: int(images_with[label]) for label, name in enumerate(names)}
    absent = [name for name, count in report.images_with.items() if not count]
    if absent:
        report.facts.append(("classes without a pixel", listed(absent, 20)))
    return report


def _decode_labelled(module: SegmentationDataModule, split: str, number: int) -> _Decoded:
    files = module.files(split)
    labels = files.read_labels(number)
    size = labels.shape[0], labels.shape[1]
    header = files.read_with_labels(number, functools.partial(image_header, size=size, exif=module.exif))
    files.read_with_labels(number, functools.partial(read_image, size=size, exif=module.exif))
    present = np.bincount(labels.ravel(), minlength=256)
    values = {int(label): int(present[label]) for label in np.flatnonzero(present)}
    return _Decoded(number, turned=header.turned, values=values)


# Text


def _of_translation(module: WMT14DataModule) -> Iterator[SplitReport]:
    module.prepare_data()
    for split, stage in (("train", "fit"), ("valid", "fit"), ("test", "test")):
        if (split == "valid" and not module.valid_files) or (split == "test" and not module.test_files):
            continue
        try:
            module.setup(stage)
        except FileNotFoundError:
            if split != "test":
                raise
            continue
        yield _of_sentences(module, split)


def _of_sentences(module: WMT14DataModule, split: str) -> SplitReport:
    dataset = module.dataset(split)
    source, target = dataset.lengths()
    report = SplitReport(split)
    unknown = sum(int((dataset.source[index] == UNK_ID).sum()) for index in range(len(dataset)))
    report.facts = [
        ("pairs", f"{len(dataset):,}"),
        (f"tokens of a sentence, {module.source_language}", _range_text(source)),
        (f"tokens of a sentence, {module.target_language}", _range_text(target)),
        ("unknown pieces of the source", f"{unknown:,} of {int(source.sum()):,}"),
    ]
    if split == "train":
        report.facts += [(f"left out: {reason}", f"{count:,}") for reason, count in module.left_out.items()]
    report.distributions = {
        f"tokens of a sentence, {module.source_language}": source,
        f"tokens of a sentence, {module.target_language}": target,
    }
    return report


# Output


def print_report(console: Console, report: SplitReport) -> None:
    """Tables of a split, and its problems."""
    table = Table(title=report.name, title_justify="left", show_header=False)
    for what, fact in report.facts:
        table.add_row(escape(what), escape(fact))
    console.print(table)
    if report.classes:
        total = sum(report.classes.values()) or 1
        classes = Table("class", report.unit, *(("share",) if report.unit == "boxes" else ()), "images")
        for name, value in sorted(report.classes.items(), key=lambda pair: -pair[1]):
            shown = (f"{value:,.0f}", f"{100 * value / total:.1f} %") if report.unit == "boxes" else (f"{value:.2f}",)
            classes.add_row(escape(name), *shown, f"{report.images_with[name]:,}")
        console.print(classes)
    for name, reason in report.problems.items():
        console.print(f"{name}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)


def draw_reports(reports: Sequence[SplitReport]) -> Figure:
    """Classes and distributions of all splits, a row for each."""
    measures: dict[str, list[npt.NDArray[Any]]] = {}
    frequencies: Counter[str] = Counter()
    for report in reports:
        frequencies.update(report.classes)
        for what, values in report.distributions.items():
            measures.setdefault(what, []).append(values)
    # The same bins and the same order of classes for all splits; what is the same everywhere is in the table.
    joined = {what: np.concatenate(parts) for what, parts in measures.items()}
    bins = {what: _Bins.of(values) for what, values in joined.items() if len(np.unique(values)) > 1}
    classes = [name for name, _ in frequencies.most_common(_MOST_CLASSES)]
    columns, rows = max(1, bool(classes) + len(bins)), max(1, len(reports))
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), dpi=110, layout="constrained")
    for line, report in zip(figure.subplots(rows, columns, squeeze=False), reports, strict=False):
        if classes:
            _draw_classes(line[0], report, classes)
        for axes, (what, shared) in zip(line[bool(classes) :], bins.items(), strict=True):
            _draw_histogram(axes, what, report.distributions.get(what, np.zeros(0)), shared)
        line[0].set_title(report.name + line[0].get_title("left"), fontsize=11, loc="left", weight="bold")
        if not classes and not bins:
            line[0].set_axis_off()
    return figure


def _draw_classes(axes: Axes, report: SplitReport, classes: Sequence[str]) -> None:
    axes.barh(classes, [report.classes.get(name, 0) for name in classes], color=_COLOUR)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(4, min(9, 180 / len(classes))))
    axes.set_xlabel(report.unit, fontsize=9)
    left_out = len(report.classes) - len(classes)
    axes.set_title(f" (without the {left_out} rarest classes)" if left_out > 0 else "", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


@dataclasses.dataclass(frozen=True)
class _Bins:
    """At most 40 bars of a histogram; of whole numbers in the middle of the bars."""

    edges: npt.NDArray[np.float64]
    logarithmic: bool

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> "_Bins":
        """For the values of all splits."""
        low, high = float(values.min()), float(values.max())
        if np.issubdtype(values.dtype, np.floating) and high > 50 * max(1.0, low) and low >= 0:
            return cls(np.geomspace(max(1.0, low), high + 1, 41), logarithmic=True)
        step = max(1, math.ceil((high - low + 1) / 40))
        return cls(np.arange(math.floor(low), high + step + 1, step) - 0.5, logarithmic=False)


def _draw_histogram(axes: Axes, what: str, values: npt.NDArray[Any], bins: _Bins) -> None:
    if bins.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.hist(np.maximum(values, bins.edges[0]), bins=bins.edges.tolist(), color=_COLOUR)
    axes.set_xlabel(what, fontsize=9, wrap=True)
    axes.set_ylabel("number", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Command-line arguments; None for those of the process.

    Raises:
        SystemExit: With status 2 if an option or the data is wrong, or a file cannot be used.
    """
    parser = data_parser("python -m lightning_attn.datamodules.check", "Checks all data before a long run.")
    parser.add_argument("--output", type=str, default="data.png", help="figure to write; an existing file is kept")
    parser.add_argument("--workers", type=int, default=-1, help="processes that decode; -1 for one per core")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options, module = parse_data(parser, args)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, Any] = {}

            def advance(split: str, count: int) -> None:
                if split not in tasks:
                    tasks[split] = bar.add_task(f"{split}: files decoded", total=None)
                bar.update(tasks[split], advance=count)

            reports = check_data(module, None if options.workers < 0 else options.workers, advance)
        path = write_figure(Path(options.output), draw_reports(reports))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    console = Console()
    for report in reports:
        print_report(console, report)
    problems = sum(len(report.problems) for report in reports)
    console.print(f"{problems:,} files cannot be used. Statistics drawn into {path}", markup=False, highlight=False)
    if problems:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
