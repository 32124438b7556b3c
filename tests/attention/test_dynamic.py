"""DynamicConv against the definition, pooling and unfolding: numbers, gradients, decoding, memory, limits, errors."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attn.attention import dynamic
from lightning_attn.attention.dynamic import DynamicConv

DIM, GROUPS = 6, 3


def make(kernel_size=3, ndim=1, dim=DIM, groups=GROUPS, dtype=torch.float64, **settings) -> DynamicConv:
    """A module in which every parameter, also those that start at zero, is random."""
    module = DynamicConv(dim, kernel_size, groups, ndim, **settings).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5)
    return module


def draw(*size, batch=2, dim=DIM, dtype=torch.float64) -> Tensor:
    """A sentence `[B, L, C]` or a map `[B, C, H, W]`."""
    shape = (batch, *size, dim) if len(size) == 1 else (batch, dim, *size)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def padding(*size, batch=2) -> Tensor:
    mask = torch.zeros(batch, math.prod(size), dtype=torch.bool)
    mask[1, ::3] = True
    return mask.view(batch, *size)


def results(module: DynamicConv, x: Tensor, grad: Tensor, **settings) -> list[Tensor]:
    y = module(x, **settings)
    return [y, *torch.autograd.grad(y, (x, *module.parameters()), grad)]


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance) -> None:
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, number=number: f"result {number}: {text}", **tolerance)


def unfolded(module: DynamicConv, x: Tensor) -> Tensor:
    """Eq. 5 to 7 with the whole N x C x N_k input, whose memory the module must not need."""
    n, groups, causal = module.kernel_size, module.groups, module.causal
    if module.ndim == 1:
        content = F.glu(module.input_proj(x), dim=-1)
        kernel = module.kernel_proj(content).unflatten(-1, (groups, n)).softmax(-1)
        before = n - 1 if causal else n // 2
        windows = F.pad(content, (0, 0, before, n - 1 - before)).unfold(1, n, 1).unflatten(2, (groups, -1))
        return module.out_proj(torch.einsum("blgn,blgdn->blgd", kernel, windows).flatten(2))
    content = F.glu(module.input_proj(x.movedim(1, -1)), dim=-1)
    kernel = module.kernel_proj(content).unflatten(-1, (groups, n * n)).softmax(-1)
    windows = F.unfold(content.movedim(-1, 1), n, padding=n // 2).unflatten(1, (groups, -1, n * n))
    windows = windows.unflatten(-1, x.shape[2:])
    return module.out_proj(torch.einsum("bhwgn,bgdnhw->bhwgd", kernel, windows).flatten(3)).movedim(-1, 1)


@pytest.fixture
def pieces(monkeypatch):
    """Makes even small inputs run in several blocks, and sentences with several bands."""
    monkeypatch.setattr(dynamic, "KERNEL_ELEMENTS", 10)
    monkeypatch.setattr(dynamic, "BLOCK_ELEMENTS", 400)
    monkeypatch.setattr(dynamic, "BAND_QUERIES", 2)


@pytest.mark.parametrize(
    ("size", "kernel_size", "causal"),
    [
        *(((length,), n, causal) for length in (1, 2, 7) for n in (1, 3, 9) for causal in (False, True)),
        *((size, n, False) for size in ((1, 1), (3, 3), (2, 5), (4, 1)) for n in (1, 3, 5)),
        ((2, 3), 9, False),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_numbers_and_gradients_of_the_definition(size, kernel_size, causal, whole, request):
    if not whole:
        request.getfixturevalue("pieces")
    module = make(kernel_size, len(size), causal=causal)
    x, mask = draw(*size), padding(*size)
    grad = torch.randn_like(x)
    actual = results(module, x, grad, key_padding_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(module(x, key_padding_mask=mask), actual[0])
    module.algorithm = "reference"
    assert_same(actual, results(module, x, grad, key_padding_mask=mask))


@pytest.mark.parametrize(
    ("size", "kernel_size", "causal"),
    [((300,), 3, False), ((150,), 31, False), ((150,), 31, True), ((20, 33), 3, False), ((17, 40), 31, False)],
)
def test_large_inputs_and_kernels_are_those_of_the_unfolded_input(size, kernel_size, causal, monkeypatch):
    module = make(kernel_size, len(size), dim=8, groups=4, causal=causal)
    x = draw(*size, batch=1, dim=8)
    grad = torch.randn_like(x)
    expected = unfolded(module, x)
    expected = [expected, *torch.autograd.grad(expected, (x, *module.parameters()), grad)]
    assert_same(results(module, x, grad), expected)
    monkeypatch.setattr(dynamic, "KERNEL_ELEMENTS", 10_000)
    monkeypatch.setattr(dynamic, "BLOCK_ELEMENTS", 100_000)
    assert_same(results(module, x, grad), expected)


@pytest.mark.parametrize("size", [(5,), (3, 4)])
def test_gradients_are_those_of_finite_differences(size):
    module = make(3, len(size), dim=4, groups=2)
    assert torch.autograd.gradcheck(module, (draw(*size, batch=1, dim=4),))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_without_a_preference_every_kernel_is_the_mean_of_its_window(kernel_size):
    sentence, image = make(kernel_size, 1), make(kernel_size, 2)
    for module in (sentence, image):
        nn.init.zeros_(module.kernel_proj.weight)
    x = draw(8)
    content = F.glu(sentence.input_proj(x), dim=-1)
    mean = F.avg_pool1d(content.mT, kernel_size, 1, kernel_size // 2).mT
    torch.testing.assert_close(sentence(x), sentence.out_proj(mean))
    x = draw(5, 8)
    content = F.glu(image.input_proj(x.movedim(1, -1)), dim=-1).movedim(-1, 1)
    mean = F.avg_pool2d(content, kernel_size, 1, kernel_size // 2)
    torch.testing.assert_close(image(x), image.out_proj(mean.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_sentence_has_the_outputs_that_it_has_alone(causal):
    module = make(5, causal=causal)
    x = draw(9).detach()
    mask = torch.arange(9) >= torch.tensor([[9], [4]])
    x[mask] = 1e3  # whatever the padding holds
    y = module(x, key_padding_mask=mask)
    torch.testing.assert_close(y[0], module(x[:1])[0])
    torch.testing.assert_close(y[1, :4], module(x[1:, :4])[0])


def test_a_padded_map_has_the_outputs_that_it_has_alone():
    module = make(5, 2)
    x, mask = draw(6, 7).detach(), torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[1, 4:], mask[1, :, 5:] = True, True
    x.masked_fill_(mask.unsqueeze(1), math.nan)
    y = module(x, key_padding_mask=mask)
    torch.testing.assert_close(y[0], module(x[:1])[0])
    torch.testing.assert_close(y[1, :, :4, :5], module(x[1:, :, :4, :5])[0])


@pytest.mark.parametrize(("causal", "reached"), [(False, range(4, 9)), (True, range(6, 11))])
def test_a_changed_token_changes_the_outputs_in_whose_window_it_is(causal, reached):
    module = make(5, causal=causal)
    x = draw(12).detach()
    other = x.clone()
    other[:, 6] += 1.0
    changed = (module(x) != module(other)).any(-1)
    assert changed.tolist() == [[q in reached for q in range(12)]] * 2


def test_a_changed_pixel_changes_the_outputs_in_whose_window_it_is():
    module = make(3, 2)
    x = draw(5, 6).detach()
    other = x.clone()
    other[:, :, 1, 4] += 1.0
    changed = (module(x) != module(other)).any(1)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[0:3, 3:6] = True
    assert torch.equal(changed, expected.expand(2, -1, -1))


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
@pytest.mark.parametrize("steps", [[1] * 7, [3, 1, 2, 1], [7]])
def test_decoding_step_by_step_gives_the_full_pass(kernel_size, steps):
    module = make(kernel_size, causal=True)
    x = draw(7)
    cache = module.new_cache()
    outputs = [module(part, cache=cache) for part in x.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), module(x))
    assert cache.value.shape == (2, kernel_size - 1, DIM)


def test_reordering_the_cache_reorders_the_sentences():
    module = make(5, causal=True)
    x, index = draw(6, batch=3), torch.tensor([2, 0, 0, 1])
    cache = module.new_cache()
    cache.reorder(index)  # nothing to reorder yet
    module(x[:, :4], cache=cache)
    cache.reorder(index)
    torch.testing.assert_close(module(x[index, 4:], cache=cache), module(x)[index, 4:])


@pytest.mark.parametrize("ndim", [1, 2])
def test_dropout_drops_elements_of_the_normalised_kernel_in_training_only(ndim):
    module = make(3, ndim, dropout=0.25)
    with torch.no_grad():  # content is one everywhere, every kernel the mean, W the identity
        for parameter in module.parameters():
            parameter.zero_()
        module.input_proj.bias[:DIM] = 2.0
        module.out_proj.weight.copy_(torch.eye(DIM))
    size = (400,) if ndim == 1 else (40, 40)
    x = draw(*size, batch=1)
    inside = (slice(None), slice(1, -1)) if ndim == 1 else (..., slice(1, -1), slice(1, -1))
    taps = 3**ndim
    kept = module(x)[inside] * 0.75 * taps
    torch.testing.assert_close(kept, kept.round())  # each of the taps is 0 or 1 / (taps * 0.75)
    assert set(kept.round().int().unique().tolist()) >= {taps - 3, taps - 2, taps - 1, taps}
    assert kept.mean().item() / taps == pytest.approx(0.75, abs=0.03)
    by_group = kept.movedim(1, -1) if ndim == 2 else kept
    by_group = by_group.unflatten(-1, (GROUPS, -1))
    assert torch.equal(by_group[..., 0].round(), by_group[..., 1].round())  # the kernel is dropped, not the channel
    assert not torch.equal(by_group[..., 0, 0].round(), by_group[..., 1, 0].round())
    module.eval()
    torch.testing.assert_close(module(x)[inside], torch.ones_like(kept))


@pytest.mark.parametrize("size", [(9,), (5, 4)])
def test_blocks_that_are_recomputed_drop_the_same_elements_again(size, pieces, monkeypatch):
    module = make(3, len(size), dropout=0.5)
    x = draw(*size)
    grad = torch.randn_like(x)
    torch.manual_seed(7)
    actual = results(module, x, grad)
    monkeypatch.setattr(dynamic, "checkpoint", lambda block, start, stop, **_: block(start, stop))
    torch.manual_seed(7)
    assert_same(actual, results(module, x, grad))


@pytest.mark.parametrize("size", [(40,), (9, 11)])
def test_bfloat16_autocast_stays_near_float32(size):
    module = make(5, len(size), dim=32, groups=4, dtype=torch.float32)
    x = draw(*size, dim=32, dtype=torch.float32)
    grad = torch.randn_like(x)
    expected = results(module, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    actual = [y, *torch.autograd.grad(y, (x, *module.parameters()), grad.bfloat16())]
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() / b.norm() < 0.02
    assert all(a.dtype == torch.float32 for a in actual[1:])
    half = make(5, len(size), dim=32, groups=4, dtype=torch.bfloat16)
    half.load_state_dict(module.state_dict())
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - expected[0]).norm() / expected[0].norm() < 0.02


@pytest.mark.parametrize(("ndim", "whole"), [(1, False), (2, True)])
def test_compiles_into_one_graph(ndim, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(dynamic, "KERNEL_ELEMENTS", 10)
        monkeypatch.setattr(dynamic, "BLOCK_ELEMENTS", 80)  # two blocks
    module = make(3, ndim)
    x = draw(*(7,) if ndim == 1 else (5, 4))
    mask = padding(*(7,) if ndim == 1 else (5, 4))
    grad = torch.randn_like(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x, key_padding_mask=mask)
    actual = [y, *torch.autograd.grad(y, (x, *module.parameters()), grad)]
    assert_same(actual, results(module, x, grad, key_padding_mask=mask))


def test_the_operator_of_maps_keeps_the_rules_of_torch():
    kernel = torch.rand(2, 3, 3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 3, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.lightning_attn.dynamic_taps.default, (kernel, value, -1))


def test_channels_last_maps():
    module = make(3, 2)
    x = draw(5, 4)
    torch.testing.assert_close(module(x.contiguous(memory_format=torch.channels_last)), module(x))


@pytest.mark.parametrize("ndim", [1, 2])
def test_empty_batches_and_inputs(ndim):
    module = make(5, ndim)
    x = draw(*(4,) if ndim == 1 else (3, 4), batch=0)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())
    nothing = draw(*(0,) if ndim == 1 else (0, 4))
    assert module(nothing).shape == nothing.shape


@pytest.mark.parametrize("size", [(9,), (5, 6)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinite_input_reach_their_own_sample_only(size, bad):
    module = make(3, len(size))
    x = draw(*size).detach()
    x[0, 4] = bad
    y = module(x)
    assert y[0].isnan().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("size", [(9,), (5, 6)])
def test_huge_preferences_pick_one_position(size):
    module = make(3, len(size), dtype=torch.float32)
    with torch.no_grad():
        module.kernel_proj.weight.mul_(1e6)
    x = draw(*size, dtype=torch.float32)
    actual = results(module, x, torch.ones_like(x))
    assert all(result.isfinite().all() for result in actual)
    # One tap with the weight 1 is the same as all of them with the preferences that float64 gives.
    torch.testing.assert_close(actual[0].double(), module.double()(x.double()), rtol=1e-4, atol=1e-4)


MEMORY = """
import resource, sys, torch
from lightning_attn.attention import dynamic
def peak():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
torch.set_num_threads(1)
dynamic.KERNEL_ELEMENTS, dynamic.BLOCK_ELEMENTS = 1 << 21, 1 << 20  # an eighth: a smaller map will do
module = dynamic.DynamicConv(64, 31, 16, 2)
module(torch.randn(1, 64, 4, 4, requires_grad=True)).sum().backward()
x = torch.randn(1, 64, 30, 30, requires_grad=True)
before = peak()
module(x).sum().backward()
print(peak() - before)
"""


def test_memory_holds_neither_the_unfolded_input_nor_all_kernels():
    pytest.importorskip("resource", reason="peak memory is measured with getrusage")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True)
    kernels, unfolded_input = 30 * 30 * 16 * 961 * 4, 30 * 30 * 64 * 961 * 4  # bytes: 55 and 221 MB
    increase = int(run.stdout)
    assert increase < kernels < unfolded_input


def test_parameters_have_the_promised_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in DynamicConv(32, 5, 16, 2).named_parameters()}
    assert shapes == {
        "input_proj.weight": (64, 32),
        "input_proj.bias": (64,),
        "kernel_proj.weight": (16 * 25, 32),
        "out_proj.weight": (32, 32),
        "out_proj.bias": (32,),
    }
    assert "groups=16" in repr(DynamicConv(32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 4}, r"kernel_size must be odd.*got 4: use 3 or 5"),
        ({"kernel_size": 0}, r"kernel_size must be an integer of at least 1, got 0"),
        ({"kernel_size": 3.0}, r"kernel_size must be an integer.*got 3\.0"),
        ({"dim": 0}, r"dim must be an integer of at least 1, got 0"),
        ({"groups": 4}, r"groups=4 does not divide dim=6: use .*\[1, 2, 3, 6\], or a width that is a multiple of 4"),
        ({"ndim": 3}, r"ndim must be 1 \(sequences\) or 2 \(maps\), got 3"),
        ({"ndim": 2, "causal": True}, r"causal=True is for sequences \(ndim=1\).*set causal=False"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0; use 0\.0 for no dropout"),
        ({"algorithm": "taps"}, r"algorithm must be one of \['auto', 'band', 'reference'\] for ndim=1, got 'taps'"),
        (
            {"algorithm": "fast", "ndim": 2},
            r"algorithm must be one of \['auto', 'triton', 'taps', 'reference'\] for ndim=2",
        ),
    ],
)
def test_errors_of_the_constructor(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicConv(**({"dim": DIM, "groups": GROUPS} | settings))


@pytest.mark.parametrize(
    ("ndim", "size", "message"),
    [
        (1, (2, 5, 5), r"x must be \[B, L, C\] with C = dim = 6, got shape \(2, 5, 5\)"),
        (1, (2, 6, 5, 5), r"x must be \[B, L, C\] for ndim=1, got 4 dimensions, shape \(2, 6, 5, 5\)"),
        (2, (2, 5, 6), r"x must be \[B, C, H, W\] for ndim=2, got 3 dimensions"),
        (2, (2, 5, 6, 6), r"x must be \[B, C, H, W\] with C = dim = 6, got shape \(2, 5, 6, 6\)"),
    ],
)
def test_errors_of_shapes(ndim, size, message):
    with pytest.raises(ValueError, match=message):
        make(ndim=ndim)(torch.zeros(size, dtype=torch.float64))


def test_errors_of_dtypes_masks_and_caches():
    module, image, causal = make(), make(ndim=2), make(causal=True)
    x = draw(4)
    with pytest.raises(ValueError, match=r"x must be of a floating-point type, got torch\.int64"):
        module(torch.zeros(2, 4, DIM, dtype=torch.long))
    with pytest.raises(ValueError, match=r"key_padding_mask must have the shape \(2, 4\) of x, got \(2, 5\)"):
        module(x, key_padding_mask=padding(5))
    with pytest.raises(ValueError, match=r"key_padding_mask must have the shape \(2, 3, 4\) of x, got \(2, 12\)"):
        image(draw(3, 4), key_padding_mask=padding(12))
    with pytest.raises(ValueError, match=r"key_padding_mask must be bool, True where padded, got torch\.float32"):
        module(x, key_padding_mask=torch.zeros(2, 4))
    for other in (module, image):
        with pytest.raises(ValueError, match=r"new_cache: only a causal sequence.*ndim=1 and causal=True"):
            other.new_cache()
    cache = causal.new_cache()
    with pytest.raises(ValueError, match=r"only a causal sequence can be decoded step by step"):
        module(x, cache=cache)
    with pytest.raises(ValueError, match=r"key_padding_mask: a sequence that is decoded step by step has no padding"):
        causal(x, key_padding_mask=padding(4), cache=cache)
    causal(x, cache=cache)
    with pytest.raises(ValueError, match=r"x has batch size 3, the cache has 2"):
        causal(draw(1, batch=3), cache=cache)
    literal = make(causal=True, algorithm="reference")
    with pytest.raises(ValueError, match=r"algorithm='reference' supports no cache; use algorithm='auto'"):
        literal(x, cache=literal.new_cache())


def fairseq(module: DynamicConv, x: Tensor) -> Tensor:
    """fairseq's DynamicConv1dTBC in its expanded form, between the projections of its layer; here batch comes first.

    The kernels of T queries, each shifted by one against the last, are a T x (T + K - 1) band; what lies outside of the
    sentence is cut off it before the softmax (`renorm_padding`) or after it.
    """
    batch, length, _ = x.shape
    heads, size = module.groups, module.kernel_size
    content = F.glu(module.input_proj(x), dim=-1)
    weight = module.kernel_proj(content).view(batch, length, heads, size)
    if not module.renorm_padding and module.weight_softmax:
        weight = weight.softmax(-1)
    left = size - 1 if module.causal else size // 2
    empty = -torch.inf if module.renorm_padding else 0.0
    band = weight.new_full((batch, heads, length, length + size - 1), empty)
    for query in range(length):
        band[:, :, query, query : query + size] = weight[:, query]
    band = band[..., left : left + length]
    if module.renorm_padding:
        band = band.softmax(-1)
    values = content.view(batch, length, heads, -1).transpose(1, 2)
    out = (band @ values).transpose(1, 2).flatten(2)
    return module.out_proj(out if module.conv_bias is None else out + module.conv_bias)


OPTIONS = [
    {"weight_softmax": False},
    {"conv_bias": True},
    {"renorm_padding": True},
    {"renorm_padding": True, "conv_bias": True},
    {"weight_softmax": False, "conv_bias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel_size", [3, 9])
def test_options_are_those_of_fairseq(options, causal, kernel_size):
    module = make(kernel_size, causal=causal, **options)
    x = draw(7)
    grad = torch.randn_like(x)
    expected = fairseq(module, x)
    wanted = [expected, *torch.autograd.grad(expected, (x, *module.parameters()), grad)]
    assert_same(results(module, x, grad), wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("size", "causal"), [((7,), False), ((7,), True), ((3, 4), False)])
@pytest.mark.parametrize("whole", [True, False])
def test_options_are_those_of_the_definition(options, size, causal, whole, request):
    if not whole:
        request.getfixturevalue("pieces")
    module = make(3, len(size), causal=causal, **options)
    x, mask = draw(*size), padding(*size)
    grad = torch.randn_like(x)
    for padded in (None, mask):
        module.algorithm = "auto"
        actual = results(module, x, grad, key_padding_mask=padded)
        module.algorithm = "reference"
        assert_same(actual, results(module, x, grad, key_padding_mask=padded))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [[1] * 9, [2, 5, 1, 1], [9]])
def test_options_decode_as_the_full_pass(options, steps):
    module = make(5, causal=True, **options)
    x = draw(9).detach()
    cache = module.new_cache()
    with torch.no_grad():
        found = torch.cat([module(piece, cache=cache) for piece in x.split(steps, dim=1)], dim=1)
        torch.testing.assert_close(found, module(x))


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="renorm_padding=True needs weight_softmax=True"):
        make(weight_softmax=False, renorm_padding=True)
    with pytest.raises(ValueError, match="conv_bias must be True or False, got 1"):
        make(conv_bias=1)
    module = make(dropout=0.2, algorithm="reference")
    with pytest.raises(ValueError, match=r"algorithm='reference' has no dropout, got dropout=0\.2"):
        module.train()(draw(4))
    module.eval()(draw(4))


def test_batches_and_sentences_of_nothing():
    for ndim, shape in ((1, (0, 5, DIM)), (1, (2, 0, DIM)), (2, (0, DIM, 3, 4)), (2, (2, DIM, 0, 4))):
        for algorithm in ("auto", "reference"):
            x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            y = make(ndim=ndim, algorithm=algorithm)(x)
            assert y.shape == shape
            y.sum().backward()
