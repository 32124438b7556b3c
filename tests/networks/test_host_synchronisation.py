"""On a GPU, forward and backward passes of training ask the host for no number of a tensor."""

import dataclasses

import pytest
import torch
from fake_cuda import DataDependentOutputException, DynamicOutputShapeException, fake_cuda, gradients

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Detector, Segmenter
from lightning_attn.networks.translation.transformer import Transformer

ATTENTION = AttentionSpec(num_heads=2)
SPECS = [
    *(dataclasses.replace(ATTENTION, terms=terms) for terms in ("1111", "0110", "0011")),
    dataclasses.replace(ATTENTION, terms="0010", convolution="modulated_deformable", kv_stride=2),
]


def name(spec: AttentionSpec) -> str:
    return f"{spec.terms}-{spec.convolution}"


def without_gradient(network: torch.nn.Module, loss: torch.Tensor, spec: AttentionSpec) -> list[str]:
    """Names of the trained parameters that a loss gives no gradient."""
    if spec.convolution != "regular":  # its backward pass calls torch's engine
        return []
    found = gradients(loss)
    return [name for name, one in network.named_parameters() if one.requires_grad and id(one) not in found]


def images(sizes=((65, 97), (60, 90))) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


def test_what_would_wait_is_found():
    with fake_cuda():
        x = torch.randn(3)
        assert x.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            bool(x.isfinite().all())
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_transformer(spec):
    with fake_cuda():
        self_attention = dataclasses.replace(spec, dropout=0.1)
        cross_attention = AttentionSpec(num_heads=2, terms=spec.terms, dropout=0.1)
        network = Transformer(50, 0, self_attention, cross_attention, 16, 32, encoder_layers=1, decoder_layers=1)
        loss, likelihood, number = network.loss(torch.randint(0, 50, (3, 7)), torch.randint(0, 50, (3, 6)), 0.1)
        assert not likelihood.requires_grad
        assert without_gradient(network, loss / number, spec) == []


@pytest.mark.parametrize(("spec", "hard"), [(SPECS[0], True), *((spec, False) for spec in SPECS[1:])])
def test_segmentation(spec, hard):
    segmenter = SegmenterSpec(head_channels=16, ohem_threshold=0.7 if hard else 0.0)
    if hard:
        segmenter = dataclasses.replace(segmenter, class_weights=(1.0, 2.0, 3.0))
    with fake_cuda():
        backbone = build_backbone(ResNetSpec("bottleneck14", width=8), spec, 8)
        network = Segmenter(3, backbone, spec, segmenter).train()
        labels = [torch.randint(0, 3, (65, 97)).to(torch.uint8), torch.randint(0, 3, (60, 90)).to(torch.uint8)]
        losses = network(images(), labels)
        assert without_gradient(network, torch.stack(list(losses.values())).sum(), spec) == []


@pytest.mark.parametrize(("spec", "head"), [(SPECS[0], "faster_rcnn"), (SPECS[-1], "retinanet")])
def test_detection_up_to_the_pyramid(spec, head):
    """Proposals and samples are torchvision's, whose numbers are data-dependent; docs/gpu.md lists where."""
    with fake_cuda():
        backbone = build_backbone(ResNetSpec("bottleneck14", width=8), spec)
        network = Detector(3, backbone, DetectorSpec(head=head, fpn_channels=8)).train()
        targets = [{"boxes": torch.rand(2, 4), "labels": torch.randint(1, 4, (2,))}] * 2
        network.head.check_targets(images(), targets)
        levels = network.head.levels(network.backbone(images()))
        convolutions = network.head.rpn.head if head == "faster_rcnn" else network.head.retinanet.head
        outputs = convolutions(list(levels.values()))
        flat = [x for part in (outputs.values() if isinstance(outputs, dict) else outputs) for x in part]
        missing = without_gradient(network, sum(one.sum() for one in flat), spec)
        assert all(name.startswith("head.roi_heads.") for name in missing)
        with pytest.raises(DynamicOutputShapeException):
            network(images(), targets)


@pytest.mark.parametrize("fields", [{"terms": "0100", "window": 5}, {"mechanism": "dynamic", "kernel_size": 5}])
def test_windows_and_dynamic_convolution_forward(fields):
    spec = AttentionSpec(groups=4, **fields) if "mechanism" in fields else AttentionSpec(num_heads=2, **fields)
    with fake_cuda():
        backbone = build_backbone(ResNetSpec("bottleneck14", width=8), spec)
        assert backbone(images()).maps["c5"].device.type == "cuda"
