"""Small problems of the detection benchmarks."""

import dataclasses

from benchmarks.detection_problem import Problem
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.heads.detection import DetectorSpec

SMALL = Problem(
    ResNetSpec("bottleneck14", width=8),
    DetectorSpec(
        fpn_channels=8,
        anchor_sizes=(8.0, 12.0, 16.0, 24.0, 32.0),
        fc_dim=16,
        rpn_post_nms_top_n_train=50,
        rpn_pre_nms_top_n_train=60,
        roi_batch_size=16,
    ),
    images=1,
    height=48,
    width=64,
    boxes=2,
    classes=3,
    heads=2,
)
FROZEN = dataclasses.replace(SMALL, backbone=dataclasses.replace(SMALL.backbone, norm="frozen", trainable_layers=3))
