"""What `profile` measures of a task: its network on made-up inputs of one size, without data on the disk."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_attn.errors import InputError, UserError

__all__ = [
    "Workload",
    "WorkloadOptions",
    "build_network",
    "image_size",
    "number_of_categories",
    "random_boxes",
    "random_images",
    "total_loss",
    "total_of_outputs",
]

Network = TypeVar("Network", bound=nn.Module)

_COCO_CATEGORIES = 80
_COCO_SPLITS = {"train": "train2017", "val": "val2017", "test": "val2017"}  # its test split has no public annotations
_BOXES = 8  # objects in a made-up image, about COCO's mean


@dataclasses.dataclass(frozen=True)
class WorkloadOptions:
    """What a user says about the inputs to be profiled.

    Attributes:
        device: Where the network runs; `meta` computes shapes only.
        size: Height and width of images in pixels, or tokens of source and target; None for the data's.
        batch_size: Images, or pairs of sentences, in a batch; None for the data's.
        num_classes: Number of classes or categories; None for the data's.
    """

    device: torch.device
    size: tuple[int, int] | None = None
    batch_size: int | None = None
    num_classes: int | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and what it is run on.

    Attributes:
        network: The network, on its device.
        forward: Its inference for a batch, called in evaluation mode.
        loss: The loss of a batch, called in training mode.
        batch_size: Images, or pairs of sentences, in the batch.
        unit: What speed is counted in: `"images"` or `"tokens"`.
        units: How many the batch has.
        inputs: The batch in words.
        notes: Where numbers, or what is computed, were assumed.
        paper_omits_own: Whether the paper's count leaves out what the network computes itself, outside its submodules.
    """

    network: nn.Module
    forward: Callable[[], object]
    loss: Callable[[], Tensor]
    batch_size: int
    unit: str
    units: int
    inputs: str
    notes: tuple[str, ...] = ()
    paper_omits_own: bool = False


def build_network(build: Callable[[], Network], device: torch.device) -> tuple[Network, tuple[str, ...]]:
    """Builds a network on a device, with random weights, and what is to be noted about it."""
    torch.manual_seed(0)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        network = build()
    replaced = _without_sync(network)
    note = "norm: sync is profiled as batch, which computes the same in one process"
    return network.to(device), (note,) if replaced else ()


def _without_sync(network: nn.Module) -> int:
    """Replaces layers of synchronised batch normalisation, which need GPUs; returns how many."""
    found = 0
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                device = None if child.weight is None else child.weight.device
                norm = nn.BatchNorm2d(
                    child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats, device
                )
                for new, old in zip(norm.parameters(), child.parameters(), strict=True):
                    new.requires_grad_(old.requires_grad)
                setattr(parent, name, norm.train(child.training))
                found += 1
    return found


def image_size(datamodule: object, options: WorkloadOptions) -> tuple[int, int]:
    """Height and width of the images: those given, or those that the data's images are resized or cropped to.

    Raises:
        ValueError: If neither is known.
    """
    if options.size is not None:
        return options.size
    sides = getattr(datamodule, "crop_size", None)
    if sides:
        return int(sides[0]), int(sides[1])
    shorter, longer = getattr(datamodule, "min_size", 0), getattr(datamodule, "max_size", 0)
    if shorter and longer:
        return int(shorter), int(longer)
    known: tuple[int, int] | None = getattr(datamodule, "usual_size", None)
    if known is None:
        raise InputError(
            f"size: {type(datamodule).__name__} neither resizes nor crops its images, so that they have no one size. "
            "Give height and width in pixels (--size 800 1333)."
        )
    return known


def number_of_categories(datamodule: Any, options: WorkloadOptions) -> tuple[int, str]:
    """The number of categories of detection data, and what is to be noted about it.

    Raises:
        ValueError: If the data is not there, and it is not said.
    """
    if options.num_classes is not None:
        return options.num_classes, ""
    kind = type(datamodule).__name__
    try:
        categories = datamodule.read_categories() if hasattr(datamodule, "read_categories") else None
    except (UserError, OSError):
        categories = None
    if categories is not None:
        return len(categories.names), ""
    if kind == "COCODataModule" and datamodule.split_names == _COCO_SPLITS:
        return _COCO_CATEGORIES, f"COCO's {_COCO_CATEGORIES} categories, as {datamodule.root} holds no annotations"
    raise InputError(
        f"num_classes: the number of categories is not known, as {getattr(datamodule, 'root', kind)} holds no "
        "annotations. Give it (--num_classes 80), or the folder of the data (--data.root FOLDER)."
    )


def total_loss(network: nn.Module, images: list[Tensor], targets: list[Any]) -> Tensor:
    """The sum of the losses of an `ImageNetwork`."""
    return torch.stack(list(network(images, targets).values())).sum()


def total_of_outputs(outputs: Callable[[], list[Tensor]]) -> Tensor:
    """A number that depends on all outputs, in place of a loss, whose targets are chosen by values."""
    return torch.stack([one.sum() for one in outputs()]).sum()


def random_images(number: int, size: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Images of noise, uint8 `[3, H, W]` each."""
    if device.type == "meta":
        return [torch.empty(3, *size, dtype=torch.uint8, device=device) for _ in range(number)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8).to(device) for _ in range(number)]


def random_boxes(number: int, size: tuple[int, int], num_classes: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Objects of `number` images: `boxes` `[n, 4]` inside the image and `labels` `[n]` from 1 on."""
    generator = torch.Generator().manual_seed(1)
    height, width = size
    sides = torch.tensor([width, height], dtype=torch.float32)
    targets = []
    for _ in range(number):
        first = torch.rand(_BOXES, 2, generator=generator) * 0.6
        extent = 0.1 + 0.3 * torch.rand(_BOXES, 2, generator=generator)
        boxes = torch.cat((first * sides, (first + extent) * sides), dim=1)
        labels = torch.randint(1, num_classes + 1, (_BOXES,), generator=generator)
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
    return targets
