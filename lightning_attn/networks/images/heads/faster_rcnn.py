"""The head of Faster R-CNN with FPN, from torchvision's modules (Ren et al. 2015; Zhu et al. 2019, section 4.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper
from typing_extensions import override

from lightning_attn.attention.transforms import is_exporting
from lightning_attn.networks.images.backbone import Features
from lightning_attn.networks.images.heads.detection import (
    Detection,
    DetectionHead,
    DetectorSpec,
    Target,
    anchor_generator,
    image_list,
    norm_layer,
)

_ROI_LEVELS = (2, 3, 4, 5)


class FasterRCNNHead(DetectionHead):
    """A proposal network, and a second stage that classifies and refines proposals; the background is class 0.

    The losses are `loss_classifier`, `loss_box_reg`, `loss_objectness` and `loss_rpn_box_reg`.

    Attributes:
        rpn: The proposal network.
        roi_heads: The second stage.
    """

    def __init__(self, num_classes: int, channels: Mapping[str, int], spec: DetectorSpec) -> None:
        super().__init__(num_classes, channels, spec, ("c2", "c3", "c4", "c5"), LastLevelMaxPool())
        self.rpn = _ProposalNetwork(
            anchor_generator(spec),
            _RPNHead(spec.fpn_channels, len(spec.aspect_ratios)),
            fg_iou_thresh=spec.rpn_foreground_iou,
            bg_iou_thresh=spec.rpn_background_iou,
            batch_size_per_image=spec.rpn_batch_size,
            positive_fraction=spec.rpn_positive_fraction,
            pre_nms_top_n={"training": spec.rpn_pre_nms_top_n_train, "testing": spec.rpn_pre_nms_top_n_test},
            post_nms_top_n={"training": spec.rpn_post_nms_top_n_train, "testing": spec.rpn_post_nms_top_n_test},
            nms_thresh=spec.rpn_nms_threshold,
        )
        pool = _RoIAlign(
            self.names, spec.roi_size, spec.roi_samples, canonical_scale=spec.roi_canonical_size, canonical_level=4
        )
        # By default it infers the strides from the first batch: wrongly, if that is mostly padding.
        pool.scales = [2.0**-level for level in _ROI_LEVELS]
        pool.map_levels = LevelMapper(_ROI_LEVELS[0], _ROI_LEVELS[-1], canonical_scale=spec.roi_canonical_size)
        self.roi_heads = _RoIHeads(
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
            detections_per_img=spec.detections_per_img,
        )
        self.roi_heads.box_voting = spec.box_voting

    @override
    def losses(self, features: Features, targets: Sequence[Target]) -> dict[str, Tensor]:
        _, losses = self._run(features, targets)
        return losses

    @override
    def results(self, features: Features) -> list[Detection]:
        detections, _ = self._run(features, None)
        return detections

    @override
    def modules_to_compile(self) -> list[nn.Module]:
        return [self.fpn, self.rpn.head, self.roi_heads.box_head, self.roi_heads.box_predictor]

    @override
    def outputs(self, features: Features) -> list[Tensor]:
        levels = list(self.levels(features).values())
        logits, deltas = self.rpn.head(levels)
        sampler, pool = self.roi_heads.fg_bg_sampler, self.roi_heads.box_roi_pool
        regions = sampler.batch_size_per_image if self.training else self.rpn.post_nms_top_n()
        # In place of what RoIAlign would pool, with a gradient to the pyramid.
        pooled = levels[0].mean().expand(len(features.image_sizes) * regions, levels[0].shape[1], *pool.output_size)
        scores, boxes = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        return [*logits, *deltas, scores, boxes]

    def _run(self, features: Features, targets: Sequence[Target] | None) -> tuple[list[Detection], dict[str, Tensor]]:
        levels = self.levels(features)
        proposals, proposal_losses = self.rpn(image_list(features, levels), levels, targets)
        detections, losses = self.roi_heads(levels, proposals, features.image_sizes, targets)
        return detections, losses | proposal_losses


class _RPNHead(RPNHead):  # type: ignore[misc]  # torchvision publishes no types
    """Returns float32 for the box coder, which would otherwise round anchors to the precision of autocast."""

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(features)
        return [level.float() for level in logits], [level.float() for level in deltas]


class _Predictor(FastRCNNPredictor):  # type: ignore[misc]
    """Returns float32, as `_RPNHead`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class _RoIHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's, with box voting if `box_voting` (see `DetectorSpec`) is not 0."""

    box_voting = 0.0

    @override
    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        boxes, scores, labels = super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        if self.box_voting:
            counts = [one.shape[0] for one in proposals]
            candidates = torch.split(self.box_coder.decode(box_regression, proposals), counts)
            class_scores = torch.split(class_logits.softmax(-1), counts)
            for index, shape in enumerate(image_shapes):
                clipped = clip_boxes_to_image(candidates[index], shape)
                boxes[index] = self._vote(boxes[index], labels[index], clipped, class_scores[index])
        return boxes, scores, labels

    def _vote(self, boxes: Tensor, labels: Tensor, candidates: Tensor, class_scores: Tensor) -> Tensor:
        """Means for `boxes` `[n, 4]` of overlapping `candidates` `[proposals, K + 1, 4]`, weighted by their scores.

        `class_scores` are `[proposals, K + 1]`.
        """
        candidates, scores = candidates[:, labels].transpose(0, 1), class_scores[:, labels].T  # of the box's own class
        overlapping = (scores > self.score_thresh) & (_paired_iou(boxes.unsqueeze(1), candidates) >= self.box_voting)
        weights = torch.where(overlapping, scores, 0.0)
        total = weights.sum(1, keepdim=True)  # zero for a box without area, which does not even overlap itself
        return torch.where(total > 0, (weights.unsqueeze(-1) * candidates).sum(1) / total, boxes)


def _paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Elementwise intersection over union of boxes `[..., 4]`, with broadcasting, `[...]`."""
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    shared = overlap.clamp_min(0).prod(-1)
    return shared / ((first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - shared)


class _RoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """torchvision's, but exportable: in an exported program the number of proposals is symbolic."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        if not is_exporting():
            aligned: Tensor = super().forward(x, boxes, image_shapes)
            return aligned
        (proposals,) = boxes  # of one image
        regions = F.pad(proposals, (1, 0))  # prepends the index of the image, 0
        levels, first = self.map_levels(boxes), x[self.featmap_names[0]]
        aligned = first.new_zeros(proposals.shape[0], first.shape[1], *self.output_size)
        for level, (name, scale) in enumerate(zip(self.featmap_names, self.scales, strict=True)):
            (chosen,) = torch.where(levels == level)
            pooled = roi_align(x[name], regions[chosen], self.output_size, scale, self.sampling_ratio)
            aligned = aligned.index_put((chosen,), pooled)
        return aligned


class _ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, but proposes the whole image in training if none is left: the mean loss of none is NaN."""

    @override
    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: list[tuple[int, int]], num_anchors_per_level: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        boxes, scores = super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        if is_exporting():
            # The exporter must know that at least one exists. Boxes without area give detections without area, which
            # are dropped.
            boxes = [F.pad(one, (0, 0, 0, 1)) for one in boxes]
        if self.training:
            for index, (height, width) in enumerate(image_shapes):
                if not len(boxes[index]):
                    boxes[index] = proposals.new_tensor([[0, 0, width, height]])
                    scores[index] = objectness.new_zeros(1)
        return boxes, scores


def _second_stage(spec: DetectorSpec) -> nn.Module:
    """The layers between a proposal's pooled features and the predictors of class and box."""
    if not spec.roi_convolutions:
        two_layers: nn.Module = TwoMLPHead(spec.fpn_channels * spec.roi_size**2, spec.fc_dim)
        return two_layers
    size = spec.fpn_channels, spec.roi_size, spec.roi_size
    layers: nn.Module = FastRCNNConvFCHead(
        size, [spec.fpn_channels] * spec.roi_convolutions, [spec.fc_dim], norm_layer(spec)
    )
    return layers
