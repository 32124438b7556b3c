"""Dynamic convolution of the definition against numbers made by hand."""

import math

import pytest
import torch

from lightning_attn.attention.reference import DynamicParameters, dynamic_convolution


def parameters(dim: int, kernel_weight: torch.Tensor, **changes: torch.Tensor) -> DynamicParameters:
    """The value of the gated linear unit is half its input, since the gate is sigmoid(0); W is the identity."""
    identity = torch.eye(dim, dtype=torch.float64)
    settings = {
        "input_weight": torch.cat((identity, torch.zeros_like(identity))),
        "input_bias": torch.zeros(2 * dim, dtype=torch.float64),
        "kernel_weight": kernel_weight.double(),
        "out_weight": identity,
        "out_bias": torch.zeros(dim, dtype=torch.float64),
    }
    return DynamicParameters(**(settings | changes))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_two_tokens_computed_by_hand():
    # One feature, one group, three taps. Value 2 x + 0.1, gate sigmoid(-x + 0.2), W = 3, bias 10.
    a, b = 0.7, -0.4
    d = (0.5, -1.5, 2.0)
    x_a, x_b = ((2 * x + 0.1) * sigmoid(-x + 0.2) for x in (a, b))

    def kernel(x_q: float) -> list[float]:
        exponentials = [math.exp(d_j * x_q) for d_j in d]
        return [exponential / sum(exponentials) for exponential in exponentials]

    settings = parameters(
        1,
        torch.tensor([[d_j] for d_j in d]),
        input_weight=torch.tensor([[2.0], [-1.0]], dtype=torch.float64),
        input_bias=torch.tensor([0.1, 0.2], dtype=torch.float64),
        out_weight=torch.tensor([[3.0]], dtype=torch.float64),
        out_bias=torch.tensor([10.0], dtype=torch.float64),
    )
    x = torch.tensor([[[a], [b]]], dtype=torch.float64)

    def expect(outputs: list[float], **options: object) -> None:
        y = dynamic_convolution(x, settings, groups=1, kernel_size=3, **options)
        torch.testing.assert_close(y, torch.tensor(outputs, dtype=torch.float64).view(1, 2, 1))

    # The tap before the first token and the one after the second read zero; the kernel is not normalised without them.
    k_a, k_b = kernel(x_a), kernel(x_b)
    expect([3 * (k_a[1] * x_a + k_a[2] * x_b) + 10, 3 * (k_b[0] * x_a + k_b[1] * x_b) + 10])
    expect([3 * k_a[2] * x_a + 10, 3 * (k_b[1] * x_a + k_b[2] * x_b) + 10], causal=True)
    padded = torch.tensor([[False, True]])
    expect([3 * k_a[1] * x_a + 10, 3 * k_b[0] * x_a + 10], key_padding_mask=padded)


def one_hot_kernels(taps: list[int], count: int, dim: int) -> torch.Tensor:
    """Weights with which a group picks one tap wherever the first feature is 2 (1 after the gate): exp(50) to 1."""
    weight = torch.zeros(len(taps) * count, dim)
    for group, tap in enumerate(taps):
        weight[group * count + tap, 0] = 50.0
    return weight


@pytest.mark.parametrize(("tap", "row", "column"), [(0, -1, -1), (1, -1, 0), (3, 0, -1), (5, 0, 1), (8, 1, 1)])
def test_taps_of_a_map_go_row_by_row(tap, row, column):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    x[:, 0] = 2.0
    y = dynamic_convolution(x, parameters(2, one_hot_kernels([tap], 9, 2)), groups=1, kernel_size=3)
    for i in range(1, 3):
        for j in range(1, 4):
            torch.testing.assert_close(y[0, 1, i, j], x[0, 1, i + row, j + column] / 2)


def test_each_group_of_neighbouring_channels_has_a_kernel_of_its_own():
    # Six channels in three groups: two take the token before, two the token itself, two the token after.
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    x[..., 0] = 2.0
    y = dynamic_convolution(x, parameters(6, one_hot_kernels([0, 1, 2], 3, 6)), groups=3, kernel_size=3)
    for channel, shift in enumerate((-1, -1, 0, 0, 1, 1)):
        torch.testing.assert_close(y[0, 1:4, channel], x[0, 1 + shift : 4 + shift, channel] / 2)
