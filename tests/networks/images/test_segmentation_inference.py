"""Inference with tiles, mirror images and scales, on networks whose answers are known."""

import dataclasses
import itertools
import math

import pytest
import torch

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Segmenter
from lightning_attn.networks.images.segmentation_inference import (
    InferenceSpec,
    class_probabilities,
    segment,
    tile_spans,
)

MODES = {
    "whole": {},
    "whole flip": {"flip": True},
    "sliding": {"mode": "sliding", "tile": 16},
    "sliding flip": {"mode": "sliding", "tile": 11, "overlap": 0.5, "flip": True},
    "sliding without overlap": {"mode": "sliding", "tile": 16, "overlap": 0},
    "two scales": {"scales": (1.0, 2.0)},
    "all": {"mode": "sliding", "tile": 20, "flip": True, "scales": (0.5, 1.0, 1.5)},
}


class PixelNetwork:
    """Logits are a linear map of the colour of a pixel; remembers what it was given."""

    def __init__(self):
        # A class for each hue, and no two of them equal for a colour in whole numbers.
        self.weight = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2], [1, 1, -2], [-2, 1, 1]])
        self.weight += torch.tensor([2.0, 3, 5, 7, 11]).sqrt()[:, None] / 100
        self.seen = []

    def __call__(self, images):
        assert isinstance(images, list)
        assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in images)
        self.seen += [image.clone() for image in images]
        return [torch.einsum("kc,chw->khw", self.weight, image / 255) for image in images]


def picture(height, width):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "scales" not in MODES[mode]])
def test_all_modes_agree_where_only_the_pixel_matters(mode):
    network = PixelNetwork()
    images = [picture(33, 50), picture(7, 16), picture(40, 5), picture(1, 1)]
    found = segment(network, images, InferenceSpec(**MODES[mode]))
    for image, labels in zip(images, found, strict=True):
        assert labels.dtype == torch.uint8
        assert torch.equal(labels, network([image])[0].argmax(0).to(torch.uint8))


@pytest.mark.parametrize("mode", [mode for mode in MODES if "scales" in MODES[mode]])
def test_scales_agree_inside_areas_of_one_colour(mode):
    network = PixelNetwork()
    colours = picture(3, 4)
    image = colours.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :45, :61]  # no multiple of anything
    (found,) = segment(network, [image], InferenceSpec(**MODES[mode]))
    expected = network([image])[0].argmax(0).to(torch.uint8)
    assert found.shape == expected.shape
    row, column = (torch.arange(size) % 16 for size in found.shape)
    inside = ((row > 3) & (row < 12))[:, None] & ((column > 3) & (column < 12))
    assert torch.equal(found[inside], expected[inside])
    assert len(expected[inside].unique()) > 2


def test_probabilities_of_one_pass_are_the_softmax():
    network, image = PixelNetwork(), picture(20, 31)
    expected = network([image])[0].softmax(0)
    for mode in ({}, {"mode": "sliding", "tile": 9}, {"flip": True}):
        found = class_probabilities(network, image, InferenceSpec(**mode))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(0), torch.ones(20, 31))


def by_position(images):
    """Logits that depend on the place in the tile, and on nothing else."""
    return [
        torch.stack((torch.zeros(image.shape[1:]), torch.arange(image.shape[2]).expand(image.shape[1:]) * 0.1))
        for image in images
    ]


def test_flip_averages_probabilities():
    image = picture(4, 30)
    found = class_probabilities(by_position, image, InferenceSpec(flip=True))
    once = torch.sigmoid(0.1 * torch.arange(30.0))
    torch.testing.assert_close(found[1], ((once + once.flip(0)) / 2).expand(4, -1))
    torch.testing.assert_close(found.sum(0), torch.ones(4, 30))


@pytest.mark.parametrize("flip", [False, True])
def test_tiles_average_probabilities(flip):
    """Against a sum and a count of every column, from the tiles' places by hand."""
    once = torch.sigmoid(0.1 * torch.arange(10.0))
    once = (once + once.flip(0)) / 2 if flip else once
    total, count = torch.zeros(27), torch.zeros(27)
    for start in (0, 6, 12, 17):  # a step of 10 - ceil(10 / 3), and the last at the side
        total[start : start + 10] += once
        count[start : start + 10] += 1
    spec = InferenceSpec(mode="sliding", tile=10, flip=flip)
    found = class_probabilities(by_position, picture(13, 27), spec)
    torch.testing.assert_close(found[1], (total / count).expand(13, -1))


def test_scales_resize_there_and_back():
    seen = []

    def by_size(images):
        (image,) = images
        seen.append(tuple(image.shape))
        assert image.dtype == torch.uint8
        return [torch.tensor([1.0, image.shape[1] / 20]).view(2, 1, 1).expand(2, *image.shape[1:]).clone()]

    spec = InferenceSpec(scales=(0.5, 1.0, 1.75))
    found = class_probabilities(by_size, picture(21, 30), spec)
    assert seen == [(3, 10, 15), (3, 21, 30), (3, 37, 52)]  # Python rounds 10.5 to 10
    expected = sum(torch.sigmoid(torch.tensor(height / 20 - 1)) for height in (10, 21, 37)) / 3
    torch.testing.assert_close(found[1], expected.expand(21, 30))


def test_shrinking_does_not_alias():
    """Every fourth column is bright. A quarter of the width must show their mean, not the dark that lies between."""
    network = PixelNetwork()
    stripes = ((torch.arange(64) % 4 == 0) * 200).to(torch.uint8).expand(3, 64, 64)
    class_probabilities(network, stripes, InferenceSpec(scales=(0.25,)))
    (seen,) = network.seen
    assert seen.shape == (3, 16, 16)
    assert (seen[..., 2:-2].float() - 50).abs().max() <= 2


def test_tiny_images_survive_tiny_scales():
    (labels,) = segment(PixelNetwork(), [picture(1, 3)], InferenceSpec(scales=(0.1, 1.0)))
    assert labels.shape == (1, 3)


@pytest.mark.parametrize(
    ("tile", "overlap"),
    [*itertools.product((10, 11, 64, 769), (0, 0.1, 1 / 3, 0.5, 0.9)), (1, 0), (2, 0.5), (3, 1 / 3), (3, 0.1)],
)
def test_tiles_cover_everything(tile, overlap):
    sizes = [1, 2, 3, tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile, 2 * tile + 1, 3 * tile + 7, 10 * tile + 3]
    for size in {*sizes, 97, 500} - {0}:
        spans = tile_spans(size, tile, overlap)
        if size <= tile:
            assert spans == [slice(0, size)]
            continue
        assert spans[0].start == 0
        assert spans[-1].stop == size
        assert {span.stop - span.start for span in spans} == {tile}
        for left, right in itertools.pairwise(spans):
            assert left.start < right.start
            assert left.stop - right.start >= overlap * tile
        # One tile less could not do it.
        assert tile + (len(spans) - 2) * (tile - math.ceil(tile * overlap)) < size


def test_tiles_of_the_papers_images():
    assert tile_spans(1024, 769, 1 / 3) == [slice(0, 769), slice(255, 1024)]
    assert [span.start for span in tile_spans(2048, 769, 1 / 3)] == [0, 512, 1024, 1279]


def test_tiles_and_scales_look_at_what_they_should():
    network = PixelNetwork()
    image = picture(30, 20)
    segment(network, [image], InferenceSpec(mode="sliding", tile=24, overlap=0.25, flip=True))
    expected = [image[:, :24], image[:, :24].flip(-1), image[:, 6:], image[:, 6:].flip(-1)]
    assert len(network.seen) == 4
    assert all(torch.equal(found, tile) for found, tile in zip(network.seen, expected, strict=True))


def test_a_segmenter_in_every_mode():
    attention = AttentionSpec(terms="0011", num_heads=2)
    backbone = build_backbone(ResNetSpec("bottleneck14", width=8), attention, 8)
    network = Segmenter(4, backbone, attention, SegmenterSpec(head_channels=16))
    images = [picture(25, 31), picture(21, 17), picture(25, 31)]
    with pytest.raises(ValueError, match="call eval"):
        segment(network, images, InferenceSpec())
    network.eval()
    for mode in MODES.values():
        found = segment(network, images, InferenceSpec(**mode))
        assert [tuple(labels.shape) for labels in found] == [(25, 31), (21, 17), (25, 31)]
        assert all(labels.dtype == torch.uint8 and labels.max() < 4 and not labels.requires_grad for labels in found)
    with torch.inference_mode():
        whole = segment(network, images, InferenceSpec(flip=True))
    for image, labels in zip(images, whole, strict=True):
        (there,), (back,) = network([image]), network([image.flip(-1)])
        assert torch.equal(labels, (there.softmax(0) + back.softmax(0).flip(-1)).argmax(0).to(torch.uint8))


def test_no_images():
    for mode in MODES.values():
        assert segment(PixelNetwork(), [], InferenceSpec(**mode)) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "tiles"}, r"mode must be one of \['whole', 'sliding'\], got 'tiles'"),
        ({"tile": 0}, "tile must be an integer of at least 1, got 0"),
        ({"overlap": 1}, "overlap must be at least 0 and below 1, got 1; CCNet's is 1/3"),
        ({"overlap": "1/3"}, "overlap must be at least 0 and below 1, got '1/3'"),
        ({"tile": 10, "overlap": 0.95}, "overlap=0.95 leaves no step from one tile of 10 pixels to the next"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"scales": ()}, r"scales must be a list of positive numbers such as .*got \(\)"),
        ({"scales": (1.0, 0)}, r"scales must be a list of positive numbers.*got \(1.0, 0\)"),
        ({"scales": 1.0}, "scales must be a list of positive numbers.*got 1.0"),
        ({"scales": "1.0"}, "scales must be a list of positive numbers.*got '1.0'"),
    ],
)
def test_spec_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        InferenceSpec(**fields)


def test_spec_survives_as_plain_values():
    spec = InferenceSpec("sliding", 513, 0.5, True, (0.5, 1.0))
    assert InferenceSpec(**dataclasses.asdict(spec)) == spec
