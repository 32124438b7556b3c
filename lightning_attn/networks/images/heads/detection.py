"""Common code of the detection heads: options, targets, and the feature pyramid (Zhu et al. 2019, section 4.1)."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from lightning_attn.errors import InputError
from lightning_attn.networks.images.backbone import Features, norm_factory
from lightning_attn.validation import is_number, refuse_unused, require_int

Head = Literal["faster_rcnn", "retinanet"]
HeadNorm = Literal["none", "batch", "sync", "group"]
Target: TypeAlias = dict[str, Tensor]
Detection: TypeAlias = dict[str, Tensor]

_LEVELS = 5
# Fields that only one head uses.
_USED_BY: Mapping[Head, tuple[str, ...]] = {
    "faster_rcnn": (
        "rpn_pre_nms_top_n_train",
        "rpn_pre_nms_top_n_test",
        "rpn_post_nms_top_n_train",
        "rpn_post_nms_top_n_test",
        "rpn_nms_threshold",
        "rpn_foreground_iou",
        "rpn_background_iou",
        "rpn_batch_size",
        "rpn_positive_fraction",
        "roi_batch_size",
        "roi_positive_fraction",
        "roi_foreground_iou",
        "roi_size",
        "roi_samples",
        "roi_canonical_size",
        "fc_dim",
        "roi_convolutions",
        "box_voting",
    ),
    "retinanet": ("topk_candidates", "foreground_iou", "background_iou"),
}


@dataclasses.dataclass(frozen=True)
class DetectorSpec:
    """The detection head, and how it is trained and evaluated. The defaults are the paper's.

    A field that the head does not use must be left at its default.

    Attributes:
        head: `"faster_rcnn"` (the paper's) or `"retinanet"`.
        fpn_channels: Channels of every level of the feature pyramid.
        norm: Normalisation after the convolutions of the pyramid and of Faster R-CNN's second stage: `"none"` (the
            paper's), or `"batch"`, `"sync"`, `"group"` as in `ResNetSpec`, which improve training from scratch.
        anchor_sizes: Square roots of the areas of anchors in pixels, one for each of five levels: strides 4 to 64 for
            Faster R-CNN, 8 to 128 for RetinaNet, which adds anchors 2^(1/3) and 2^(2/3) times as large.
        aspect_ratios: Heights over widths of the anchors.
        rpn_pre_nms_top_n_train: Number of best anchors per level before the non-maximum suppression of proposals.
        rpn_pre_nms_top_n_test: The same in evaluation.
        rpn_post_nms_top_n_train: Proposals per image after it.
        rpn_post_nms_top_n_test: The same in evaluation.
        rpn_nms_threshold: Intersection over union from which the worse of two proposals is dropped.
        rpn_foreground_iou: Anchors that overlap a box by this much are positives of the proposal network.
        rpn_background_iou: Anchors that overlap all boxes by less are negatives; those in between are ignored.
        rpn_batch_size: Anchors per image in its loss.
        rpn_positive_fraction: Maximum fraction of positives among them.
        roi_batch_size: Proposals per image that the second stage is trained on.
        roi_positive_fraction: Maximum fraction of positives among them.
        roi_foreground_iou: Proposals that overlap a box by this much are positives, the others background.
        roi_size: Height and width of RoIAlign's output.
        roi_samples: Sampling points per bin and axis in RoIAlign.
        roi_canonical_size: Square root of the area, in pixels, of proposals that are pooled from the level of stride
            16; half that size, from the next finer one. 224 is FPN's, for images whose short side is about 800.
        fc_dim: Width of the fully connected layers of the second stage.
        roi_convolutions: 3x3 convolutions of the second stage, before one fully connected layer; 0 (the paper's) for
            none and two such layers.
        topk_candidates: Number of best anchors per level that RetinaNet decodes in evaluation.
        foreground_iou: Anchors that overlap a box by this much are positives of RetinaNet.
        background_iou: Anchors that overlap all boxes by less are its negatives.
        score_threshold: Detections must have a higher score.
        nms_threshold: Intersection over union from which the worse of two detections of a class is dropped.
        detections_per_img: Maximum detections per image.
        box_voting: Every detection of Faster R-CNN becomes the mean, weighted by scores, of the boxes of its class,
            before the non-maximum suppression, that it overlaps by this much (Gidaris and Komodakis 2015, section 5);
            0 (the paper's) for none.

    Raises:
        ValueError: If a field has an invalid value; the message names the field and the fix.
    """

    head: Head = "faster_rcnn"
    fpn_channels: int = 256
    norm: HeadNorm = "none"
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_threshold: float = 0.7
    rpn_foreground_iou: float = 0.7
    rpn_background_iou: float = 0.3
    rpn_batch_size: int = 256
    rpn_positive_fraction: float = 0.5
    roi_batch_size: int = 512
    roi_positive_fraction: float = 0.25
    roi_foreground_iou: float = 0.5
    roi_size: int = 7
    roi_samples: int = 2
    roi_canonical_size: int = 224
    fc_dim: int = 1024
    roi_convolutions: int = 0
    topk_candidates: int = 1000
    foreground_iou: float = 0.5
    background_iou: float = 0.4
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_img: int = 100
    box_voting: float = 0.0

    def __post_init__(self) -> None:
        if self.head not in get_args(Head):
            raise InputError(f"head must be one of {list(get_args(Head))}, got {self.head!r}.")
        if self.norm not in get_args(HeadNorm):
            raise InputError(f"norm must be one of {list(get_args(HeadNorm))}, got {self.norm!r}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                require_int(field.name, value, 0 if field.name == "roi_convolutions" else 1)
            elif field.type is float and not (is_number(value) and 0 <= value <= 1):
                raise InputError(f"{field.name} must be a number from 0 to 1, got {value!r}.")
        for name in ("anchor_sizes", "aspect_ratios"):
            values = getattr(self, name)
            if not (
                isinstance(values, Sequence)
                and values
                and all(is_number(value) and math.isfinite(value) and value > 0 for value in values)
            ):
                raise InputError(f"{name} must be a list of positive numbers, got {values!r}.")
        if len(self.anchor_sizes) != _LEVELS:
            raise InputError(
                f"anchor_sizes must have one size for each of the {_LEVELS} levels of the pyramid, got "
                f"{len(self.anchor_sizes)}: {list(self.anchor_sizes)}."
            )
        refuse_unused(self, "head", _USED_BY)
        for low, high in (("rpn_background_iou", "rpn_foreground_iou"), ("background_iou", "foreground_iou")):
            if getattr(self, low) > getattr(self, high):
                raise InputError(
                    f"{low}={getattr(self, low)} must not be above {high}={getattr(self, high)}, or an anchor would be "
                    "both."
                )


class DetectionHead(nn.Module, abc.ABC):
    """Maps a backbone's features to losses or detections; built from torchvision's modules, with their names.

    Convolutions and matrix products follow `torch.autocast`; anchors, box coding and RoIAlign are always float32.

    Args:
        num_classes: Number of classes K without the background; their labels are 1 to K.
        channels: Number of channels of the backbone's maps, by name.
        spec: The options.
        names: The input maps of the pyramid.
        top: Adds the coarsest levels.

    Attributes:
        align_corners: How images are padded; see `padded_size`.
        needs_equal_sizes: Whether all images of a batch must have the same size in evaluation.
        fpn: The feature pyramid.

    Raises:
        ValueError: If `num_classes` is below 1.
    """

    align_corners = False
    needs_equal_sizes = False

    def __init__(
        self,
        num_classes: int,
        channels: Mapping[str, int],
        spec: DetectorSpec,
        names: Sequence[str],
        top: ExtraFPNBlock,
    ) -> None:
        super().__init__()
        require_int("num_classes", num_classes)
        self.num_classes, self.names = num_classes, list(names)
        self.fpn = FeaturePyramidNetwork([channels[name] for name in names], spec.fpn_channels, top, norm_layer(spec))

    @abc.abstractmethod
    def losses(self, features: Features, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses by torchvision's names, to be summed.

        Args:
            features: Of B images.
            targets: For every image `boxes`, float32 `[n, 4]`, the corners x1, y1, x2, y2 in pixels of the image; and
                `labels`, int64 `[n]`, 1 to K. An image may have none.
        """

    @abc.abstractmethod
    def results(self, features: Features) -> list[Detection]:
        """For every image `boxes` as in `losses`, within the image, `labels` and `scores`, best first."""

    @abc.abstractmethod
    def modules_to_compile(self) -> list[nn.Module]:
        """The modules that `torch.compile` may compile: convolutions and linear layers."""

    @abc.abstractmethod
    def outputs(self, features: Features) -> list[Tensor]:
        """What the layers compute of all anchors, and of as many regions as can be, without looking at any value.

        It runs on the meta device, where neither the proposals nor the detections exist.
        """

    def levels(self, features: Features) -> dict[str, Tensor]:
        """Five levels of the pyramid by name, finest first, float32 `[B, fpn_channels, H', W']`."""
        levels: dict[str, Tensor] = self.fpn({name: features.maps[name] for name in self.names})
        return {name: level.float() for name, level in levels.items()}

    def check_targets(self, images: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Checks that targets have the shapes and dtypes described in `losses`.

        Raises:
            ValueError: If not; the message names the first invalid one.
        """
        if len(targets) != len(images):
            raise InputError(f"targets has {len(targets)} entries for {len(images)} images; give one for each image.")
        for index, target in enumerate(targets):
            boxes, labels = target["boxes"], target["labels"]
            if boxes.dtype != torch.float32 or boxes.dim() != 2 or boxes.shape[1] != 4:
                raise InputError(
                    f"targets[{index}]['boxes'] must be float32 [n, 4], got {boxes.dtype} {tuple(boxes.shape)}."
                )
            if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
                raise InputError(
                    f"targets[{index}]['labels'] must be int64 [{len(boxes)}], one for each box, "
                    f"got {labels.dtype} {tuple(labels.shape)}."
                )

    def check_values(self, targets: Sequence[Target]) -> None:
        """Checks that labels are known, and that boxes are finite and have an area. Waits for a GPU.

        Raises:
            ValueError: If not; the message names the first invalid one.
        """
        if not targets:
            return
        boxes = torch.cat([target["boxes"] for target in targets])
        labels = torch.cat([target["labels"] for target in targets])
        valid_labels = (labels >= 1) & (labels <= self.num_classes)
        valid_boxes = (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1)
        if bool((valid_labels & valid_boxes).all()):
            return
        index = int((valid_labels & valid_boxes).logical_not().nonzero()[0])
        image, position = 0, index
        while position >= len(targets[image]["boxes"]):
            position -= len(targets[image]["boxes"])
            image += 1
        if not valid_labels[index]:
            raise InputError(
                f"targets[{image}]['labels'][{position}] is {int(labels[index])}, but the detector has the labels 1 to "
                f"{self.num_classes}. Map categories to 1..K, and build the detector with as many classes as the data."
            )
        raise InputError(
            f"targets[{image}]['boxes'][{position}] is {boxes[index].tolist()}; corners must be finite, with x1 < x2 "
            "and y1 < y2. Drop boxes without an area."
        )


def image_list(features: Features, levels: Mapping[str, Tensor]) -> ImageList:
    """The `ImageList` of torchvision's modules, for the sizes of images and batch; it holds no pixels."""
    level = next(iter(levels.values()))
    placeholder = level.new_empty(()).expand(len(features.image_sizes), 3, *features.batch_size)
    return ImageList(placeholder, features.image_sizes)


def anchor_generator(spec: DetectorSpec, octaves: Sequence[float] = (1.0,)) -> AnchorGenerator:
    """Anchors of every level: all aspect ratios of all multiples (`octaves`) of the level's size."""
    sizes = [tuple(size * octave for octave in octaves) for size in spec.anchor_sizes]
    return AnchorGenerator(sizes, (tuple(spec.aspect_ratios),) * _LEVELS)


def norm_layer(spec: DetectorSpec) -> Callable[[int], nn.Module] | None:
    """The constructor of the head's normalisation layers; None for none."""
    return None if spec.norm == "none" else norm_factory(spec.norm)
