"""Contact sheets of a model's inputs after all transforms.

`python -m lightning_attn.visualization.contact_sheets -c CONFIG --split train` draws one.

The DataModule is built from the `data` section of a configuration, as in training, and its own loader provides the
batches, so the sheet shows resizing, augmentation, tokenization and padding. A custom DataModule is supported if it has
a method `browse_figure(split, num)` that returns a figure.
"""

import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_attn.datamodules.data_option import data_parser, parse_data
from lightning_attn.datamodules.detection.datamodule import DetectionBatch, DetectionDataModule
from lightning_attn.datamodules.multitask import MultitaskDataModule
from lightning_attn.datamodules.segmentation.classes import IGNORED, SegmentationClasses
from lightning_attn.datamodules.segmentation.datamodule import SegmentationBatch, SegmentationDataModule
from lightning_attn.datamodules.translation.batches import TranslationBatch
from lightning_attn.datamodules.translation.vocabulary import PAD_ID, Vocabulary
from lightning_attn.datamodules.translation.wmt14 import WMT14DataModule
from lightning_attn.errors import InputError
from lightning_attn.io import write_figure
from lightning_attn.visualization.detection import draw_detections
from lightning_attn.visualization.segmentation import colour_labels

SPLITS = {
    "train": ("fit", "train_dataloader"),
    "val": ("validate", "val_dataloader"),
    "test": ("test", "test_dataloader"),
    "predict": ("predict", "predict_dataloader"),
}
"""The stage and the loader of each split."""

_COLUMNS = 4
_MAX_NAME_LENGTH = 40  # characters
_TITLE_INCHES = 0.4  # above each panel
_PANEL_INCHES = 4.0
_DPI = 110
_PADDING_COLOUR = "0.85"
_IGNORED_COLOUR = (255, 255, 255)


@runtime_checkable
class Browsable(Protocol):
    """A DataModule that draws its own contact sheet."""

    def browse_figure(self, split: str, num: int) -> Figure:
        """Draws at most `num` samples of a split."""


def browse_figure(module: pl.LightningDataModule, split: str, num: int) -> Figure:
    """Draws the contact sheet of a DataModule.

    Args:
        module: The DataModule; its `setup` is called.
        split: "train", "val", "test" or "predict".
        num: Maximum number of samples.

    Raises:
        ValueError: If the split does not exist, `num` is below 1, or the DataModule is not supported.
    """
    if split not in SPLITS:
        raise InputError(f"split: {split!r} is unknown; use one of {', '.join(SPLITS)} (--split NAME).")
    if num < 1:
        raise InputError(f"num: {num} is too small; use 1 or more (--num 1).")
    if isinstance(module, Browsable):
        return module.browse_figure(split, num)
    if isinstance(module, DetectionDataModule):
        loader = split_loader(module, split)
        names = module.categories.names if module.categories is not None else ()
        return draw_detection_sheet(loader, num, names, f"{split} images of {module.root}")
    if isinstance(module, SegmentationDataModule):
        loader = split_loader(module, split)
        folder = module.predict_folder or module.root
        return draw_segmentation_sheet(loader, num, module.classes, f"{split} images of {folder}")
    if isinstance(module, WMT14DataModule):
        loader = split_loader(module, split)
        return draw_token_sheet(loader, num, module.vocabulary, f"{split} sentences of {module.root}")
    raise InputError(
        f"{type(module).__name__} has no contact sheet; define a method browse_figure(split, num) in it that returns "
        "a figure."
    )


def split_loader(module: pl.LightningDataModule, split: str) -> DataLoader[Any]:
    """The loader of training, validation, test or prediction."""
    stage, name = SPLITS[split]
    module.prepare_data()
    module.setup(stage)
    loader: DataLoader[Any] = getattr(module, name)()
    return loader


def draw_detection_sheet(batches: Iterable[DetectionBatch], num: int, names: Sequence[str], title: str) -> Figure:
    """Draws the network's input images, before normalisation and padding, with their boxes.

    Args:
        batches: Batches of images.
        num: Maximum number of images.
        names: Names of the categories, from label 1.
        title: Above the sheet.
    """
    samples = (
        sample
        for batch in batches
        for sample in zip(
            batch.ids.tolist(), batch.names, batch.images, batch.targets or [{}] * len(batch), strict=True
        )
    )
    shown = list(itertools.islice(samples, num))
    figure, panels = _grid(len(shown), title, [image.shape[1] / image.shape[2] for _, _, image, _ in shown])
    for axes, (image_id, name, image, target) in zip(panels, shown, strict=True):
        height, width = image.shape[1:]
        boxes, labels = (target["boxes"], target["labels"].tolist()) if target else (np.empty((0, 4)), [])
        called = [names[label - 1] for label in labels]
        # At the resolution of the sheet, so that text has the intended size.
        axes.imshow(draw_detections(image, boxes, called, categories=names, longest_side=round(_DPI * _PANEL_INCHES)))
        axes.set(xticks=[], yticks=[])
        count = f"{len(labels)} boxes" if target else "no targets"
        axes.set_title(f"{_short(name)} (id {image_id})\n{width} x {height}, {count}", fontsize=8, parse_math=False)
    return figure


def draw_segmentation_sheet(
    batches: Iterable[SegmentationBatch], num: int, classes: SegmentationClasses, title: str
) -> Figure:
    """Draws the network's input images, before normalisation and padding, each with its labels below or beside it.

    Ignored pixels are white. A legend below the sheet has the classes that occur.

    Args:
        batches: Batches of images.
        num: Maximum number of images.
        classes: Names and colours of the labels.
        title: Above the sheet.
    """
    none: list[Tensor | None] = [None]
    samples = (
        sample
        for batch in batches
        for sample in zip(batch.ids.tolist(), batch.names, batch.images, batch.labels or none * len(batch), strict=True)
    )
    shown = list(itertools.islice(samples, num))
    heights = [
        image.shape[1] / image.shape[2] * (1 if labels is None else 2 if image.shape[2] > image.shape[1] else 0.5)
        for _, _, image, labels in shown
    ]
    figure, panels = _grid(len(shown), title, heights)
    occurring = np.zeros(IGNORED + 1, dtype=np.bool_)
    for axes, (number, name, image, labels) in zip(panels, shown, strict=True):
        height, width = image.shape[1:]
        pixels = image.permute(1, 2, 0).numpy()
        if labels is not None:
            coloured = colour_labels(labels, classes.colours, _IGNORED_COLOUR)
            pixels = np.concatenate((pixels, coloured), axis=0 if width > height else 1)
            occurring[labels.numpy()] = True
        axes.imshow(pixels)
        axes.set(xticks=[], yticks=[])
        labelled = "no labels" if labels is None else f"{100 * (labels != IGNORED).float().mean():.0f} % labelled"
        axes.set_title(f"{_short(name)} (id {number})\n{width} x {height}, {labelled}", fontsize=8, parse_math=False)
    meanings = [*enumerate(zip(classes.names, classes.colours, strict=True)), (IGNORED, ("ignored", _IGNORED_COLOUR))]
    keys = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="0.6", label=name)
        for label, (name, (red, green, blue)) in meanings
        if occurring[label]
    ]
    if keys:
        columns = min(len(keys), 2 * max(1, min(_COLUMNS, len(shown))))
        figure.legend(handles=keys, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def draw_token_sheet(batches: Iterable[TranslationBatch], num: int, vocabulary: Vocabulary, title: str) -> Figure:
    """Draws sentences of token batches: a cell for each piece, grey for padding.

    Args:
        batches: Batches of sentences.
        num: Maximum number of sentences.
        vocabulary: The pieces of the tokens.
        title: Above the sheet.
    """
    rows: list[tuple[str, Tensor]] = []
    sentences = (
        (f"batch {number}, {index}", *pair)
        for number, batch in enumerate(batches)
        for index, *pair in zip(batch.ids.tolist(), batch.source, batch.target, strict=True)
    )
    for label, source, target in itertools.islice(sentences, num):
        rows.append((f"{label}: source", source))
        if len(target):
            rows.append(("target", target))
    # sentencepiece marks the beginning of a word by U+2581, drawn here as a thin underscore.
    texts = [[piece.replace("\u2581", "_") for piece in vocabulary.pieces(row.tolist())] for _, row in rows]
    longest = max(map(len, texts), default=1)
    widest = max((len(text) for line in texts for text in line), default=1)
    width = 0.2 + min(0.8, 0.06 * widest)
    figure = Figure(figsize=(2.0 + width * longest, 1.0 + 0.28 * len(rows)), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    for y, ((_, row), line) in enumerate(zip(rows, texts, strict=True)):
        for x, (token, text) in enumerate(zip(row.tolist(), line, strict=True)):
            colour = _PADDING_COLOUR if token == PAD_ID else "white"
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="0.6"))
            size = min(7.0, 90 * width / max(1, len(text)))
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, parse_math=False)
    axes.set(xlim=(0, longest), ylim=(len(rows), 0), xticks=[])
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [label for label, _ in rows], fontsize=7)
    axes.tick_params(length=0)
    return figure


def _short(name: str) -> str:
    """A file name, shortened in the middle to fit above its panel."""
    name = name.rpartition("/")[2]
    return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 16]}…{name[-15:]}"


def _grid(count: int, title: str, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each of `count` samples, of the median of the given aspect ratios (height / width)."""
    columns = max(1, min(_COLUMNS, count))
    rows = max(1, -(-count // columns))
    height = _PANEL_INCHES * min(2.0, max(0.5, float(np.median(heights)) if count else 1.0)) + _TITLE_INCHES
    figure = Figure(figsize=(_PANEL_INCHES * columns, height * rows + 0.4), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Command-line arguments; None for those of the process.

    Raises:
        SystemExit: With status 2 and a message on the standard error if an option or the data is wrong.
    """
    parser = data_parser(
        "python -m lightning_attn.visualization.contact_sheets", "Draws a model's inputs after all transforms."
    )
    parser.add_argument("--split", type=str, default="train", help=f"one of {', '.join(SPLITS)}")
    parser.add_argument("--member", type=str, default="", help="which data of a joint training")
    parser.add_argument("--num", type=int, default=16, help="maximum number of samples")
    parser.add_argument(
        "--output", type=str, default="sheet.png", help="figure to write; an existing file is not replaced"
    )
    try:
        options, module = parse_data(parser, args)
        module = _member(module, options.member)
        path = write_figure(Path(options.output), browse_figure(module, options.split, options.num))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"Contact sheet written to {path}")


def _member(module: pl.LightningDataModule, name: str) -> pl.LightningDataModule:
    """The data of one task of a joint training, or the module itself."""
    members = module.members if isinstance(module, MultitaskDataModule) else {}
    if name in members or (not members and not name):
        return members.get(name, module)
    if not members:
        raise InputError(f"member: {type(module).__name__} has no members; leave out --member {name}.")
    raise InputError(f"member: {name!r} is none of the members; give --member with one of {', '.join(members)}.")


if __name__ == "__main__":
    main()
