"""Semantic segmentation: the dilated attended ResNet under CCNet's head (Zhu et al. 2019, section 4.1).

The extra attention module stands in the place of CCNet's criss-cross attention.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attn.attention import AttentionSpec, build_attention
from lightning_attn.errors import InputError
from lightning_attn.networks.images.backbone import (
    NormalizedBatch,
    ResNetSpec,
    build_resnet,
    check_images,
    norm_factory,
)
from lightning_attn.validation import is_number, require_dropout, require_int

HeadNorm = Literal["batch", "sync", "group"]
OutputStride = Literal[8, 16, 32]

IGNORED = 255
"""Label of pixels that do not count."""


@dataclasses.dataclass(frozen=True)
class SegmenterSpec:
    """What stands on the backbone, and how it is trained. The defaults are CCNet's, which the paper follows.

    Only `norm` is not: the paper normalises new layers with statistics over all GPUs, `"sync"`, which needs GPUs.

    Attributes:
        head_channels: Channels of the head, of the attention in it and of the auxiliary head.
        dropout: Probability of dropping a channel before the classifiers.
        auxiliary_weight: Factor on the loss of the auxiliary head, which reads conv4; 0 for no auxiliary head.
        norm: Normalisation after every new 3x3 convolution: `"batch"`, `"sync"` or `"group"`, as in `ResNetSpec`.
        output_stride: How much smaller than the image the map of conv5 is: 8 (the paper's), 16 or 32. With 8, conv4
            is dilated by 2 and conv5 by 4.
        ohem_threshold: With online hard example mining the loss is the mean over those pixels whose true class has a
            lower probability than this, CCNet's is 0.7; 0 for all pixels. The auxiliary loss is over all pixels.
        ohem_min_kept: Pixels of a batch, on each GPU, that it keeps at least: the hardest.

        class_weights: What a pixel of each class counts in both losses, beside the others; empty for all the same.
            Without them, a network that is trained from scratch for a short time does not find rare classes at all.

    Raises:
        ValueError: If a field has a value that no segmentation network has; the message names the field.
    """

    head_channels: int = 512
    dropout: float = 0.1
    auxiliary_weight: float = 0.4
    norm: HeadNorm = "batch"
    output_stride: OutputStride = 8
    ohem_threshold: float = 0.0
    ohem_min_kept: int = 100_000
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require_int("head_channels", self.head_channels)
        require_dropout(self.dropout)
        if not (
            is_number(self.auxiliary_weight) and math.isfinite(self.auxiliary_weight) and self.auxiliary_weight >= 0
        ):
            raise InputError(
                f"auxiliary_weight must be a finite number of at least 0, got {self.auxiliary_weight!r}; "
                "0 is for no auxiliary head."
            )
        if self.norm not in get_args(HeadNorm):
            raise InputError(f"norm must be one of {list(get_args(HeadNorm))}, got {self.norm!r}.")
        if self.output_stride not in get_args(OutputStride):
            raise InputError(f"output_stride must be 8, 16 or 32, got {self.output_stride!r}.")
        if not (is_number(self.ohem_threshold) and 0 <= self.ohem_threshold < 1):
            raise InputError(
                f"ohem_threshold must be a probability of at least 0 and below 1, got {self.ohem_threshold!r}; "
                "0 is for the loss over all pixels."
            )
        require_int("ohem_min_kept", self.ohem_min_kept)
        if not all(is_number(weight) and math.isfinite(weight) and weight > 0 for weight in self.class_weights):
            raise InputError(
                f"class_weights must be finite numbers above 0, got {list(self.class_weights)}; a class that "
                "is not to be learnt is left out of the data's."
            )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for YAML and for checkpoints."""
        return dataclasses.asdict(self)


class Segmenter(nn.Module):
    """A segmentation network from uint8 images to logits of every pixel.

    Images are normalised as ImageNet's and padded at the right and at the bottom; they are not resized. Pixel i of a
    map of stride s is computed around pixel s i of the image, so the padded sides are 1 more than a multiple of the
    stride, and the logits are resized to them with `align_corners=True`: pixel i then comes to lie at s i exactly,
    whatever the size of the image.

    Convolutions and matrix products follow `torch.autocast`; resizing and losses are float32 always.

    Args:
        num_classes: Number of classes K; their labels are 0 to K - 1.
        backbone: Which ResNet.
        attention: What stands in it, and in the head.
        segmenter: What stands on it.

    Attributes:
        class_weights: Those of the spec, `[K]`, or None.
        backbone: The ResNet.
        head: The `SegmentationHead`.
        auxiliary: The `AuxiliaryHead`; None if its weight is 0.

    Raises:
        ValueError: If the parts do not fit one another.
        OSError: If pretrained weights cannot be read.
    """

    class_weights: Tensor | None

    def __init__(
        self, num_classes: int, backbone: ResNetSpec, attention: AttentionSpec, segmenter: SegmenterSpec
    ) -> None:
        super().__init__()
        require_int("num_classes", num_classes)
        if num_classes > IGNORED:
            raise InputError(
                f"num_classes must be at most {IGNORED}, got {num_classes}: labels are bytes, and {IGNORED} is ignored."
            )
        if len(segmenter.class_weights) not in (0, num_classes):
            raise InputError(
                f"class_weights has {len(segmenter.class_weights)} entries for {num_classes} classes; give one for "
                "each, in the order of the data's classes, or none."
            )
        self.num_classes, self.segmenter = num_classes, segmenter
        weights = torch.tensor(segmenter.class_weights, dtype=torch.float32) if segmenter.class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.batch = NormalizedBatch(segmenter.output_stride, remainder=1)
        self.backbone = build_resnet(backbone, attention, segmenter.output_stride)
        self.head = SegmentationHead(self.backbone.channels["c5"], num_classes, attention, segmenter)
        self.auxiliary = (
            AuxiliaryHead(self.backbone.channels["c4"], num_classes, segmenter) if segmenter.auxiliary_weight else None
        )

    @overload
    def forward(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]: ...

    @overload
    def forward(self, images: Sequence[Tensor], labels: None = None) -> list[Tensor]: ...

    def forward(
        self, images: Sequence[Tensor], labels: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor] | list[Tensor]:
        """Losses in training mode, logits in evaluation mode.

        Args:
            images: RGB, uint8, `[3, H, W]` each.
            labels: In training, for every image: uint8 `[H, W]`, 0 to K - 1, or 255 where the pixel does not count.

        Returns:
            In training the losses by name, to be summed: `loss`, the mean cross entropy of all pixels of the batch that
            count, 0 if none does; and `loss_auxiliary`, that of the auxiliary head times its weight, if there is one.
            In evaluation for every image the logits, float32 `[K, H, W]`, which do not depend on the other images.

        Raises:
            ValueError: If images or labels are not as described, or the labels do not go with the mode.
        """
        check_images(images)
        if self.training:
            if labels is None:
                raise InputError("labels is needed in training mode; call eval() for logits.")
            return self._losses(images, labels)
        if labels is not None:
            raise InputError("labels was given in evaluation mode, which has no losses; call train() for losses.")
        # Attention sees the padding that a smaller image has beside a larger one: images of one size go together.
        groups: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.shape, []).append(index)
        found: dict[int, Tensor] = {}
        for indices in groups.values():
            found.update(zip(indices, self._logits([images[index] for index in indices]), strict=True))
        return [found[index] for index in range(len(images))]

    def _logits(self, images: Sequence[Tensor]) -> Tensor:
        """Logits of images of one size, `[B, K, H, W]`."""
        batch = self.batch(images)
        logits = _upsampled(self.head(self.backbone(batch)["c5"]), batch.shape[2:])
        return logits[:, :, : images[0].shape[1], : images[0].shape[2]]

    def _losses(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        self._check_sizes(images, labels)
        batch = self.batch(images)
        target = torch.full((len(batch), *batch.shape[2:]), IGNORED, dtype=torch.uint8, device=batch.device)
        for place, label in zip(target, labels, strict=True):
            place[: label.shape[0], : label.shape[1]] = label
        self._check_values(target)
        features = self.backbone(batch)
        spec, size, weights = self.segmenter, batch.shape[2:], self.class_weights
        logits = _upsampled(self.head(features["c5"]), size)
        if spec.ohem_threshold:
            losses = {"loss": hard_cross_entropy(logits, target, spec.ohem_threshold, spec.ohem_min_kept, weights)}
        else:
            losses = {"loss": cross_entropy(logits, target, weights)}
        if self.auxiliary is not None:
            auxiliary = cross_entropy(_upsampled(self.auxiliary(features["c4"]), size), target, weights)
            losses["loss_auxiliary"] = spec.auxiliary_weight * auxiliary
        return losses

    def _check_sizes(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        if len(labels) != len(images):
            raise InputError(f"labels has {len(labels)} entries for {len(images)} images; give one for each image.")
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if label.dtype != torch.uint8 or label.shape != image.shape[1:]:
                raise InputError(
                    f"labels[{index}] must be uint8 {list(image.shape[1:])}, one label for each pixel of its image, "
                    f"got {label.dtype} {list(label.shape)}. Cut and resize labels together with their image."
                )

    def _check_values(self, target: Tensor) -> None:
        # Plus 1, bytes wrap around: 255 becomes 0, and what is no label becomes the largest.
        if int((target + 1).amax()) <= self.num_classes:
            return
        index, row, column = ((target >= self.num_classes) & (target != IGNORED)).nonzero()[0].tolist()
        raise InputError(
            f"labels[{index}][{row}, {column}] is {int(target[index, row, column])}, but the network has the labels 0 "
            f"to {self.num_classes - 1}, and {IGNORED} for pixels that do not count. Map the data's ids to labels, and "
            "build the network with as many classes as the data."
        )


class SegmenterProgram(nn.Module):
    """A segmentation network in evaluation mode for one image, as `torch.export` and ONNX want it.

    Args:
        segmenter: The network; it is used, not copied.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Maps an image as in `Segmenter`, `[3, H, W]`, to logits `[K, H, W]`."""
        found: list[Tensor] = self.segmenter([image])
        return found[0]


class SegmentationHead(nn.Module):
    """CCNet's head with another attention: 3x3, attention, 3x3, concatenation with the input, 3x3, dropout, 1x1.

    Norm and ReLU follow each 3x3 convolution. (In CCNet's code it is a leaky ReLU of slope 0.01, the default of its
    fused normalisation.)

    Args:
        in_channels: Channels of the map of conv5.
        num_classes: Number of classes K.
        attention: What stands in the place of criss-cross attention.
        spec: Channels, dropout and normalisation.

    Attributes:
        reduce: The convolution before the attention.
        attention: The gated attention, None for `mechanism: none`.
        refine: The convolution after it.
        fuse: The convolution that reads the input, first, and what became of it.
        classifier: The last, 1x1.
    """

    def __init__(self, in_channels: int, num_classes: int, attention: AttentionSpec, spec: SegmenterSpec) -> None:
        super().__init__()
        channels = spec.head_channels
        self.reduce = _convolution(in_channels, spec)
        try:
            self.attention = build_attention(attention, channels, 2, role="head")
        except ValueError as error:
            raise InputError(f"head_channels={channels} does not fit the attention: {error}") from error
        self.refine = _convolution(channels, spec)
        self.fuse = _convolution(in_channels + channels, spec)
        self.dropout = nn.Dropout2d(spec.dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps conv5, `[B, in_channels, H, W]`, to logits, `[B, K, H, W]`."""
        context = self.reduce(features)
        if self.attention is not None:
            context = self.attention(context)
        context = self.refine(context)
        logits: Tensor = self.classifier(self.dropout(self.fuse(torch.cat((features, context), 1))))
        return logits


class AuxiliaryHead(nn.Module):
    """The head that trains conv4 more directly, and that evaluation leaves out: 3x3, norm, ReLU, dropout, 1x1.

    Args:
        in_channels: Channels of the map of conv4.
        num_classes: Number of classes K.
        spec: Channels, dropout and normalisation.
    """

    def __init__(self, in_channels: int, num_classes: int, spec: SegmenterSpec) -> None:
        super().__init__()
        self.convolution = _convolution(in_channels, spec)
        self.dropout = nn.Dropout2d(spec.dropout)
        self.classifier = nn.Conv2d(spec.head_channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps conv4, `[B, in_channels, H, W]`, to logits, `[B, K, H, W]`."""
        logits: Tensor = self.classifier(self.dropout(self.convolution(features)))
        return logits


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the pixels that count; 0, with a gradient of 0, if none does.

    Args:
        logits: `[B, K, H, W]`.
        labels: Uint8 `[B, H, W]`, 0 to K - 1, or 255 for pixels that do not count.
        weights: Of the classes in the mean, `[K]`; None for all the same.
    """
    total = F.cross_entropy(logits, labels.long(), weight=weights, ignore_index=IGNORED, reduction="sum")
    return total / _weight(labels, labels != IGNORED, weights)


def hard_cross_entropy(
    logits: Tensor, labels: Tensor, threshold: float, min_kept: int, weights: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of hard pixels (online hard example mining); 0, with a gradient of 0, if no pixel counts.

    Args:
        logits: `[B, K, H, W]`.
        labels: Uint8 `[B, H, W]`, 0 to K - 1, or 255 for pixels that do not count.
        threshold: Pixels whose true class has a lower probability are hard.
        min_kept: If fewer are, the hardest of the batch that make up this number; all that count if there are not so
            many.
        weights: Of the classes in the mean, `[K]`, without influence on what is hard; None for all the same.
    """
    losses = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none")
    with torch.no_grad():
        # What does not count has a loss of 0, and ranks with the easiest.
        easiest_kept = losses.flatten().kthvalue(max(losses.numel() - min_kept, 0) + 1).values
        easy = (losses <= -math.log(threshold)) & (losses < easiest_kept)  # a loss that is NaN is not, and shows
        kept = (labels != IGNORED) & ~easy
    if weights is not None:
        losses = losses * weights[labels.long().clamp(max=len(weights) - 1)]  # what is ignored is not kept
    return losses.where(kept, 0).sum() / _weight(labels, kept, weights)


def _weight(labels: Tensor, counted: Tensor, weights: Tensor | None) -> Tensor:
    """What some pixels count together, but never 0."""
    if weights is None:
        return counted.sum().clamp(min=1)
    return weights[labels[counted].long()].sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _convolution(in_channels: int, spec: SegmenterSpec) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, spec.head_channels, 3, padding=1, bias=False),
        norm_factory(spec.norm)(spec.head_channels),
        nn.ReLU(inplace=True),
    )


def _upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=True)
