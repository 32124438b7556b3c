"""Faster R-CNN and RetinaNet with FPN on the attended ResNet, of torchvision's parts (Zhu et al. 2019, section 4.1)."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image, nms, roi_align
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from lightning_attn.attention import AttentionSpec
from lightning_attn.errors import InputError
from lightning_attn.networks.images.backbone import NormalizedBatch, ResNetSpec, build_resnet, norm_factory
from lightning_attn.validation import is_number, require_int

Head = Literal["faster_rcnn", "retinanet"]
HeadNorm = Literal["none", "batch", "sync", "group"]
Target: TypeAlias = dict[str, Tensor]
Detection: TypeAlias = dict[str, Tensor]

_LEVELS = 5
_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # anchor sizes of RetinaNet within a level
_ROI_LEVELS = (2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class DetectorSpec:
    """What stands on the backbone, and how it is trained and read out. The defaults are the paper's.

    Attributes:
        head: `"faster_rcnn"` (the paper's) or `"retinanet"`.
        fpn_channels: Channels of every level of the feature pyramid.
        norm: Normalisation after the convolutions of the pyramid and of Faster R-CNN's second stage: `"none"` (the
            paper's), or `"batch"`, `"sync"`, `"group"` as in `ResNetSpec`, which training from scratch is better with.
        anchor_sizes: Square roots of the areas of anchors in pixels, one for each of five levels: strides 4 to 64 for
            Faster R-CNN, 8 to 128 for RetinaNet, which adds anchors 2^(1/3) and 2^(2/3) times as large.
        aspect_ratios: Heights over widths of the anchors.
        rpn_candidates_train: Best anchors of every level that go into the non-maximum suppression of proposals.
        rpn_candidates_eval: The same in evaluation.
        proposals_train: Proposals per image after it.
        proposals_eval: The same in evaluation.
        rpn_nms_threshold: Intersection over union from which the worse of two proposals is dropped.
        rpn_foreground_iou: Anchors that overlap a box by this much are objects to the proposal network.
        rpn_background_iou: Anchors that overlap all boxes by less are background; those in between do not count.
        rpn_batch_size: Anchors per image that its loss is computed on.
        rpn_positive_fraction: At most this share of them are objects.
        roi_batch_size: Proposals per image that the second stage is trained on.
        roi_positive_fraction: At most this share of them are objects.
        roi_foreground_iou: Proposals that overlap a box by this much are objects, the others background.
        roi_size: Height and width that RoIAlign gives every proposal.
        roi_samples: Points per bin and axis that RoIAlign takes the mean of.
        roi_canonical_size: Square root of the area, in pixels, of proposals that are read from the level of stride 16;
            of half that size, from the next finer one. 224 is FPN's, for images whose short side is about 800.
        fc_dim: Width of the fully connected layers of the second stage.
        roi_convolutions: 3x3 convolutions of the second stage, before one fully connected layer; 0 (the paper's) for
            none and two such layers.
        candidates: Best anchors of every level that RetinaNet decodes in evaluation.
        foreground_iou: Anchors that overlap a box by this much are objects to RetinaNet.
        background_iou: Anchors that overlap all boxes by less are background to it.
        score_threshold: Detections need a higher score.
        nms_threshold: Intersection over union from which the worse of two detections of a class is dropped.
        detections: Detections per image at most.
        box_voting: Every detection of Faster R-CNN becomes the mean, weighted by scores, of the boxes of its class,
            before the non-maximum suppression, that it overlaps by this much (Gidaris and Komodakis 2015, section 5);
            0 (the paper's) for none.

    Raises:
        ValueError: If a field has a value that no detector has; the message names the field and the way out.
    """

    head: Head = "faster_rcnn"
    fpn_channels: int = 256
    norm: HeadNorm = "none"
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_candidates_train: int = 2000
    rpn_candidates_eval: int = 1000
    proposals_train: int = 2000
    proposals_eval: int = 1000
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
    candidates: int = 1000
    foreground_iou: float = 0.5
    background_iou: float = 0.4
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100
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
        if self.box_voting and self.head != "faster_rcnn":
            raise InputError(f"box_voting={self.box_voting} is for faster_rcnn; set it to 0 for head={self.head!r}.")
        for low, high in (("rpn_background_iou", "rpn_foreground_iou"), ("background_iou", "foreground_iou")):
            if getattr(self, low) > getattr(self, high):
                raise InputError(
                    f"{low}={getattr(self, low)} must not be above {high}={getattr(self, high)}, or an anchor would be "
                    "both."
                )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for YAML and for checkpoints."""
        return dataclasses.asdict(self)


class Detector(nn.Module):
    """A detector from uint8 images to boxes.

    Images are normalised as ImageNet's and padded to a batch whose sides are multiples of 32; they are not resized.
    Convolutions and matrix products follow `torch.autocast`; anchors, box coding and RoIAlign are float32 always.

    Args:
        num_classes: Number of classes K without the background; their labels are 1 to K.
        backbone: Which ResNet.
        attention: What stands in it.
        detector: What stands on it.

    Attributes:
        network: torchvision's detector; its parameters have the names of torchvision's models.

    Raises:
        ValueError: If the parts do not fit one another.
        OSError: If pretrained weights cannot be read.
    """

    def __init__(
        self, num_classes: int, backbone: ResNetSpec, attention: AttentionSpec, detector: DetectorSpec
    ) -> None:
        super().__init__()
        require_int("num_classes", num_classes)
        self.num_classes = num_classes
        self.label_shift = 1 if detector.head == "retinanet" else 0  # its labels start at 0, there is no background
        pyramid = Pyramid(backbone, attention, detector)
        self.network: nn.Module
        if detector.head == "faster_rcnn":
            self.network = _faster_rcnn(num_classes, pyramid, detector)
        else:
            self.network = _retinanet(num_classes, pyramid, detector)

    @overload
    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]: ...

    @overload
    def forward(self, images: Sequence[Tensor], targets: None = None) -> list[Detection]: ...

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detection]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: RGB, uint8, `[3, H, W]` each.
            targets: In training, for every image: `boxes`, float32 `[n, 4]`, the corners x1, y1, x2, y2 in pixels of
                the image; and `labels`, int64 `[n]`, 1 to K. An image may have none.

        Returns:
            In training the losses by name, to be summed: `loss_classifier`, `loss_box_reg`, `loss_objectness` and
            `loss_rpn_box_reg` for Faster R-CNN, `classification` and `bbox_regression` for RetinaNet. In evaluation
            for every image `boxes` as above, within the image, `labels` and `scores`, best first.

        Raises:
            ValueError: If images or targets are not as described, or the targets do not go with the mode.
        """
        if self.training:
            if targets is None:
                raise InputError("targets is needed in training mode; call eval() for detections.")
            self._check_targets(images, targets)
            shifted = [{"boxes": target["boxes"], "labels": target["labels"] - self.label_shift} for target in targets]
            losses: dict[str, Tensor] = self.network(list(images), shifted)
            return losses
        if targets is not None:
            raise InputError("targets was given in evaluation mode, which has no losses; call train() for losses.")
        detections: list[Detection] = self.network(list(images))
        for detection in detections:
            detection["labels"] = detection["labels"] + self.label_shift
        return detections

    def _check_targets(self, images: Sequence[Tensor], targets: Sequence[Target]) -> None:
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
        boxes = torch.cat([target["boxes"] for target in targets])
        labels = torch.cat([target["labels"] for target in targets])
        known = (labels >= 1) & (labels <= self.num_classes)
        proper = (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1)
        if bool((known & proper).all()):
            return
        index = int((known & proper).logical_not().nonzero()[0])
        owner, position = 0, index
        while position >= len(targets[owner]["boxes"]):
            position -= len(targets[owner]["boxes"])
            owner += 1
        if not known[index]:
            raise InputError(
                f"targets[{owner}]['labels'][{position}] is {int(labels[index])}, but the detector has the labels 1 to "
                f"{self.num_classes}. Map categories to 1..K, and build the detector with as many classes as the data."
            )
        raise InputError(
            f"targets[{owner}]['boxes'][{position}] is {boxes[index].tolist()}; corners must be finite, with x1 < x2 "
            "and y1 < y2. Drop boxes without an area."
        )


class DetectorProgram(nn.Module):
    """A detector in evaluation mode for one image, as `torch.export` and ONNX want it.

    Args:
        detector: The detector; it is used, not copied.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps an image as in `Detector`, `[3, H, W]`, to boxes `[n, 4]`, labels `[n]` and scores `[n]`."""
        with _exportable_suppression() if torch.compiler.is_exporting() else contextlib.nullcontext():
            (found,) = self.detector([image])
        return found["boxes"], found["labels"], found["scores"]


@contextlib.contextmanager
def _exportable_suppression() -> Iterator[None]:
    """With one suppression for any number of boxes: torchvision chooses between two by that, which a program cannot."""
    original = box_ops.batched_nms
    box_ops.batched_nms = _batched_suppression
    try:
        yield
    finally:
        box_ops.batched_nms = original


def _batched_suppression(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes stay, best first: classes are moved apart, so that one suppression serves all.

    Args:
        boxes: Within the image, `[n, 4]`; there may be none.
        scores: Not below 0, `[n]`.
        classes: `[n]`, int64.
        iou_threshold: Boxes that overlap a better one of their class by more go.
    """
    largest = F.pad(boxes.flatten(), (0, 1)).max()
    apart = boxes + (classes.to(boxes.dtype) * (largest + 1)).unsqueeze(1)
    # torch.export takes it for certain that at least two are kept. Two that no image has see to it.
    outside = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
    kept = nms(torch.cat((apart, outside)), F.pad(scores, (0, 2), value=-1.0), iou_threshold)
    inside: Tensor = kept[kept < boxes.shape[0]]
    return inside


class Pyramid(nn.Module):
    """A backbone with a feature pyramid, in float32 whatever the precision inside.

    Args:
        backbone: Which ResNet.
        attention: What stands in it.
        detector: Decides the channels, and the levels that the head wants.
    """

    def __init__(self, backbone: ResNetSpec, attention: AttentionSpec, detector: DetectorSpec) -> None:
        super().__init__()
        self.body = build_resnet(backbone, attention)
        self.out_channels = detector.fpn_channels
        names, top = ["c2", "c3", "c4", "c5"], LastLevelMaxPool()
        if detector.head == "retinanet":
            names, top = names[1:], LastLevelP6P7(self.body.channels["c5"], self.out_channels)
        self.names = names
        inputs = [self.body.channels[name] for name in names]
        self.fpn = FeaturePyramidNetwork(inputs, self.out_channels, top, _norm_layer(detector))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps a normalised batch `[B, 3, H, W]` to five levels by name, finest first, `[B, fpn_channels, H', W']`."""
        features = self.body(images)
        levels: dict[str, Tensor] = self.fpn({name: features[name] for name in self.names})
        return {name: level.float() for name, level in levels.items()}


class _Images(nn.Module):
    """In the place of torchvision's transform, which would resize."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = NormalizedBatch()

    def forward(self, images: Sequence[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        return ImageList(self.batch(images), [tuple(image.shape[-2:]) for image in images]), targets

    def postprocess(self, detections: list[Detection], sizes: object, original_sizes: object) -> list[Detection]:
        return detections


class _RPNHead(RPNHead):  # type: ignore[misc]  # torchvision publishes no types
    """Hands float32 to the box coder, which would otherwise round anchors to the precision of autocast."""

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(features)
        return [level.float() for level in logits], [level.float() for level in deltas]


class _Predictor(FastRCNNPredictor):  # type: ignore[misc]
    """As `_RPNHead`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class _RoIHeads(RoIHeads):  # type: ignore[misc]
    """Lets boxes vote, if `box_voting` (see `DetectorSpec`) is not 0."""

    box_voting = 0.0

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        boxes, scores, labels = super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        if self.box_voting:
            numbers = [one.shape[0] for one in proposals]
            voters = torch.split(self.box_coder.decode(box_regression, proposals), numbers)
            weights = torch.split(class_logits.softmax(-1), numbers)
            for index, shape in enumerate(image_shapes):
                voting = clip_boxes_to_image(voters[index], shape)
                boxes[index] = self._voted(boxes[index], labels[index], voting, weights[index])
        return boxes, scores, labels

    def _voted(self, boxes: Tensor, labels: Tensor, voters: Tensor, weights: Tensor) -> Tensor:
        """Means for `boxes` `[n, 4]` over `voters` `[proposals, classes, 4]` with `weights` `[proposals, classes]`."""
        # What each says of the box's own class.
        voters, voices = voters[:, labels].transpose(0, 1), weights[:, labels].T
        heard = (voices > self.score_thresh) & (_paired_iou(boxes.unsqueeze(1), voters) >= self.box_voting)
        shares = torch.where(heard, voices, 0.0)
        total = shares.sum(1, keepdim=True)  # a box without area does not even overlap itself
        return torch.where(total > 0, (shares.unsqueeze(-1) * voters).sum(1) / total, boxes)


def _paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes one by one; `[..., 4]` each, which broadcast, to `[...]`."""
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    shared = overlap.clamp_min(0).prod(-1)
    return shared / ((first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - shared)


class _RoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """torchvision's, that can also be a part of a program, which does not know the number of proposals yet."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        if not torch.compiler.is_exporting():
            aligned: Tensor = super().forward(x, boxes, image_shapes)
            return aligned
        (proposals,) = boxes  # of one image
        regions = F.pad(proposals, (1, 0))  # in front the number of the image, 0
        levels, first = self.map_levels(boxes), x[self.featmap_names[0]]
        aligned = first.new_zeros(proposals.shape[0], first.shape[1], *self.output_size)
        for level, (name, scale) in enumerate(zip(self.featmap_names, self.scales, strict=True)):
            (chosen,) = torch.where(levels == level)
            pooled = roi_align(x[name], regions[chosen], self.output_size, scale, self.sampling_ratio)
            aligned = aligned.index_put((chosen,), pooled)
        return aligned


class _RetinaNetHead(RetinaNetHead):  # type: ignore[misc]
    """As `_RPNHead`."""

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {name: output.float() for name, output in super().forward(features).items()}


class _ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Proposes the whole image where nothing is left in training, since the mean loss of no proposals is NaN."""

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: list[tuple[int, int]], num_anchors_per_level: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        boxes, scores = super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        if torch.compiler.is_exporting():
            # A program must know that there is one. A box without area makes boxes without area, which are dropped.
            boxes = [F.pad(one, (0, 0, 0, 1)) for one in boxes]
        if self.training:
            for index, (height, width) in enumerate(image_shapes):
                if not len(boxes[index]):
                    boxes[index] = proposals.new_tensor([[0, 0, width, height]])
                    scores[index] = objectness.new_zeros(1)
        return boxes, scores


def _faster_rcnn(num_classes: int, pyramid: Pyramid, spec: DetectorSpec) -> nn.Module:
    anchors = AnchorGenerator([(size,) for size in spec.anchor_sizes], (tuple(spec.aspect_ratios),) * _LEVELS)
    rpn = _ProposalNetwork(
        anchors,
        _RPNHead(pyramid.out_channels, len(spec.aspect_ratios)),
        fg_iou_thresh=spec.rpn_foreground_iou,
        bg_iou_thresh=spec.rpn_background_iou,
        batch_size_per_image=spec.rpn_batch_size,
        positive_fraction=spec.rpn_positive_fraction,
        pre_nms_top_n={"training": spec.rpn_candidates_train, "testing": spec.rpn_candidates_eval},
        post_nms_top_n={"training": spec.proposals_train, "testing": spec.proposals_eval},
        nms_thresh=spec.rpn_nms_threshold,
    )
    pool = _RoIAlign(
        pyramid.names, spec.roi_size, spec.roi_samples, canonical_scale=spec.roi_canonical_size, canonical_level=4
    )
    # Left alone it infers the strides from the first batch and keeps them: wrongly, if that is mostly padding.
    pool.scales = [2.0**-level for level in _ROI_LEVELS]
    pool.map_levels = LevelMapper(_ROI_LEVELS[0], _ROI_LEVELS[-1], canonical_scale=spec.roi_canonical_size)
    roi_heads = _RoIHeads(
        pool,
        _second_stage(spec),
        _Predictor(spec.fc_dim, num_classes + 1),
        fg_iou_thresh=spec.roi_foreground_iou,
        bg_iou_thresh=spec.roi_foreground_iou,
        batch_size_per_image=spec.roi_batch_size,
        positive_fraction=spec.roi_positive_fraction,
        bbox_reg_weights=None,
        score_thresh=spec.score_threshold,
        nms_thresh=spec.nms_threshold,
        detections_per_img=spec.detections,
    )
    roi_heads.box_voting = spec.box_voting
    network: nn.Module = GeneralizedRCNN(pyramid, rpn, roi_heads, _Images())
    return network


def _second_stage(spec: DetectorSpec) -> nn.Module:
    """From a proposal's features to the vector that its class and box are read from."""
    if not spec.roi_convolutions:
        two_layers: nn.Module = TwoMLPHead(spec.fpn_channels * spec.roi_size**2, spec.fc_dim)
        return two_layers
    size = spec.fpn_channels, spec.roi_size, spec.roi_size
    layers: nn.Module = FastRCNNConvFCHead(
        size, [spec.fpn_channels] * spec.roi_convolutions, [spec.fc_dim], _norm_layer(spec)
    )
    return layers


def _norm_layer(spec: DetectorSpec) -> Callable[[int], nn.Module] | None:
    return None if spec.norm == "none" else norm_factory(spec.norm)


def _retinanet(num_classes: int, pyramid: Pyramid, spec: DetectorSpec) -> nn.Module:
    sizes = [tuple(size * octave for octave in _OCTAVES) for size in spec.anchor_sizes]
    anchors = AnchorGenerator(sizes, (tuple(spec.aspect_ratios),) * _LEVELS)
    network = RetinaNet(
        pyramid,
        num_classes,
        anchor_generator=anchors,
        head=_RetinaNetHead(pyramid.out_channels, len(_OCTAVES) * len(spec.aspect_ratios), num_classes),
        score_thresh=spec.score_threshold,
        nms_thresh=spec.nms_threshold,
        detections_per_img=spec.detections,
        fg_iou_thresh=spec.foreground_iou,
        bg_iou_thresh=spec.background_iou,
        topk_candidates=spec.candidates,
    )
    network.transform = _Images()
    module: nn.Module = network
    return module
