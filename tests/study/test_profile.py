"""Measured multiply-adds against counts by hand."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_attn.attention import AttentionSpec, TransformerAttention, build_attention
from lightning_attn.attention.flops import paper_count
from lightning_attn.study.profile import attention_costs, count_multiply_adds


def map_of(channels, height, width):
    return torch.randn(2, channels, height, width)


def test_a_linear_layer_by_hand_forward_and_backward():
    layer, x = nn.Linear(4, 5), torch.randn(2, 3, 4)
    count = count_multiply_adds(layer, x)
    assert count.total == 6 * 4 * 5
    assert count.by_operator == {"aten.addmm": 120}
    assert count_multiply_adds(layer, x, backward=True).total == 2 * 120  # and the gradient of the weight
    assert count_multiply_adds(layer, x.requires_grad_(), backward=True).total == 3 * 120  # and of the input


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 2 * 6 * 4 * 9 * 35),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), 2 * 6 * 2 * 9 * 35),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), 2 * 4 * 9 * 35),
        (nn.Conv2d(4, 6, 3, stride=2), 2 * 6 * 4 * 9 * 6),
        (nn.ConvTranspose2d(4, 6, 3), 2 * 6 * 4 * 9 * 35),
    ],
)
def test_a_convolution_by_hand_grouped_or_not(layer, expected):
    x = map_of(4, 5, 7).requires_grad_()
    assert count_multiply_adds(layer, x).total == expected
    assert count_multiply_adds(layer, x, backward=True).total == 3 * expected


def test_fused_attention_is_not_counted_as_nothing():
    query, key = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 10, 4)
    attend = nn.functional.scaled_dot_product_attention
    product = 2 * 3 * 6 * 10 * 4
    count = count_multiply_adds(attend, query, key, key)
    assert count.total == 2 * product
    assert "aten._scaled_dot_product_flash_attention_for_cpu" in count.by_operator  # the operator that this is about
    count = count_multiply_adds(attend, query.requires_grad_(), key, key, backward=True)
    assert count.total == (2 + 5) * product


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_by_hand(modulated):
    x, offset, weight = map_of(4, 5, 7), torch.zeros(2, 18, 5, 7), torch.randn(6, 2, 3, 3)
    mask = torch.ones(2, 9, 5, 7) if modulated else None
    convolution, samples = 2 * 6 * 2 * 9 * 35, 2 * 4 * 9 * 35

    def run(x, offset, weight):
        return torchvision.ops.deform_conv2d(x, offset, weight, padding=1, mask=mask)

    assert count_multiply_adds(run, x, offset, weight).total == convolution + samples * (5 if modulated else 4)
    count = count_multiply_adds(run, x, offset, weight.requires_grad_(), backward=True)
    assert count.total == 3 * convolution + samples * (5 + 23 if modulated else 4 + 16)


def test_bilinear_sampling_by_hand():
    x, grid = map_of(4, 5, 7).requires_grad_(), torch.zeros(2, 3, 6, 2)
    samples = 2 * 4 * 3 * 6

    def run(x, grid, mode="bilinear"):
        return nn.functional.grid_sample(x, grid, mode=mode, align_corners=True)

    assert count_multiply_adds(run, x, grid).total == 4 * samples
    assert count_multiply_adds(run, x, grid, backward=True).total == (4 + 4) * samples
    assert count_multiply_adds(run, x, grid.requires_grad_(), backward=True).total == (4 + 4 + 8) * samples
    assert count_multiply_adds(run, x, grid, mode="nearest", backward=True).total == 0


def test_weighted_sums_of_rows_by_hand():
    rows, weights = torch.randn(10, 3, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    indices, products = torch.randint(0, 10, (2, 4)), 2 * 4 * 3

    def run(rows, weights, padding_idx=None):
        return nn.functional.embedding_bag(
            indices, rows, mode="sum", per_sample_weights=weights, padding_idx=padding_idx
        )

    for padding_idx in (None, 0):
        assert count_multiply_adds(run, rows, weights, padding_idx).total == products
        assert count_multiply_adds(run, rows, weights, padding_idx, backward=True).total == 3 * products
        assert count_multiply_adds(run, rows, None, padding_idx, backward=True).total == 0


def test_products_written_in_place_or_into_a_buffer_count():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    for run in (
        lambda: torch.matmul(a, b),
        lambda: torch.matmul(a, b, out=torch.empty(2, 3, 5)),
        lambda: torch.bmm(a, b, out=torch.empty(2, 3, 5)),
        lambda: torch.baddbmm(torch.zeros(2, 3, 5), a, b, out=torch.empty(2, 3, 5)),
        lambda: torch.zeros(2, 3, 5).baddbmm_(a, b),
        lambda: torch.zeros(3, 5).addbmm_(a, b),
        lambda: torch.einsum("bmk,bkn->nbm", a, b),
        lambda: torch.stack([torch.mm(a[i], b[i]) for i in range(2)]),
        lambda: torch.stack([torch.zeros(3, 5).addmm_(a[i], b[i]) for i in range(2)]),
        lambda: torch.stack([a[i] @ b[i, :, j] for i in range(2) for j in range(5)]),
        lambda: torch.stack([a[i, k] @ b[i, :, j] for i in range(2) for j in range(5) for k in range(3)]),
        lambda: (a[..., None] * b[:, None]).sum(2),
        lambda: torch.addcmul(torch.zeros(2, 3, 4, 5), a[..., None], b[:, None]).sum(2),
        lambda: torch.zeros(2, 3, 4, 5).addcmul_(a[..., None], b[:, None]).sum(2),
    ):
        assert count_multiply_adds(run).total == 2 * 3 * 4 * 5


def test_indices_are_not_counted_and_what_has_no_formula_is_listed():
    count = count_multiply_adds(lambda x: (torch.arange(6) * 3, x.view(3, 2).t().exp() + 1), torch.randn(6))
    assert count.total == 0
    assert count.uncounted == {"aten.exp": 6, "aten.add": 6}


@torch.library.custom_op("lightning_attn_tests::double_product", mutates_args=())
def double_product(a: Tensor, b: Tensor, times: int = 2) -> Tensor:
    """An operator written in Python, which torch's counter does not look into."""
    return times * torch.matmul(a, b)


double_product.register_autograd(
    lambda ctx, grad: (double_product(grad, ctx.saved_tensors[0].t().contiguous()), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


def test_an_operator_written_in_python_is_looked_into_forward_and_backward():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    count = count_multiply_adds(double_product, a, b)
    assert count.by_operator == {"aten.mm": 60, "aten.mul": 15}
    count = count_multiply_adds(double_product, a, b, backward=True)
    assert count.by_operator == {"aten.mm": 60 + 60, "aten.mul": 15 + 12}


def test_the_parts_of_submodules_add_up_and_gradients_are_left_alone():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 2)))
    count = count_multiply_adds(module, torch.randn(3, 4), backward=True)
    assert count.total == 2 * 3 * 32 + 3 * 3 * 16
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.is_grad_enabled()


def test_a_backward_pass_without_gradients_is_refused():
    with pytest.raises(ValueError, match=r"backward=True.*requires_grad=True.*leave backward out"):
        count_multiply_adds(nn.ReLU(), torch.randn(3), backward=True)


def count(terms, height, width, dim=16, **settings):
    attention = TransformerAttention(dim, num_heads=2, terms=terms, ndim=2, **settings).eval()
    return count_multiply_adds(attention, torch.randn(1, dim, height, width)).total


def test_0010_projects_neither_keys_nor_values_nor_every_output():
    """The energies and the pooling of N keys by M heads, and one projection of each pooled vector."""
    heads, dim, keys = 2, 16, 24 * 32
    small, large = count("0010", 24, 32), count("0010", 48, 64)
    once = 3 * dim**2  # the keys' saliency, the pooled values, and the output
    assert small == pytest.approx(2 * heads * dim * keys + once, rel=0.02)
    assert small < 0.1 * paper_count(AttentionSpec(terms="0010"), dim, (24, 32)).total
    assert large / small == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("terms", ["0001", "0011"])
def test_attention_without_a_query_never_costs_the_square_of_the_map(terms):
    spec = AttentionSpec(terms=terms)
    assert count(terms, 32, 32) / count(terms, 16, 16) < 8.5
    assert count(terms, 32, 32) < 0.5 * paper_count(spec, 16, (32, 32)).total


@pytest.mark.parametrize("terms", ["1000", "1111"])
def test_attention_to_key_content_costs_at_least_its_two_products(terms):
    assert count(terms, 8, 16) > 2 * (8 * 16) ** 2 * 16


@pytest.mark.parametrize("terms", ["1000", "0100", "1111"])
def test_a_window_makes_the_measured_work_nearly_linear(terms):
    # Twice as many queries. Position energies are made for all rows and columns of keys, N (H + W) of them.
    assert count(terms, 96, 16, window=5) / count(terms, 48, 16, window=5) < 2.6
    assert count(terms, 96, 16) / count(terms, 48, 16) > 3.2


def test_the_table_of_costs():
    specs = [AttentionSpec(terms="0010", num_heads=2), AttentionSpec(mechanism="none")]
    row, without = attention_costs(specs, 8, (4, 6))
    module = build_attention(specs[0], 8, 2, "head")
    assert row.spec is specs[0]
    assert row.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert row.multiply_adds == count_multiply_adds(module, torch.randn(1, 8, 4, 6)).total > 0
    assert row.paper_multiply_adds == paper_count(specs[0], 8, (4, 6)).total
    assert (without.parameters, without.multiply_adds, without.paper_multiply_adds) == (0, 0, 0)
    (causal,) = attention_costs([AttentionSpec(num_heads=2)], 8, (5,), role="causal")
    assert causal.multiply_adds > 0


def test_work_on_several_threads_is_counted():
    before = torch.get_num_threads()
    attention = TransformerAttention(16, 2, "1111", ndim=2)
    x = torch.randn(1, 16, 40, 40)
    try:
        torch.set_num_threads(1)
        alone = count_multiply_adds(attention, x, backward=True)
        torch.set_num_threads(2)
        together = count_multiply_adds(attention, x, backward=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert together.total == alone.total > 7 * 1600**2 * 16
