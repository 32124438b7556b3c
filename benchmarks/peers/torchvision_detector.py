"""torchvision's Faster R-CNN of the sizes that this project's specs give, without attention."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map  # noqa: PLC2701 - torch has no public name
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.heads.detection import DetectorSpec


class _AsTheyAre(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision publishes no types
    """Normalises and pads; the data module has resized the images."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


_LAYOUTS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "bottleneck14": (Bottleneck, (1, 1, 1, 1)),
    "bottleneck26": (Bottleneck, (2, 2, 2, 2)),
}
_NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.BatchNorm2d,  # there is one process
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
}
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")


def torchvision_resnet(spec: ResNetSpec) -> nn.Sequential:
    """The backbone of a spec without attention, of torchvision's blocks; its children have torchvision's names."""
    block, counts = _LAYOUTS[spec.name]
    make_norm = _NORMS[spec.norm]
    body = nn.Sequential()
    body.add_module("conv1", nn.Conv2d(3, spec.width, 7, stride=2, padding=3, bias=False))
    body.add_module("bn1", make_norm(spec.width))
    body.add_module("relu", nn.ReLU(inplace=True))
    body.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    inputs = spec.width
    for stage, count in enumerate(counts):
        planes, layer = spec.width * 2**stage, nn.Sequential()
        outputs = planes * block.expansion
        for index in range(count):
            stride = 2 if stage and not index else 1
            shortcut = None
            if stride != 1 or inputs != outputs:
                shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), make_norm(outputs))
            layer.append(block(inputs, planes, stride, shortcut, norm_layer=make_norm))
            inputs = outputs
        body.add_module(f"layer{stage + 1}", layer)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if spec.weights != "none":
        if Path(spec.weights).is_file():
            state = torch.load(spec.weights, map_location="cpu", weights_only=True)
        else:
            state = get_model_weights(spec.name)[spec.weights].get_state_dict(check_hash=True)
        body.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    return body


def torchvision_detector(num_classes: int, backbone: ResNetSpec, spec: DetectorSpec) -> FasterRCNN:
    """The Faster R-CNN of the specs without attention, built by torchvision; it takes images in 0..1.

    Raises:
        ValueError: If the spec is of another detector.
    """
    if spec.head != "faster_rcnn":
        raise ValueError(f"head={spec.head!r}: the peer is torchvision's Faster R-CNN. Set head: faster_rcnn.")
    body = torchvision_resnet(backbone)
    for name, module in body.named_children():
        trained = _LAYERS[: backbone.trainable_layers]
        module.requires_grad_(name in trained or (name == "bn1" and len(trained) == len(_LAYERS)))
    expansion = _LAYOUTS[backbone.name][0].expansion
    levels = [str(level) for level in range(4)]
    ratios = tuple(spec.aspect_ratios)
    norm = None if spec.norm == "none" else _NORMS[spec.norm]
    if spec.roi_convolutions:
        size = spec.fpn_channels, spec.roi_size, spec.roi_size
        second_stage = FastRCNNConvFCHead(size, [spec.fpn_channels] * spec.roi_convolutions, [spec.fc_dim], norm)
    else:
        second_stage = TwoMLPHead(spec.fpn_channels * spec.roi_size**2, spec.fc_dim)
    network = FasterRCNN(
        BackboneWithFPN(
            body,
            {f"layer{stage + 1}": level for stage, level in enumerate(levels)},
            [backbone.width * 2**stage * expansion for stage in range(4)],
            spec.fpn_channels,
            norm_layer=norm,
        ),
        rpn_anchor_generator=AnchorGenerator([(size,) for size in spec.anchor_sizes], (ratios,) * 5),
        rpn_pre_nms_top_n_train=spec.rpn_pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=spec.rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_train=spec.rpn_post_nms_top_n_train,
        rpn_post_nms_top_n_test=spec.rpn_post_nms_top_n_test,
        rpn_nms_thresh=spec.rpn_nms_threshold,
        rpn_fg_iou_thresh=spec.rpn_foreground_iou,
        rpn_bg_iou_thresh=spec.rpn_background_iou,
        rpn_batch_size_per_image=spec.rpn_batch_size,
        rpn_positive_fraction=spec.rpn_positive_fraction,
        box_roi_pool=MultiScaleRoIAlign(
            levels, spec.roi_size, spec.roi_samples, canonical_scale=spec.roi_canonical_size, canonical_level=4
        ),
        box_head=second_stage,
        box_predictor=FastRCNNPredictor(spec.fc_dim, num_classes + 1),
        box_score_thresh=spec.score_threshold,
        box_nms_thresh=spec.nms_threshold,
        box_detections_per_img=spec.detections_per_img,
        box_fg_iou_thresh=spec.roi_foreground_iou,
        box_bg_iou_thresh=spec.roi_foreground_iou,
        box_batch_size_per_image=spec.roi_batch_size,
        box_positive_fraction=spec.roi_positive_fraction,
    )
    # The sizes are not used, since nothing is resized.
    transform = network.transform
    network.transform = _AsTheyAre(1, 1, transform.image_mean, transform.image_std)
    # What these hand on in the precision of autocast would become that of the boxes.
    for module in (network.backbone, network.rpn.head, network.roi_heads.box_predictor):
        module.register_forward_hook(lambda module, inputs, output: tree_map(Tensor.float, output))
    return network


def train_mode(network: nn.Module) -> None:
    """Training mode, in which layers that are not trained keep their statistics."""
    network.train()
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        if isinstance(module, nn.BatchNorm2d) and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
