"""The loader of Cityscapes beside torchvision's, on this machine.

One step is an epoch: every training image is decoded with its labels, scaled by a random factor from 0.7 to 2, cropped
to 769x769, flipped, and its label ids become labels. The images are those of Cityscapes in size and weight:
photographs, enlarged, with the noise of a camera, as PNG files in a temporary folder.

The peer is ``torchvision.datasets.Cityscapes`` with its transforms of the second version, wrapped as torchvision says:
``ScaleJitter`` (of the image's own size, which makes it a factor), ``RandomCrop`` and ``RandomHorizontalFlip``. It has
two rows, because its transforms take Pillow's images and tensors, and which is faster depends on the machine. Sides
differ in what they draw, since their random numbers differ, and in one thing: here only the part of the image that the
crop shows is scaled. Sides run in turn in one process; their worker processes are kept.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.case import Benchmark, Case, Run, no_targets
from benchmarks.measure import timed_in_turn
from benchmarks.peers.torchvision_cityscapes import TorchvisionCityscapes
from benchmarks.report import settings
from benchmarks.results import Comparison, Result, Side, Target, overlap, ratio
from benchmarks.runner import run_as_command
from lightning_attn.datamodules.miniature.backgrounds import photograph
from lightning_attn.datamodules.segmentation.cityscapes import CityscapesDataModule
from lightning_attn.datamodules.segmentation.classes import HIGHEST_ID

OURS, PILLOW, TENSORS = "lightning_attn", "torchvision, Pillow", "torchvision, tensors"
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
        workers: Numbers of worker processes, each of which is a comparison.
    """

    images: int = 12
    height: int = 1024
    width: int = 2048
    crop: int = 769
    smallest: float = 0.7
    largest: float = 2.0
    batch_size: int = 2
    workers: tuple[int, ...] = (0, 1, 2)

    def __str__(self) -> str:
        return settings(dataclasses.asdict(self))

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


def loaders(root: Path, problem: Problem, num_workers: int) -> dict[str, DataLoader[Any]]:
    """Each side's loader of shuffled batches of crops."""
    ours = CityscapesDataModule(str(root), problem.batch_size, num_workers, val_split="train", crop_size=problem.crop)
    ours.setup("fit")
    size, scales = (problem.height, problem.width), (problem.smallest, problem.largest)
    peers = {
        name: DataLoader(
            TorchvisionCityscapes(root, size=size, scales=scales, crop=problem.crop, tensors=name == TENSORS),
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


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """Times an epoch of every side in turn, for each number of workers."""
    problem: Problem = case.problem
    cv2.setNumThreads(run.threads)
    with tempfile.TemporaryDirectory() as folder:
        run.report("images")
        weight = problem.write(Path(folder))
        for number in problem.workers:
            run.report(f"{number} workers")
            steps = {name: epoch_of(loader) for name, loader in loaders(Path(folder), problem, number).items()}
            timings = timed_in_turn(
                {name: steps[name] for name in case.measured_sides()},
                repetitions=case.repetitions,
                budget=case.budget,
                unmeasured=case.unmeasured,
                clock=run.clock,
            )
            sides = {name: Side.of(timing) for name, timing in timings.items()}
            yield Comparison(f"{number} workers", sides, figures={"png_bytes": weight})


def judge(result: Result) -> None:
    """Our time beside that of the faster peer, which it should not exceed."""
    for comparison in result.comparisons:
        peers = {name: comparison.sides.get(name, Side()).timing for name in (PILLOW, TENSORS)}
        medians = {name: timing.median for name, timing in peers.items() if timing is not None}
        ours, fastest = (
            comparison.sides[OURS],
            comparison.sides[min(medians, key=medians.__getitem__)] if medians else None,
        )
        name = f"{comparison.name}, time / the faster torchvision"
        comparison.targets = [Target(name, ratio(ours, fastest, "time"), 1.0, noise=overlap(ours, fastest))]


BENCHMARK = Benchmark(
    name="segmentation_loading",
    title="Segmentation: images per second of the loader",
    description=__doc__,
    method="Medians of interleaved epochs.",
    cases=(
        Case(
            "segmentation_loading.epoch",
            "Cityscapes' loader beside torchvision's",
            measure,
            Problem(),
            sides=(PILLOW, TENSORS),
            base=OURS,
            rates={"images/s": lambda problem, seconds: problem["images"] / seconds},
            judge=judge,
            repetitions=5,
            budget=40.0,
            unmeasured=1,
            quick={"problem": Problem(images=4, workers=(0, 1)), "repetitions": 2, "judge": no_targets},
        ),
    ),
    packages=("pillow", "opencv-python-headless"),
)

if __name__ == "__main__":
    run_as_command("segmentation_loading")
