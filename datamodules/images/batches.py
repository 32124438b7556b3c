"""Batches of images of any sizes, and data sets that read them and deal with files that cannot be used."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import cv2
import torch
from torch import LongTensor, Tensor
from typing_extensions import override

from lightning_attn.datamodules.images.files import ImageError
from lightning_attn.datamodules.images.folders import printable
from lightning_attn.datamodules.sampling.grouped_batches import BatchedDataset, SampleRequest

__all__ = ["BadImage", "BadImagePolicy", "ImageBatch", "ImageDataset"]

BadImagePolicy = Literal["stop", "skip"]
"""How a file that is damaged or not an image is treated while a stage runs.

`stop` ends the run with an error that names it. `skip` logs it: training takes the next image instead, and evaluation
leaves it out of the scores.
"""


class BadImage(NamedTuple):
    """A file that could not be used.

    Args:
        name: Its name relative to the folder of the split.
        reason: The error.
    """

    name: str
    reason: str


@dataclass
class ImageBatch:
    """Images, each of its own size; possibly none. A subclass adds the targets.

    Not frozen only because Lightning refuses frozen dataclasses when it converts the precision of inputs.

    Args:
        ids: Id of each image, `[B]`.
        images: RGB images, transformed for the network, uint8 `[3, H, W]` each.
        outputs: For each image the stem of its output files, unique in a split.
        paths: The files.
        bad: Images of this batch that could not be used.

    Attributes:
        on_cpu: Fields that stay on the CPU, where they are read.
    """

    on_cpu: ClassVar[tuple[str, ...]] = ("ids",)

    ids: LongTensor
    images: list[Tensor]
    outputs: list[str] = field(default_factory=list, kw_only=True)
    paths: list[str] = field(default_factory=list, kw_only=True)
    bad: list[BadImage] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device, except for `on_cpu`."""
        asynchronous = torch.device(device).type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=asynchronous))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory, except for `on_cpu`."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            **{
                one.name: _changed(getattr(self, one.name), change)
                for one in fields(self)
                if one.name not in self.on_cpu
            },
        )


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of lists and dictionaries in which tensors are changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    if isinstance(value, dict):
        return {name: _changed(one, change) for name, one in value.items()}
    return value


BatchType = TypeVar("BatchType", bound=ImageBatch)
T = TypeVar("T")

_MOST_REPLACEMENTS = 100  # bad images in a row, after which all of them are considered bad


class ImageDataset(BatchedDataset[BatchType], abc.ABC):
    """Images that are read and transformed a batch at a time.

    Attributes:
        on_bad_image: See `BadImagePolicy`; a subclass reads by `read_each` to follow it.
        replaces_bad_images: Whether a bad image is replaced by the next one, as in training.
    """

    on_bad_image: BadImagePolicy = "stop"
    replaces_bad_images: bool = False

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        return f"image {index}"

    def read_each(
        self, requests: Sequence[SampleRequest], read: Callable[[SampleRequest], T]
    ) -> tuple[list[SampleRequest], list[T], list[BadImage]]:
        """Reads images, and treats those that cannot be used as `on_bad_image` says.

        Args:
            requests: Which images.
            read: Reads one.

        Returns:
            The requests that were read, what `read` returned for each, and the images that could not be used.

        Raises:
            ImageError: If an image cannot be used and is not to be skipped, or no image can be used.
            OSError: If a file cannot be read, likewise.
        """
        used, results, bad = [], [], []
        attempts = min(len(self), _MOST_REPLACEMENTS) if self.replaces_bad_images else 1
        for request in requests:
            for attempt in range(attempts):
                chosen = replace(request, index=(request.index + attempt) % len(self))
                try:
                    result = read(chosen)
                except (ImageError, OSError) as error:
                    if self.on_bad_image == "stop" or (self.replaces_bad_images and attempt == attempts - 1):
                        raise
                    bad.append(BadImage(self.name(chosen.index), printable(str(error))))
                else:
                    used.append(chosen)
                    results.append(result)
                    break
        return used, results, bad

    @override
    def start_worker(self) -> None:
        cv2.setNumThreads(0)  # OpenCV would start a thread per core in each worker
