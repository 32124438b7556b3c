"""Every algorithm against dense sums and against the equations, each where the others do not hide it."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_attn.attention import TransformerAttention
from lightning_attn.attention.algorithms import ORDER, AttentionProblem, select_algorithm, tiled
from lightning_attn.attention.algorithms.augmented_sdpa import position_basis
from lightning_attn.attention.algorithms.tiled import dense_attention, tiled_attention
from lightning_attn.attention.dropout import dropout_factors
from lightning_attn.attention.layout import Layout
from lightning_attn.attention.positions import relative_encoding
from lightning_attn.attention.spec import TERM_SETS

BATCH, HEADS = 3, 2

# Queries, keys, stride of the keys, and how the features lie in memory.
GRIDS = [
    ((5, 7), (5, 7), 1, "features outside"),
    ((5, 7), (3, 4), 2, "features inside"),
    ((1, 9), (1, 9), 1, "contiguous"),
    ((1, 9), (1, 6), 1, "features outside"),
    ((1, 9), (1, 5), 2, "features inside"),
]


@pytest.fixture(params=["one tile", "many tiles", "for two threads"])
def threads(request, monkeypatch):
    """Small tensors cut as large ones are; the number of threads that they are cut for."""
    if request.param != "one tile":
        cut_small(monkeypatch)
    return 2 if request.param == "for two threads" else 1


def cut_small(monkeypatch, weights=50):
    monkeypatch.setattr(tiled, "TILE_WEIGHTS", weights)
    monkeypatch.setattr(tiled, "MIN_TILE_QUERIES", 2)
    monkeypatch.setattr(tiled, "MIN_WINDOW_TILE", 2)


def literal_sums(query, key, key_energy, along_y, along_x, value, padding, attention_mask, layout: Layout) -> Tensor:
    """The same sums with every weight held at once; positions are written out for every pair."""
    columns, key_columns = layout.query_sizes[1], layout.key_sizes[1]
    queries, keys = torch.arange(layout.num_queries), torch.arange(layout.num_keys)
    y, x = queries // columns, queries % columns
    key_y, key_x = keys // key_columns, keys % key_columns
    dy, dx = key_y * layout.stride - y[:, None], key_x * layout.stride - x[:, None]
    energy = value.new_zeros(*value.shape[:2], len(queries), len(keys))
    if query is not None:
        energy = energy + torch.einsum("bmqd,bmkd->bmqk", query, key)
    if key_energy is not None:
        energy = energy + key_energy[:, :, None]
    for along, place in ((along_y, key_y), (along_x, key_x)):
        if along is not None:
            energy = energy + along[:, :, y, x][..., place]
    hidden = torch.zeros(value.shape[0], 1, len(queries), len(keys), dtype=torch.bool)
    if padding is not None:
        hidden = hidden | padding[:, None, None]
    if attention_mask is not None:
        hidden = hidden | attention_mask
    if layout.causal:
        hidden = hidden | (dy > 0) | ((dy == 0) & (dx > 0))
    if layout.window is not None:
        hidden = hidden | (dy.abs() > layout.window[0] // 2) | (dx.abs() > layout.window[1] // 2)
    weights = torch.softmax(energy.masked_fill(hidden, -1e300), dim=-1).masked_fill(hidden, 0.0)
    return weights @ value


def leaves(layout: Layout, content: bool, key_energy: bool, position: bool, memory: str):
    """Random inputs of `tiled_attention` in a memory layout, float64: what has gradients, and the inputs."""
    width = 4

    def make(count):
        shapes = {
            "features outside": ((BATCH, HEADS, width, count), (0, 1, 3, 2)),
            "features inside": ((BATCH, count, HEADS, width), (0, 2, 1, 3)),
            "contiguous": ((BATCH, HEADS, count, width), (0, 1, 2, 3)),
        }
        shape, order = shapes[memory]
        leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        return leaf, leaf.permute(order)

    def plain(*shape):
        leaf = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        return leaf, leaf

    absent = (None, None)
    is_map = layout.query_sizes[0] > 1
    pairs = [
        make(layout.num_queries) if content else absent,
        make(layout.num_keys) if content else absent,
        plain(BATCH, HEADS, layout.num_keys) if key_energy else absent,
        plain(BATCH, HEADS, *layout.query_sizes, layout.key_sizes[0]) if position and is_map else absent,
        plain(BATCH, HEADS, *layout.query_sizes, layout.key_sizes[1]) if position else absent,
        make(layout.num_keys),
    ]
    return [leaf for leaf, _ in pairs if leaf is not None], [view for _, view in pairs]


def some_padding(layout: Layout) -> Tensor:
    padding = torch.zeros(BATCH, layout.num_keys, dtype=torch.bool)
    padding[1, layout.num_keys // 2 :] = True
    padding[2] = True  # a sample without any key
    return padding


@pytest.mark.parametrize(("query_sizes", "key_sizes", "stride", "memory"), GRIDS)
def test_tiles_give_the_literal_sums_and_gradients(threads, query_sizes, key_sizes, stride, memory):
    torch.manual_seed(0)
    masks = [
        (False, None, False, None),
        (True, None, False, None),
        (False, (5, 5), False, "by head"),
        (False, (3, 5), True, None),
        (True, (3, 3), True, "for all"),
        (False, None, True, "by sample"),
    ]
    for content, key_energy, position in itertools.product((False, True), repeat=3):
        if not (content or key_energy or position):
            continue
        for causal, window, padded, masked in masks:
            layout = Layout(query_sizes, key_sizes, stride, causal=causal, window=window)
            inputs, tensors = leaves(layout, content, key_energy, position, memory)
            padding = some_padding(layout) if padded else None
            mask = None
            if masked is not None:
                shape = {"by head": (BATCH, HEADS), "by sample": (BATCH, 1), "for all": (1, 1)}[masked]
                mask = torch.rand(*shape, layout.num_queries, layout.num_keys) < 0.3
            expected = literal_sums(*tensors, padding, mask, layout)
            grad = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, inputs, grad)
            arguments = (query_sizes, key_sizes, stride, causal, window, 0.0, None, memory != "features outside")
            for keep in (False, True):
                out, _ = tiled_attention(*tensors, padding, mask, *arguments, threads, keep)
                torch.testing.assert_close(out, expected, atol=1e-11, rtol=0)
                for one, two in zip(torch.autograd.grad(out, inputs, grad), wanted, strict=True):
                    torch.testing.assert_close(one, two, atol=1e-10, rtol=0)
            torch.testing.assert_close(dense_attention(*tensors, padding, mask, *arguments), expected)


def test_the_operator_is_well_formed_for_compilers():
    # Also that what tracing takes its results to be has their strides.
    torch.manual_seed(0)
    layout = Layout((3, 4), (2, 2), 2)
    for memory, padded, keep in itertools.product(
        ("features outside", "features inside", "contiguous"), (False, True), (False, True)
    ):
        _, tensors = leaves(layout, True, True, True, memory)
        tensors = [t.detach().requires_grad_() for t in tensors]  # of these strides
        mask = torch.rand(1, 1, 12, 4) < 0.3 if padded else None
        padding = some_padding(layout) if padded else None
        for features_last in (False, True):
            arguments = ((3, 4), (2, 2), 2, False, None, 0.0, None, features_last, 1, keep)
            torch.library.opcheck(tiled_attention, (*tensors, padding, mask, *arguments))


def make(terms: str, ndim: int, algorithm: str = "auto", **settings) -> TransformerAttention:
    torch.manual_seed(1)
    attention = TransformerAttention(8, 2, terms, ndim=ndim, algorithm=algorithm, **settings).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


SETTINGS = [{}, {"kv_stride": 2}, {"causal": True}, {"window": 3}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_each_algorithm_that_fits_gives_the_reference(terms, ndim, settings):
    x = torch.randn(2, 6, 8) if ndim == 1 else torch.randn(2, 8, 3, 4)
    x = x.double().requires_grad_()
    mask = torch.zeros(2, 6) if ndim == 1 else torch.zeros(2, 3, 4)
    mask[1, -1:] = 1
    grad = torch.randn_like(x)
    used = set()
    for padding in (None, mask.bool()):
        reference = make(terms, ndim, "reference", **settings)
        expected = reference(x, key_padding_mask=padding)
        wanted = torch.autograd.grad(expected, [x, *reference.parameters()], grad)
        names = [name for name, _ in reference.named_parameters()]
        sizes = (1, 6) if ndim == 1 else (3, 4)
        stride = settings.get("kv_stride", 1)
        window = (3, 3) if "window" in settings else None
        layout = Layout(sizes, (-(-sizes[0] // stride), -(-sizes[1] // stride)), stride, "causal" in settings, window)
        problem = AttentionProblem(terms, ndim, layout, padded=padding is not None)
        for algorithm in ORDER:
            attention = make(terms, ndim, algorithm.name, **settings)
            if algorithm.unsupported_reason(problem) is not None:
                with pytest.raises(ValueError, match=f"algorithm='{algorithm.name}' cannot compute this attention: "):
                    attention(x, key_padding_mask=padding)
                continue
            used.add(algorithm.name)
            out = attention(x, key_padding_mask=padding)
            torch.testing.assert_close(out, expected, atol=1e-9, rtol=0, msg=lambda t, a=algorithm: f"{a.name}: {t}")
            actual = torch.autograd.grad(out, [x, *attention.parameters()], grad)
            for name, one, two in zip(["x", *names], actual, wanted, strict=True):
                torch.testing.assert_close(
                    one, two, atol=1e-8, rtol=0, msg=lambda t, w=f"{algorithm.name} {name}": f"{w}: {t}"
                )
    e1, e2, _, e4 = (bit == "1" for bit in terms)
    masked = "causal" in settings or "window" in settings
    assert {"dense", "augmented_sdpa", "tiled", "reference"} <= used
    assert ("pooled" in used) == (terms == "0010" and not masked)
    assert ("separable" in used) == (terms in ("0001", "0011") and ndim == 2 and "causal" not in settings)
    assert ("sdpa" in used) == (e1 and not e2 and not e4)


@pytest.mark.parametrize("algorithm", ["auto", "dense", "tiled", "sdpa", "augmented_sdpa"])
@pytest.mark.parametrize("terms", ["1010", "1111", "0110"])
def test_float32_and_bfloat16_of_each_algorithm(terms, algorithm):
    if (algorithm, terms) in {("sdpa", "1111"), ("sdpa", "0110")}:
        pytest.skip("it has no position energies")
    torch.manual_seed(0)
    attention = TransformerAttention(64, 4, terms, 2, kv_stride=2, algorithm=algorithm)
    exact = TransformerAttention(64, 4, terms, 2, kv_stride=2, algorithm="dense").double()
    exact.load_state_dict(attention.state_dict())
    x, grad = torch.randn(2, 64, 13, 20), torch.randn(2, 64, 13, 20)
    wide = x.double().requires_grad_()
    expected = exact(wide)
    wanted = torch.autograd.grad(expected, [wide, *exact.parameters()], grad.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = attention(leaf)
        found = torch.autograd.grad(out, [leaf, *attention.parameters()], grad.to(out.dtype))
        assert out.dtype == dtype
        for one, two in zip((out, *found), (expected, *wanted), strict=True):
            assert ((one.double() - two).norm() / two.norm()).item() < tolerance


def test_a_long_sentence_has_its_position_energies_as_further_features(monkeypatch):
    monkeypatch.setattr(tiled, "MAX_SENTENCE_KEYS", 4)
    for terms, settings in itertools.product(("1111", "0100", "0011", "1001"), ({}, {"causal": True}, {"window": 5})):
        attention, x = make(terms, 1, "tiled", **settings), torch.randn(2, 70, 8).double()
        expected = make(terms, 1, "dense", **settings)(x)
        torch.testing.assert_close(attention(x), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("algorithm", ["tiled", "augmented_sdpa"])
@pytest.mark.parametrize("ndim", [1, 2])
def test_energies_of_a_layer_that_replaces_the_position_projection(ndim, algorithm, monkeypatch):
    # They are in no space of few dimensions: that of the encodings is for a matrix alone.
    monkeypatch.setattr(tiled, "MAX_SENTENCE_KEYS", 4)

    class Bent(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    x = torch.randn(2, 40, 8) if ndim == 1 else torch.randn(2, 8, 9, 40)
    for kind in (torch.nn.Linear, Bent) if ndim == 1 else (torch.nn.Linear,):
        layer = kind(8, 8).double()
        torch.nn.init.normal_(layer.bias, std=5.0)
        one, other = make("1111", ndim, algorithm), make("1111", ndim, "dense")
        one.position_proj = other.position_proj = layer
        torch.testing.assert_close(one(x.double()), other(x.double()), atol=1e-9, rtol=0)


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((600,), {"window": 5}),
        ((600,), {"window": 5, "causal": True, "kv_stride": 2}),
        ((19, 3), {"window": 3}),
        ((19, 3), {"window": 1, "kv_stride": 2}),
        ((1, 300), {"window": 3}),
        ((5, 4), {"causal": True, "kv_stride": 2}),
    ],
    ids=str,
)
def test_blocks_of_a_window_and_masks_by_query(terms, sizes, settings):
    ndim = len(sizes)
    x = torch.randn(2, *sizes, 8) if ndim == 1 else torch.randn(2, 8, *sizes)
    x = x.double().requires_grad_()
    padding = torch.zeros(2, *sizes, dtype=torch.bool)
    padding[1, ..., -2:] = True
    count = x[0].numel() // 8
    mask = torch.rand(2, 1, count, count) < 0.2 if count < 100 else None
    results = []
    for algorithm in ("augmented_sdpa", "dense"):
        out = make(terms, ndim, algorithm, **settings)(x, key_padding_mask=padding, attention_mask=mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("count", "stride", "features"), [(84, 1, 128), (25, 2, 256), (300, 1, 512), (5, 3, 8)])
def test_the_basis_holds_every_energy_along_an_axis(count, stride, features):
    # However far the query is: the encodings of all offsets lie in the space of those that begin at zero.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        basis = position_basis(count, stride, features, dtype, torch.device("cpu")).double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-6, rtol=0)
        for first in (-77, 0, 13):
            offsets = first + stride * torch.arange(count, dtype=torch.float64)
            energies = relative_encoding(offsets, features) @ torch.randn(features, 3, dtype=torch.float64)
            torch.testing.assert_close(basis @ (basis.T @ energies), energies, atol=tolerance * 100, rtol=tolerance)
    assert count < 50 or basis.shape[1] < count / 2


def test_what_is_chosen():
    def chosen(terms, ndim=2, sizes=(50, 84), **facts):
        layout = {key: facts.pop(key) for key in ("causal", "window", "stride") if key in facts}
        sizes = sizes if ndim == 2 else (1, 600)
        return select_algorithm("auto", AttentionProblem(terms, ndim, Layout(sizes, sizes, **layout), 8, **facts)).name

    assert chosen("0010") == "pooled"
    assert chosen("0010", causal=True) == chosen("0010", window=(3, 3)) == chosen("0010", dropout=0.1) == "tiled"
    assert chosen("0010", masked=True) == "tiled"
    assert chosen("0001") == chosen("0011") == chosen("0011", window=(3, 5)) == "separable"
    assert chosen("0011", causal=True) == chosen("0011", ndim=1) == "tiled"  # reading order does not separate
    assert chosen("1000") == chosen("1010", padded=True) == chosen("1000", ndim=1, causal=True) == "sdpa"
    assert chosen("1000", causal=True, padded=True) == chosen("1000", window=(5, 5)) == "tiled"
    assert chosen("1000", masked=True) == chosen("1000", dropout=0.1) == "tiled"
    assert {chosen(terms) for terms in ("1111", "1101", "1011", "1001", "1100", "1110", "0100", "0111")} == {"tiled"}
    small = {"sizes": (7, 7)}
    assert {chosen(terms, **small) for terms in TERM_SETS} == {"pooled", "separable", "dense"}
    assert chosen("1000", ndim=1, dtype=torch.bfloat16) == "tiled"
    for terms in TERM_SETS:  # nothing of our own where every operation has to be seen
        for fact in ("transformed", "exported"):
            assert chosen(terms, **{fact: True}) in ("pooled", "separable", "dense", "sdpa")
    assert chosen("1000", exported=True) == "sdpa"
    assert chosen("1000", transformed=True) == "dense"
    assert chosen("1000", device="cuda") == chosen("1010", device="cuda", dropout=0.1) == "sdpa"
    assert chosen("1000", device="cuda", padded=True) == "augmented_sdpa"
    assert chosen("1111", device="cuda") == chosen("0111", ndim=1, device="cuda", causal=True) == "augmented_sdpa"
    for facts in (
        {"window": (3, 3)},
        {"masked": True},
        {"causal": True, "stride": 2},
        {"dropout": 0.1},
        {"padded": True},
    ):
        names = {chosen(terms, ndim=ndim, device="cuda", **facts) for terms in TERM_SETS for ndim in (1, 2)}
        assert names <= {"pooled", "separable", "sdpa", "augmented_sdpa"}, "tiles are cut for the caches of a CPU"


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match=r"algorithm must be one of .*'tiled'.*, got 'quick'"):
        TransformerAttention(8, 2, algorithm="quick")  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", ["0001", "0011", "0100", "0101", "0110", "0111"])
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("algorithm", ["auto", "tiled"])
def test_extreme_energies_do_not_vanish(terms, scale, algorithm):
    # Keys salient where positions are not: products of exponentials of +-200 underflow, sums of energies do not.
    attention = TransformerAttention(8, 2, terms, ndim=2, algorithm=algorithm).float()
    x = torch.randn(1, 8, 4, 5)
    with torch.no_grad():
        energies = attention.energies(x)
        for name, parameter in (("E2", "query_proj"), ("E4", "position_bias"), ("E3", "key_bias")):
            if name in energies:
                weight = getattr(attention, parameter)
                weight = weight if isinstance(weight, torch.Tensor) else weight.weight
                weight *= scale / energies[name].abs().max()
    x = x.requires_grad_()
    out = attention(x)
    reference = TransformerAttention(8, 2, terms, ndim=2, algorithm="reference")
    reference.load_state_dict(attention.state_dict())
    wanted_input = x.detach().double().requires_grad_()
    expected = reference.double()(wanted_input)
    assert torch.allclose(out.double(), expected, atol=2e-3 * expected.abs().max().item())
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, x, grad)
    (wanted,) = torch.autograd.grad(expected, wanted_input, grad.double())
    assert torch.isfinite(actual).all()
    assert torch.allclose(actual.double(), wanted, atol=2e-2 * wanted.abs().max().item())


class TestDropout:
    @pytest.mark.parametrize("cut", [False, True], ids=["one tile", "many tiles"])
    def test_dropped_weights_are_the_same_in_both_passes(self, cut, monkeypatch):
        if cut:
            cut_small(monkeypatch)
        for algorithm in ("dense", "tiled"):
            attention = make("1111", 1, algorithm, dropout=0.5).train()
            x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)

            def run(value: Tensor, attention=attention) -> Tensor:
                torch.manual_seed(3)
                return attention(value)

            assert torch.autograd.gradcheck(run, x)
            first = run(x)
            assert not torch.equal(first, attention(x))  # another draw
            assert torch.equal(first, run(x))

    @pytest.mark.parametrize("settings", [{}, {"window": 5}, {"causal": True}, {"kv_stride": 2}], ids=str)
    @pytest.mark.parametrize("size", [(40,), (6, 9)])
    def test_the_mask_of_a_seed_does_not_depend_on_the_tiles(self, size, settings, monkeypatch):
        x = torch.randn(2, *size, 8) if len(size) == 1 else torch.randn(2, 8, *size)

        def run(algorithm):
            torch.manual_seed(3)
            return make("1111", len(size), algorithm, dropout=0.5, **settings)(x.double())

        expected = run("dense")
        for weights in (20, 70, 300, 10**6):
            cut_small(monkeypatch, weights)
            torch.testing.assert_close(run("tiled"), expected, atol=1e-10, rtol=0)

    def test_every_head_sample_query_and_key_draws_for_itself(self, monkeypatch):
        # Equal tokens and even weights: what a head gives is the mean of the values that it kept, and nothing else.
        cut_small(monkeypatch, 5000)
        batch, length, heads = 4, 200, 4
        attention = TransformerAttention(8, heads, "0100", 1, dropout=0.5, algorithm="tiled").double()
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.zero_()
            attention.value_proj.weight.copy_(torch.eye(8))
            attention.out_proj.weight.copy_(torch.eye(8))
            x = torch.randn(1, length, 2, dtype=torch.float64).repeat(batch, 1, heads)
            rows = attention(x).unflatten(-1, (heads, 2)).transpose(1, 2).flatten(0, 2)
        assert len({tuple(row) for row in rows.round(decimals=12).tolist()}) == batch * heads * length

    def test_the_masks_are_fair_and_independent(self):
        rows = torch.arange(400)
        for p in (0.1, 0.5):
            kept = dropout_factors(torch.tensor(7), p, torch.float64, rows, 1001) > 0
            share = kept.double().mean().item()
            assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
            signs = kept.double() - (1 - p)
            # Neighbours along keys and queries, and the lanes of one 64-bit number, do not know of each other.
            limit = 5 * p * (1 - p) / math.sqrt(kept.numel())
            for step in (1, 2, 3, 4, 5):
                assert abs((signs[:, step:] * signs[:, :-step]).mean().item()) < limit
                assert abs((signs[step:] * signs[:-step]).mean().item()) < limit
            by_key = kept.double().mean(0)
            assert (by_key - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / len(rows))

    def test_the_expectation_is_exact_and_0_1_is_0_1(self):
        factors = dropout_factors(torch.tensor(1), 0.1, torch.float64, torch.arange(10), 100)
        kept = factors[factors > 0].unique()
        assert len(kept) == 1
        assert abs(1 - 1 / kept.item() - 0.1) < 1 / 2**16
        assert dropout_factors(torch.tensor(1), 1e-9, torch.float64, torch.arange(10), 100).eq(1).all()

    def test_single_keys_are_those_of_the_whole_mask(self):
        rows, keys = torch.arange(6).view(2, 3), torch.tensor([0, 3, 4, 9, 10])
        whole = dropout_factors(torch.tensor(5), 0.4, torch.float32, rows, 11)
        assert torch.equal(dropout_factors(torch.tensor(5), 0.4, torch.float32, rows, 11, keys), whole[..., keys])


class TestCompiled:
    @pytest.mark.parametrize("terms", ["1111", "0111", "0011", "0010", "1010"])
    @pytest.mark.parametrize("ndim", [1, 2])
    def test_in_one_graph(self, terms, ndim, monkeypatch):
        torch._dynamo.reset()
        for algorithm in ("auto", "tiled"):
            attention = make(terms, ndim, algorithm)
            x = torch.randn(2, 6, 8) if ndim == 1 else torch.randn(2, 8, 3, 4)
            x = x.double().requires_grad_()
            compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
            out, expected = compiled(x), attention(x)
            assert torch.allclose(out, expected)
            grad = torch.randn_like(out)
            assert torch.allclose(*(torch.autograd.grad(y, x, grad)[0] for y in (out, expected)))

    def test_maps_of_changing_sizes_around_the_fused_kernel(self):
        # What is chosen on a GPU is left out of graphs, so that a new size compiles nothing.
        torch._dynamo.reset()
        attention = make("1111", 2, "augmented_sdpa")
        compiled = torch.compile(attention, backend="aot_eager", dynamic=True)
        graphs = []
        for rows, columns in ((3, 4), (9, 5), (10, 17), (6, 21), (11, 12)):
            x = torch.randn(2, 8, rows, columns).double().requires_grad_()
            out, expected = compiled(x), attention(x)
            torch.testing.assert_close(out, expected)
            grad = torch.randn_like(out)
            torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (out, expected)))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[-1] == graphs[1], "later sizes are computed by the graphs of the first two"

    @pytest.mark.parametrize("ndim", [1, 2])
    def test_by_inductor_with_padding(self, ndim):
        # Only this backend checks the strides that results are said to have.
        torch._dynamo.reset()
        attention = TransformerAttention(32, 4, "1111", ndim=ndim, algorithm="tiled")
        x = torch.randn(2, 6, 32) if ndim == 1 else torch.randn(2, 32, 3, 4)
        x = x.requires_grad_()
        mask = torch.zeros(2, *(x.shape[1:2] if ndim == 1 else x.shape[2:]), dtype=torch.bool)
        mask[1, -1:] = True
        expected = attention(x, key_padding_mask=mask)
        out = torch.compile(attention)(x, key_padding_mask=mask)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(y, [x, *attention.parameters()], torch.ones_like(y)) for y in (out, expected)]
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("algorithm", ["dense", "tiled"])
    def test_by_inductor_with_dropout(self, algorithm):
        torch._dynamo.reset()
        attention = TransformerAttention(64, 8, dropout=0.25, algorithm=algorithm)
        x = torch.randn(2, 12, 64, requires_grad=True)
        compiled = torch.compile(attention)
        torch.manual_seed(0)
        one, two = compiled(x), compiled(x)
        assert (one - two).abs().max() > 0.01, "each pass draws anew"
        one.sum().backward()
        assert x.grad.isfinite().all()
        many = torch.stack([compiled(x.detach()) for _ in range(300)]).mean(0)
        expected = attention.eval()(x)
        assert (many - expected).abs().mean() < 0.1 * expected.std()

    def test_by_inductor_long_sentences_and_decoding(self):
        torch._dynamo.reset()
        attention = TransformerAttention(32, 4, "1111", causal=True)
        x = torch.randn(1, 300, 32)
        compiled = torch.compile(attention, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), attention(x), rtol=1e-4, atol=1e-5)
            compiled = torch.compile(attention)
            cache, expected = attention.new_cache(), attention.new_cache()
            for token in x[:, :3].split(1, dim=1):
                torch.testing.assert_close(compiled(token, cache=cache), attention(token, cache=expected))


def test_tiles_cover_every_query_once(monkeypatch):
    for weights in (50, 5000):
        cut_small(monkeypatch, weights)
        for window, causal, threads in itertools.product((None, (3, 3), (7, 5)), (False, True), (1, 3)):
            layout = Layout((13, 17), (7, 9), 2, causal=causal, window=window)
            seen = torch.zeros(12, 13, 17, dtype=torch.long)
            for tile in tiled.cut(layout, 12, threads):
                seen[tile.pairs, tile.queries[0], tile.queries[1]] += 1
            assert seen.eq(1).all()
        assert not tiled.cut(Layout((0, 5), (0, 5)), 4, 1)


def test_a_fully_hidden_sample_gives_zeros_and_finite_gradients_in_each_algorithm():
    for algorithm, terms in itertools.product(("dense", "tiled", "augmented_sdpa", "separable"), ("1111", "0011")):
        attention = make(terms, 2, "auto")
        attention.algorithm = algorithm
        x, mask = torch.randn(2, 8, 3, 4).double(), torch.zeros(2, 3, 4, dtype=torch.bool)
        mask[1] = True
        if (algorithm == "separable") != (terms == "0011"):
            continue
        y = attention(x.requires_grad_(), key_padding_mask=mask)
        torch.testing.assert_close(y[1], attention.out_proj.bias[:, None, None].expand(8, 3, 4))
        y.square().sum().backward()
        assert all(value.grad.isfinite().all() for value in (x, *attention.parameters()))
