"""The segmentation network: its parts against torch's functions, its losses against definitions in numpy."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_attn.attention import AttentionSpec, DeformableConv
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.segmentation import (
    SegmenterSpec,
    cross_entropy,
    hard_cross_entropy,
    upsampled,
)
from lightning_attn.networks.images.network import Segmenter

NONE = AttentionSpec(mechanism="none")
MECHANISMS = {
    "1111": AttentionSpec(terms="1111", num_heads=2),
    "0010 deformable": AttentionSpec(terms="0010", num_heads=2, convolution="deformable"),
    "0011 modulated": AttentionSpec(terms="0011", num_heads=2, kv_stride=2, convolution="modulated_deformable"),
    "dynamic": AttentionSpec(mechanism="dynamic", groups=4),
    "none": NONE,
}
mechanisms = pytest.mark.parametrize("mechanism", MECHANISMS)
PYRAMID = {"head": "pyramid", "output_stride": 32}
heads = pytest.mark.parametrize("head", [{}, PYRAMID], ids=["ccnet", "pyramid"])


def small_segmenter(attention=NONE, num_classes=3, backbone=None, **segmenter):
    return built(
        num_classes,
        ResNetSpec(**{"name": "bottleneck14", "width": 8} | (backbone or {})),
        attention,
        SegmenterSpec(**{"head_channels": 16} | segmenter),
    )


def built(num_classes, backbone, attention, segmenter):
    return Segmenter(num_classes, build_backbone(backbone, attention, segmenter.output_stride), attention, segmenter)


def picture(height, width):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


def labels_for(images, num_classes=3):
    """Random labels, some of them ignored."""
    labels = [torch.randint(num_classes, image.shape[1:], dtype=torch.uint8) for image in images]
    for label in labels:
        label[torch.rand(label.shape) < 0.2] = 255
    return labels


def randomise(module):
    """Statistics and factors that a trained network could have, and gates that are open."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith("gamma"):
                value.fill_(0.6)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.1)
    return module


def attention_parameters(name, channels):
    """Of a gated 1111 module with 8 heads."""
    head = channels // 8
    square = (channels, channels)
    return {
        f"{name}.gamma": (),
        **{f"{name}.attention.{part}_proj.weight": square for part in ("query", "key", "position", "value", "out")},
        f"{name}.attention.out_proj.bias": (channels,),
        f"{name}.attention.key_bias": (8, head),
        f"{name}.attention.position_bias": (8, head),
    }


def convolution_parameters(name, inputs, outputs):
    return {f"{name}.0.weight": (outputs, inputs, 3, 3), f"{name}.1.weight": (outputs,), f"{name}.1.bias": (outputs,)}


def test_the_papers_network_has_the_parameters_it_should():
    with torch.device("meta"):
        network = built(19, ResNetSpec(), AttentionSpec(terms="1111"), SegmenterSpec(norm="sync"))
        resnet = torchvision.models.resnet50()
    expected = {
        f"backbone.body.{name}": tuple(value.shape)
        for name, value in resnet.named_parameters()
        if not name.startswith("fc.")
    }
    for stage, blocks, channels in ((3, 6, 256), (4, 3, 512)):
        for block in range(blocks):
            expected |= attention_parameters(f"backbone.body.layer{stage}.{block}.attention", channels)
    expected |= {
        **convolution_parameters("head.reduce", 2048, 512),
        **attention_parameters("head.attention", 512),
        **convolution_parameters("head.refine", 512, 512),
        **convolution_parameters("head.fuse", 2048 + 512, 512),
        "head.classifier.weight": (19, 512, 1, 1),
        "head.classifier.bias": (19,),
        **convolution_parameters("head.auxiliary.convolution", 1024, 512),
        "head.auxiliary.classifier.weight": (19, 512, 1, 1),
        "head.auxiliary.classifier.bias": (19,),
    }
    assert {name: tuple(value.shape) for name, value in network.named_parameters()} == expected

    # In numbers: torchvision's ResNet-50 without classifier, 6 + 3 + 1 attentions of 5 C^2 + 3 C + 1, four 3x3
    # convolutions with a norm, two classifiers.
    attentions = 6 * (5 * 256**2 + 3 * 256 + 1) + 4 * (5 * 512**2 + 3 * 512 + 1)
    convolutions = 9 * 512 * (2048 + 512 + 2560 + 1024) + 4 * 2 * 512
    total = sum(value.numel() for value in network.parameters())
    assert total == 23_508_032 + attentions + convolutions + 2 * (512 * 19 + 19)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) == 4
    assert network.head.dropout.p == network.head.auxiliary.dropout.p == 0.1


def test_what_is_switched_off_does_not_exist():
    """Distributed training fails on parameters without a gradient."""
    network = small_segmenter(auxiliary_weight=0)
    assert network.head.auxiliary is None
    assert network.head.attention is None
    assert not [name for name in network.state_dict() if "auxiliary" in name or "attention" in name]
    images = [picture(17, 25)]
    assert set(network(images, labels_for(images))) == {"loss_head"}
    norms = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "sync": nn.SyncBatchNorm}
    for norm, kind in norms.items():
        assert isinstance(small_segmenter(norm=norm).head.fuse[1], kind)


@mechanisms
def test_head_is_ccnets_with_this_attention(mechanism):
    head = randomise(small_segmenter(MECHANISMS[mechanism]).head).eval()
    x = torch.randn(2, 256, 5, 7)

    def convolved(part, value):
        value = F.conv2d(value, part[0].weight, padding=1)
        norm = part[1]
        return F.batch_norm(value, norm.running_mean, norm.running_var, norm.weight, norm.bias).clamp(min=0)

    context = convolved(head.reduce, x)
    if mechanism != "none":
        context = context + 0.6 * head.attention.attention(context)
    fused = convolved(head.fuse, torch.cat((x, convolved(head.refine, context)), 1))
    expected = torch.einsum("bchw,kc->bkhw", fused, head.classifier.weight[:, :, 0, 0])
    expected = expected + head.classifier.bias[:, None, None]
    torch.testing.assert_close(head({"c5": x}), expected, rtol=1e-4, atol=1e-5)


def test_a_pyramid_adds_all_levels_at_stride_4():
    """Against the equations, level by level."""
    head = randomise(small_segmenter(MECHANISMS["1111"], **PYRAMID).head).eval()
    sizes = {"c2": (33, 41), "c3": (17, 21), "c4": (9, 11), "c5": (5, 6)}
    maps = {name: torch.randn(2, 32 * 2**place, *size) for place, (name, size) in enumerate(sizes.items())}

    def convolved(part, value):
        value = F.conv2d(value, part[0].weight, padding=1)
        norm = part[1]
        return F.batch_norm(value, norm.running_mean, norm.running_var, norm.weight, norm.bias).clamp(min=0)

    def at(name, value):
        return F.interpolate(value, sizes[name], mode="bilinear", align_corners=True)

    context = convolved(head.reduce, maps["c5"])
    p5 = context + 0.6 * head.attention.attention(context)
    p4 = F.conv2d(maps["c4"], head.laterals["c4"].weight, head.laterals["c4"].bias) + at("c4", p5)
    p3 = F.conv2d(maps["c3"], head.laterals["c3"].weight, head.laterals["c3"].bias) + at("c3", p4)
    p2 = F.conv2d(maps["c2"], head.laterals["c2"].weight, head.laterals["c2"].bias) + at("c2", p3)
    of = head.branches
    total = convolved(of["c2"][0], p2)
    total = total + at("c2", convolved(of["c3"][0], p3))
    total = total + at("c2", convolved(of["c4"][1], at("c3", convolved(of["c4"][0], p4))))
    last = convolved(of["c5"][1], at("c4", convolved(of["c5"][0], p5)))
    total = total + at("c2", convolved(of["c5"][2], at("c3", last)))
    expected = F.conv2d(total, head.classifier.weight, head.classifier.bias)
    assert expected.shape == (2, 3, 33, 41)
    torch.testing.assert_close(head(maps), expected, rtol=1e-4, atol=1e-5)
    assert sum(len(branch) for branch in of.values()) == 3 + 2 + 1 + 1


def test_head_drops_channels_in_training_only():
    head = small_segmenter(dropout=0.5).head
    seen = []
    head.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 256, 6, 6)
    head.train()({"c5": x})
    head.eval()({"c5": x})
    dropped = (seen[0] == 0).flatten(2).all(2)
    assert dropped.sum() >= 6
    assert not (seen[1] == 0).flatten(2).all(2).any()


@pytest.mark.parametrize("mechanism", ["1111", "0011 modulated", "dynamic"])
def test_starts_as_the_network_without_attention_bit_for_bit(mechanism):
    attention = MECHANISMS[mechanism]
    plain = small_segmenter(AttentionSpec(mechanism="none", convolution=attention.convolution)).eval()
    attended = small_segmenter(attention).eval()
    missing, unexpected = attended.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all(".attention." in name for name in missing)
    images = [picture(41, 60)]
    assert torch.equal(attended(images)[0], plain(images)[0])
    randomise(attended)
    assert not torch.allclose(attended(images)[0], plain(images)[0])


def test_backbone_is_dilated_as_torchvisions():
    peer = randomise(torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])).eval()
    network = built(2, ResNetSpec(), AttentionSpec(terms="0010"), SegmenterSpec(head_channels=8)).eval()
    state = {name: value for name, value in peer.state_dict().items() if not name.startswith("fc.")}
    network.backbone.body.load_state_dict(state, strict=False)
    batch = network.backbone.batch([picture(60, 73)], 8, align_corners=True)
    assert batch.shape[2:] == (65, 73)
    x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(batch))))
    expected = peer.layer4(peer.layer3(peer.layer2(peer.layer1(x))))
    assert expected.shape[2:] == (9, 10)
    assert torch.equal(network.backbone.body(batch)["c5"], expected)


def test_deformable_convolutions_are_dilated_too():
    torch.manual_seed(5)
    regular = small_segmenter(backbone={"name": "bottleneck26"}).eval()
    deformable = small_segmenter(
        AttentionSpec(mechanism="none", convolution="deformable"), backbone={"name": "bottleneck26"}
    ).eval()
    deformable.load_state_dict(regular.state_dict(), strict=False)
    convolutions = [module for module in deformable.modules() if isinstance(module, DeformableConv)]
    assert [module.dilation for module in convolutions] == [(n, n) for n in (1, 2, 2, 4)]
    images = [picture(49, 57)]
    torch.testing.assert_close(deformable(images)[0], regular(images)[0], rtol=1e-4, atol=1e-4)


class Subsampled(nn.Module):
    """A backbone that shows the pixels around which its maps are computed."""

    def forward(self, batch):
        return {"c5": batch[:, :, ::8, ::8]}


@pytest.mark.parametrize(("height", "width"), [(25, 49), (24, 48), (26, 50), (31, 33)])
def test_logits_lie_where_they_were_computed(height, width):
    """A ramp goes through subsampling and resizing unchanged, up to the last pixel of the map within the image."""
    network = small_segmenter().eval()
    network.backbone.body, network.head.forward = Subsampled(), lambda maps: maps["c5"]
    ramp = (2 * torch.arange(width) + 3 * torch.arange(height)[:, None]).to(torch.uint8).expand(3, -1, -1)
    (found,) = network([ramp])
    assert found.shape == (3, height, width)
    rows, columns = (height - 1) // 8 * 8 + 1, (width - 1) // 8 * 8 + 1
    back = (found * network.backbone.batch.std + network.backbone.batch.mean) * 255
    torch.testing.assert_close(back[:, :rows, :columns], ramp[:, :rows, :columns].float(), rtol=0, atol=1e-3)


@heads
def test_pixels_of_maps_are_where_they_were_computed(head):
    """With kernels that are their own mirror images, pixel i of a map must be pixel n - i of the mirrored image's."""
    network = small_segmenter(**head).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 4:
                parameter.copy_((parameter + parameter.flip(-1)) / 2)
    image = picture(33, 97 if head else 57)
    (found,), (mirrored,) = network([image]), network([image.flip(-1)])
    torch.testing.assert_close(mirrored.flip(-1), found, rtol=1e-4, atol=1e-5)
    (other,), (mirrored,) = network([image[..., :-1]]), network([image[..., :-1].flip(-1)])
    assert (mirrored.flip(-1) - other).abs().max() > 1e-2  # or this says nothing


def test_logits_move_with_the_image():
    network = randomise(small_segmenter()).eval()
    scene = picture(33, 305)
    (here,), (there,) = network([scene[..., :297]]), network([scene[..., 8:]])
    inside = slice(80, 209)  # beyond the reach of the sides
    torch.testing.assert_close(there[..., inside], here[..., 88:217], rtol=1e-4, atol=1e-5)
    assert (there[..., inside] - here[..., inside]).abs().max() > 1e-2


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_strides(output_stride):
    network = small_segmenter(output_stride=output_stride)
    images = [picture(40, 70), picture(33, 65)]
    features = network.backbone(images, align_corners=True).maps
    assert features["c5"].shape[2:] == (-(-39 // output_stride) + 1, -(-69 // output_stride) + 1)
    assert all(loss.isfinite() for loss in network(images, labels_for(images)).values())
    assert [tuple(value.shape) for value in network.eval()(images)] == [(3, 40, 70), (3, 33, 65)]


@heads
@mechanisms
def test_logits_do_not_depend_on_the_other_images(mechanism, head):
    network = randomise(small_segmenter(MECHANISMS[mechanism], **head)).eval()
    images = [picture(40, 33), picture(1, 1), picture(5, 3), picture(40, 33), picture(19, 80)]
    found = network(images)
    assert [tuple(value.shape) for value in found] == [(3, *image.shape[1:]) for image in images]
    for image, value in zip(images, found, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, network([image])[0], rtol=1e-4, atol=1e-5)


@heads
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_smallest_image_can_be_trained(norm, head):
    images = [picture(1, 1)]
    network = small_segmenter(MECHANISMS["1111"], norm=norm, backbone={"norm": norm}, **head)
    assert all(loss.isfinite() for loss in network(images, [torch.ones(1, 1, dtype=torch.uint8)]).values())


def pixel_losses(logits, labels):
    """Cross entropy of the pixels that count, in numpy: `[n]`."""
    logits = np.concatenate([value.detach().double().flatten(1).T.numpy() for value in logits])
    labels = np.concatenate([label.flatten().numpy() for label in labels])
    logits, labels = logits[labels != 255], labels[labels != 255]
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]


@pytest.mark.parametrize("ohem_threshold", [0.0, 0.4])
def test_losses_are_means_over_the_pixels_of_the_batch(ohem_threshold):
    network = small_segmenter(
        num_classes=4, dropout=0.0, norm="group", backbone={"norm": "group"}, auxiliary_weight=0.3,
        ohem_threshold=ohem_threshold, ohem_min_kept=500,
    )  # fmt: skip
    images = [picture(40, 30), picture(33, 57)]
    labels = labels_for(images, num_classes=4)
    found = network(images, labels)
    features = network.backbone(images, align_corners=True).maps
    expected = {}
    for name, logits in (
        ("loss_head", network.head(features)),
        ("loss_auxiliary", network.head.auxiliary(features["c4"])),
    ):
        logits = F.interpolate(logits, (41, 57), mode="bilinear", align_corners=True)
        expected[name] = pixel_losses((logits[0, :, :40, :30], logits[1, :, :33, :57]), labels)
    losses = np.sort(expected["loss_head"])[::-1]
    if ohem_threshold:
        count = max((np.exp(-losses) < ohem_threshold).sum(), 500)
        assert 500 < count < len(losses)
        losses = losses[:count]
    assert set(found) == set(expected)
    assert found["loss_head"].item() == pytest.approx(losses.mean(), rel=1e-5)
    assert found["loss_auxiliary"].item() == pytest.approx(0.3 * expected["loss_auxiliary"].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("threshold", "min_kept"), [(0.7, 1), (0.05, 100), (0.05, 1), (0.3, 300), (0.9, 10**6), (1e-9, 7)]
)
def test_hard_pixels_against_a_definition(threshold, min_kept):
    """Every pixel below the threshold; if they are too few, the hardest up to `min_kept`."""
    logits = 2 * torch.randn(2, 5, 15, 17)
    labels = torch.randint(5, (2, 15, 17), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.3] = 255
    losses = np.sort(pixel_losses(logits, labels))[::-1]
    count = max((np.exp(-losses) < threshold).sum(), min(min_kept, len(losses)))
    found = hard_cross_entropy(logits, labels, threshold, min_kept)
    assert found.item() == pytest.approx(losses[:count].mean(), rel=1e-5)


def test_hard_pixels_show_divergence():
    logits = torch.full((1, 2, 3, 3), torch.nan)
    assert hard_cross_entropy(logits, torch.zeros(1, 3, 3, dtype=torch.uint8), 0.7, 2).isnan()


@pytest.mark.parametrize("hard", [False, True])
def test_ignored_pixels_have_no_gradient(hard):
    def loss_of(logits, labels):
        return hard_cross_entropy(logits, labels, 0.9, 10**6) if hard else cross_entropy(logits, labels)

    labels = torch.randint(3, (1, 8, 9), dtype=torch.uint8)
    labels[0, :, 4:] = 255
    logits = torch.randn(1, 3, 8, 9, requires_grad=True)
    loss_of(logits, labels).backward()
    assert logits.grad[..., 4:].count_nonzero() == 0
    assert logits.grad[..., :4].count_nonzero() == 3 * 8 * 4
    logits.grad = None
    nothing = loss_of(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0
    assert logits.grad.count_nonzero() == 0


@heads
@mechanisms
@pytest.mark.parametrize("everything_ignored", [False, True])
def test_every_parameter_gets_a_gradient(mechanism, everything_ignored, head):
    network = small_segmenter(MECHANISMS[mechanism], ohem_threshold=0.7 * everything_ignored, **head)
    images = [picture(33, 49), picture(20, 41)]
    labels = labels_for(images)
    if everything_ignored:
        labels = [torch.full_like(label, 255) for label in labels]
    losses = network(images, labels)
    assert set(losses) == {"loss_head", "loss_auxiliary"}
    assert bool(losses["loss_head"] == 0) == everything_ignored
    sum(losses.values()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_maps_are_resized_in_float32_or_better():
    maps = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    exact = upsampled(maps, (5, 7))
    torch.testing.assert_close(exact, F.interpolate(maps, (5, 7), mode="bilinear", align_corners=True))
    assert not torch.equal(exact, exact.float().double()), "more digits than float32 has"
    assert upsampled(maps.bfloat16(), (5, 7)).dtype == torch.float32


@heads
def test_losses_and_logits_are_float32_under_autocast(head):
    network = small_segmenter(MECHANISMS["1111"], dropout=0.0, **head)
    images = [picture(41, 49)]
    labels = labels_for(images)
    with torch.autocast("cpu", torch.bfloat16):
        losses, (logits,) = network(images, labels), network.eval()(images)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert logits.dtype == torch.float32
    (exact,) = network(images)
    assert (logits - exact).norm() < 0.05 * exact.norm()
    for name, value in network.train()(images, labels).items():
        torch.testing.assert_close(losses[name], value, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"targets is required in training mode; call eval\(\) for results"),
        ([torch.zeros(4, 5, dtype=torch.uint8)], "labels has 1 entries for 2 images"),
        (
            [torch.zeros(4, 5, dtype=torch.uint8), torch.zeros(5, 4, dtype=torch.uint8)],
            r"labels\[1\] must be uint8 \[4, 6\], one label for each pixel.*got torch.uint8 \[5, 4\]",
        ),
        ([torch.zeros(4, 5), torch.zeros(4, 6)], r"labels\[0\] must be uint8 \[4, 5\].*got torch.float32 \[4, 5\]"),
        (
            [torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.uint8)],
            r"labels\[0\] must be.*got torch.uint8 \[3, 4, 5\]",
        ),
    ],
)
def test_training_refuses_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        small_segmenter()([picture(4, 5), picture(4, 6)], labels)


@pytest.mark.parametrize("value", [3, 4, 33, 254])
def test_training_refuses_unknown_labels(value):
    labels = [torch.full((4, 5), 255, dtype=torch.uint8), torch.full((6, 5), 2, dtype=torch.uint8)]
    labels[1][5, 3] = value
    with pytest.raises(
        ValueError,
        match=rf"labels\[1\]\[5, 3\] is {value}, but the network has the labels 0 to 2, and 255 for.*as many",
    ):
        small_segmenter()([picture(4, 5), picture(6, 5)], labels)


def test_as_many_classes_as_a_byte_holds():
    labels = [torch.tensor([[254, 255, 0]], dtype=torch.uint8)]
    assert small_segmenter(num_classes=255)([picture(1, 3)], labels)["loss_head"] > 0
    with pytest.raises(ValueError, match="num_classes must be at most 255, got 256: labels are bytes"):
        small_segmenter(num_classes=256)
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        small_segmenter(num_classes=0)


def test_forward_refuses():
    network = small_segmenter()
    label = torch.zeros(4, 4, dtype=torch.uint8)
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"images\[1\] must be RGB as uint8 \[3, H, W\].*got torch.float32"):
            network.train(mode)([picture(9, 9), torch.zeros(3, 4, 4)], [label, label] if mode else None)
        with pytest.raises(ValueError, match="images is empty"):
            network([], [] if mode else None)
    with pytest.raises(ValueError, match="targets was given in evaluation mode"):
        network([picture(4, 4)], [label])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_channels": 0}, "head_channels must be an integer of at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"auxiliary_weight": -0.1}, "auxiliary_weight must be a finite number of at least 0, got -0.1; set 0 for no"),
        ({"auxiliary_weight": float("inf")}, "auxiliary_weight must be a finite number"),
        ({"norm": "frozen"}, r"norm must be one of \['batch', 'sync', 'group'\], got 'frozen'"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"head": "fcn"}, r"head must be one of \['ccnet', 'pyramid'\], got 'fcn'"),
        ({"head": "pyramid"}, "output_stride=8 with head: pyramid, which joins maps.*set output_stride: 32"),
        ({"ohem_threshold": 1.0}, "ohem_threshold must be a probability of at least 0 and below 1, got 1.0; set 0 for"),
        ({"ohem_threshold": "0.7"}, "ohem_threshold must be a probability.*got '0.7'"),
        ({"ohem_min_kept": 0}, "ohem_min_kept must be an integer of at least 1, got 0"),
    ],
)
def test_spec_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SegmenterSpec(**fields)


def test_parts_must_fit():
    with pytest.raises(ValueError, match="head_channels=20 does not fit the attention: dim=20 cannot be divided"):
        small_segmenter(AttentionSpec(num_heads=8), head_channels=20)
    with pytest.raises(ValueError, match="output_stride=8 needs dilation, which the blocks of resnet18 do not have"):
        small_segmenter(backbone={"name": "resnet18"})


def test_spec_survives_as_plain_values():
    spec = SegmenterSpec(norm="group", ohem_threshold=0.7, output_stride=16)
    assert SegmenterSpec(**dataclasses.asdict(spec)) == spec


def test_class_weights_weigh_the_mean():
    """Beside the definition, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 5, 7), generator=generator, dtype=torch.uint8)
    labels[0, :2] = 255
    weights = torch.tensor([0.5, 1.0, 8.0], dtype=torch.float64)
    total = number = 0.0
    hard_total = hard_number = 0.0
    for index, row, column in itertools.product(range(2), range(5), range(7)):
        label = int(labels[index, row, column])
        if label == 255:
            continue
        probability = float(logits[index, :, row, column].softmax(0)[label])
        total -= float(weights[label]) * math.log(probability)
        number += float(weights[label])
        if probability < 0.4:
            hard_total -= float(weights[label]) * math.log(probability)
            hard_number += float(weights[label])
    assert 0 < hard_number < number
    assert float(cross_entropy(logits, labels, weights)) == pytest.approx(total / number, rel=1e-12)
    hard = hard_cross_entropy(logits, labels, threshold=0.4, min_kept=1, weights=weights)
    assert float(hard) == pytest.approx(hard_total / hard_number, rel=1e-12)
    nothing = torch.full_like(labels, 255)
    assert cross_entropy(logits, nothing, weights) == 0
    assert hard_cross_entropy(logits, nothing, 0.4, 1, weights) == 0


def test_class_weights_reach_both_losses():
    torch.manual_seed(0)
    images = [torch.randint(256, (3, 32, 40), dtype=torch.uint8)]
    labels = [torch.randint(2, (32, 40), dtype=torch.uint8)]
    network = small_segmenter(num_classes=2, dropout=0.0).train()
    plain = network(images, labels)
    weighted = small_segmenter(num_classes=2, dropout=0.0, class_weights=(1.0, 50.0)).train()
    weighted.load_state_dict(network.state_dict())
    only_ones = [torch.where(labels[0] == 1, 1, 255).to(torch.uint8)]
    of_ones = network(images, only_ones)
    for name, loss in weighted(images, labels).items():
        assert abs(loss - of_ones[name]) < 0.1 * abs(plain[name] - of_ones[name]) + 1e-6, name


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, float("nan")), (-1.0, 2.0), (True, 1.0)])
def test_class_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="class_weights must be finite numbers above 0"):
        SegmenterSpec(class_weights=weights)


def test_class_weights_of_another_number_of_classes():
    with pytest.raises(ValueError, match="class_weights has 2 entries for 3 classes; give one for each"):
        small_segmenter(num_classes=3, class_weights=(1.0, 2.0))
