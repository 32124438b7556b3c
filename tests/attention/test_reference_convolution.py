"""Convolutions written as attention (Eq. 3 and 4) against torch's, torchvision's, and numbers made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from lightning_attn.attention.reference import deformable_convolution, regular_convolution

GEOMETRIES = [
    {"stride": 1, "dilation": 1, "padding": 1},
    {"stride": 2, "dilation": 1, "padding": 1},
    {"stride": 1, "dilation": 2, "padding": 1},
    {"stride": 2, "dilation": 2, "padding": 3},
]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_regular_convolution_is_that_of_torch(geometry):
    x, weight, bias = draw(2, 3, 4, 5), draw(4, 3, 3, 3), draw(4)
    torch.testing.assert_close(regular_convolution(x, weight, bias, **geometry), F.conv2d(x, weight, bias, **geometry))
    x, weight = draw(2, 7, 3), draw(4, 3, 3)
    expected = F.conv1d(x.transpose(1, 2), weight, bias, **geometry).transpose(1, 2)
    torch.testing.assert_close(regular_convolution(x, weight, bias, **geometry), expected)


def test_causal_regular_convolution_pads_on_the_left():
    x, weight = draw(2, 6, 3), draw(4, 3, 3)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (4, 0)), weight, dilation=2).transpose(1, 2)
    torch.testing.assert_close(regular_convolution(x, weight, dilation=2, causal=True), expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_is_that_of_torchvision(geometry, modulated):
    x, weight, bias = draw(2, 3, 4, 5), draw(4, 3, 3, 3), draw(4)
    sizes = F.conv2d(x, weight, **geometry).shape[2:]
    offset = 2 * draw(2, 18, *sizes)
    mask = draw(2, 9, *sizes) if modulated else None
    expected = deform_conv2d(x, offset, weight, bias, mask=mask, **geometry)
    torch.testing.assert_close(deformable_convolution(x, offset, weight, bias, mask=mask, **geometry), expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_sentence_is_a_map_of_one_row(geometry):
    x, weight, bias = draw(2, 7, 3), draw(4, 3, 3), draw(4)
    length = F.conv1d(x.transpose(1, 2), weight, **geometry).shape[2]
    offset, mask = 2 * draw(2, length, 3), draw(2, length, 3)
    along_x = torch.stack((torch.zeros_like(offset), offset), dim=-1).flatten(2).transpose(1, 2)
    expected = deform_conv2d(
        x.transpose(1, 2)[:, :, None],
        along_x[:, :, None],
        weight[:, :, None],
        bias,
        mask=mask.transpose(1, 2)[:, :, None],
        stride=(1, geometry["stride"]),
        dilation=(1, geometry["dilation"]),
        padding=(0, geometry["padding"]),
    )[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(deformable_convolution(x, offset, weight, bias, mask=mask, **geometry), expected)


def test_offsets_between_tokens_computed_by_hand():
    # One channel, the taps weigh 100, 10 and 1 and read at -1, 0 and 1 from the query before they move.
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]], dtype=torch.float64)
    weight = torch.tensor([[[100.0, 10.0, 1.0]]], dtype=torch.float64)
    offset = torch.zeros(1, 4, 3, dtype=torch.float64)
    offset[0, 1] = torch.tensor([0.25, 1.5, 1.75])  # reads at 0.25, 2.5 and 3.75
    y = deformable_convolution(x, offset, weight, padding=1)
    expected = [
        0 * 100 + 1 * 10 + 2 * 1,
        (0.75 * 1 + 0.25 * 2) * 100 + (0.5 * 4 + 0.5 * 8) * 10 + 0.25 * 8 * 1,
        2 * 100 + 4 * 10 + 8 * 1,
        4 * 100 + 8 * 10 + 0 * 1,
    ]
    torch.testing.assert_close(y[0, :, 0], torch.tensor(expected, dtype=torch.float64))


def test_causal_form_drops_the_share_of_later_tokens_by_hand():
    # The taps start at -2, -1 and 0 from the query.
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]], dtype=torch.float64)
    weight = torch.tensor([[[100.0, 10.0, 1.0]]], dtype=torch.float64)
    offset = torch.zeros(1, 4, 3, dtype=torch.float64)
    offset[0, 2] = torch.tensor([1.5, 1.25, 1.0])  # reads at 1.5, 2.25 and 3, of which 3 is later than the query
    y = deformable_convolution(x, offset, weight, causal=True)
    expected = [1, 1 * 10 + 2, (0.5 * 2 + 0.5 * 4) * 100 + 0.75 * 4 * 10 + 0, 2 * 100 + 4 * 10 + 8]
    torch.testing.assert_close(y[0, :, 0], torch.tensor(expected, dtype=torch.float64))


def test_padding_is_not_among_the_keys():
    x, weight = draw(2, 3, 3, 4), draw(4, 3, 3, 3)
    offset = 2 * draw(2, 18, 3, 4)
    padded = torch.zeros(2, 3, 4, dtype=torch.bool)
    padded[1, :, 2:] = True
    padded[0, 2] = True
    y = deformable_convolution(x, offset, weight, padding=1, key_padding_mask=padded)
    expected = deform_conv2d(x * ~padded[:, None], offset, weight, padding=1)
    torch.testing.assert_close(y, expected)
