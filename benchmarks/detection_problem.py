"""The networks and random batches of the detection benchmarks: all that they know of this project's detectors."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images import backbone
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.batching import NormalizedBatch
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.network import Detector

if TYPE_CHECKING:
    from lightning_attn.datamodules.detection.datamodule import (
        DetectionBatch,  # needs Lightning, which a network does not
    )

ATTENTIONS: Mapping[str, dict[str, Any]] = {
    "none": {"mechanism": "none"},
    "0010": {"terms": "0010"},
    "1111 stride 2": {"terms": "1111", "kv_stride": 2},
    "1111": {"terms": "1111"},
    "0010 deformable": {"terms": "0010", "convolution": "deformable"},
    "none deformable": {"mechanism": "none", "convolution": "deformable"},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and a random batch for it.

    Attributes:
        backbone: Which ResNet.
        detector: Its head.
        images: Images in the batch.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        boxes: Boxes in each image.
        classes: Number of classes without the background.
        heads: Attention heads.
    """

    backbone: ResNetSpec
    detector: DetectorSpec
    images: int
    height: int
    width: int
    boxes: int = 6
    classes: int = 80
    heads: int = 8

    def __str__(self) -> str:
        return (
            f"{self.backbone.name} of width {self.backbone.width}; batch of {self.images}, images of "
            f"{self.height}x{self.width}"
        )

    def batch(self, seed: int = 0) -> "DetectionBatch":
        """`samples` as a data module gives them."""
        from lightning_attn.datamodules.detection.datamodule import DetectionBatch

        images, targets = self.samples(seed)
        sizes = torch.tensor([[self.height, self.width]] * self.images)
        return DetectionBatch(torch.arange(self.images), images, targets, sizes)  # type: ignore[arg-type]

    def samples(self, seed: int = 0) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Random images with random boxes, each at most half as wide and high as its image."""
        generator = torch.Generator().manual_seed(seed)
        size = torch.tensor((self.width, self.height))
        images, targets = [], []
        for _ in range(self.images):
            shape = 3, self.height, self.width
            images.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
            corners = 0.5 * torch.rand(self.boxes, 2, generator=generator)
            extents = 0.1 + 0.4 * torch.rand(self.boxes, 2, generator=generator)
            boxes = torch.cat((corners * size, (corners + extents) * size), dim=1)
            labels = torch.randint(1, self.classes + 1, (self.boxes,), generator=generator)
            targets.append({"boxes": boxes, "labels": labels})
        return images, targets

    def attention(self, side: str) -> AttentionSpec:
        """The attention of one of `ATTENTIONS`."""
        return AttentionSpec(num_heads=self.heads, **ATTENTIONS[side])


# The paper's network and its input, and the network of the miniature set, the smallest that is configured here.
PAPER = Problem(
    ResNetSpec("resnet50", norm="frozen", trainable_layers=3), DetectorSpec(), images=1, height=800, width=1344
)
MINIATURE = Problem(
    ResNetSpec("bottleneck14", width=32),
    DetectorSpec(
        fpn_channels=64,
        anchor_sizes=(8.0, 16.0, 32.0, 64.0, 128.0),
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=300,
        roi_batch_size=128,
        roi_canonical_size=64,
        fc_dim=256,
    ),
    images=8,
    height=128,
    width=160,
    classes=8,
)


def build_detector(problem: Problem, attention: AttentionSpec) -> Detector:
    """A detector that trains, with random weights whose features stay in range."""
    torch.manual_seed(0)
    network = Detector(problem.classes, backbone.build_backbone(problem.backbone, attention), problem.detector)
    damp(network)
    return network.train()


def build_backbone(problem: Problem, attention: AttentionSpec) -> nn.Module:
    """Its backbone alone, which takes `normalized` images."""
    torch.manual_seed(0)
    network = backbone.build_resnet(problem.backbone, attention)
    damp(network)
    return network


def normalized(batch: "DetectionBatch") -> Tensor:
    """The images as a backbone takes them, `[B, 3, H, W]`."""
    images: Tensor = NormalizedBatch()(batch.images, 32)
    return images


def detector_loss(network: nn.Module, batch: "DetectionBatch") -> tuple[Tensor, dict[str, float]]:
    """The sum of a detector's losses, and each of them."""
    losses = network(batch.images, batch.targets)
    return torch.stack(list(losses.values())).sum(), {name: float(loss.detach()) for name, loss in losses.items()}


def damp(network: nn.Module) -> None:
    """Lets each residual branch add little where frozen statistics, made up, would let it double the variance."""
    for name, buffer in network.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)
