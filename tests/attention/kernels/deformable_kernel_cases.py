"""Deformable convolution by our kernels against the gather and the definition, both in float64.

`test_deformable_kernel.py` runs this file, since Triton decides when it is imported whether it interprets kernels.
"""

import math
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_attn.attention.deformable import DeformableConv, deformable_conv
from lightning_attn.attention.kernels import deformable as kernels

DEVICE = "cpu" if kernels.RUNS_ANYWHERE else "cuda"
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SETTINGS = [
    {"channels": 5, "out": 3},
    {"stride": (1, 2), "padding": (0, 3), "dilation": (2, 1), "size": (5, 4)},
    {"kernel_size": (2, 4)},
    {"groups": 3, "offset_groups": 2},
]
MORE_SETTINGS = [
    {},
    {"stride": 2, "padding": 0},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"offset_groups": 3},
    {"kernel_size": (1, 3), "padding": (2, 0), "groups": 6, "offset_groups": 6},
]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_()


def draw_inputs(
    dtype, modulated, channels=6, out=6, groups=1, offset_groups=1, kernel_size=(3, 3), size=(2, 3), **rest
):
    """x, offset, weight, bias and mask, and the geometry."""
    geometry = {"padding": None} | rest
    x, weight = draw(2, channels, *size, dtype=dtype), draw(out, channels // groups, *kernel_size, dtype=dtype)
    module = DeformableConv(channels, out, kernel_size, groups=groups, offset_groups=offset_groups, **geometry)
    *_, height, width = module.offset(x.detach().cpu().float()).shape
    taps = offset_groups * math.prod(kernel_size)
    position = torch.float64 if dtype == torch.float64 else torch.float32
    offset = (2 * torch.randn(2, 2 * taps, height, width)).to(DEVICE, position).requires_grad_()
    mask = draw(2, taps, height, width, dtype=position) if modulated else None
    return [x, offset, weight, draw(out, dtype=dtype), mask], geometry


def compute(inputs, algorithm, **geometry):
    x, offset, weight, bias, mask = inputs
    return deformable_conv(x, offset, weight, bias, mask=mask, algorithm=algorithm, **geometry)


def in_float64(inputs):
    return [None if t is None else t.detach().cpu().double().requires_grad_() for t in inputs]


def assert_same(actual, expected, tolerance) -> None:
    """Equal up to a fraction of the largest value."""
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.detach().cpu().double(), expected, rtol=0, atol=tolerance * scale)


def compare(inputs, geometry, algorithm="gather") -> None:
    """Outputs and all gradients against another algorithm in float64."""
    dtype = inputs[0].dtype
    copies = in_float64(inputs)
    y, expected = compute(inputs, "triton", **geometry), compute(copies, algorithm, **geometry)
    assert y.dtype == dtype
    assert_same(y, expected.detach(), TOLERANCES[dtype])
    cotangent = torch.randn(expected.shape).to(dtype)
    leaves = [[t for t in tensors if t is not None] for tensors in (inputs, copies)]
    gradients = torch.autograd.grad(y, leaves[0], cotangent.to(DEVICE))
    references = torch.autograd.grad(expected, leaves[1], cotangent.double())
    for gradient, reference, leaf in zip(gradients, references, leaves[0], strict=True):
        assert gradient.dtype == leaf.dtype
        assert_same(gradient, reference, TOLERANCES[dtype])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_numbers_and_gradients_are_those_of_the_gather(settings):
    compare(*draw_inputs(torch.float64, True, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(dtype):
    compare(*draw_inputs(dtype, False, channels=5, out=3, stride=2, size=(3, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS + MORE_SETTINGS, ids=str)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_everything_in_every_dtype(settings, modulated, dtype):
    compare(*draw_inputs(dtype, modulated, **{"size": (5, 7)} | settings))


def test_numbers_and_gradients_are_those_of_the_definition():
    compare(*draw_inputs(torch.float64, True, channels=3, out=2, padding=1), algorithm="reference")


@pytest.mark.skipif(kernels.RUNS_ANYWHERE, reason="Triton's interpreter computes bfloat16 wrongly")
@pytest.mark.parametrize("settings", [{}, {"channels": 256, "out": 64, "size": (25, 42)}], ids=str)
def test_bfloat16(settings):
    compare(*draw_inputs(torch.bfloat16, True, **settings))


@pytest.mark.parametrize(("channels", "size"), [(3, (5, 14)), (150, (3, 7))])
def test_more_channels_and_queries_than_a_block_has(channels, size):
    compare(*draw_inputs(torch.float32, True, channels=channels, out=2, kernel_size=(1, 1), size=size))


def test_positions_on_and_beyond_the_border():
    height, width = 2, 3
    edges = torch.tensor([-math.inf, -1e30, -2, -1.5, -1, -0.75, -0.0, 0.5, 1, 1.25, 2, 2.5, 3, 4.5, 1e7, math.inf])
    pairs = torch.cartesian_prod(edges, edges)
    pairs = torch.cat((pairs, pairs[: -len(pairs) % (height * width)]))
    positions = pairs.view(-1, height, width, 2).movedim(3, 1)
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    # The tap of a 1x1 kernel is at the query, so the offset that reaches a position is the difference to it.
    offset = (positions - grid).to(DEVICE, torch.float32).requires_grad_()
    shapes = ((len(positions), 2, height, width), (3, 2, 1, 1), (3,), (len(positions), 1, height, width))
    x, weight, bias, mask = (draw(*shape, dtype=torch.float32) for shape in shapes)
    compare([x, offset, weight, bias, mask], {})


def test_infinite_offsets_read_zero_and_have_no_gradient():
    (x, offset, weight, _, _), _ = draw_inputs(torch.float32, False)
    with torch.no_grad():
        offset[:, ::4] = math.inf  # one coordinate of every tap: y, x, y, x, ...
        offset[:, 3::4] = -math.inf
    y = compute([x, offset, weight, None, None], "triton")
    assert not y.any()
    gradients = torch.autograd.grad(y.sum(), [x, offset, weight])
    assert not any(gradient.any() for gradient in gradients)


def test_nan_offsets_give_nan_where_they_are_and_nowhere_else():
    (x, offset, weight, bias, _), _ = draw_inputs(torch.float32, False)
    expected = compute([x, offset, weight, bias, None], "triton")
    with torch.no_grad():
        offset[1, 7, 1, 2] = math.nan
    y = compute([x, offset, weight, bias, None], "triton")
    assert y[1, :, 1, 2].isnan().all()
    there = torch.zeros(2, 1, 2, 3, dtype=torch.bool, device=DEVICE)
    there[1, :, 1, 2] = True
    torch.testing.assert_close(y.masked_fill(there, 0), expected.masked_fill(there, 0))
    y.masked_fill(there, 0).sum().backward()
    assert x.grad.isfinite().all()


def test_a_broken_input_reaches_only_the_queries_that_read_it():
    x = torch.zeros(2, 3, 4, 5, device=DEVICE)
    x[0, :, 0, 0] = math.nan
    x[1, :, 3, 4] = math.inf
    inputs = [x, torch.zeros(2, 18, 4, 5, device=DEVICE), torch.ones(2, 3, 3, 3, device=DEVICE), None, None]
    y, expected = compute(inputs, "triton"), compute([None if t is None else t.cpu() for t in inputs], "gather")
    torch.testing.assert_close(y.cpu(), expected, equal_nan=True)
    assert not expected.isfinite().all()


def test_all_taps_in_one_place():
    # Every sum of the map's gradient is then at four grid points.
    inputs, geometry = draw_inputs(torch.float32, True)
    with torch.no_grad():
        rows = torch.arange(2, device=DEVICE)[:, None] + torch.arange(-1, 2, device=DEVICE).repeat_interleave(3)
        columns = torch.arange(3, device=DEVICE)[:, None] + torch.arange(-1, 2, device=DEVICE).repeat(3)
        inputs[1][:, ::2] = (0.25 - rows).T[:, :, None]
        inputs[1][:, 1::2] = (1.5 - columns).T[:, None]
    compare(inputs, geometry)
    (grad_x,) = torch.autograd.grad(compute(inputs, "triton", **geometry).sum(), inputs[0])
    assert grad_x[0, 0].count_nonzero() == 4


def test_repeated_backward_passes_are_bitwise_equal():
    inputs, geometry = draw_inputs(torch.float32, True, channels=16, size=(2, 3) if DEVICE == "cpu" else (50, 84))
    first, second = (torch.autograd.grad(compute(inputs, "triton", **geometry).sum(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_of_a_batch_change_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "COLUMN_BYTES", 1)
    compare(*draw_inputs(torch.float64, True, groups=2))


def test_what_the_taps_read_is_not_kept_for_the_backward_pass():
    inputs, geometry = draw_inputs(torch.float32, True, channels=16, out=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        compute(inputs, "triton", **geometry)
    assert max(kept) < 2 * 16 * 9 * 6 / 2


@pytest.mark.slow
def test_each_gradient_alone_and_pairs():
    inputs, geometry = draw_inputs(torch.float64, True, size=(1, 2))
    expected = torch.autograd.grad(compute(inputs, "triton", **geometry).sum(), inputs)
    for needed in ({0}, {1}, {2}, {3}, {4}, {0, 2}, {1, 2}):
        some = [t.detach().requires_grad_(index in needed) for index, t in enumerate(inputs)]
        leaves = [t for t in some if t.requires_grad]
        gradients = torch.autograd.grad(compute(some, "triton", **geometry).sum(), leaves)
        for gradient, index in zip(gradients, sorted(needed), strict=True):
            torch.testing.assert_close(gradient, expected[index])


def test_second_derivatives_are_those_of_the_gather():
    inputs, geometry = draw_inputs(torch.float64, True, channels=2, out=2, size=(3, 3))
    copies = in_float64(inputs)
    results = []
    for tensors, algorithm in ((inputs, "triton"), (copies, "gather")):
        first = torch.autograd.grad(compute(tensors, algorithm, **geometry).square().sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for gradient, expected in zip(*results, strict=True):
        assert_same(gradient, expected, 1e-10)


def test_transforms_and_batched_gradients_take_plain_operations():
    (x, offset, weight, bias, mask), geometry = draw_inputs(torch.float64, True)
    function = lambda x: compute([x, offset, weight, bias, mask], "triton", **geometry)  # noqa: E731
    tangent = torch.randn_like(x)
    y, directional = torch.func.jvp(function, (x.detach(),), (tangent,))
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(directional.sum(), (gradient * tangent).sum())
    cotangents = torch.stack((torch.ones_like(y), 2 * torch.ones_like(y)))
    (batched,) = torch.autograd.grad(function(x), x, cotangents, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack((gradient, 2 * gradient)))


def test_memory_formats_are_kept():
    (x, *others), geometry = draw_inputs(torch.float32, True)
    assert compute([x, *others], "triton", **geometry).is_contiguous()
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = compute([last, *others], "triton", **geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y.sum(), last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, compute([x, *others], "triton", **geometry))


def test_inputs_that_are_views():
    (x, offset, weight, bias, mask), geometry = draw_inputs(torch.float64, True)
    views = [
        x.detach().transpose(2, 3).contiguous().transpose(2, 3),
        offset.detach().transpose(2, 3).contiguous().transpose(2, 3),
        weight.detach().transpose(0, 1).contiguous().transpose(0, 1),
        bias.detach().repeat_interleave(2)[::2],
        torch.cat((mask, mask), dim=1).detach()[:, 9:],
    ]
    assert not any(view.is_contiguous() for view in views)
    compare([view.requires_grad_() for view in views], geometry)


def test_an_empty_batch():
    module = DeformableConv(3, 4, modulated=True, algorithm="triton").to(DEVICE)
    y = module(torch.zeros(0, 3, 4, 5, device=DEVICE))
    assert y.shape == (0, 4, 4, 5)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("modulated", [False, True])
def test_the_module_gives_what_the_gather_gives(modulated):
    module = DeformableConv(4, 6, modulated=modulated, algorithm="triton", dtype=torch.float64)
    nn.init.normal_(module.offset.weight, std=0.3)
    other = DeformableConv(4, 6, modulated=modulated, algorithm="gather", dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    module.to(DEVICE)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    padding = torch.rand(2, 3, 4) < 0.2
    y, expected = module(x.to(DEVICE), key_padding_mask=padding.to(DEVICE)), other(x, key_padding_mask=padding)
    torch.testing.assert_close(y.cpu(), expected)
    (y**2).sum().backward()
    (expected**2).sum().backward()
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


def test_follows_autocast_except_for_positions():
    # At 100.25 even float16 has steps of 1/16, and bfloat16 of one half.
    half = torch.float16 if kernels.RUNS_ANYWHERE else torch.bfloat16
    module = DeformableConv(4, 4, algorithm="triton").to(DEVICE)
    with torch.no_grad():
        module.offset.bias[1::2].fill_(100.26)
    x = torch.randn(1, 4, 1, 110, device=DEVICE)
    expected = module(x)
    with torch.autocast(DEVICE, half):
        y, from_half = module(x), module(x.to(half))
    assert y.dtype == from_half.dtype == half
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(from_half.float(), expected, rtol=3e-2, atol=3e-2)
    y.float().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    module.zero_grad()
    module(x).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=2e-2, atol=4e-2 * float(parameter.grad.abs().max())
        )


def test_a_module_in_half_precision_stays_in_it():
    half = torch.float16 if kernels.RUNS_ANYWHERE else torch.bfloat16
    module = DeformableConv(4, 4, modulated=True, algorithm="triton").to(DEVICE, half)
    nn.init.normal_(module.offset.weight, std=0.3)
    x = torch.randn(1, 4, 2, 3, device=DEVICE, dtype=half)
    y = module(x)
    assert y.dtype == half
    y.sum().backward()
    other = DeformableConv(4, 4, modulated=True, algorithm="gather", dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    assert_same(y, other(x.cpu().double()).detach(), 10 * TOLERANCES[half])  # offsets are rounded too
    assert all(p.grad.dtype == half for p in module.parameters())


@pytest.mark.parametrize(
    ("modulated", "memory_format"), [(False, torch.channels_last), (True, torch.contiguous_format)], ids=str
)
def test_the_operator_keeps_the_rules_of_torch(modulated, memory_format):
    inputs, _ = draw_inputs(torch.float32, modulated, out=2, channels=2, kernel_size=(1, 3))
    inputs[0] = inputs[0].detach().to(memory_format=memory_format).requires_grad_()
    torch.library.opcheck(torch.ops.lightning_attn.deformable_conv, (*inputs, (1, 1), (1, 1), (0, 1), torch.float32))


@pytest.mark.slow
def test_compiles_in_one_piece_with_changing_sizes():
    module = DeformableConv(4, 4, modulated=True, algorithm="triton").to(DEVICE)
    nn.init.normal_(module.offset.weight, std=0.3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch, height in ((2, 2), (3, 4)):
        x = torch.randn(batch, 4, height, 3, device=DEVICE)
        gradients = [torch.autograd.grad(f(x).square().sum(), list(module.parameters())) for f in (compiled, module)]
        torch.testing.assert_close(*gradients)


def test_asks_the_device_for_no_number():
    module = DeformableConv(4, 4, modulated=True, algorithm="triton").to(DEVICE)
    x = torch.randn(2, 4, 2, 3, device=DEVICE, requires_grad=True)
    module(x).sum().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile() as profile:
            module(x).sum().backward()
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    names = {event.key for event in profile.key_averages()}
    assert {"aten::sort", "aten::searchsorted"} <= names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


@pytest.mark.parametrize("modulated", [False, True])
def test_multiply_adds_are_counted(modulated):
    inputs, geometry = draw_inputs(torch.float32, modulated, out=4, groups=2)
    samples, product = 2 * 6 * 9 * 6, 2 * 4 * 6 * 3 * 9
    with FlopCounterMode(display=False) as counter:
        y = compute(inputs, "triton", **geometry)
    assert counter.get_total_flops() == 2 * (samples * (4 + modulated) + product)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (samples * 12 + 2 * product)


def test_auto_takes_the_kernels_on_cuda_alone():
    inputs, geometry = draw_inputs(torch.float32, False)
    with patch.object(kernels, "deformable_conv", side_effect=RuntimeError("kernels")):
        if DEVICE == "cuda":
            with pytest.raises(RuntimeError, match="kernels"):
                compute(inputs, "auto", **geometry)
        compute([None if t is None else t.cpu() for t in inputs], "auto", **geometry)
