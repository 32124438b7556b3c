"""The fast deformable convolution against its definition, against torchvision's operator and against itself alone."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d, deform_conv2d

from lightning_attn.attention import sampling
from lightning_attn.attention.deformable import DeformableConv, deformable_conv, offset_parameters

GEOMETRIES = [
    {"stride": 1, "dilation": 1, "padding": 1},
    {"stride": 2, "dilation": 1, "padding": 0},
    {"stride": 1, "dilation": 2, "padding": 2},
    {"stride": 2, "dilation": 2, "padding": 3},
]


def output_size(size: tuple[int, ...], geometry: dict[str, int]) -> list[int]:
    reach = 2 * geometry["dilation"]
    return [(n + 2 * geometry["padding"] - reach - 1) // geometry["stride"] + 1 for n in size]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def shaken(*sizes: int, spread: float = 2.0, **settings) -> DeformableConv:
    """A module in float64 whose offsets depend on the input and reach several positions away."""
    module = DeformableConv(*sizes, **settings).double()
    nn.init.normal_(module.offset.weight, std=spread / 4)
    nn.init.normal_(module.offset.bias, std=spread)
    return module


def assert_same(actual, expected, inputs) -> None:
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, inputs, cotangent)
    references = torch.autograd.grad(expected, inputs, cotangent, retain_graph=True)  # is compared several times
    for index, pair in enumerate(zip(gradients, references, strict=True)):
        torch.testing.assert_close(*pair, msg=lambda text, index=index: f"gradient of input {index}: {text}")


@pytest.mark.parametrize(
    ("size", "geometry"),
    [(size, g) for size in [(5, 7), (6, 3), (2, 1), (1, 1)] for g in GEOMETRIES if min(output_size(size, g)) > 0],
)
@pytest.mark.parametrize("modulated", [False, True])
def test_a_map_gives_the_numbers_and_gradients_of_torchvision(size, geometry, modulated):
    x, weight, bias = draw(2, 3, *size), draw(4, 3, 3, 3), draw(4)
    outputs = output_size(size, geometry)
    offset = (2 * draw(2, 18, *outputs)).detach().requires_grad_()
    mask = draw(2, 9, *outputs) if modulated else None
    inputs = [t for t in (x, offset, weight, bias, mask) if t is not None]
    expected = deform_conv2d(x, offset, weight, bias, mask=mask, **geometry)
    for algorithm in ("gather", "torchvision"):
        y = deformable_conv(x, offset, weight, bias, mask=mask, algorithm=algorithm, **geometry)
        assert_same(y, expected, inputs)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modulated", [False, True])
def test_a_sentence_gives_the_numbers_and_gradients_of_the_definition(geometry, modulated):
    x, weight, bias = draw(2, 7, 3), draw(4, 3, 3), draw(4)
    (length,) = output_size((7,), geometry)
    offset = (3 * draw(2, length, 3)).detach().requires_grad_()
    mask = draw(2, length, 3) if modulated else None
    inputs = [t for t in (x, offset, weight, bias, mask) if t is not None]
    compute = functools.partial(deformable_conv, x, offset, weight, bias, mask=mask, **geometry)
    assert_same(compute(), compute(algorithm="reference"), inputs)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_causal_form_gives_the_numbers_and_gradients_of_the_definition(kernel_size, dilation):
    x, weight, bias, mask = draw(2, 6, 3), draw(4, 3, kernel_size), draw(4), draw(2, 6, kernel_size)
    offset = (3 * draw(2, 6, kernel_size)).detach().requires_grad_()
    compute = functools.partial(
        deformable_conv, x, offset, weight, bias, mask=mask, dilation=dilation, padding=None, causal=True
    )
    assert_same(compute(), compute(algorithm="reference"), [x, offset, weight, bias, mask])


def test_positions_on_and_beyond_the_border_read_as_torchvision_reads_them():
    height, width = 4, 5
    edges = [-1e30, -1e7, -7.5, -2.0, -1.0, -0.75, -0.0, 0.5, 3.0, 3.25, 4.0, 4.5, 5.0, 6.5, 1e7, 1e30]
    x, weight = draw(1, 2, height, width), draw(3, 2, 1, 1)
    for edge in edges:
        for axis, other in ((0, 2.25), (1, 1.5), (0, edge)):
            # The tap of a 1x1 kernel is at the query, so the offset that reaches a position is the difference to it.
            position = torch.full((2, height, width), other, dtype=torch.float64)
            position[axis] = edge
            grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            offset = (position - torch.stack(grid))[None].requires_grad_()
            for algorithm in ("gather", "torchvision"):
                y = deformable_conv(x, offset, weight, algorithm=algorithm)
                assert_same(y, deform_conv2d(x, offset, weight), [x, offset, weight])


@pytest.mark.parametrize("algorithm", ["gather", "torchvision"])
def test_infinite_offsets_read_zero_and_have_no_gradient(algorithm):
    x, weight, offset = draw(1, 2, 4, 5), draw(3, 2, 3, 3), draw(1, 18, 4, 5)
    with torch.no_grad():
        offset[:, ::4] = float("inf")  # one coordinate of every tap: y, x, y, x, ...
        offset[:, 3::4] = -float("inf")
    y = deformable_conv(x, offset, weight, algorithm=algorithm)
    assert not y.any()
    gradients = torch.autograd.grad(y.sum(), [x, offset])  # torchvision alone gives NaN
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("algorithm", ["gather", "torchvision"])
def test_nan_offsets_give_nan_where_they_are_and_nowhere_else(algorithm):
    x, weight, offset = draw(2, 3, 5, 6), draw(4, 3, 3, 3), draw(2, 18, 5, 6)
    expected = deformable_conv(x, offset, weight)
    with torch.no_grad():
        offset[1, 7, 2, 3] = float("nan")
    y = deformable_conv(x, offset, weight, algorithm=algorithm)
    assert y[1, :, 2, 3].isnan().all()
    there = torch.zeros(2, 1, 5, 6, dtype=torch.bool)
    there[1, :, 2, 3] = True
    torch.testing.assert_close(y.masked_fill(there, 0), expected.masked_fill(there, 0))
    y.masked_fill(there, 0).sum().backward()
    assert x.grad.isfinite().all()


def test_nan_offset_in_a_sentence_gives_nan_there():
    x, weight, offset = draw(1, 6, 3), draw(4, 3, 3), draw(1, 6, 3)
    with torch.no_grad():
        offset[0, 2, 1] = float("nan")
    for causal in (False, True):
        y = deformable_conv(x, offset, weight, causal=causal)
        assert y.isnan().all(-1).tolist() == [[False, False, True, False, False, False]]


def test_a_broken_input_reaches_only_the_queries_that_read_it():
    # The first position is where an index outside the map could wrongly point.
    x = torch.zeros(2, 3, 4, 5)
    x[0, :, 0, 0] = float("nan")
    x[1, :, 3, 4] = float("inf")
    weight = torch.ones(2, 3, 3, 3)
    y = deformable_conv(x, torch.zeros(2, 18, 4, 5), weight, algorithm="gather")
    expected = deform_conv2d(x, torch.zeros(2, 18, 4, 5), weight, padding=1)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert expected.isfinite().any()
    assert not expected.isfinite().all()


@pytest.mark.parametrize("ndim", [1, 2])
def test_starts_as_the_regular_convolution(ndim):
    x = torch.randn(2, 9, 4) if ndim == 1 else torch.randn(2, 4, 6, 7)
    plain = DeformableConv(4, 5, ndim=ndim, stride=2, dilation=2)
    modulated = DeformableConv(4, 5, ndim=ndim, stride=2, dilation=2, modulated=True)
    regular = (nn.Conv1d if ndim == 1 else nn.Conv2d)(4, 5, 3, stride=2, dilation=2, padding=2)
    for module in (plain, modulated):
        keys = module.load_state_dict(regular.state_dict(), strict=False)
        assert keys.missing_keys == ["offset.weight", "offset.bias"]
        assert not keys.unexpected_keys
    expected = regular(x.transpose(1, 2)).transpose(1, 2) if ndim == 1 else regular(x)
    torch.testing.assert_close(plain(x), expected)
    # The modulation is a sigmoid that starts at zero: one half.
    bias = regular.bias if ndim == 1 else regular.bias[:, None, None]
    torch.testing.assert_close(modulated(x), (expected - bias) / 2 + bias)


@pytest.mark.parametrize("modulated", [False, True])
def test_the_module_in_two_dimensions_is_torchvision_with_its_own_offsets(modulated):
    module = shaken(3, 4, modulated=modulated)
    x = draw(2, 3, 3, 4)
    channels = module.offset(x)
    mask = channels[:, 18:].sigmoid() if modulated else None
    expected = deform_conv2d(x, channels[:, :18], module.weight, module.bias, padding=1, mask=mask)
    inputs = [x, *module.parameters()]
    assert_same(module(x), expected, inputs)
    for algorithm in ("torchvision", "reference"):
        module.algorithm = algorithm
        torch.testing.assert_close(module(x), expected)


def test_gradients_are_those_of_finite_differences():
    module = shaken(2, 2, ndim=1, modulated=True, causal=True)
    assert torch.autograd.gradcheck(module, (draw(1, 4, 2),))
    offset, mask = (2 * draw(1, 18, 3, 2)).detach().requires_grad_(), draw(1, 9, 3, 2)
    compute = functools.partial(deformable_conv, algorithm="gather")
    assert torch.autograd.gradcheck(
        lambda x, o, w, m: compute(x, o, w, mask=m), (draw(1, 2, 3, 2), offset, draw(1, 2, 3, 3), mask)
    )


@pytest.mark.parametrize(("ndim", "causal"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("modulated", [False, True])
def test_padding_changes_nothing_at_valid_positions(ndim, modulated, causal):
    module = shaken(3, 4, ndim=ndim, modulated=modulated, causal=causal, spread=3.0)
    x = draw(2, 9, 3) if ndim == 1 else draw(2, 3, 6, 7)
    mask = torch.ones(x.shape[:2] if ndim == 1 else (2, 6, 7), dtype=torch.bool)
    valid = (slice(0, 5),) if ndim == 1 else (slice(0, 4), slice(0, 3))
    mask[(0, *valid)] = False
    mask[1] = False
    filled = x.detach().clone()
    (filled if ndim == 1 else filled.movedim(1, -1))[mask] = float("nan")  # whatever stands in the padding
    y = module(filled, key_padding_mask=mask)
    part = (slice(0, 1), *valid) if ndim == 1 else (slice(0, 1), slice(None), *valid)
    torch.testing.assert_close(y[part], module(x[part]))
    torch.testing.assert_close(y[1:], module(x[1:]))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
def test_causal_outputs_do_not_change_with_later_tokens(modulated, dilation):
    module = shaken(4, 4, ndim=1, causal=True, modulated=modulated, dilation=dilation, spread=5.0)
    x = draw(2, 8, 4)
    y = module(x)
    for token in range(1, 8):
        changed = x.detach().clone()
        changed[:, token:] = torch.randn_like(changed[:, token:]) * 100
        torch.testing.assert_close(module(changed)[:, :token], y[:, :token], rtol=0, atol=1e-12)
        assert not torch.allclose(module(changed)[:, token:], y[:, token:])
        (gradient,) = torch.autograd.grad(y[:, token - 1].sum(), x, retain_graph=True)
        assert not gradient[:, token:].any()


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dilation", [1, 3])
def test_decoding_step_by_step_gives_the_full_pass(modulated, dilation):
    module = shaken(4, 5, ndim=1, causal=True, modulated=modulated, dilation=dilation, spread=4.0)
    x = draw(3, 12, 4).detach()
    expected = module(x)
    with torch.no_grad():
        for steps in ([1] * 12, [5, 1, 2, 4], [12]):
            cache = module.new_cache()
            y = torch.cat([module(piece, cache=cache) for piece in x.split(steps, dim=1)], dim=1)
            assert cache.length == 12
            torch.testing.assert_close(y, expected)


def test_reordered_cache_follows_the_sentences():
    module = shaken(4, 4, ndim=1, causal=True, spread=6.0)
    x = draw(3, 5, 4).detach()
    new = draw(4, 3, 4).detach()
    with torch.inference_mode():
        cache = module.new_cache()
        module(x, cache=cache)
        cache.reorder(torch.tensor([2, 0, 0, 2]))
        first = module(new[:, :1], cache=cache)
        order = torch.tensor([3, 1])
        cache.reorder(order)
        last = module(new[order, 1:], cache=cache)
        full = module(torch.cat((x[[2, 0, 0, 2]], new), dim=1))
    torch.testing.assert_close(first, full[:, 5:6])
    torch.testing.assert_close(last, full[order, 6:])
    with pytest.raises(ValueError, match=r"x has batch size 3, the cache has 2: they must be equal"):
        module(x, cache=cache)


@pytest.mark.parametrize("block", [1, 60, 400, 10**6])
def test_the_size_of_a_block_does_not_change_anything(block, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK_ELEMENTS", block)
    x, weight, bias, offset = draw(5, 3, 3, 4), draw(4, 3, 3, 3), draw(4), draw(5, 18, 3, 4)
    y = deformable_conv(x, offset, weight, bias, algorithm="gather")
    assert_same(y, deform_conv2d(x, offset, weight, bias, padding=1), [x, offset, weight, bias])
    with torch.no_grad():
        torch.testing.assert_close(deformable_conv(x, offset, weight, bias, algorithm="gather"), y)


def test_what_the_taps_read_is_not_kept_for_the_backward_pass():
    x, weight = torch.randn(1, 64, 12, 12, requires_grad=True), torch.randn(4, 64, 3, 3, requires_grad=True)
    offset = torch.randn(1, 18, 12, 12, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        deformable_conv(x, offset, weight, algorithm="gather")
    assert max(kept) < 64 * 9 * 144 / 2


def test_large_enough_for_several_blocks_in_single_precision():
    x, offset = torch.randn(2, 128, 50, 60), torch.randn(2, 18, 50, 60) * 2
    weight = torch.randn(16, 128, 3, 3) / 34
    assert x.shape[1] * 9 * 3000 * 2 > sampling.BLOCK_ELEMENTS
    y = deformable_conv(x, offset, weight, algorithm="gather")
    torch.testing.assert_close(y, deform_conv2d(x, offset, weight, padding=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ndim", [1, 2])
def test_under_autocast_positions_keep_their_precision(ndim):
    # At 100.25 bfloat16 has steps of one half.
    module = DeformableConv(4, 4, ndim=ndim)
    length = 120
    x = torch.randn(1, length, 4) if ndim == 1 else torch.randn(1, 4, 1, length)
    with torch.no_grad():
        (module.offset.bias if ndim == 1 else module.offset.bias[1::2]).fill_(100.25)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, from_half = module(x), module(x.bfloat16())
    assert y.dtype == from_half.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(from_half.float(), expected, rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_module_in_bfloat16_stays_in_it():
    for ndim in (1, 2):
        module = shaken(4, 4, ndim=ndim, modulated=True).bfloat16()
        x = torch.randn(2, 5, 4) if ndim == 1 else torch.randn(2, 4, 5, 5)
        assert module(x.bfloat16()).dtype == torch.bfloat16
        if ndim == 2:
            module.algorithm = "torchvision"
            assert module(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"ndim": 2, "modulated": True}, {"ndim": 1, "causal": True}])
def test_compiles_in_one_piece_with_changing_sizes(settings):
    module = shaken(4, 4, **settings)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for size in ((2, 5), (3, 7)):
        x = draw(size[0], size[1], 4) if settings["ndim"] == 1 else draw(size[0], 4, size[1], 6)
        assert_same(compiled(x), module(x), [x, *module.parameters()])


@pytest.mark.parametrize("modulated", [False, True])
def test_smallest_inputs(modulated):
    for ndim, shape in ((1, (2, 1, 3)), (2, (2, 3, 1, 1)), (1, (0, 5, 3)), (2, (0, 3, 4, 5))):
        module = shaken(3, 4, ndim=ndim, modulated=modulated)
        x = draw(*shape)
        y = module(x)
        assert y.shape == (*shape[:2], 4) if ndim == 1 else (shape[0], 4, *shape[2:])
        y.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        if shape[0]:
            module.algorithm = "reference"
            torch.testing.assert_close(module(x), y)


def test_the_memory_format_of_a_map_is_kept():
    module = DeformableConv(4, 6)
    x = torch.randn(2, 4, 5, 7)
    assert module(x).is_contiguous()
    y = module(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, module(x))


def test_offset_parameters_are_found_at_any_depth_and_nothing_else():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(DeformableConv(4, 4), nn.ReLU()), DeformableConv(4, 2))
    names = {id(p): name for name, p in network.named_parameters()}
    found = [names[id(p)] for p in offset_parameters(network)]
    assert found == ["1.0.offset.weight", "1.0.offset.bias", "2.offset.weight", "2.offset.bias"]
    assert offset_parameters(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 0}, r"kernel_size must be an integer of at least 1, got 0"),
        ({"in_channels": True}, r"in_channels must be an integer of at least 1, got True"),
        ({"stride": 1.5}, r"stride must be an integer of at least 1, got 1\.5"),
        ({"padding": -1}, r"padding must be an integer of at least 0, got -1"),
        ({"ndim": 3}, r"ndim must be 1 \(sequences\) or 2 \(maps\), got 3"),
        ({"causal": True, "ndim": 2}, r"causal=True needs ndim=1: the positions of a map have no order"),
        ({"causal": True, "ndim": 1, "stride": 2}, r"causal=True needs stride=1, got 2"),
        ({"causal": True, "ndim": 1, "padding": 1}, r"pads 2 zeros on the left only; leave padding=None, got 1"),
        ({"algorithm": "fast"}, r"algorithm must be one of \['auto', 'gather', 'triton', 'torchvision', 'reference'\]"),
        ({"algorithm": "torchvision", "ndim": 1}, r"algorithm='torchvision' supports maps only.*'auto' or 'gather'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeformableConv(**{"in_channels": 4, "out_channels": 4} | settings)


@pytest.mark.parametrize(
    ("ndim", "x", "mask", "message"),
    [
        (2, torch.zeros(4, 5, 5), None, r"x must be \[B, C, H, W\] for ndim=2, got 3 dimensions, shape \(4, 5, 5\)"),
        (1, torch.zeros(2, 4, 5), None, r"x must be \[B, L, C\] with C = in_channels = 4, got shape \(2, 4, 5\)"),
        (2, torch.zeros(2, 5, 4, 4), None, r"x must be \[B, C, H, W\] with C = in_channels = 4"),
        (1, torch.zeros(2, 5, 4, dtype=torch.long), None, r"floating-point type, got torch\.int64"),
        (1, torch.zeros(2, 5, 4), torch.zeros(2, 5), r"key_padding_mask must be bool.*got torch\.float32"),
        (2, torch.zeros(2, 4, 5, 6), torch.zeros(2, 6, 5, dtype=torch.bool), r"shape \(2, 5, 6\).*got \(2, 6, 5\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(ndim, x, mask, message):
    with pytest.raises(ValueError, match=message):
        DeformableConv(4, 4, ndim=ndim)(x, key_padding_mask=mask)


def test_offsets_and_sizes_that_do_not_fit_are_refused():
    x, weight = torch.zeros(2, 4, 5, 6), torch.zeros(3, 4, 3, 3)
    with pytest.raises(ValueError, match=r"offset must have the shape \(2, 18, 5, 6\), got \(2, 9, 5, 6\)"):
        deformable_conv(x, torch.zeros(2, 9, 5, 6), weight)
    with pytest.raises(ValueError, match=r"mask must have the shape \(2, 9, 5, 6\), got \(2, 18, 5, 6\)"):
        deformable_conv(x, torch.zeros(2, 18, 5, 6), weight, mask=torch.zeros(2, 18, 5, 6))
    with pytest.raises(ValueError, match=r"x and weight must be.*got shapes \(2, 4, 5, 6\) and \(3, 5, 3, 3\)"):
        deformable_conv(x, torch.zeros(2, 18, 5, 6), torch.zeros(3, 5, 3, 3))
    with pytest.raises(ValueError, match=r"at least 5 positions along each axis for kernel_size=3, dilation=2"):
        DeformableConv(4, 4, dilation=2, padding=0)(torch.zeros(1, 4, 4, 9))
    with pytest.raises(ValueError, match=r"at least 1 positions.*got shape \(2, 0, 4\)"):
        DeformableConv(4, 4, ndim=1)(torch.zeros(2, 0, 4))


def test_a_cache_is_for_causal_convolutions_without_padding():
    module = DeformableConv(4, 4, ndim=1)
    with pytest.raises(ValueError, match=r"only a causal convolution is decoded step by step"):
        module.new_cache()
    causal = DeformableConv(4, 4, ndim=1, causal=True)
    x, cache = torch.zeros(2, 1, 4), causal.new_cache()
    with pytest.raises(ValueError, match=r"only a causal convolution is decoded step by step"):
        module(x, cache=cache)
    with pytest.raises(ValueError, match=r"decoding step by step supports no key_padding_mask"):
        causal(x, key_padding_mask=torch.zeros(2, 1, dtype=torch.bool), cache=cache)


@pytest.mark.parametrize("algorithm", ["gather", "torchvision"])
@pytest.mark.parametrize(
    "settings",
    [
        {"groups": 2},
        {"offset_groups": 3},
        {"groups": 3, "offset_groups": 2},
        {"kernel_size": (3, 5)},
        {"kernel_size": (2, 4)},
        {"kernel_size": 4, "stride": 2},
        {"stride": (1, 2), "padding": (0, 3), "dilation": (2, 1)},
        {"kernel_size": (1, 3), "padding": (2, 0), "groups": 6, "offset_groups": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("modulated", [False, True])
def test_what_torchvisions_operator_knows(settings, modulated, algorithm):
    module = shaken(6, 6, modulated=modulated, algorithm=algorithm, **settings)
    x = draw(2, 6, 7, 9)
    channels = module.offset(x)
    split = channels.shape[1] * 2 // 3 if modulated else channels.shape[1]
    expected = deform_conv2d(
        x,
        channels[:, :split],
        module.weight,
        module.bias,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        mask=channels[:, split:].sigmoid() if modulated else None,
    )
    assert_same(module(x), expected, [x, *module.parameters()])


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_groups_of_a_sentence_are_convolutions_of_their_own(modulated, causal):
    module = shaken(6, 4, ndim=1, groups=2, offset_groups=2, modulated=modulated, causal=causal, kernel_size=4)
    x = draw(2, 7, 6)
    parts = []
    channels = module.offset(F.pad(x, (0, 0, 3, 0) if causal else (0, 0)).transpose(1, 2)).transpose(1, 2)
    for group in range(2):
        offset = channels[..., 4 * group : 4 * group + 4]
        mask = channels[..., 8 + 4 * group : 12 + 4 * group].sigmoid() if modulated else None
        part = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        settings = {"causal": True} if causal else {"padding": 1}
        parts.append(
            deformable_conv(
                x[..., part[0]],
                offset,
                module.weight[part[1]],
                module.bias[part[1]],
                mask=mask,
                **settings,
                algorithm="reference",
            )
        )
    assert_same(module(x), torch.cat(parts, dim=2), [x, *module.parameters()])
    if causal:
        with torch.no_grad():
            cache = module.new_cache()
            stepwise = torch.cat([module(token, cache=cache) for token in x.detach().split([1, 3, 1, 2], dim=1)], dim=1)
        torch.testing.assert_close(stepwise, module(x))


def test_weights_of_published_modules_load():
    # Names and shapes of mmcv.ops.DeformConv2dPack(4, 6, 3, groups=2, deform_groups=2) and its modulated form.
    for modulated, name in ((False, "conv_offset"), (True, "conv_offset"), (True, "conv_offset_mask")):
        channels = 2 * 9 * (3 if modulated else 2)
        state = {
            "weight": torch.randn(6, 2, 3, 3),
            f"{name}.weight": torch.randn(channels, 4, 3, 3) / 10,
            f"{name}.bias": torch.randn(channels),
        }
        if modulated:
            state["bias"] = torch.randn(6)
        module = DeformableConv(4, 6, 3, groups=2, offset_groups=2, modulated=modulated, bias=modulated)
        outer = nn.Sequential(module)
        outer.load_state_dict({f"0.{key}": value for key, value in state.items()})
        x = torch.randn(2, 4, 5, 6)
        moved = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
        # mmcv: o1, o2, mask = chunk(out, 3); offset = cat(o1, o2); mask = sigmoid(mask)
        offset = torch.cat(moved.chunk(3, dim=1)[:2], dim=1) if modulated else moved
        mask = moved.chunk(3, dim=1)[2].sigmoid() if modulated else None
        expected = deform_conv2d(x, offset, state["weight"], state.get("bias"), padding=1, mask=mask)
        torch.testing.assert_close(outer(x), expected, rtol=1e-4, atol=1e-5)
        assert f"{name}.weight" in state, "the given state is left as it was"
    peer = DeformConv2d(4, 6, 3, padding=1, groups=2)
    module = DeformableConv(4, 6, 3, groups=2)
    found = module.load_state_dict(peer.state_dict(), strict=False)
    assert found.missing_keys == ["offset.weight", "offset.bias"]
    assert not found.unexpected_keys
    torch.testing.assert_close(module(x), peer(x, torch.zeros(2, 18, 5, 6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, r"groups=3 must divide the 4 channels: use one of \[1, 2, 4\]"),
        ({"offset_groups": 3}, r"offset_groups=3 must divide the 4 channels"),
        ({"groups": 0}, r"groups must be an integer of at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be one number or 2 for ndim=2, got \(3, 3, 3\)"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be an integer of at least 1, got 0"),
        ({"stride": "2"}, r"stride must be an integer of at least 1, got '2'"),
        ({"modulated": "no"}, r"modulated must be True or False, got 'no'"),
        ({"groups": 2, "algorithm": "reference"}, r"algorithm='reference' supports one group only; .* groups=2"),
    ],
)
def test_groups_and_sizes_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeformableConv(**{"in_channels": 4, "out_channels": 4} | settings)


def test_the_function_checks_its_sizes():
    x, weight, offset = torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3), torch.zeros(1, 18, 5, 5)
    for settings, message in (
        ({"dilation": 0}, "dilation must be an integer of at least 1, got 0"),
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"padding": -1}, "padding must be an integer of at least 0, got -1"),
        ({"padding": 0, "dilation": 3}, r"x must have at least 7 positions .* dilation=3 and padding=0"),
    ):
        with pytest.raises(ValueError, match=message):
            deformable_conv(x, offset, weight, **settings)
