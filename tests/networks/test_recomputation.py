"""Activation checkpointing: the same losses, gradients and statistics, bitwise, with fewer stored activations."""

import copy
import dataclasses

import pytest
import torch

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Detector, Segmenter
from lightning_attn.networks.recomputation import recompute_activations
from lightning_attn.networks.translation.transformer import Transformer

ATTENTION = AttentionSpec(num_heads=2, dropout=0.2)
DEFORMABLE = dataclasses.replace(ATTENTION, terms="0010", convolution="modulated_deformable")


def loss_and_stored(network, inputs) -> tuple[torch.Tensor, int]:
    """The loss of a step with a given random stream, and how many bytes wait for its backward pass."""
    torch.manual_seed(1)
    stored: dict[int, int] = {}

    def pack(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if isinstance(network, Transformer):
            loss = network.loss(*inputs)[0]
        else:
            loss = torch.stack(list(network(*inputs).values())).sum()
    return loss, sum(stored.values())


def compare(network, inputs, number: int) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    other = copy.deepcopy(network.train())
    assert recompute_activations(other) == number
    losses, stored = zip(*(loss_and_stored(one, inputs) for one in (network, other)), strict=True)
    assert stored[1] < 0.8 * stored[0]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward(retain_graph=True)
        loss.backward()  # computed again a second time
    for (name, parameter), twin in zip(network.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, twin.grad), name
    torch.testing.assert_close(other.state_dict(), network.state_dict(), rtol=0, atol=0)  # statistics too


def images() -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, 33, 49), dtype=torch.uint8) for _ in range(2)]


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("spec", [ATTENTION, DEFORMABLE])
def test_segmentation(spec, norm):
    backbone = build_backbone(ResNetSpec("bottleneck26", width=8, norm=norm), spec, 8)
    labels = [torch.randint(0, 3, (33, 49)).to(torch.uint8) for _ in range(2)]
    compare(Segmenter(3, backbone, spec, SegmenterSpec(head_channels=16)), (images(), labels), 4 + 1)


def test_segmentation_by_a_pyramid():
    pyramid = SegmenterSpec(head="pyramid", head_channels=16, output_stride=32)
    backbone = build_backbone(ResNetSpec("bottleneck26", width=8), ATTENTION, 32)
    labels = [torch.randint(0, 3, (33, 49)).to(torch.uint8) for _ in range(2)]
    compare(Segmenter(3, backbone, ATTENTION, pyramid), (images(), labels), 4 + 1)


def test_basic_blocks_without_attention_but_deformable():
    spec = AttentionSpec(mechanism="none", convolution="deformable")
    backbone = build_backbone(ResNetSpec("resnet18", width=8, deformable_blocks=("conv2", "conv3")), spec)
    targets = [{"boxes": torch.tensor([[2.0, 3, 20, 30]]), "labels": torch.tensor([1])}] * 2
    compare(Detector(2, backbone, DetectorSpec(fpn_channels=8, fc_dim=8)), (images(), targets), 4)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_transformer(norm_position):
    network = Transformer(50, 0, ATTENTION, ATTENTION, 16, 32, 2, 2, dropout=0.1, norm_position=norm_position)
    source, target = torch.randint(1, 50, (3, 7)), torch.randint(1, 50, (3, 6))
    source[0, -2:] = 0
    compare(network, (source, target), 4)


def test_without_gradients_nothing_is_computed_twice():
    network = Transformer(50, 0, ATTENTION, ATTENTION, 16, 32, 1, 1)
    recompute_activations(network)
    with torch.no_grad():
        loss, stored = loss_and_stored(network, (torch.randint(1, 50, (3, 7)), torch.randint(1, 50, (3, 6))))
    assert not loss.requires_grad
    assert stored == 0
