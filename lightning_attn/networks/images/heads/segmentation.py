"""What segmentation heads have in common: options, losses, results, the auxiliary head."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention import AttentionSpec, build_attention
from lightning_attn.errors import InputError
from lightning_attn.networks.compilation import outside_graph
from lightning_attn.networks.images.backbone import Features, norm_factory
from lightning_attn.networks.images.batching import padded_labels
from lightning_attn.networks.recomputation import RecomputableLayer
from lightning_attn.validation import is_number, require_dropout, require_int

SegmentationHeadName = Literal["ccnet", "pyramid"]
HeadNorm = Literal["batch", "sync", "group"]
OutputStride = Literal[8, 16, 32]

IGNORED = 255
"""Label of pixels that are ignored in losses and metrics."""


@dataclasses.dataclass(frozen=True)
class SegmenterSpec:
    """The segmentation head, and how it is trained. The defaults are CCNet's, which the paper follows.

    The exception is `norm`: the paper normalises new layers with statistics over all GPUs, `"sync"`, which needs GPUs.

    Attributes:
        head_channels: Channels of the head, of the attention in it and of the auxiliary head.
        dropout: Probability of dropping a channel before the classifiers.
        auxiliary_weight: Factor on the loss of the auxiliary head, whose input is conv4; 0 for no auxiliary head.
        norm: Normalisation after every new 3x3 convolution: `"batch"`, `"sync"` or `"group"`, as in `ResNetSpec`.
        output_stride: Stride of conv5: 8 (the paper's), 16 or 32. With 8, conv4 is dilated by 2 and conv5 by 4. A
            feature pyramid needs 32.
        ohem_threshold: With online hard example mining the loss is the mean over those pixels whose true class has a
            lower probability than this, CCNet's is 0.7; 0 for all pixels. The auxiliary loss is over all pixels.
        ohem_min_kept: Minimum number of pixels of a batch, on each GPU, in that mean: the hardest.
        class_weights: Weight of the pixels of each class in both losses; empty for equal weights. Without them,
            a network that is trained from scratch for a short time never predicts rare classes.
        head: `"ccnet"`, see `CCNetHead`, or `"pyramid"` for a feature pyramid, see `PyramidHead`.

    Raises:
        ValueError: If a field has an invalid value; the message names the field.
    """

    head_channels: int = 512
    dropout: float = 0.1
    auxiliary_weight: float = 0.4
    norm: HeadNorm = "batch"
    output_stride: OutputStride = 8
    ohem_threshold: float = 0.0
    ohem_min_kept: int = 100_000
    class_weights: tuple[float, ...] = ()
    head: SegmentationHeadName = "ccnet"

    def __post_init__(self) -> None:
        if self.head not in get_args(SegmentationHeadName):
            raise InputError(f"head must be one of {list(get_args(SegmentationHeadName))}, got {self.head!r}.")
        require_int("head_channels", self.head_channels)
        require_dropout(self.dropout)
        if not (
            is_number(self.auxiliary_weight) and math.isfinite(self.auxiliary_weight) and self.auxiliary_weight >= 0
        ):
            raise InputError(
                f"auxiliary_weight must be a finite number of at least 0, got {self.auxiliary_weight!r}; "
                "set 0 for no auxiliary head."
            )
        if self.norm not in get_args(HeadNorm):
            raise InputError(f"norm must be one of {list(get_args(HeadNorm))}, got {self.norm!r}.")
        if self.output_stride not in get_args(OutputStride):
            raise InputError(f"output_stride must be 8, 16 or 32, got {self.output_stride!r}.")
        if self.head == "pyramid" and self.output_stride != 32:
            raise InputError(
                f"output_stride={self.output_stride} with head: pyramid, which joins maps of the strides 4, 8, 16 and "
                "32: set output_stride: 32, or head: ccnet."
            )
        if not (is_number(self.ohem_threshold) and 0 <= self.ohem_threshold < 1):
            raise InputError(
                f"ohem_threshold must be a probability of at least 0 and below 1, got {self.ohem_threshold!r}; "
                "set 0 for the loss over all pixels."
            )
        require_int("ohem_min_kept", self.ohem_min_kept)
        if not all(is_number(weight) and math.isfinite(weight) and weight > 0 for weight in self.class_weights):
            raise InputError(
                f"class_weights must be finite numbers above 0, got {list(self.class_weights)}; remove a class that "
                "should not be learnt from the data's classes instead."
            )


class SegmentationHead(RecomputableLayer, nn.Module, abc.ABC):
    """Maps the features of images to logits, and these to losses or results.

    Pixel i of a map of stride s is computed around pixel s i of the image, so images are padded to sides of 1 more than
    a multiple of the stride, and maps and logits are resized with `align_corners=True`: pixel i is then exactly at s i,
    whatever the size of the image. Resizing and losses are always float32.

    Args:
        num_classes: Number of classes K; their labels are 0 to K - 1.
        channels: Number of channels of the backbone's maps, by name.
        attention: Of the head.
        spec: Channels, dropout, normalisation and losses.

    Attributes:
        align_corners: How images are padded; see `padded_size`.
        needs_equal_sizes: Whether all images of a batch must have the same size in evaluation: the attention would
            read the padding of smaller images.
        reduce: The convolution of conv5 before the attention.
        attention: The gated attention, None for `mechanism: none`.
        classifier: The last convolution, 1x1.
        auxiliary: The `AuxiliaryHead`; None if its weight is 0.
        class_weights: Those of the spec, `[K]`, or None.

    Raises:
        ValueError: If the parts do not fit one another.
    """

    align_corners = True
    needs_equal_sizes = True
    class_weights: Tensor | None

    def __init__(
        self, num_classes: int, channels: Mapping[str, int], attention: AttentionSpec, spec: SegmenterSpec
    ) -> None:
        super().__init__()
        require_int("num_classes", num_classes)
        if num_classes > IGNORED:
            raise InputError(
                f"num_classes must be at most {IGNORED}, got {num_classes}: labels are bytes, and {IGNORED} is ignored."
            )
        if len(spec.class_weights) not in (0, num_classes):
            raise InputError(
                f"class_weights has {len(spec.class_weights)} entries for {num_classes} classes; give one for "
                "each, in the order of the data's classes, or none."
            )
        self.num_classes, self.spec = num_classes, spec
        weights = torch.tensor(spec.class_weights, dtype=torch.float32) if spec.class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        width = spec.head_channels
        self.reduce = convolution(channels["c5"], spec)
        try:
            self.attention = build_attention(attention, width, 2, role="head")
        except ValueError as error:
            raise InputError(f"head_channels={width} does not fit the attention: {error}") from error
        self.build_layers(channels)
        self.dropout = nn.Dropout2d(spec.dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary = AuxiliaryHead(channels["c4"], num_classes, spec) if spec.auxiliary_weight else None

    @abc.abstractmethod
    def build_layers(self, channels: Mapping[str, int]) -> None:
        """Makes the layers between the attention and the classifier."""

    @abc.abstractmethod
    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Maps the backbone's maps to logits, `[B, K, H, W]`."""

    def context(self, conv5: Tensor) -> Tensor:
        """Conv5, `[B, C, H, W]`, behind `reduce` and the attention, `[B, head_channels, H, W]`."""
        context: Tensor = self.reduce(conv5)
        return context if self.attention is None else self.run(outside_graph, self.attention, context)

    @property
    @override
    def has_attention(self) -> bool:
        return self.attention is not None

    def losses(self, features: Features, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """The losses by name, to be summed.

        `loss_head` is the mean cross entropy of all labelled pixels of the batch, 0 if none is; `loss_auxiliary`, with
        an auxiliary head, is its loss times its weight.

        Args:
            features: Of B images.
            targets: For every image uint8 `[H, W]`, 0 to K - 1, or 255 for ignored pixels.
        """
        spec, size, weights = self.spec, features.batch_size, self.class_weights
        labels = padded_labels(targets, size, IGNORED)
        logits = upsampled(self(features.maps), size)
        if spec.ohem_threshold:
            losses = {"loss_head": hard_cross_entropy(logits, labels, spec.ohem_threshold, spec.ohem_min_kept, weights)}
        else:
            losses = {"loss_head": cross_entropy(logits, labels, weights)}
        if self.auxiliary is not None:
            auxiliary = cross_entropy(upsampled(self.auxiliary(features.maps["c4"]), size), labels, weights)
            losses["loss_auxiliary"] = spec.auxiliary_weight * auxiliary
        return losses

    def results(self, features: Features) -> list[Tensor]:
        """For every image the logits of its pixels `[K, H, W]`, float32 or better."""
        logits = upsampled(self(features.maps), features.batch_size)
        return [one[:, :height, :width] for one, (height, width) in zip(logits, features.image_sizes, strict=True)]

    def modules_to_compile(self) -> list[nn.Module]:
        """The modules that `torch.compile` may compile, each as a whole."""
        return [self] if self.auxiliary is None else [self, self.auxiliary]

    def check_targets(self, images: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Checks that labels have the sizes of their images.

        Raises:
            ValueError: If not; the message names the first.
        """
        if len(targets) != len(images):
            raise InputError(f"labels has {len(targets)} entries for {len(images)} images; give one for each image.")
        for index, (image, label) in enumerate(zip(images, targets, strict=True)):
            if label.dtype != torch.uint8 or label.shape != image.shape[1:]:
                raise InputError(
                    f"labels[{index}] must be uint8 {list(image.shape[1:])}, one label for each pixel of its image, "
                    f"got {label.dtype} {list(label.shape)}. Crop and resize labels together with their image."
                )

    def check_values(self, targets: Sequence[Tensor]) -> None:
        """Checks that every label is a class, or 255. Waits for a GPU.

        Raises:
            ValueError: If not; the message names the first pixel.
        """
        for index, labels in enumerate(targets):
            # Bytes plus 1 wrap around: 255 becomes 0, so that any value above num_classes is invalid.
            if int((labels + 1).amax()) <= self.num_classes:
                continue
            row, column = ((labels >= self.num_classes) & (labels != IGNORED)).nonzero()[0].tolist()
            raise InputError(
                f"labels[{index}][{row}, {column}] is {int(labels[row, column])}, but the network has the labels 0 "
                f"to {self.num_classes - 1}, and {IGNORED} for ignored pixels. Map the data's ids to labels, and build "
                "the network with as many classes as the data."
            )


class AuxiliaryHead(nn.Module):
    """A head on conv4 for an auxiliary loss, not used in evaluation: 3x3, norm, ReLU, dropout, 1x1.

    Args:
        in_channels: Channels of the map of conv4.
        num_classes: Number of classes K.
        spec: Channels, dropout and normalisation.
    """

    def __init__(self, in_channels: int, num_classes: int, spec: SegmenterSpec) -> None:
        super().__init__()
        self.convolution = convolution(in_channels, spec)
        self.dropout = nn.Dropout2d(spec.dropout)
        self.classifier = nn.Conv2d(spec.head_channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps conv4, `[B, in_channels, H, W]`, to logits, `[B, K, H, W]`."""
        logits: Tensor = self.classifier(self.dropout(self.convolution(features)))
        return logits


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the labelled pixels; 0, with a gradient of 0, if none is.

    Args:
        logits: `[B, K, H, W]`.
        labels: Uint8 `[B, H, W]`, 0 to K - 1, or 255 for ignored pixels.
        weights: Of the classes in the mean, `[K]`; None for equal weights.
    """
    # CUDA's kernels that sum by themselves are not deterministic.
    reduction = "sum" if logits.device.type == "cpu" else "none"
    losses = F.cross_entropy(logits, labels.long(), weight=weights, ignore_index=IGNORED, reduction=reduction)
    return losses.sum() / _total_weight(labels, labels != IGNORED, weights)


def hard_cross_entropy(
    logits: Tensor, labels: Tensor, threshold: float, min_kept: int, weights: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of hard pixels (online hard example mining); 0, with a gradient of 0, if none is labelled.

    Args:
        logits: `[B, K, H, W]`.
        labels: Uint8 `[B, H, W]`, 0 to K - 1, or 255 for ignored pixels.
        threshold: Pixels whose true class has a lower probability are hard.
        min_kept: If fewer pixels are hard, this number of pixels of the batch with the highest losses is used, or all
            labelled ones if there are fewer.
        weights: Of the classes in the mean, `[K]`, without effect on which pixels are hard; None for equal weights.
    """
    losses = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none")
    with torch.no_grad():
        # Ignored pixels have a loss of 0, and rank with the easiest.
        min_hard_loss = _kth_highest(losses.flatten(), min(min_kept, losses.numel()))
        easy = (losses <= -math.log(threshold)) & (losses < min_hard_loss)  # False for NaN, which so reaches the loss
        hard_pixels = (labels != IGNORED) & ~easy
    if weights is not None:
        losses = losses * weights[labels.long().clamp(max=len(weights) - 1)]  # ignored pixels are never hard
    return losses.where(hard_pixels, 0).sum() / _total_weight(labels, hard_pixels, weights)


def _kth_highest(values: Tensor, k: int) -> Tensor:
    if values.device.type == "cpu":
        return values.kthvalue(len(values) - k + 1).values
    return values.topk(k).values[-1]  # CUDA's kthvalue has no deterministic form: of equal values it takes any


def _total_weight(labels: Tensor, pixels: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of the class weights of some pixels, but never 0."""
    if weights is None:
        return pixels.sum().clamp(min=1)
    of_pixels = weights[labels.long().clamp(max=len(weights) - 1)]  # not selected first: a GPU would make the host wait
    return of_pixels.where(pixels, 0).sum().clamp(min=torch.finfo(weights.dtype).tiny)


def convolution(in_channels: int, spec: SegmenterSpec) -> nn.Sequential:
    """3x3 to `head_channels`, norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, spec.head_channels, 3, padding=1, bias=False),
        norm_factory(spec.norm)(spec.head_channels),
        nn.ReLU(inplace=True),
    )


def upsampled(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps resized to a height and width, in float32 or better; their corners stay corners."""
    exact = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(exact, tuple(size), mode="bilinear", align_corners=True)
