"""The head of RetinaNet with FPN, from torchvision's modules (Lin et al. 2017)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead as TorchvisionHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from typing_extensions import override

from lightning_attn.networks.images.backbone import Features
from lightning_attn.networks.images.heads.detection import (
    Detection,
    DetectionHead,
    DetectorSpec,
    Target,
    anchor_generator,
    image_list,
)

_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # anchor sizes within a level


class RetinaNetHead(DetectionHead):
    """Predicts class and box of every anchor in one stage; there is no background class.

    The losses are `classification` and `bbox_regression`.

    Attributes:
        retinanet: torchvision's, without a backbone.
    """

    def __init__(self, num_classes: int, channels: Mapping[str, int], spec: DetectorSpec) -> None:
        top = LastLevelP6P7(channels["c5"], spec.fpn_channels)
        super().__init__(num_classes, channels, spec, ("c3", "c4", "c5"), top)
        self.retinanet = RetinaNet(
            _NoBackbone(spec.fpn_channels),
            num_classes,
            anchor_generator=anchor_generator(spec, _OCTAVES),
            head=_Head(spec.fpn_channels, len(_OCTAVES) * len(spec.aspect_ratios), num_classes),
            score_thresh=spec.score_threshold,
            nms_thresh=spec.nms_threshold,
            detections_per_img=spec.detections_per_img,
            fg_iou_thresh=spec.foreground_iou,
            bg_iou_thresh=spec.background_iou,
            topk_candidates=spec.topk_candidates,
        )

    @override
    def losses(self, features: Features, targets: Sequence[Target]) -> dict[str, Tensor]:
        outputs, anchors, _ = self._run(features)
        from_zero = [{"boxes": target["boxes"], "labels": target["labels"] - 1} for target in targets]
        losses: dict[str, Tensor] = self.retinanet.compute_loss(from_zero, outputs, anchors)
        return losses

    @override
    def results(self, features: Features) -> list[Detection]:
        outputs, anchors, levels = self._run(features)
        per_cell = len(anchors[0]) // sum(height * width for height, width in levels)
        numbers = [height * width * per_cell for height, width in levels]
        by_level = {name: list(torch.split(output, numbers, dim=1)) for name, output in outputs.items()}
        anchors_by_level = [list(torch.split(one, numbers)) for one in anchors]
        found = self.retinanet.postprocess_detections(by_level, anchors_by_level, features.image_sizes)
        return [detection | {"labels": detection["labels"] + 1} for detection in found]

    @override
    def modules_to_compile(self) -> list[nn.Module]:
        return [self.fpn, self.retinanet.head]

    @override
    def outputs(self, features: Features) -> list[Tensor]:
        return list(self.retinanet.head(list(self.levels(features).values())).values())

    def _run(self, features: Features) -> tuple[dict[str, Tensor], list[Tensor], list[tuple[int, int]]]:
        """Outputs for all anchors, the anchors of each image, and height and width of each level."""
        levels = self.levels(features)
        maps = list(levels.values())
        outputs = self.retinanet.head(maps)
        anchors = self.retinanet.anchor_generator(image_list(features, levels), maps)
        return outputs, anchors, [(level.shape[2], level.shape[3]) for level in maps]


class _NoBackbone(nn.Identity):
    """A placeholder for torchvision, which reads only `out_channels` of its backbone."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


class _Head(TorchvisionHead):  # type: ignore[misc]  # torchvision publishes no types
    """Returns float32 for the box coder, which would otherwise round anchors to the precision of autocast."""

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {name: output.float() for name, output in super().forward(features).items()}
