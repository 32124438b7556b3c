"""TransformerAttention against the literal definition: numbers, gradients, decoding, limits and errors."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - torch has no public name
from torch.utils._pytree import tree_leaves  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention import GatedResidual, TransformerAttention, reference
from lightning_attn.attention.spec import TERM_SETS

WITH_POSITION = [terms for terms in TERM_SETS if terms[1] == "1" or terms[3] == "1"]
SHAPES = {"sentence": (6,), "square": (3, 3), "oblong": (2, 4)}
KEY_SHAPES = {"sentence": (7,), "square": (2, 2), "oblong": (3, 2)}  # of another set, in encoder-decoder attention
DIM, HEADS = 8, 2


def randomise(module: nn.Module, spread: float = 0.5) -> nn.Module:
    """Gives every parameter, also those that start at zero, random values."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=spread)
    return module


def make(terms="1111", ndim=1, dim=DIM, num_heads=HEADS, dtype=torch.float64, spread=0.5, **settings):
    attention = TransformerAttention(dim, num_heads, terms, ndim, **settings)
    return randomise(attention.to(dtype), spread)


def draw(size, batch=2, dim=DIM, dtype=torch.float64):
    """Random content: a sentence `[B, L, C]` or a map `[B, C, H, W]`."""
    return (
        torch.randn(batch, *size, dim, dtype=dtype) if len(size) == 1 else torch.randn(batch, dim, *size, dtype=dtype)
    )


def padding(size, batch=2):
    """The first sample whole, the second with the key at the origin and some others padded."""
    mask = torch.zeros(batch, math.prod(size), dtype=torch.bool)
    mask[1, [0, 2, -1]] = True
    return mask.view(batch, *size)


def literal(attention: TransformerAttention, query, key=None, *, key_padding_mask=None, causal=None):
    """The definition with the parameters and settings of the module; padding counts as zero, as query too."""
    if key is None and key_padding_mask is not None:
        query = query.masked_fill(key_padding_mask.unsqueeze(-1 if query.dim() == 3 else 1), 0.0)
    return reference.transformer_attention(
        query,
        query if key is None else key,
        reference.parameters_of(attention),
        num_heads=attention.num_heads,
        terms=attention.terms,
        scale=attention.scale,
        window=attention.window,
        kv_stride=attention.kv_stride,
        causal=attention.causal if causal is None else causal,
        key_padding_mask=key_padding_mask,
    )


def expected_names(terms: str) -> set[str]:
    e1, e2, e3, e4 = (bit == "1" for bit in terms)
    wanted = {
        "query_proj.weight": e1 or e2,
        "key_proj.weight": e1 or e3,
        "position_proj.weight": e2 or e4,
        "key_bias": e3,
        "position_bias": e4,
        "value_proj.weight": True,
        "out_proj.weight": True,
        "out_proj.bias": True,
    }
    return {name for name, on in wanted.items() if on}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def error_norm(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def dense(attention: TransformerAttention, query, key=None, *, hidden=None):
    """Eq. 2 with whole N x N tensors, a float64 module's, for sizes at which the definition takes too long."""
    key = query if key is None else key
    p = reference.parameters_of(attention)
    heads, ndim, stride = attention.num_heads, attention.ndim, attention.kv_stride

    def split(x, weight):
        return F.linear(x, weight).unflatten(-1, (heads, -1)).transpose(1, 2)

    if ndim == 1:
        z, x = query.double(), key.double()[:, ::stride]
        sizes, key_sizes = (query.shape[1],), (key.shape[1],)
    else:
        z, x = query.double().flatten(2).mT, key.double()[:, :, ::stride, ::stride].flatten(2).mT
        sizes, key_sizes = query.shape[2:], key.shape[2:]
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, ndim)
    key_places = torch.cartesian_prod(*(torch.arange(0, size, stride) for size in key_sizes)).view(-1, ndim)
    energy = torch.zeros((), dtype=torch.float64)
    if p.query_weight is not None:
        u_z = split(z, p.query_weight)
    if p.key_weight is not None:
        v_x = split(x, p.key_weight)
    if attention.terms[0] == "1":
        energy = energy + u_z @ v_x.mT
    if attention.terms[2] == "1":
        energy = energy + (p.key_bias[:, None] * v_x).sum(-1)[:, :, None]
    if p.position_weight is not None:
        offsets = (key_places[None] - places[:, None]).flip(-1)  # [Nq, Nk, (x, y)]
        span = max(*sizes, *key_sizes)
        zero = (0,) * (ndim - 1)
        # One axis at a time: the features of the other axes are left out.
        width = attention.dim // ndim
        table = torch.stack([reference.relative_encoding((o, *zero), attention.dim) for o in range(-span, span + 1)])
        encoding = torch.cat([table[offsets[..., axis] + span][..., :width] for axis in range(ndim)], dim=-1)
        v_r = F.linear(encoding, p.position_weight).unflatten(-1, (heads, -1))  # [Nq, Nk, M, d]
        asking = torch.zeros(1, heads, len(places), attention.head_dim, dtype=torch.float64)
        if attention.terms[1] == "1":
            asking = asking + u_z
        if attention.terms[3] == "1":
            asking = asking + p.position_bias[:, None]
        energy = energy + torch.einsum("bmqd,qkmd->bmqk", asking, v_r) / math.sqrt(ndim)
    energy = energy * attention.scale
    if hidden is not None:
        energy = energy.masked_fill(hidden, -torch.inf)
    pooled = energy.softmax(-1) @ split(x, p.value_weight)
    pooled = pooled.expand(query.shape[0], heads, len(places), -1).transpose(1, 2).flatten(2)
    out = F.linear(pooled, p.out_weight, p.out_bias)
    return out if ndim == 1 else out.mT.unflatten(-1, sizes)


# --- The numbers of the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["self", "causal", "cross"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("terms", TERM_SETS)
def test_values_and_gradients_are_those_of_the_definition(terms, shape, mode):
    size = SHAPES[shape]
    key_size = KEY_SHAPES[shape] if mode == "cross" else size
    for pad, stride, window in itertools.product([False, True], [1, 2], [None, 3]):
        attention = make(terms, len(size), kv_stride=stride, window=window, causal=mode == "causal", scale=0.7)
        mask = padding(key_size) if pad else None
        inputs = [draw(size)] + ([draw(key_size)] if mode == "cross" else [])
        variables = [*(x.requires_grad_() for x in inputs), *attention.parameters()]
        names = ["query", "key"][: len(inputs)] + [name for name, _ in attention.named_parameters()]

        actual = attention(*inputs, key_padding_mask=mask)
        expected = literal(attention, *inputs, key_padding_mask=mask)
        direction = torch.randn_like(expected)
        where = f"padding={pad} kv_stride={stride} window={window}"
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text, w=where: f"{w}: {text}")
        actual_gradients = torch.autograd.grad(actual, variables, direction, materialize_grads=True)
        expected_gradients = torch.autograd.grad(expected, variables, direction, materialize_grads=True)
        for name, a, e in zip(names, actual_gradients, expected_gradients, strict=True):
            torch.testing.assert_close(
                a, e, rtol=1e-9, atol=1e-9, msg=lambda text, w=f"{where}: gradient of {name}": f"{w}: {text}"
            )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_gated_residual_is_x_plus_gamma_times_the_definition(terms, causal):
    residual = GatedResidual(TransformerAttention(DIM, HEADS, terms, ndim=2, causal=causal)).double()
    x = draw((2, 3)).requires_grad_()
    torch.testing.assert_close(residual(x), x)  # gamma starts at zero
    assert residual.gamma.shape == ()
    randomise(residual)
    mask = padding((2, 3))
    actual = residual(x, key_padding_mask=mask)
    expected = x + residual.gamma * literal(residual.attention, x, key_padding_mask=mask, causal=causal)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(x)
    variables = [x, *residual.parameters()]
    for a, e in zip(
        torch.autograd.grad(actual, variables, direction),
        torch.autograd.grad(expected, variables, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dim", "num_heads"), [(12, 1), (12, 3), (12, 4), (12, 12)])
@pytest.mark.parametrize("size", [(5,), (2, 3)])
def test_any_number_of_heads_that_divides_the_width(dim, num_heads, size):
    attention = make("1111", len(size), dim, num_heads)
    x = draw(size, dim=dim)
    torch.testing.assert_close(attention(x), literal(attention, x))


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("shape", ["sentence", "oblong"])
def test_energies_and_weights_are_those_of_the_definition(terms, shape):
    size, key_size = SHAPES[shape], KEY_SHAPES[shape]
    for stride, window, causal in itertools.product([1, 2], [None, 3], [False, True]):
        attention = make(terms, len(size), kv_stride=stride, window=window, scale=0.7)
        query, key, mask = draw(size), draw(key_size), padding(key_size)
        expected = reference.term_energies(
            query,
            key,
            reference.parameters_of(attention),
            num_heads=HEADS,
            terms=terms,
            scale=0.7,
            kv_stride=stride,
        )
        energies = attention.energies(query, key)
        assert list(energies) == list(expected)
        for name, energy in expected.items():
            assert energies[name].shape == energy.shape
            torch.testing.assert_close(energies[name], energy)
        regions = reference.supporting_keys(
            query, key, window=window, kv_stride=stride, causal=causal, key_padding_mask=mask
        )
        weights = attention.weights(query, key, key_padding_mask=mask, causal=causal)
        torch.testing.assert_close(weights, reference.normalised_weights(expected, regions))


def test_weights_and_energies_of_self_attention_need_no_key():
    attention, x = make(causal=True), draw((5,))
    torch.testing.assert_close(attention.weights(x), attention.weights(x, x, causal=True))
    torch.testing.assert_close(attention.energies(x), attention.energies(x, x))
    assert attention.weights(x).triu(1).abs().max() == 0
    assert attention.weights(x, causal=False).min() > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("terms", TERM_SETS)
def test_float32_is_within_1e_5_of_the_definition(terms, shape):
    size = SHAPES[shape]
    attention = make(terms, len(size), 16, 4, torch.float32, spread=0.3)
    x = draw(size, dim=16, dtype=torch.float32).requires_grad_()
    actual = attention(x)
    direction = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, [x, *attention.parameters()], direction)
    exact = copy.deepcopy(attention).double()
    wide = x.detach().double().requires_grad_()
    expected = literal(exact, wide)
    expected_gradients = torch.autograd.grad(expected, [wide, *exact.parameters()], direction.double())
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(gradients[0], expected_gradients[0]) < 1e-5


@pytest.mark.parametrize("shape", ["sentence", "square"])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_bfloat16_autocast_stays_within_its_rounding(terms, shape):
    size = SHAPES[shape]
    attention = make(terms, len(size), 32, 4, torch.float32, spread=0.15)
    x = draw(size, dim=32, dtype=torch.float32).requires_grad_()
    expected = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = attention(x)
    # Energies of up to 8 with 8 bits, exponentiated, and four products on the way: a few units of 2^-8.
    assert error_norm(actual, expected) < 4 * 2**-8
    direction = torch.randn_like(expected)
    variables = [x, *attention.parameters()]
    gradients = torch.autograd.grad(actual, variables, direction.to(actual.dtype))
    for a, e in zip(gradients, torch.autograd.grad(expected, variables, direction), strict=True):
        assert a.dtype == torch.float32
        assert error_norm(a, e) < 10 * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["sentence", "square"])
@pytest.mark.parametrize("terms", ["1111", "0011", "0010", "0100"])
def test_a_whole_module_in_half_precision(terms, shape, dtype):
    size = SHAPES[shape]
    attention = make(terms, len(size), 32, 4, torch.float32, spread=0.15, causal=True)
    x, mask = draw(size, dim=32, dtype=torch.float32), padding(size)
    mask[1] = True
    half = copy.deepcopy(attention).to(dtype)
    y = half(x.to(dtype), key_padding_mask=mask)
    assert y.dtype == dtype
    assert error_norm(y, attention(x, key_padding_mask=mask)) < 8 * torch.finfo(dtype).eps
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.parametrize("terms", WITH_POSITION)
@pytest.mark.parametrize("size", [(600,), (2, 300)])
def test_positions_keep_their_phase_in_half_precision(terms, size):
    # bfloat16 holds no odd number above 256, float16 none above 2048: encoded in them, far offsets lose their phase.
    attention = make(terms, len(size), dtype=torch.float32, spread=0.4)
    x = draw(size, batch=1, dtype=torch.float32)
    names = [name for name in ("E2", "E4") if terms[int(name[1]) - 1] == "1"]
    expected = attention.energies(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = attention.energies(x)
    whole = copy.deepcopy(attention).bfloat16().energies(x.bfloat16())
    for name in names:
        assert relative_error(autocast[name], expected[name]) < 4 * 2**-8
        assert relative_error(whole[name], expected[name]) < 6 * 2**-8


def test_float32_positions_stay_within_1e_5_over_a_long_sentence():
    attention = make("0101", dtype=torch.float32)
    x = draw((700,), batch=1, dtype=torch.float32)
    exact = copy.deepcopy(attention).double().energies(x.double())
    for name, energy in attention.energies(x).items():
        assert relative_error(energy, exact[name]) < 1e-5


@pytest.mark.parametrize(
    ("terms", "ndim", "settings"),
    [
        ("1111", 1, {}),
        ("1111", 2, {}),
        ("0110", 1, {"causal": True}),
        ("0101", 1, {"kv_stride": 2}),
        ("0011", 2, {"window": 3}),
        ("0010", 1, {}),
        ("1001", 2, {"kv_stride": 2, "window": 3}),
    ],
)
def test_gradcheck(terms, ndim, settings):
    attention = make(terms, ndim, 4, 2, **settings)
    size = (3,) if ndim == 1 else (2, 2)
    query, key = (draw(size, dim=4).requires_grad_() for _ in range(2))
    mask = torch.zeros(2, *size, dtype=torch.bool)
    mask[1].view(-1)[1] = True
    names, values = zip(*attention.named_parameters(), strict=True)

    def call(query, key, *values):
        return torch.func.functional_call(
            attention, dict(zip(names, values, strict=True)), (query, key), {"key_padding_mask": mask}
        )

    assert torch.autograd.gradcheck(call, (query, key, *values))


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_exactly_the_needed_parameters_exist_and_each_gets_a_gradient(terms, ndim):
    attention = TransformerAttention(DIM, HEADS, terms, ndim)  # as initialised
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert set(shapes) == expected_names(terms)
    for name, shape in shapes.items():
        assert shape == {"key_bias": (HEADS, DIM // HEADS), "position_bias": (HEADS, DIM // HEADS)}.get(
            name, (DIM,) if name == "out_proj.bias" else (DIM, DIM)
        )
    assert not list(attention.buffers())
    attention(draw((5,) if ndim == 1 else (2, 3), dtype=torch.float32)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_call_leaves_its_inputs_alone_and_repeats():
    attention, x, mask = make(), draw((6,)), padding((6,))
    before = x.clone(), mask.clone(), copy.deepcopy(attention.state_dict())
    first = attention(x, key_padding_mask=mask)
    assert torch.equal(attention(x, key_padding_mask=mask), first)
    assert torch.equal(x, before[0])
    assert torch.equal(mask, before[1])
    assert all(torch.equal(value, before[2][name]) for name, value in attention.state_dict().items())


def test_strided_views_are_read_right():
    attention = make("1111", 2)
    wide = draw((4, 6))
    for view in (wide[:, :, ::2, 1:4], wide.transpose(2, 3), wide.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(attention(view), attention(view.clone(memory_format=torch.contiguous_format)))


# --- One step at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERM_SETS)
def test_decoding_step_by_step_equals_the_causal_pass(terms):
    for stride, window, steps in itertools.product([1, 2, 3], [None, 3], [[1] * 9, [3, 1, 2, 1, 2], [1, 3, 5], [9]]):
        attention = make(terms, kv_stride=stride, window=window, causal=True)
        x = draw((9,))
        cache = attention.new_cache()
        pieces = [attention(piece, cache=cache) for piece in x.split(steps, dim=1)]
        where = f"kv_stride={stride} window={window} steps={steps}"
        torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x), msg=lambda text, w=where: f"{w}: {text}")


@pytest.mark.parametrize("terms", TERM_SETS)
def test_decoding_against_a_memory_equals_the_full_pass(terms):
    for stride, window, pad in itertools.product([1, 2], [None, 3], [False, True]):
        attention = make(terms, kv_stride=stride, window=window)
        x, memory = draw((6,)), draw((7,))
        mask = padding((7,)) if pad else None
        expected = attention(x, memory, key_padding_mask=mask)
        for steps in ([1] * 6, [1, 3, 2]):
            cache = attention.new_cache(memory, key_padding_mask=mask)
            pieces = [attention(piece, cache=cache) for piece in x.split(steps, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("terms", ["1111", "0011", "0010", "0100"])
def test_decoding_many_steps(terms):
    # Long enough for any table that is made ahead to be made again.
    own, other = make(terms, causal=True), make(terms)
    x, memory = draw((70,)), draw((5,))
    cache, memory_cache = own.new_cache(), other.new_cache(memory)
    tokens = x.split(1, dim=1)
    torch.testing.assert_close(torch.cat([own(token, cache=cache) for token in tokens], dim=1), own(x))
    steps = [other(token, cache=memory_cache) for token in tokens]
    torch.testing.assert_close(torch.cat(steps, dim=1), other(x, memory))


@pytest.mark.parametrize("terms", TERM_SETS)
def test_a_reordered_cache_goes_on_as_the_chosen_rows(terms):
    attention = make(terms, causal=True)
    x, memory, mask = draw((5,), batch=3), draw((4,), batch=3), torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 2] = mask[2, 0] = True
    cross_attention = copy.deepcopy(attention)
    cross_attention.causal = False
    own, cross = attention.new_cache(), cross_attention.new_cache(memory, key_padding_mask=mask)
    attention(x[:, :3], cache=own)
    cross_attention(x[:, :3], cache=cross)
    index = torch.tensor([2, 2, 0, 1])
    own.reorder(index)
    cross.reorder(index)
    chosen = torch.cat([x[index, :3], draw((2,), batch=4)], dim=1)
    torch.testing.assert_close(attention(chosen[:, 3:], cache=own), attention(chosen)[:, 3:])
    expected = cross_attention(chosen, memory[index], key_padding_mask=mask[index])
    torch.testing.assert_close(cross_attention(chosen[:, 3:], cache=cross), expected[:, 3:])


def test_decoding_in_float32_and_without_gradients_keeps_the_numbers():
    attention = make(dtype=torch.float32, causal=True).eval()
    x = draw((12,), dtype=torch.float32)
    cache = attention.new_cache()
    with torch.inference_mode():
        pieces = [attention(x[:, t : t + 1], cache=cache) for t in range(12)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("terms", ["1111", "0011", "0010", "0101"])
def test_decoding_under_autocast_stays_within_its_rounding(terms):
    attention = make(terms, causal=True, dtype=torch.float32, spread=0.3)
    x = draw((12,), dtype=torch.float32)
    cache = attention.new_cache()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pieces = [attention(x[:, t : t + 1], cache=cache) for t in range(12)]
    assert error_norm(torch.cat(pieces, dim=1), attention(x)) < 4 * 2**-8


def test_misuse_of_a_cache_is_refused():
    attention, x = make(causal=True), draw((3,))
    with pytest.raises(ValueError, match=r"cache.*no key or key_padding_mask"):
        attention(x, x, cache=attention.new_cache())
    with pytest.raises(ValueError, match=r"cache.*no key or key_padding_mask"):
        attention(x, key_padding_mask=padding((3,)), cache=attention.new_cache())
    with pytest.raises(ValueError, match=r"cache.*no attention_mask"):
        attention(x, attention_mask=torch.zeros(3, 3, dtype=torch.bool), cache=attention.new_cache())
    with pytest.raises(ValueError, match="cache: another module created it"):
        make(causal=True)(x, cache=attention.new_cache())
    with pytest.raises(ValueError, match="causal=False: with a cache self-attention is always causal"):
        attention(x, cache=attention.new_cache(), causal=False)
    with pytest.raises(ValueError, match=r"new_cache: only causal self-attention .*causal=True, or pass the memory"):
        make().new_cache()
    with pytest.raises(ValueError, match=r"new_cache.*ndim=1"):
        make(ndim=2).new_cache()
    with pytest.raises(ValueError, match=r"memory must be \[B, L, C\] with C = dim = 8, got shape \(2, 3, 5\)"):
        attention.new_cache(torch.zeros(2, 3, 5).double())
    with pytest.raises(ValueError, match=r"key_padding_mask.*\(2, 3\).*\(2, 4\)"):
        attention.new_cache(x, key_padding_mask=padding((4,)))
    with pytest.raises(ValueError, match=r"key_padding_mask.*memory"):
        attention.new_cache(key_padding_mask=padding((3,)))  # nothing that it could be the mask of
    with pytest.raises(ValueError, match=r"batch.*1.*2|batch.*2.*1"):
        attention(x[:1, :1], cache=attention.new_cache(x))  # not broadcast without a word
    cache = attention.new_cache()
    attention(x, cache=cache)
    with pytest.raises(ValueError, match=r"batch.*1.*2|batch.*2.*1"):
        attention(x[:1, :1], cache=cache)


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_a_sample_that_is_padded_whole_gives_the_bias_and_finite_gradients(terms, ndim):
    size = (5,) if ndim == 1 else (2, 3)
    attention = make(terms, ndim, dtype=torch.float32)
    x = draw(size, dtype=torch.float32).requires_grad_()
    mask = torch.zeros(2, *size, dtype=torch.bool)
    mask[1] = True
    y = attention(x, key_padding_mask=mask)
    alone = attention(x[:1])
    torch.testing.assert_close(y[:1], alone)
    torch.testing.assert_close(y[1].movedim(-1 if ndim == 1 else 0, -1), attention.out_proj.bias.expand(*size, DIM))
    assert attention.weights(x, key_padding_mask=mask)[1].abs().max() == 0
    y.square().sum().backward()
    for value in (x, *attention.parameters()):
        assert value.grad.isfinite().all()
    assert x.grad[1].abs().max() == 0
    assert x.grad[0].abs().max() > 0


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_energies_of_hundreds_stay_right_and_finite(terms, ndim):
    size = (6,) if ndim == 1 else (3, 3)
    attention = make(terms, ndim)
    x = draw(size)
    with torch.no_grad():
        largest = max(energy.abs().max().item() for energy in attention.energies(x).values())
        attention.scale *= 200 / largest
    assert max(energy.abs().max().item() for energy in attention.energies(x).values()) == pytest.approx(200)
    exact = literal(attention, x)
    x32 = x.float().requires_grad_()
    attention32 = copy.deepcopy(attention).float()
    y = attention32(x32)
    # float32 holds an energy of 200 to 1.5e-5, and four of them add up to one exponent.
    assert relative_error(y, exact) < 1e-3
    torch.testing.assert_close(attention(x), exact, rtol=1e-8, atol=1e-8)
    y.sum().backward()
    for value in (x32, *attention32.parameters()):
        assert value.grad.isfinite().all()
    mask = padding(size)
    torch.testing.assert_close(
        attention(x, key_padding_mask=mask, causal=True),
        literal(attention, x, key_padding_mask=mask, causal=True),
        rtol=1e-8,
        atol=1e-8,
    )


def test_the_visible_keys_may_all_be_far_below_the_hidden_ones():
    # The largest energy belongs to a key that is padded: subtracting it would make every other weight vanish.
    attention = make("0010", dtype=torch.float32)
    with torch.no_grad():
        attention.key_proj.weight.copy_(torch.eye(DIM))
        attention.key_bias.fill_(1.0)
    x = draw((5,), batch=1, dtype=torch.float32)
    x[0, 2] = 200.0
    mask = torch.tensor([[False, False, True, False, False]])
    expected = dense(copy.deepcopy(attention).double(), x, hidden=mask[:, None, None])
    assert relative_error(attention(x, key_padding_mask=mask), expected) < 1e-5


def test_nan_stays_in_its_row():
    for terms in TERM_SETS:
        attention = make(terms)
        query, key = draw((4,)), draw((5,))
        clean = attention(query, key)
        query[0, 1] = torch.nan
        y = attention(query, key)
        touched = torch.zeros(2, 4, dtype=torch.bool)
        touched[0, 1] = terms[0] == "1" or terms[1] == "1"  # without E1 and E2 the query's content is not read
        assert y.isnan().any(-1).equal(touched), terms
        assert torch.equal(y[~touched], clean[~touched])
        own = attention(query)  # as keys, the NaN reaches every query of its sample, and of no other
        assert own[0].isnan().all()
        assert own[1].isfinite().all()


@pytest.mark.parametrize("terms", TERM_SETS)
def test_the_smallest_inputs(terms):
    sentence, image = make(terms), make(terms, 2)
    for attention, size in ((sentence, (1,)), (image, (1, 1)), (image, (1, 4)), (image, (3, 1))):
        for stride in (1, 2):
            attention.kv_stride = stride
            x, key = draw(size), draw(tuple(s + 1 for s in size))
            torch.testing.assert_close(attention(x), literal(attention, x))
            torch.testing.assert_close(attention(x, key), literal(attention, x, key))
            torch.testing.assert_close(attention(key, x), literal(attention, key, x))


@pytest.mark.parametrize("terms", TERM_SETS)
def test_nothing_in_nothing_out(terms):
    sentence, image = make(terms), make(terms, 2)
    for attention, shape in (
        (sentence, (0, 5, DIM)),
        (sentence, (2, 0, DIM)),
        (image, (0, DIM, 2, 3)),
        (image, (2, DIM, 0, 3)),
        (image, (2, DIM, 2, 0)),
    ):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = attention(x)
        assert y.shape == shape
        y.sum().backward()  # an optimiser step after an empty batch must not fail, as on a rank without samples
    x = draw((3,))
    torch.testing.assert_close(sentence(x, x[:, :0]), sentence.out_proj.bias.expand(2, 3, DIM))
    torch.testing.assert_close(
        image(draw((2, 3)), draw((0, 3))), image.out_proj.bias[:, None, None].expand(2, DIM, 2, 3)
    )


@pytest.mark.parametrize("settings", [{}, {"kv_stride": 2}, {"causal": True}], ids=str)
@pytest.mark.parametrize("size", [(700,), (24, 30)])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_long_inputs_in_blocks_equal_a_dense_computation(terms, size, settings):
    attention = make(terms, len(size), spread=0.4, **settings)
    x = draw(size, batch=1).requires_grad_()
    count = math.prod(size)
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1) if attention.causal else None
    actual, expected = attention(x), dense(attention, x, hidden=hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    if not settings:
        direction = torch.randn_like(x)
        variables = [x, *attention.parameters()]
        gradients = torch.autograd.grad(actual, variables, direction)
        for a, e in zip(gradients, torch.autograd.grad(expected, variables, direction), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)


def test_the_dense_computation_equals_the_definition():
    for terms, size, stride in itertools.product(TERM_SETS, [(5,), (2, 3)], [1, 2]):
        attention = make(terms, len(size), kv_stride=stride, scale=0.7)
        x = draw(size)
        torch.testing.assert_close(dense(attention, x), literal(attention, x))


@pytest.mark.parametrize("size", [(300,), (16, 20)])
def test_a_long_input_with_padding_and_window_at_single_queries(size):
    # The window keeps each query's keys few, so that a small crop holds all a query sees.
    attention = make("1111", len(size), window=5)
    x = draw(size, batch=1)
    mask = torch.rand(1, *size) < 0.3
    y = attention(x, key_padding_mask=mask)
    for corner in (0, 7):
        if len(size) == 1:
            crop, crop_mask, whole = x[:, corner : corner + 9], mask[:, corner : corner + 9], y[:, corner + 4]
            centre = literal(attention, crop, key_padding_mask=crop_mask)[:, 4]
        else:
            part = slice(corner, corner + 5)
            crop, crop_mask, whole = x[:, :, part, part], mask[:, part, part], y[:, :, corner + 2, corner + 2]
            centre = literal(attention, crop, key_padding_mask=crop_mask)[:, :, 2, 2]
        torch.testing.assert_close(whole, centre)


class _LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still held, in forward and backward."""

    def __init__(self, inputs):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.given:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def _peak_of(call, attention, x):
    with _LiveMemory([x, *attention.parameters()]) as memory:
        call().sum().backward()
    return memory


@pytest.mark.parametrize(
    ("terms", "settings"),
    [(terms, {}) for terms in TERM_SETS]
    + [
        (terms, settings)
        for terms in ("1111", "0010")
        for settings in ({"causal": True}, {"window": 65}, {"dropout": 0.1}, {"kv_stride": 2})
    ],
    ids=str,
)
@pytest.mark.parametrize("ndim", [1, 2])
def test_never_two_whole_maps_at_a_time(terms, ndim, settings):
    batch, heads, keys = 2, 2, 1024  # more weights than small inputs may keep for the backward pass
    attention = make(terms, ndim, 16, heads, torch.float32, **settings)
    stride = attention.kv_stride
    size = (keys * stride,) if ndim == 1 else (32 * stride, 32 * stride)
    x = draw(size, batch, 16, torch.float32).requires_grad_()
    mask = torch.rand(batch, *size) < 0.1
    memory = _peak_of(lambda: attention(x, key_padding_mask=mask), attention, x)
    whole_map = batch * heads * math.prod(size) * keys * x.element_size()
    small = 32 * x.nbytes  # projections, masks and gradients, each of the size of the input
    assert memory.peak > x.nbytes  # the counter counts
    assert memory.largest <= whole_map
    assert memory.peak <= whole_map + small


def test_the_memory_counter_would_notice_a_plain_softmax():
    attention = make("1000", dim=16, dtype=torch.float32)
    x = draw((256,), 2, 16, torch.float32).requires_grad_()

    def plain():
        q, k = attention.query_proj(x), attention.key_proj(x)
        return (q @ k.mT).softmax(-1) @ attention.value_proj(x)

    memory = _peak_of(plain, attention, x)
    assert memory.peak >= 2 * 2 * 256 * 256 * 4


# --- Masks of pairs, other values, windows of two sizes ---------------------------------------------------------------


def pair_masks(batch, queries, keys):
    """One of each shape that is taken; every query keeps some key, save one."""
    for shape in ((queries, keys), (batch, queries, keys), (batch, 1, queries, keys), (batch, HEADS, queries, keys)):
        mask = torch.rand(shape) < 0.4
        mask[..., 0, :] = True
        yield mask


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("shape", ["sentence", "oblong"])
def test_masks_of_pairs_and_other_values_are_those_of_the_definition(terms, shape):
    size, key_size = SHAPES[shape], KEY_SHAPES[shape]
    for stride, algorithm in itertools.product((1, 2), ("dense", "tiled")):
        attention = make(terms, len(size), kv_stride=stride, window=5, scale=0.7, algorithm=algorithm)
        query, key, value = (x.requires_grad_() for x in (draw(size), draw(key_size), draw(key_size)))
        padded = padding(key_size)
        for mask in pair_masks(2, math.prod(size), math.prod(key_size)):
            whole = mask if mask.dim() == 4 else mask.view(-1, 1, *mask.shape[-2:])
            actual = attention(query, key, value, key_padding_mask=padded, attention_mask=mask)
            expected = reference.transformer_attention(
                query,
                key,
                reference.parameters_of(attention),
                value=value,
                num_heads=HEADS,
                terms=terms,
                scale=0.7,
                window=5,
                kv_stride=stride,
                key_padding_mask=padded,
                attention_mask=whole.expand(2, HEADS, -1, -1),
            )
            torch.testing.assert_close(actual, expected)
            variables = [query, key, value, *attention.parameters()]
            direction = torch.randn_like(actual)
            for a, e in zip(
                *(torch.autograd.grad(y, variables, direction, materialize_grads=True) for y in (actual, expected)),
                strict=True,
            ):
                torch.testing.assert_close(a, e)
            torch.testing.assert_close(
                attention.weights(query, key, attention_mask=mask)[:, :, 0].abs().max().item(), 0.0
            )


def test_content_alone_is_torchs_multi_head_attention():
    peer = nn.MultiheadAttention(DIM, HEADS, batch_first=True, bias=False, dtype=torch.float64)
    ours = make("1000", scale=(DIM // HEADS) ** -0.5)
    with torch.no_grad():
        for name, weight in zip(("query", "key", "value"), peer.in_proj_weight.chunk(3), strict=True):
            getattr(ours, f"{name}_proj").weight.copy_(weight)
        ours.out_proj.weight.copy_(peer.out_proj.weight)
        ours.out_proj.bias.zero_()
    query, key, value = draw((5,)), draw((6,)), draw((6,))
    padded = torch.zeros(2, 6, dtype=torch.bool)
    padded[1, 4:] = True
    mask = (torch.rand(5, 6) < 0.4).index_fill(1, torch.tensor([0]), False)
    expected, weights = peer(query, key, value, key_padding_mask=padded, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(ours(query, key, value, key_padding_mask=padded, attention_mask=mask), expected)
    found = ours.weights(query, key, key_padding_mask=padded, attention_mask=mask)
    torch.testing.assert_close(found, weights)


def test_a_mask_of_later_keys_is_the_causal_mask():
    for terms, ndim in itertools.product(TERM_SETS, (1, 2)):
        attention, x = make(terms, ndim), draw((6,) if ndim == 1 else (2, 3))
        later = torch.ones(6, 6, dtype=torch.bool).triu(1)
        torch.testing.assert_close(attention(x, attention_mask=later), attention(x, causal=True))


@pytest.mark.parametrize("terms", TERM_SETS)
def test_a_window_of_two_sizes_is_that_of_the_definition(terms):
    for window, stride, algorithm in itertools.product(((1, 5), (5, 3)), (1, 2), ("auto", "tiled")):
        attention = make(terms, 2, window=window, kv_stride=stride, algorithm=algorithm)
        x = draw((4, 5))
        torch.testing.assert_close(attention(x), literal(attention, x))
    both, one = make(terms, 2, window=(3, 3)), make(terms, 2, window=3)
    one.load_state_dict(both.state_dict())
    torch.testing.assert_close(both(x), one(x))


# --- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERM_SETS)
def test_dropout_keeps_the_mean_and_is_off_in_eval(terms):
    attention = make(terms, dropout=0.3)
    x = draw((6,), batch=1).expand(4000, -1, -1)
    expected = literal(attention, x[:1])
    torch.testing.assert_close(attention.eval()(x[:1]), expected)
    samples = attention.train()(x).detach()
    spread = samples.std(0)
    assert spread.min() > 0
    assert ((samples.mean(0) - expected[0]).abs() < 5 * spread / math.sqrt(len(samples))).all()
    # Kept weights are scaled by 1 / (1 - p), all alike: the variance of a sum of independent weights.
    weights = attention.weights(x[:1])[0]
    values = attention.value_proj(x[:1])[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)
    head_out = attention.out_proj.weight.unflatten(-1, (HEADS, -1))
    parts = torch.einsum("mqk,mkd,omd->mkqo", weights, values, head_out)
    deviation = (0.3 / 0.7 * parts.square().sum((0, 1))).sqrt()
    torch.testing.assert_close(spread, deviation, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("terms", TERM_SETS)
def test_dropout_drops_the_weights_of_each_query_on_its_own(terms):
    attention = make(terms, dropout=0.5)
    # Equal tokens and a flat map: without dropout all rows are equal, so only the drawn zeros tell them apart.
    with torch.no_grad():
        for name in ("key_bias", "position_bias"):
            if hasattr(attention, name):
                getattr(attention, name).zero_()
        for name in ("query_proj", "key_proj"):
            if hasattr(attention, name):
                getattr(attention, name).weight.zero_()
    x = draw((1,), batch=1).expand(-1, 16, -1)
    torch.testing.assert_close(attention.eval()(x), attention(x)[:, :1].expand_as(x))
    rows = attention.train()(x)[0].detach()
    assert len({tuple(row.tolist()) for row in rows.round(decimals=9)}) > 8


@pytest.mark.parametrize("size", [(6,), (700,), (24, 30)])
def test_dropout_repeats_for_a_seed_and_its_gradient_belongs_to_the_drawn_weights(size):
    attention = make("1111", len(size), dropout=0.4, spread=0.3)
    x = draw(size, batch=1)
    outputs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outputs.append(attention(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    torch.manual_seed(9)  # the backward pass may not draw again
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(outputs[0], attention.value_proj.weight, direction)
    # For given weights the output without its bias is linear in W'.
    bias = attention.out_proj.bias if len(size) == 1 else attention.out_proj.bias[:, None, None]
    expected = (direction * (outputs[0] - bias)).sum()
    torch.testing.assert_close((gradient * attention.value_proj.weight).sum(), expected)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 10, "num_heads": 4}, r"dim=10 .*num_heads=4.*\[1, 2, 5, 10\]"),
        ({"dim": 0}, "dim .*got 0"),
        ({"dim": 16.0}, r"dim must be an integer .*got 16\.0"),
        ({"dim": "16"}, r"dim must be an integer .*got '16'"),
        ({"causal": "no"}, "causal must be True or False, got 'no'"),
        ({"window": (3, 5)}, r"window=\(3, 5\) is for maps"),
        ({"window": (3, 5, 7), "ndim": 2}, r"window must be one odd number, or two .*got \(3, 5, 7\)"),
        ({"window": (3, 4), "ndim": 2}, "window must be odd.*got 4"),
        ({"dim": 9, "num_heads": 3, "terms": "0100"}, "dim=9 .*multiple of 2"),
        ({"dim": 6, "num_heads": 3, "terms": "0001", "ndim": 2}, "dim=6 .*multiple of 4"),
        ({"ndim": 3}, "ndim must be 1 .*or 2 .*got 3"),
        ({"terms": "0000"}, "terms.*mechanism: none"),
        ({"terms": 1111}, "terms.*int.*1111.*Quote"),
        ({"window": 4}, "window must be odd.*got 4.*3 or 5"),
        ({"window": -1}, "window.*-1"),
        ({"kv_stride": 0}, "kv_stride.*0"),
        ({"num_heads": 0}, "num_heads.*0"),
        ({"scale": 0.0}, "scale.*0.0"),
        ({"dropout": 1.0}, "dropout.*1.0"),
    ],
)
def test_constructor_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerAttention(**({"dim": DIM, "num_heads": HEADS} | settings))


def test_an_odd_width_serves_the_terms_without_positions():
    attention = make("1010", dim=9, num_heads=3)
    x = draw((4,), dim=9)
    torch.testing.assert_close(attention(x), literal(attention, x))


def test_call_errors():
    sentence, image = make(), make(ndim=2)
    x, m = draw((5,)), draw((2, 3))

    def refused(message):
        return pytest.raises(ValueError, match=message)

    with refused(r"query must be \[B, L, C\] for ndim=1, got 4 dimensions, shape \(2, 8, 2, 3\)"):
        sentence(m)
    with refused(r"query must be \[B, C, H, W\] for ndim=2, got 3 dimensions, shape \(2, 5, 8\)"):
        image(x)
    with refused(r"query must be \[B, L, C\] .*C = dim = 8, got shape \(2, 8, 5\)"):
        sentence(x.mT)
    with refused(r"query must be \[B, C, H, W\] .*C = dim = 8, got shape \(2, 7, 2, 3\)"):
        image(m[:, 1:])
    with refused(r"key must be \[B, L, C\].*\(2, 5, 7\)"):
        sentence(x, x[..., 1:])
    with refused("key .*batch size 1, query has 2"):
        sentence(x, x[:1])
    with refused(re.escape("key_padding_mask") + r".*\(2, 5\).*\(2, 4\)"):
        sentence(x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with refused(r"key_padding_mask.*\(2, 2, 3\).*\(2, 6\)"):
        image(m, key_padding_mask=torch.zeros(2, 6, dtype=torch.bool))
    with refused(r"key_padding_mask.*\(2, 4\).*\(2, 5\)"):
        sentence(x, x[:, :4], key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with refused(r"key_padding_mask must be bool.*torch\.float32"):
        sentence(x, key_padding_mask=torch.zeros(2, 5))
    with refused(r"key_padding_mask must be bool.*torch\.int64"):
        sentence.weights(x, key_padding_mask=torch.zeros(2, 5, dtype=torch.int64))
    with refused(r"key_padding_mask must be a torch.Tensor of bool, .*got ndarray; use torch.as_tensor"):
        sentence(x, key_padding_mask=np.zeros((2, 5), dtype=bool))
    with refused(r"query must be a torch.Tensor \[B, L, C\], got ndarray"):
        sentence(x.numpy())
    with refused(r"attention_mask must be bool, True where hidden, got torch\.float64"):
        sentence(x, attention_mask=torch.zeros(5, 5).double())
    with refused(r"attention_mask must have one of the shapes \(5, 5\), \(2, 5, 5\), \(2, 1, 5, 5\).*got \(5, 4\)"):
        sentence(x, attention_mask=torch.zeros(5, 4, dtype=torch.bool))
    with refused(r"value must have the shape \(2, 5, 8\) of the keys, got \(2, 4, 8\)"):
        sentence(x, x, x[:, :4])
    with refused(r"causal must be True or False, got 'no'"):
        sentence(x, causal="no")
    with refused(r"query.*torch\.int64"):
        sentence(torch.zeros(2, 5, 8, dtype=torch.int64))
    with refused(r"key.*torch\.int64"):
        sentence(x, torch.zeros(2, 5, 8, dtype=torch.int64))
    with refused(r"query must be .*\(5, 8\)"):
        sentence.energies(x[0])
