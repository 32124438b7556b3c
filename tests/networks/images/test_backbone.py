"""The attended ResNet: equal to torchvision's where nothing is added, Fig. 2a where something is."""

import copy
import dataclasses
import io

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from lightning_attn.attention import AttentionSpec, DeformableConv, DynamicConv, GatedResidual, TransformerAttention
from lightning_attn.networks.images.backbone import (
    FrozenBatchNorm,
    ResNetSpec,
    build_resnet,
)
from lightning_attn.networks.images.batching import IMAGENET_MEAN, IMAGENET_STD, NormalizedBatch

NONE = AttentionSpec(mechanism="none")
STAGES = {f"layer{stage}": f"c{stage + 1}" for stage in (1, 2, 3, 4)}


def small(**fields):
    return ResNetSpec(**{"name": "bottleneck26", "width": 8} | fields)


def randomise_norms(network):
    """Statistics and factors that a trained network could have."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.2, 0.6)
                module.bias.normal_(std=0.1)
    return network


def stage_outputs(network, images):
    return IntermediateLayerGetter(network, STAGES)(images)


@pytest.mark.parametrize(
    ("name", "norm", "attention"),
    [
        ("resnet18", "batch", AttentionSpec(terms="1111")),
        ("resnet50", "frozen", NONE),
        ("resnet50", "batch", AttentionSpec(terms="1111")),
        ("resnet50", "frozen", AttentionSpec(terms="0010", kv_stride=2)),
        ("resnet50", "frozen", AttentionSpec(mechanism="dynamic")),
    ],
    ids=["resnet18 1111", "none", "1111", "0010", "dynamic"],
)
def test_starts_as_torchvisions_network_bit_for_bit(name, norm, attention):
    peer = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d)
    randomise_norms(peer)
    network = build_resnet(ResNetSpec(name, norm=norm), attention)
    state = {name: value for name, value in peer.state_dict().items() if not name.startswith("fc.")}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(".attention." in name for name in missing)
    assert bool(missing) == (attention != NONE)
    images = torch.randn(2, 3, 38, 65)
    for training in (False, True):
        expected, found = stage_outputs(peer.train(training), images), network.train(training)(images)
        assert list(found) == ["c2", "c3", "c4", "c5"]
        for stage, value in expected.items():
            assert torch.equal(found[stage], value), stage
            assert network.channels[stage] == value.shape[1]


@pytest.mark.parametrize("architecture", ["resnet34", "resnet101"])
def test_has_the_parameters_of_torchvisions(architecture):
    with torch.device("meta"):
        ours = build_resnet(ResNetSpec(architecture), NONE).state_dict()
        theirs = getattr(torchvision.models, architecture)().state_dict()
    del theirs["fc.weight"], theirs["fc.bias"]
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize(("output_stride", "replaced"), [(16, [False, False, True]), (8, [False, True, True])])
def test_dilates_as_torchvision_does(output_stride, replaced):
    peer = randomise_norms(torchvision.models.resnet50(replace_stride_with_dilation=replaced)).eval()
    network = build_resnet(ResNetSpec(), AttentionSpec(terms="0010"), output_stride).eval()
    network.load_state_dict(peer.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 96)
    found = network(images)
    for stage, value in stage_outputs(peer, images).items():
        assert torch.equal(found[stage], value), stage
    assert [64 // found[stage].shape[2] for stage in found] == [4, 8, *(min(s, output_stride) for s in (16, 32))]


def test_deformable_blocks_stride_and_dilate_as_regular_ones():
    """Offsets start at zero, so that the convolution starts as the one it replaces."""
    for output_stride in (32, 8):
        torch.manual_seed(3)
        regular = build_resnet(small(norm="frozen"), NONE, output_stride).eval()
        torch.manual_seed(3)
        deformable = build_resnet(
            small(norm="frozen", deformable_blocks=("conv3", "conv4", "conv5")),
            AttentionSpec(mechanism="none", convolution="deformable"),
            output_stride,
        ).eval()
        images = torch.randn(1, 3, 64, 96)
        found, expected = deformable(images), regular(images)
        for stage in found:
            torch.testing.assert_close(found[stage], expected[stage], rtol=1e-4, atol=1e-4)
        assert isinstance(deformable.layer2[0].conv2, DeformableConv)
        dilations = [block.conv2.dilation[0] for layer in (deformable.layer3, deformable.layer4) for block in layer]
        assert dilations == ([1, 2, 2, 4] if output_stride == 8 else [1, 1, 1, 1])


def test_attended_block_is_figure_2a():
    """A block by hand: 1x1, 3x3 deformable, norm, ReLU, x + gamma attention(x), 1x1, norm, residual connection."""
    attention = AttentionSpec(terms="1011", num_heads=2, convolution="deformable")
    network = build_resnet(small(norm="frozen"), attention).eval()
    block = randomise_norms(network).layer3[1]
    nn.init.normal_(block.conv2.offset.weight, std=0.3)
    nn.init.constant_(block.attention.gamma, 0.7)
    x = torch.randn(2, 128, 6, 7)

    def norm(layer, value):
        return nn.functional.batch_norm(value, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    hidden = norm(block.bn1, block.conv1(x)).relu()
    offset = block.conv2.offset(hidden)
    hidden = torchvision.ops.deform_conv2d(hidden, offset, block.conv2.weight, padding=1)
    hidden = norm(block.bn2, hidden).relu()
    hidden = hidden + 0.7 * block.attention.attention(hidden)
    expected = (x + norm(block.bn3, block.conv3(hidden))).relu()
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_attended_basic_block_attends_between_its_convolutions():
    network = randomise_norms(build_resnet(ResNetSpec("resnet18", width=8, norm="frozen"), AttentionSpec(num_heads=2)))
    block = network.eval().layer4[1]
    nn.init.constant_(block.attention.gamma, -0.4)
    x = torch.randn(1, 64, 5, 4)
    hidden = block.bn1(block.conv1(x)).relu()
    hidden = hidden - 0.4 * block.attention.attention(hidden)
    expected = (x + block.bn2(block.conv2(hidden))).relu()
    torch.testing.assert_close(block(x), expected)


def places(network, kind):
    """Blocks that hold a module of a kind, in the paper's names."""
    return {
        f"conv{stage + 2}_{index + 1}"
        for stage, layer in enumerate((network.layer1, network.layer2, network.layer3, network.layer4))
        for index, block in enumerate(layer)
        if any(isinstance(module, kind) for module in block.modules())
    }


CONV4 = {f"conv4_{index}" for index in range(1, 7)}
CONV5 = {f"conv5_{index}" for index in range(1, 4)}


@pytest.mark.parametrize(
    ("fields", "attended", "deformable"),
    [
        ({}, CONV4 | CONV5, CONV4 | CONV5),
        ({"attended_blocks": ["conv5"]}, CONV5, CONV5),
        ({"attended_blocks": ("conv4_6", "conv5_1", "conv2_3")}, {"conv4_6", "conv5_1", "conv2_3"}, None),
        ({"deformable_blocks": ("conv3_4", "conv4")}, CONV4 | CONV5, {"conv3_4"} | CONV4),
        ({"attended_blocks": (), "deformable_blocks": ("conv5_3",)}, set(), {"conv5_3"}),
    ],
)
@pytest.mark.parametrize(
    ("mechanism", "convolution"),
    [("transformer", "deformable"), ("dynamic", "regular"), ("none", "modulated_deformable"), ("none", "regular")],
)
def test_stands_where_config_says(fields, attended, deformable, mechanism, convolution):
    with torch.device("meta"):
        network = build_resnet(ResNetSpec(**fields), AttentionSpec(mechanism=mechanism, convolution=convolution))
    deformable = attended if deformable is None else deformable
    assert places(network, GatedResidual) == (set() if mechanism == "none" else attended)
    assert places(network, DeformableConv) == (set() if convolution == "regular" else deformable)
    assert places(network, TransformerAttention) == (attended if mechanism == "transformer" else set())
    assert places(network, DynamicConv) == (attended if mechanism == "dynamic" else set())


def test_positions_are_as_wide_as_the_paper_has_them():
    with torch.device("meta"):
        network = build_resnet(ResNetSpec(), AttentionSpec(terms="1111"))
    widths = [layer[-1].attention.attention.position_proj.in_features for layer in (network.layer3, network.layer4)]
    assert widths == [256, 512]


@pytest.mark.parametrize(
    ("trainable_layers", "trained"),
    [
        (0, set()),
        (1, {"layer4"}),
        (3, {"layer4", "layer3", "layer2"}),
        (4, {"layer4", "layer3", "layer2", "layer1"}),
        (5, {"layer4", "layer3", "layer2", "layer1", "conv1", "bn1"}),
    ],
)
def test_trains_the_layers_that_torchvision_would_and_all_that_is_new(trainable_layers, trained):
    network = build_resnet(
        small(trainable_layers=trainable_layers), AttentionSpec(num_heads=2, convolution="deformable")
    )
    new = {name for name, _ in network.named_parameters() if ".attention." in name or ".offset." in name}
    assert len(new) == 4 * (9 + 2)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] in trained or name in new), name


def test_norms_of_layers_that_are_not_trained_stay_as_they_are():
    network = build_resnet(small(trainable_layers=2), NONE)
    before = copy.deepcopy(network.state_dict())
    network.train()(torch.randn(2, 3, 64, 64))
    changed = {
        name.split(".")[0] for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"layer3", "layer4"}
    assert network.eval().train().layer3[0].bn1.training


def test_frozen_norm_is_frozen_in_training():
    network = build_resnet(small(norm="frozen"), NONE).train()
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    output = network(images)["c5"]
    output.square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any("bn" in name or "downsample.1" in name for name, _ in network.named_parameters())
    assert torch.equal(output, network.eval()(images)["c5"])


def test_frozen_norm_has_torchvisions_gradient():
    norm, peer = randomise_norms(FrozenBatchNorm(5)), FrozenBatchNorm2d(5)
    peer.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, 3, 4)
    gradients = []
    for layer in (norm, peer):
        leaf = x.clone().requires_grad_()
        layer(leaf * 2).sin().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_group_and_sync_norms():
    group = build_resnet(small(norm="group", width=24), NONE)
    assert {module.num_groups for module in group.modules() if isinstance(module, nn.GroupNorm)} == {8, 16, 32}
    assert group(torch.randn(1, 3, 32, 32))["c5"].shape == (1, 768, 1, 1)
    sync = build_resnet(small(norm="sync"), NONE)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in sync.modules())
    assert sync(torch.randn(2, 3, 32, 32))["c5"].shape == (2, 256, 1, 1)


def test_sizes_of_the_small_networks():
    """What the documentation of ResNetSpec says, in millions."""
    with torch.device("meta"):
        sizes = {
            (name, width): sum(p.numel() for p in build_resnet(ResNetSpec(name, width=width), NONE).parameters()) / 1e6
            for name, width in [("bottleneck14", 64), ("bottleneck26", 64), ("bottleneck26", 48)]
        }
    assert {key: round(size, 1) for key, size in sizes.items()} == {
        ("bottleneck14", 64): 8.0,
        ("bottleneck26", 64): 13.9,
        ("bottleneck26", 48): 7.9,
    }


@pytest.mark.parametrize("terms", ["1111", "0010"])
def test_every_trained_parameter_gets_a_gradient(terms):
    network = build_resnet(
        small(trainable_layers=3), AttentionSpec(terms=terms, num_heads=2, convolution="modulated_deformable")
    )
    sum(value.sum() for value in network(torch.randn(2, 3, 64, 64)).values()).backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_autocast_stays_near_float32():
    network = randomise_norms(build_resnet(small(norm="frozen"), AttentionSpec(num_heads=2))).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images)
    for stage, value in network(images).items():
        assert found[stage].dtype == torch.bfloat16
        assert (found[stage] - value).norm() < 0.03 * value.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnet52"}, "name must be one of .*'resnet18'.*got 'resnet52'"),
        ({"width": 4}, "width must be an integer of at least 8, got 4"),
        ({"norm": "none"}, "norm must be one of .*got 'none'"),
        ({"weights": ""}, "weights must be 'none', a name of torchvision's weights or a path, got ''"),
        (
            {"weights": "IMAGENET1K_V1", "width": 32},
            "trained at width 64, got width=32. Set width: 64 or weights: none",
        ),
        ({"weights": "IMAGENET1K_V2", "norm": "group"}, "norm='group'. Set norm: frozen, batch or sync"),
        ({"trainable_layers": 6}, "trainable_layers must be at most 5, got 6"),
        ({"trainable_layers": -1}, "trainable_layers must be an integer of at least 0, got -1"),
        ({"attended_blocks": "conv4"}, r"attended_blocks must be a list such as \[conv4, conv5\], got the string"),
        ({"attended_blocks": ("conv6",)}, r"attended_blocks has 'conv6', which resnet50 has not.*conv4_1 to conv4_6"),
        ({"attended_blocks": ("conv4_7",)}, "attended_blocks has 'conv4_7'"),
        ({"attended_blocks": ("conv4_",)}, "attended_blocks has 'conv4_'"),
        ({"deformable_blocks": ("conv4_0",)}, "deformable_blocks has 'conv4_0'"),
        ({"deformable_blocks": ("layer3",)}, "deformable_blocks has 'layer3'"),
    ],
)
def test_spec_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNetSpec(**fields)


def test_build_refuses():
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        build_resnet(small(), NONE, 4)
    with pytest.raises(ValueError, match="output_stride=8 needs dilation, which the blocks of resnet18 do not have"):
        build_resnet(ResNetSpec("resnet18"), NONE, 8)


def test_state_survives_saving():
    attention = AttentionSpec(num_heads=2, convolution="deformable")
    network = build_resnet(small(), attention)
    file = io.BytesIO()
    torch.save({"state": network.state_dict(), "spec": dataclasses.asdict(small())}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = build_resnet(ResNetSpec(**loaded["spec"]), attention)
    again.load_state_dict(loaded["state"])
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(network.eval()(images)["c5"], again.eval()(images)["c5"])


def test_batch_is_normalised_and_padded():
    images = [torch.randint(256, (3, 40, 33), dtype=torch.uint8), torch.randint(256, (3, 1, 65), dtype=torch.uint8)]
    batch = NormalizedBatch()(images, 32)
    assert batch.shape == (2, 3, 64, 96)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for image, found in zip(images, batch, strict=True):
        height, width = image.shape[1:]
        expected = torchvision.transforms.functional.normalize(image / 255, IMAGENET_MEAN, IMAGENET_STD)
        assert torch.equal(found[:, :height, :width], expected)
        assert found[:, height:].count_nonzero() == found[:, :, width:].count_nonzero() == 0


def test_smallest_batch_can_be_normalised():
    """One value per channel has no variance: with a single map of 1 x 1, batch normalisation would fail in training."""
    batch = NormalizedBatch()([torch.zeros(3, 1, 1, dtype=torch.uint8)], 32)
    assert batch.shape == (1, 3, 32, 64)
    assert build_resnet(small(), NONE).train()(batch)["c5"].shape == (1, 256, 1, 2)


@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_batch_may_end_under_a_pixel_of_the_map(multiple):
    """With aligned corners, both ends of an axis lie under a pixel of a map of that stride."""
    batch = NormalizedBatch()
    for height, width in [(1, 1), (5, 3), (8, 9), (9, 8), (33, 65), (32, 64), (34, 66), (769, 1024)]:
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        found = batch([image], multiple, align_corners=True)
        for size, padded, least in ((height, found.shape[2], 1), (width, found.shape[3], multiple + 1)):
            assert padded % multiple == 1
            assert max(size, least) <= padded < max(size, least) + multiple
        assert torch.equal(found[0, :, :height, :width], NormalizedBatch()([image], 32)[0, :, :height, :width])
        assert found[:, :, height:].count_nonzero() == found[..., width:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4), r"images\[1\] must be RGB as uint8 \[3, H, W\].*got torch.float32 \(3, 4, 4\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"images\[1\].*\(4, 4, 3\)"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"images\[1\].*\(4, 4\)"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), r"images\[1\].*neither H nor W zero.*\(3, 0, 4\)"),
    ],
)
def test_batch_refuses(image, message):
    with pytest.raises(ValueError, match=message):
        NormalizedBatch()([torch.zeros(3, 4, 4, dtype=torch.uint8), image], 32)
    with pytest.raises(ValueError, match="images is empty"):
        NormalizedBatch()([], 32)
