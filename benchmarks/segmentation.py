"""What segmentation costs here: time and memory of a training step, and of inference on a whole image.

``training`` is the training step of the paper's network at its crop, one image of 769x769, under several attentions:
forward, backward and SGD. Sides are too large to take turns within one process, so they take turns as processes of
their own, whose peaks of memory are counted; time is the median of the steps after the first of each.

``inference`` is a whole image of 1024x2048 under 1111 with all keys. It takes minutes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Steps, in_processes, no_targets
from benchmarks.runner import run_as_command
from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Segmenter
from lightning_attn.networks.images.segmentation_inference import InferenceSpec, segment

ATTENTIONS: Mapping[str, dict[str, Any]] = {
    "none": {"mechanism": "none"},
    "0010": {"terms": "0010"},
    "0011": {"terms": "0011"},
    "1111": {"terms": "1111"},
    "1111 stride 2": {"terms": "1111", "kv_stride": 2},
    "0010 deformable": {"terms": "0010", "convolution": "deformable"},
}
_CLASSES = 19


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and the size of its random input.

    Attributes:
        backbone: Which ResNet.
        segmenter: What stands on it.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        heads: Attention heads.
    """

    backbone: ResNetSpec
    segmenter: SegmenterSpec
    height: int
    width: int
    heads: int = 8

    def __str__(self) -> str:
        return f"{self.backbone.name}, one image of {self.height}x{self.width}"

    def network(self, side: str) -> Segmenter:
        """The network under one of `ATTENTIONS`, its gates open, as training opens them."""
        torch.manual_seed(0)
        network = build_segmenter(self, AttentionSpec(num_heads=self.heads, **ATTENTIONS[side]))
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                torch.nn.init.constant_(parameter, 0.1)
        return network

    def images(self) -> list[Tensor]:
        """A random image."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(256, (3, self.height, self.width), generator=generator, dtype=torch.uint8)]

    def labels(self) -> list[Tensor]:
        """Random labels for it."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(_CLASSES, (self.height, self.width), generator=generator, dtype=torch.uint8)]


def build_segmenter(problem: Problem, attention: AttentionSpec) -> Segmenter:
    """The network of a problem."""
    backbone = build_backbone(problem.backbone, attention, problem.segmenter.output_stride)
    return Segmenter(_CLASSES, backbone, attention, problem.segmenter)


def training_steps(problem: Problem, sides: Sequence[str]) -> Steps:
    """Forward, backward and SGD; the optimizer has its state before the step that counts."""
    return {side: _training_step(problem.network(side).train(), problem) for side in sides}


def _training_step(network: Segmenter, problem: Problem) -> Callable[[], object]:
    images, labels = problem.images(), problem.labels()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        losses = network(images, labels)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def inference_steps(problem: Problem, sides: Sequence[str]) -> Steps:
    """A label for every pixel of the whole image."""

    def step(side: str) -> Callable[[], list[Tensor]]:
        network, images = problem.network(side).eval(), problem.images()
        return lambda: segment(network, images, InferenceSpec())

    return {side: step(side) for side in sides}


# Statistics of a batch of one image are no less work than those over GPUs.
PAPER = Problem(ResNetSpec("resnet50", norm="batch"), SegmenterSpec(norm="batch"), height=769, width=769)

BENCHMARK = Benchmark(
    name="segmentation",
    title="Segmentation: time and memory",
    description=__doc__,
    method="Each side in processes of its own, float32; medians of the steps after the first.",
    cases=(
        Case(
            "segmentation.training",
            "a training step under several attentions",
            in_processes,
            PAPER,
            build=training_steps,
            sides=tuple(ATTENTIONS),
            base="none",
            peaks={"1111": 24.0},
            repetitions=2,
            steps=3,
            quick={
                "problem": dataclasses.replace(PAPER, height=257, width=257),
                "sides": ("1111", "0010"),
                "repetitions": 1,
                "judge": no_targets,
            },
        ),
        Case(
            "segmentation.inference",
            "a whole image",
            in_processes,
            dataclasses.replace(PAPER, height=1024, width=2048),
            build=inference_steps,
            sides=("1111",),
            peaks={"1111": 12.0},
            repetitions=1,
            steps=1,
            quick={"problem": dataclasses.replace(PAPER, height=256, width=512), "judge": no_targets},
        ),
    ),
)

if __name__ == "__main__":
    run_as_command("segmentation")
