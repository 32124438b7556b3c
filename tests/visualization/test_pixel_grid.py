"""Maps are drawn where the network's receptive fields are, whatever the size of the image and its padding."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Detector, Segmenter
from lightning_attn.visualization import PixelGrid, draw_term_maps, record_image
from lightning_attn.visualization.images import image_attention

GREY = torch.tensor([124, 116, 104], dtype=torch.uint8)  # about the mean, so that padding looks the same


def build(kind, terms="0010", kv_stride=1):
    torch.manual_seed(0)
    attention = AttentionSpec(terms=terms, num_heads=2, kv_stride=kv_stride)
    spec = ResNetSpec(name="bottleneck14", width=8, norm="batch")
    if kind == "detector":
        network = Detector(3, build_backbone(spec, attention), DetectorSpec(fpn_channels=16, fc_dim=16))
    else:
        stride = 32 if kind == "pyramid" else 8
        head = {"head": "pyramid", "output_stride": 32} if kind == "pyramid" else {}
        backbone = build_backbone(spec, attention, output_stride=stride)
        network = Segmenter(3, backbone, attention, SegmenterSpec(head_channels=32, **head))
    return network.eval()


def listening_to_white(network):
    """Weights with which each attention, by E3 alone, looks at what is white: symmetric averages, passed on."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                size = module.kernel_size[0]
                ramp = 1.0 + torch.minimum(torch.arange(size), torch.arange(size).flip(0))  # greatest in the middle
                kernel = ramp[:, None] * ramp
                module.weight.copy_((kernel / kernel.sum()).expand_as(module.weight) / module.weight.shape[1])
    return network


def drawn_peak(network, image, layer_end, kv_stride=1):
    """Where a figure has the greatest weight, in pixels of its picture, and the half width of its cell."""
    recorded = record_image(network, image)
    layer = next(name for name in recorded.inputs if name.endswith(layer_end))
    attention, inputs = recorded.inputs[layer]
    # An energy that grows with the content of a key.
    with torch.no_grad():
        attention.key_proj.weight.fill_(1.0)
        attention.key_bias.fill_(3.0 / max(1e-9, float(inputs["query"].amax()) * attention.key_proj.weight[0].numel()))
    maps = recorded.maps(layer, (0, 0))
    grid = recorded.grid(layer)
    panel = draw_term_maps(maps, image, grid=grid).axes[1]
    picture, values = panel.images[0], panel.images[-1]
    drawn = np.ma.filled(values.get_array().astype(float), np.nan)
    row, column = np.unravel_index(np.nanargmax(drawn), drawn.shape)
    left, right, bottom, top = values.get_extent()
    cell = (right - left) / drawn.shape[1]
    x, y = left + (column + 0.5) * cell, top + (row + 0.5) * (bottom - top) / drawn.shape[0]
    # From the axes' units to pixels of the picture, by the picture's own extent.
    left, right, bottom, top = picture.get_extent()
    height, width = picture.get_array().shape[:2]
    assert (height, width) == tuple(image.shape[1:])
    assert panel.get_xlim() == pytest.approx((left, right))
    assert panel.get_ylim() == pytest.approx((bottom, top))
    scale = width / (right - left)
    return (y - top) * height / (bottom - top) - 0.5, (x - left) * scale - 0.5, cell * scale / 2


@pytest.mark.parametrize("size", [(300, 451), (96, 192), (131, 64)])
@pytest.mark.parametrize(
    ("kind", "layer_end", "kv_stride", "stride"),
    [
        *[("detector", "layer3.0", 1, 16), ("detector", "layer4.0", 1, 32), ("ccnet", "layer4.0", 1, 8)],
        *[("ccnet", "layer3.0", 2, 16), ("pyramid", "layer4.0", 1, 32)],
    ],
)
def test_the_greatest_weight_is_drawn_where_the_image_is_white(kind, layer_end, kv_stride, stride, size):
    """At both ends of both axes: at one of them, an image stretched over the map is half a cell off or more."""
    network = listening_to_white(build(kind, kv_stride=kv_stride))
    for down, right in [(0.08, 0.08), (0.5, 0.3), (0.9, 0.92)]:
        # Not beyond the last key that is centred on the image: what is nearest to a key of the padding has no other.
        y, x = (
            min(int(part * length), (length - 1) // stride * stride)
            for part, length in zip((down, right), size, strict=True)
        )
        image = GREY[:, None, None].repeat(1, *size)
        image[:, max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = 255
        drawn_y, drawn_x, half = drawn_peak(network, image, layer_end, kv_stride)
        # Half a cell for the choice of a position, and a little for what the white square's width adds.
        assert abs(drawn_y - y) <= half + 2, (drawn_y, y)
        assert abs(drawn_x - x) <= half + 2, (drawn_x, x)


@pytest.mark.parametrize(("kind", "stride"), [("detector", 32), ("detector", 16), ("ccnet", 8), ("pyramid", 32)])
def test_a_position_is_centred_on_its_pixel(kind, stride):
    """By the derivatives of the network: those of a position are symmetric around the pixel that it is centred on."""
    network = listening_to_white(build(kind, "1000"))
    image = GREY[:, None, None].repeat(1, 300, 451)
    recorded = record_image(network, image)
    layer = {16: "backbone.body.layer3.0", 32: "backbone.body.layer4.0", 8: "backbone.body.layer4.0"}[stride]
    grid = recorded.grid(layer)
    assert grid.stride == stride
    body = network.backbone.body
    body.maxpool = nn.AvgPool2d(3, stride=2, padding=1)  # of equal pixels the maximum would take the first
    normalized = torch.zeros(1, 3, *recorded.batch_size, requires_grad=True)
    found = []
    stage = body.layer4 if layer.endswith("layer4.0") else body.layer3
    handle = stage[0].attention.register_forward_pre_hook(lambda module, arguments: found.append(arguments[0]))
    body(normalized + 0.1)
    handle.remove()
    position = (4, 5) if stride == 32 else (8, 12)
    (gradient,) = torch.autograd.grad(found[0][0, :, *position].sum(), normalized)
    weights = gradient[0].abs().sum(0)
    rows, columns = torch.arange(weights.shape[0]).float(), torch.arange(weights.shape[1]).float()
    centre = (weights.sum(1) @ rows / weights.sum()).item(), (weights.sum(0) @ columns / weights.sum()).item()
    # A field that the border cuts is not symmetric; these are not cut, or hardly.
    assert centre == pytest.approx(grid.pixel_of(position), abs=0.05 * stride)


def test_grids_of_batches():
    detector = PixelGrid.of_batch((300, 451), (320, 480), (10, 15))
    segmenter = PixelGrid.of_batch((300, 451), (305, 457), (39, 58))
    assert (detector.stride, segmenter.stride) == (32, 8)
    assert detector.inside == (10, 15)
    assert segmenter.inside == (38, 57), "the last row and column are centred on pixels 304 and 456: padding"
    assert segmenter.keys_inside(2) == (19, 29)
    assert detector.position_of(0, 0) == (0, 0)
    assert detector.position_of(15, 17) == (0, 1)
    assert detector.position_of(299, 450) == (9, 14)
    assert segmenter.position_of(299, 450) == (37, 56)
    assert segmenter.pixel_of((37, 56)) == (296, 448)
    left, top, width, height = detector.key_box()
    assert (left * 451, top * 300, width * 451, height * 300) == pytest.approx((-15.5, -15.5, 480, 320))
    one_row = PixelGrid.of_batch((1, 40), (32, 64), (1, 2))
    assert one_row.stride == 32
    assert one_row.inside == (1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PixelGrid.of_batch((300, 451), (320, 480), (10, 14)), "10 × 14 positions is of no stride 1, 2, 4"),
        (lambda: PixelGrid(8, (300, 451), (10, 15)), "image of 300 × 451 pixels is larger than a map of 10 × 15"),
        (lambda: PixelGrid(0, (3, 4), (1, 1)), "at least 1"),
        (lambda: PixelGrid(8, (300, 451), (39, 58)).position_of(300, 0), r"\(300, 0\) is no pixel of an image of 300"),
    ],
)
def test_impossible_grids(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_image_must_be_that_of_its_grid():
    network = build("detector", "0011")
    image = GREY[:, None, None].repeat(1, 100, 120)
    recorded = record_image(network, image)
    layer = [*recorded.inputs][-1]
    with pytest.raises(ValueError, match=r"image of 128 × 128 pixels and map of .* are not those of PixelGrid"):
        draw_term_maps(recorded.maps(layer, (0, 0)), np.zeros((128, 128)), grid=recorded.grid(layer))


@pytest.mark.parametrize("kind", ["detector", "ccnet"])
def test_the_example_of_a_test_has_its_place_on_the_picture(kind):
    network = build(kind, "0011")
    image = torch.randint(0, 255, (3, 300, 451), dtype=torch.uint8)
    example, picture = image_attention(network, image)
    assert picture.shape[0] / picture.shape[1] == pytest.approx(300 / 451, rel=0.01)
    stride = 16 if kind == "detector" else 8
    rows, columns = example["size"]
    left, top, width, height = example["key_box"]
    # Key i's square is centred on the middle of pixel i s.
    for key in (0, columns - 1):
        assert (left + (key + 0.5) * width / columns) * 451 == pytest.approx(key * stride + 0.5, abs=0.01)
    for key in (0, rows - 1):
        assert (top + (key + 0.5) * height / rows) * 300 == pytest.approx(key * stride + 0.5, abs=0.01)
    row, column = example["query"]
    assert abs(row * stride - 149.5) <= stride / 2
    assert abs(column * stride - 225) <= stride / 2
    assert example["query_at"] == pytest.approx([(column * stride + 0.5) / 451, (row * stride + 0.5) / 300], abs=1e-4)
    weights = np.array(example["weights"]["whole"], dtype=float)
    shown = np.isfinite(weights)
    outside = np.add.outer(np.arange(rows) * stride > 299, np.arange(columns) * stride > 450)
    assert (shown == ~outside).all()
    assert outside.any(), "a test without padding would say nothing"
    assert np.nansum(weights) / weights.size + example["padding"] == pytest.approx(1, abs=1e-3)
