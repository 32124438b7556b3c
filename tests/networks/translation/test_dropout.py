import pytest
import torch

from lightning_attn.networks.translation.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_share_and_expectation(p):
    x = torch.ones(1000, 1001, dtype=torch.float64)  # a number of elements that no word of 8 bytes divides
    y = Dropout(p)(x)
    used = round(256 * p) / 256
    zeros = (y == 0).double()
    assert abs(zeros.mean() - used) < 4 * (used * (1 - used) / x.numel()) ** 0.5
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - used)])
    # Every byte of a word is as random as the others, its sign bit included.
    by_byte = zeros.flatten()[: 8 * (x.numel() // 8)].view(-1, 8).mean(dim=0)
    assert (by_byte - used).abs().max() < 5 * (used * (1 - used) / (x.numel() / 8)) ** 0.5


def test_gradient_goes_through_what_was_kept():
    x = torch.randn(50, 50, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


def test_off_in_evaluation_and_for_zero():
    x = torch.randn(10, 10)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()


def test_seed_decides():
    x = torch.ones(100, 10)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(Dropout(0.5)(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
