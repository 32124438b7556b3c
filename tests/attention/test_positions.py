import math

import pytest
import torch

from lightning_attn.attention import reference
from lightning_attn.attention.positions import relative_encoding


@pytest.mark.parametrize("dim", [2, 8, 64])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_equals_the_definition_one_offset_at_a_time(dim, dtype):
    offsets = torch.tensor([-1024, -300, -7, -1, 0, 1, 2, 50, 257, 999], dtype=dtype)
    encoding = relative_encoding(offsets, dim)
    assert encoding.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.stack([reference.relative_encoding((int(o),), dim) for o in offsets])
    # In float32 an angle of a thousand is known to a few 1e-5.
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(encoding.double(), expected, rtol=0, atol=tolerance)


def test_sine_before_cosine_and_the_shortest_wavelength_first():
    encoding = relative_encoding(torch.tensor(3.0, dtype=torch.float64), 4)
    slow = 3 / 1000**0.5
    expected = torch.tensor([math.sin(3), math.sin(slow), math.cos(3), math.cos(slow)], dtype=torch.float64)
    torch.testing.assert_close(encoding, expected)


def test_an_offset_and_its_negative_differ_in_the_sines_only():
    ahead, behind = relative_encoding(torch.tensor([5, -5]), 8)
    assert torch.equal(ahead[:4], -behind[:4])
    assert torch.equal(ahead[4:], behind[4:])
    assert torch.equal(relative_encoding(torch.tensor([0]), 4), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_keeps_the_shape_of_the_offsets():
    assert relative_encoding(torch.zeros(2, 3, 5), 6).shape == (2, 3, 5, 6)
    assert relative_encoding(torch.zeros(0), 6).shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stays_in_float32_under_autocast(dtype):
    offsets = torch.arange(-700, 700)
    expected = relative_encoding(offsets, 16)
    with torch.autocast("cpu", dtype):
        encoding = relative_encoding(offsets, 16)
    assert encoding.dtype == torch.float32
    assert torch.equal(encoding, expected)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"dim .*must be even.*got 7"):
        relative_encoding(torch.zeros(3), 7)
