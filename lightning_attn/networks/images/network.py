"""Networks of a backbone and one head: images to losses in training, and to results in evaluation."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from lightning_attn.attention import AttentionSpec
from lightning_attn.errors import InputError
from lightning_attn.networks.images.backbone import Backbone, Features
from lightning_attn.networks.images.batching import check_images
from lightning_attn.networks.images.heads.ccnet import CCNetHead
from lightning_attn.networks.images.heads.detection import Detection, DetectionHead, DetectorSpec, Head, Target
from lightning_attn.networks.images.heads.faster_rcnn import FasterRCNNHead
from lightning_attn.networks.images.heads.retinanet import RetinaNetHead
from lightning_attn.networks.images.heads.segmentation import SegmentationHead, SegmentationHeadName, SegmenterSpec
from lightning_attn.networks.images.heads.semantic_pyramid import PyramidHead

TargetType = TypeVar("TargetType")
ResultType = TypeVar("ResultType")
HeadTarget = TypeVar("HeadTarget", contravariant=True)

_DETECTION_HEADS: dict[Head, type[FasterRCNNHead] | type[RetinaNetHead]] = {
    "faster_rcnn": FasterRCNNHead,
    "retinanet": RetinaNetHead,
}
_SEGMENTATION_HEADS: dict[SegmentationHeadName, type[SegmentationHead]] = {"ccnet": CCNetHead, "pyramid": PyramidHead}


class ImageHead(Protocol[HeadTarget, ResultType]):
    """The interface of heads: an `nn.Module` with these members."""

    align_corners: bool
    """How images are padded; see `padded_size`."""
    needs_equal_sizes: bool
    """Whether all images of a batch must have the same size in evaluation."""

    def check_targets(self, images: Sequence[Tensor], targets: Sequence[HeadTarget]) -> None:
        """Raises a ValueError for targets whose shapes and dtypes are not as `losses` describes them."""
        ...

    def check_values(self, targets: Sequence[HeadTarget]) -> None:
        """Raises a ValueError for targets with values that are not as `losses` describes them. Waits for a GPU."""
        ...

    def losses(self, features: Features, targets: Sequence[HeadTarget]) -> dict[str, Tensor]:
        """Losses by name, to be summed."""
        ...

    def modules_to_compile(self) -> list[nn.Module]:
        """The modules that `torch.compile` may compile, each as a whole."""
        ...

    def results(self, features: Features) -> list[ResultType]:
        """A result for every image."""
        ...


class ImageNetwork(nn.Module, Generic[TargetType, ResultType]):
    """Maps uint8 images to losses in training mode, and to results in evaluation mode.

    Images are normalised as ImageNet's and padded to a batch; they are not resized.

    Args:
        backbone: From `build_backbone`; several networks may share it.
        head: Maps its features to losses or results.
    """

    head: ImageHead[TargetType, ResultType]

    def __init__(self, backbone: Backbone, head: ImageHead[TargetType, ResultType]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @overload
    def forward(self, images: Sequence[Tensor], targets: Sequence[TargetType]) -> dict[str, Tensor]: ...

    @overload
    def forward(self, images: Sequence[Tensor], targets: None = None) -> list[ResultType]: ...

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[TargetType] | None = None
    ) -> dict[str, Tensor] | list[ResultType]:
        """Returns losses in training mode, results in evaluation mode.

        Args:
            images: RGB, uint8, `[3, H, W]` each.
            targets: In training, one for every image; see `losses` of the head.

        Returns:
            In training the losses by name, to be summed; in evaluation the head's `results` for every image, which do
            not depend on the other images.

        Raises:
            ValueError: If images or targets are not as described, or the targets do not fit the mode. Values of targets
                are checked on the CPU only: on a GPU that would make the host wait. There, call `head.check_values`
                before they are moved, as the tasks do.
        """
        check_images(images)
        if self.training:
            if targets is None:
                raise InputError("targets is required in training mode; call eval() for results.")
            self.head.check_targets(images, targets)
            if images[0].device.type == "cpu":
                self.head.check_values(targets)
            return self.head.losses(self.backbone(images, align_corners=self.head.align_corners), targets)
        if targets is not None:
            raise InputError("targets was given in evaluation mode, which has no losses; call train() for losses.")
        groups: dict[torch.Size | None, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.shape if self.head.needs_equal_sizes else None, []).append(index)
        found: dict[int, ResultType] = {}
        for indices in groups.values():
            batch = [images[index] for index in indices]
            results = self.head.results(self.backbone(batch, align_corners=self.head.align_corners))
            found.update(zip(indices, results, strict=True))
        return [found[index] for index in range(len(images))]

    def modules_to_compile(self) -> list[nn.Module]:
        """The modules that `torch.compile` may compile, each as a whole."""
        return [*self.backbone.body.modules_to_compile(), *self.head.modules_to_compile()]


class Detector(ImageNetwork[Target, Detection]):
    """An `ImageNetwork` with a detection head.

    Args:
        num_classes: Number of classes K without the background; their labels are 1 to K.
        backbone: Of output stride 32.
        detector: The head.

    Raises:
        ValueError: If the parts do not fit one another.
    """

    head: DetectionHead

    def __init__(self, num_classes: int, backbone: Backbone, detector: DetectorSpec) -> None:
        super().__init__(backbone, _DETECTION_HEADS[detector.head](num_classes, backbone.channels, detector))


class Segmenter(ImageNetwork[Tensor, Tensor]):
    """An `ImageNetwork` with a segmentation head.

    Args:
        num_classes: Number of classes K; their labels are 0 to K - 1.
        backbone: Of the spec's output stride.
        attention: The attention of the head.
        segmenter: The head.

    Raises:
        ValueError: If the parts do not fit one another.
    """

    head: SegmentationHead

    def __init__(
        self, num_classes: int, backbone: Backbone, attention: AttentionSpec, segmenter: SegmenterSpec
    ) -> None:
        if backbone.stride != segmenter.output_stride:
            raise InputError(
                f"output_stride={segmenter.output_stride} of the head is not the backbone's, {backbone.stride}: build "
                "both with the same output_stride."
            )
        head = _SEGMENTATION_HEADS[segmenter.head]
        super().__init__(backbone, head(num_classes, backbone.channels, attention, segmenter))
