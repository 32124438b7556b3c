"""The loader of Cityscapes beside torchvision's, on this machine.

``python -m benchmarks.segmentation_loading`` prints a table and writes JSON and Markdown. One step is an epoch: every
training image is decoded with its labels, scaled by a random factor from 0.7 to 2, cropped to 769x769, flipped, and its
label ids become labels. The images are those of Cityscapes in size and weight: photographs, enlarged, with the noise of
a camera, as PNG files in a temporary folder.

The peer is ``torchvision.datasets.Cityscapes`` with its transforms of the second version, wrapped as torchvision says:
``ScaleJitter`` (of the image's own size, which makes it a factor), ``RandomCrop`` and ``RandomHorizontalFlip``. It has
two rows, because its transforms take Pillow's images and tensors, and which is faster depends on the machine. Sides
differ in what they draw, since their random numbers differ, and in one thing: here only the part of the image that the
crop shows is scaled. Sides run in turn in one process; their worker processes are kept.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from benchmarks.measure import (
    Side,
    Target,
    Timing,
    machine,
    markdown_settings,
    markdown_table,
    overlap,
    positive_int,
    print_results,
    ratio,
    timed_in_turn,
)
from datamodules.miniature.backgrounds import photograph
from datamodules.segmentation.cityscapes import CityscapesDataModule
from datamodules.segmentation.classes import HIGHEST_ID, IGNORED, SegmentationClasses
from lightning_attn.io import unused_path, write_json, write_text

OURS, PILLOW, TENSORS = "lightning_attn", "torchvision, Pillow", "torchvision, tensors"
WORKERS = (0, 1, 2)
_FILLING = (124, 116, 104)
_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The images, and what is made of them.

    Attributes:
        images: Number of the images.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        crop: Height and width of the crops.
        smallest: Least factor by which images are scaled.
        largest: Largest factor.
        batch_size: Images in a batch.
    """

    images: int = 12
    height: int = 1024
    width: int = 2048
    crop: int = 769
    smallest: float = 0.7
    largest: float = 2.0
    batch_size: int = 2

    def write(self, root: Path) -> int:
        """Writes the images and their labels in the layout of Cityscapes; returns the bytes of an image at the mean."""
        generator = np.random.default_rng(0)
        total = 0
        for number in range(self.images):
            name = f"city_{number:06d}_000000"
            source = photograph(_PHOTOGRAPHS[number % len(_PHOTOGRAPHS)])
            pixels = cv2.resize(source, (self.width, self.height), interpolation=cv2.INTER_CUBIC)
            noisy = np.clip(np.rint(pixels + generator.normal(0, 1, pixels.shape)), 0, 255).astype(np.uint8)
            coarse = generator.integers(0, HIGHEST_ID + 1, (12, 24), dtype=np.uint8)
            label_ids = cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_NEAREST)
            for kind, ending, values in (
                ("leftImg8bit", "leftImg8bit", noisy),
                ("gtFine", "gtFine_labelIds", np.asarray(label_ids)),
            ):
                folder = root / kind / "train" / "city"
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{name}_{ending}.png"
                Image.fromarray(values).save(path)
                total += path.stat().st_size * (kind == "leftImg8bit")
        return total // self.images


class Peer(Dataset[tuple[Tensor, Tensor]]):
    """`torchvision.datasets.Cityscapes` with its transforms.

    Args:
        root: Folder of the data.
        problem: What is made of the images.
        tensors: Whether images become tensors first, instead of last.
    """

    def __init__(self, root: Path, problem: Problem, *, tensors: bool) -> None:
        filling = {ImageTensor: _FILLING, Image.Image: _FILLING, Mask: IGNORED}
        changes = [
            v2.ScaleJitter((problem.height, problem.width), (problem.smallest, problem.largest)),
            v2.RandomCrop(problem.crop, pad_if_needed=True, fill=filling),
            v2.RandomHorizontalFlip(),
        ]
        steps = [v2.ToImage(), *changes] if tensors else [*changes, v2.ToImage()]
        found = datasets.Cityscapes(
            str(root), split="train", mode="fine", target_type="semantic", transforms=v2.Compose(steps)
        )
        self.dataset = datasets.wrap_dataset_for_transforms_v2(found)
        self.table = torch.from_numpy(SegmentationClasses.chosen().to_labels(np.arange(256, dtype=np.uint8)[None])[0])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[index]
        return image.as_subclass(Tensor), self.table[mask.as_subclass(Tensor).long().squeeze(0)]


def loaders(root: Path, problem: Problem, num_workers: int) -> dict[str, DataLoader[Any]]:
    """Each side's loader of shuffled batches of crops."""
    ours = CityscapesDataModule(str(root), problem.batch_size, num_workers, val_split="train", crop_size=problem.crop)
    ours.setup("fit")
    peers = {
        name: DataLoader(
            Peer(root, problem, tensors=name == TENSORS),
            problem.batch_size,
            shuffle=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        for name in (PILLOW, TENSORS)
    }
    return {OURS: ours.train_dataloader(), **peers}


def epoch_of(loader: DataLoader[Any]) -> Callable[[], None]:
    """A step: all batches once."""

    def run() -> None:
        for _ in loader:
            pass

    return run


def measure(root: Path, problem: Problem, num_workers: int, repetitions: int) -> dict[str, Side]:
    """Times an epoch of every side in turn."""
    steps = {name: epoch_of(loader) for name, loader in loaders(root, problem, num_workers).items()}
    timings = timed_in_turn(steps, repetitions=repetitions, budget=40.0, unmeasured=1)
    return {
        name: Side(timing=timing) if isinstance(timing, Timing) else Side(error=timing)
        for name, timing in timings.items()
    }


def judge(num_workers: int, sides: Mapping[str, Side]) -> Target:
    """Our time beside that of the faster peer, which it should not exceed."""
    peers = [sides[name] for name in (PILLOW, TENSORS) if sides[name].timing is not None]
    fastest = min(peers, key=lambda side: statistics.median(side.timing.seconds) if side.timing else 0.0, default=None)
    return Target(
        f"{num_workers} workers, time / the faster torchvision",
        ratio(sides[OURS], fastest, "time"),
        1.0,
        at_least=False,
        noise=overlap(sides[OURS], fastest),
    )


def table(results: Mapping[int, Mapping[str, Side]], images: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    cells = []
    for num_workers, sides in results.items():
        for name, side in sides.items():
            if side.timing is None:
                cells.append([str(num_workers), name, side.error or "-", "", ""])
                continue
            upper, lower = (images / quartile for quartile in side.timing.quartiles)
            relative = ratio(side, sides[OURS], "time")
            faster = "" if relative is None else f"{relative:.2f}"
            cells.append(
                [str(num_workers), name, f"{images / side.timing.median:.1f}", f"{lower:.1f}-{upper:.1f}", faster]
            )
    return ["workers", "side", "images/s", "quartiles", f"time / {OURS}"], cells


def main(arguments: Sequence[str] | None = None, problem: Problem = Problem()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=positive_int, default=5, help="measured epochs of each side (5)")
    parser.add_argument("--threads", type=positive_int, default=2, help="threads of the training process (2)")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    cv2.setNumThreads(chosen.threads)
    errors = Console(stderr=True)
    results: dict[int, dict[str, Side]] = {}
    with tempfile.TemporaryDirectory() as folder, errors.status("images") as status:
        weight = problem.write(Path(folder))
        for num_workers in WORKERS:
            status.update(f"{num_workers} workers")
            results[num_workers] = measure(Path(folder), problem, num_workers, chosen.repetitions)
    targets = [judge(num_workers, sides) for num_workers, sides in results.items()]
    header, cells = table(results, problem.images)
    run: dict[str, Any] = {
        "machine": machine("torch", "torchvision", "pillow", "opencv-python-headless"),
        "problem": dataclasses.asdict(problem) | {"png_bytes": weight},
        "results": {
            str(num_workers): {name: dataclasses.asdict(side) for name, side in sides.items()}
            for num_workers, sides in results.items()
        },
        "targets": [target.as_dict() for target in targets],
    }
    file = write_json(unused_path(chosen.output / "segmentation_loading.json"), run)
    lines = ["# Segmentation: images per second of the loader", ""]
    lines += [markdown_settings(run[name]) for name in ("machine", "problem")]
    lines += ["", "Medians of interleaved epochs.", "", *markdown_table(header, cells), ""]
    lines += [f"- {target}" for target in targets]
    write_text(file.with_suffix(".md"), "\n".join([*lines, ""]))
    print_results("loading", header, cells, targets, file)


if __name__ == "__main__":
    main()
