"""Evaluators of all tasks on images: pictures of results, and reports of unusable images."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from lightning_attn.datamodules.images.batches import BadImage, ImageBatch
from lightning_attn.datamodules.images.folders import listed
from lightning_attn.io import unused_path, write_json, write_table
from lightning_attn.metrics.gather import gather_by_id
from lightning_attn.networks.images.network import ImageNetwork
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.visualization.images import image_attention
from lightning_attn.visualization.pictures import Picture, save_picture

if TYPE_CHECKING:
    from lightning_attn.tasks.images import ImageTask

_logger = logging.getLogger(__name__)


class Pictures(Evaluator):
    """Draws the first images of rank 0: to the loggers after a validation, else to files.

    Args:
        task: The task that draws them.
        number: Number of pictures.
    """

    def __init__(self, task: "ImageTask[Any, Any]", number: int) -> None:
        self._task, self._number = task, number
        self._pending: dict[str, Callable[[], Picture]] = {}

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        self._pending = {}

    @override
    def update(self, batch: Any, outputs: Mapping[str, Any]) -> None:
        if self._task.trainer.is_global_zero and len(self._pending) < self._number:
            for name, draw in self._task.pictures(batch, outputs["results"]):
                self._pending[name] = draw
                if len(self._pending) == self._number:
                    break

    @override
    def write(self, scores: dict[str, Any]) -> None:
        pending, self._pending = self._pending, {}
        if self.split == "val":
            for name, draw in pending.items():
                self._task.log_picture(f"val/{name}", draw())
        elif pending:
            folder = unused_path(self._task.output_directory / "predictions" / f"{self.split}_pictures")
            for name, draw in pending.items():
                save_picture(draw(), folder / f"{name}.png")
            rank_zero_info(f"{len(pending)} pictures drawn to {folder}")


class AttentionExample(Evaluator):
    """Writes how each term of an attention weights the first test image, to `predictions/test_attention.json`.

    Of the attention with the largest map (the last of equal ones), for the query in the middle of the image; nothing
    without such an attention.

    Args:
        task: The task; nothing is written unless its network is an `ImageNetwork`.
    """

    def __init__(self, task: "ImageTask[Any, Any]") -> None:
        self._task = task
        self._image: Tensor | None = None

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        self._image = None

    @override
    def update(self, batch: ImageBatch, outputs: Mapping[str, Any]) -> None:
        if self.split == "test" and self._image is None and len(batch) and self._task.trainer.is_global_zero:
            self._image = batch.images[0]

    @override
    def write(self, scores: dict[str, Any]) -> None:
        image, self._image = self._image, None
        network = self._task.built_network
        if image is None or not isinstance(network, ImageNetwork):
            return
        if (found := image_attention(network, image)) is not None:
            weights, picture = found
            folder = self._task.output_directory / "predictions"
            drawn = save_picture(picture, unused_path(folder / "test_attention.jpg"))
            write_json(folder / "test_attention.json", {"maps": [weights | {"image": drawn.name}]})


class BadImages(Evaluator):
    """Reports images that could not be used: each when it occurs, and all of them at the end of a stage."""

    def __init__(self, task: "ImageTask[Any, Any]") -> None:
        self._task = task
        self._found: dict[BadImage, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        # Validations of a training belong to its stage.
        if split != "val" or self._task.trainer.state.fn != TrainerFn.FITTING:
            self._found = {}

    @override
    def update(self, batch: ImageBatch, outputs: Mapping[str, Any]) -> None:
        for image in batch.bad:
            if image not in self._found:
                self._found[image] = None
                _logger.warning(f"Skipped: {image.reason}")

    @override
    def compute(self) -> dict[str, Any]:
        if self.split == "test":
            self.report()
        return {}

    def report(self, path: Path | None = None) -> None:
        """Logs which images of all ranks could not be used; a collective.

        Args:
            path: A CSV file to write their names and the reasons to; None for none.
        """
        unreadable = dict.fromkeys(getattr(self._task.datamodule, "unreadable", ()))
        self._found = gather_by_id(self._found | unreadable)
        if not self._found or not self._task.trainer.is_global_zero:
            return
        where = ""
        if path is not None:
            where = f", which {write_table(path, ('file_name', 'reason'), self._found)} lists"
        _logger.warning(
            f"{len(self._found):,} images could not be used and were skipped{where}: "
            f"{listed([image.name for image in self._found], 20)}"
        )


def print_scores(
    scores: dict[str, Any], header: tuple[str, str], per_class: dict[str, float], totals: tuple[str, ...]
) -> None:
    """Prints the scores of a test, whatever split it is made on, as a table.

    Args:
        scores: All scores, including `num_images`.
        header: Headings of the two columns.
        per_class: A score for each class.
        totals: Names of the scores in the last rows.
    """
    table = Table(*header, title=f"Scores of {scores['num_images']:,} images")
    for name, value in per_class.items():
        table.add_row(escape(name), _formatted(value))
    table.add_section()
    for name in totals:
        table.add_row(name, _formatted(scores[name]))
    Console().print(table)


def _formatted(score: float) -> str:
    return f"{score:.3f}" if score == score else "-"  # NaN is not equal to itself
