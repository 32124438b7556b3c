"""Every algorithm against dense sums and against the equations, each where the others do not hide it."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from lightning_attn.attention import TransformerAttention, algorithms, threads, tiled
from lightning_attn.attention.algorithms import choose, unfit
from lightning_attn.attention.spec import TERM_SETS
from lightning_attn.attention.tiled import Layout, factored_sums, tiled_attention

# Queries, keys, stride of the keys, and how the features lie in memory.
GRIDS = [
    ((5, 7), (5, 7), 1, "features outside"),
    ((5, 7), (3, 4), 2, "features inside"),
    ((1, 9), (1, 9), 1, "heads outside"),
    ((1, 9), (1, 6), 1, "features outside"),
    ((1, 9), (1, 5), 2, "features inside"),
]


@pytest.fixture(params=["one tile", "many tiles", "two threads"])
def tiles(request, monkeypatch):
    """Small tensors cut as large ones are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == "two threads" else 1)
    if request.param != "one tile":
        monkeypatch.setattr(tiled, "TILE_ELEMENTS", 50)
        monkeypatch.setattr(tiled, "SHARED_TILE_ELEMENTS", 100)
        monkeypatch.setattr(tiled, "MIN_TILE_QUERIES", 2)
        monkeypatch.setattr(tiled, "MIN_WINDOW_TILE", 2)
    yield
    torch.set_num_threads(before)


def dense(content_query, key, key_energy, position_query, table_y, table_x, value, padding, layout: Layout) -> Tensor:
    """The same sums with every weight held at once; the offsets are written out for every pair."""
    (rows, columns), key_columns = layout.query_sizes, layout.key_sizes[1]
    queries, keys = torch.arange(layout.num_queries), torch.arange(layout.num_keys)
    y, x = queries // columns, queries % columns
    key_y, key_x = keys // key_columns * layout.stride, keys % key_columns * layout.stride
    dy, dx = key_y - y[:, None], key_x - x[:, None]
    energy = value.new_zeros(*value.shape[:2], len(queries), len(keys))
    if content_query is not None:
        energy = energy + content_query @ key.transpose(-1, -2)
    if key_energy is not None:
        energy = energy + key_energy[:, :, None]
    if position_query is not None:
        query = position_query.expand(*value.shape[:2], len(queries), -1)
        for table, offset, size in ((table_y, dy, rows), (table_x, dx, columns)):
            if table is not None:
                energy = energy + torch.einsum("mbqd,mdqk->mbqk", query, table[:, :, offset + size - 1])
    hidden = torch.zeros(value.shape[1], len(queries), len(keys), dtype=torch.bool)
    if padding is not None:
        hidden = hidden | padding[:, None]
    if layout.causal:
        hidden = hidden | (dy > 0) | ((dy == 0) & (dx > 0))
    if layout.window is not None:
        hidden = hidden | (torch.maximum(dy.abs(), dx.abs()) > layout.window // 2)
    weights = torch.softmax(energy.masked_fill(hidden, -1e300), dim=-1).masked_fill(hidden, 0.0)
    return weights @ value


def leaves(layout: Layout, content: bool, key_energy: bool, position: str | None, memory: str):
    """Random inputs `[M, B, N, d]` in one of three memory layouts, float64."""
    heads, batch, width = 2, 3, 4

    def make(count):
        if memory == "features outside":
            leaf = torch.randn(batch, heads, width, count, dtype=torch.float64, requires_grad=True)
            return leaf, leaf.permute(1, 0, 3, 2)
        if memory == "features inside":
            leaf = torch.randn(batch, count, heads, width, dtype=torch.float64, requires_grad=True)
            return leaf, leaf.permute(2, 0, 1, 3)
        leaf = torch.randn(heads, batch, count, width, dtype=torch.float64, requires_grad=True)
        return leaf, leaf

    def plain(*shape):
        leaf = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        return leaf, leaf

    absent = (None, None)
    tables = [
        plain(heads, width, queries + (keys - 1) * layout.stride)
        for queries, keys in zip(layout.query_sizes, layout.key_sizes, strict=True)
    ]
    pairs = [
        make(layout.num_queries) if content else absent,
        make(layout.num_keys) if content else absent,
        plain(heads, batch, layout.num_keys) if key_energy else absent,
        absent if position is None else make(layout.num_queries) if position == "query" else plain(heads, 1, 1, width),
        tables[0] if position and layout.query_sizes[0] > 1 else absent,
        tables[1] if position else absent,
        make(layout.num_keys),
    ]
    return [leaf for leaf, _ in pairs if leaf is not None], [view for _, view in pairs]


@pytest.mark.parametrize(("query_sizes", "key_sizes", "stride", "memory"), GRIDS)
def test_tiles_give_the_dense_sums_and_gradients(tiles, query_sizes, key_sizes, stride, memory):
    torch.manual_seed(0)
    masks = [(False, None, False), (True, None, False), (False, 5, False), (False, 3, True), (True, 3, True)]
    for content, key_energy, position in itertools.product((0, 1), (0, 1), (None, "query", "bias")):
        if not (content or key_energy or position):
            continue
        for causal, window, padded in masks:
            layout = Layout(query_sizes, key_sizes, stride, causal=causal, window=window)
            inputs, tensors = leaves(layout, bool(content), bool(key_energy), position, memory)
            padding = None
            if padded:
                padding = torch.zeros(3, layout.num_keys, dtype=torch.bool)
                padding[1, layout.num_keys // 2 :] = True
                padding[2] = True  # a sample without any key
            out = tiled_attention(*tensors, padding, query_sizes, key_sizes, stride, causal, window, 0.0, None)
            expected = dense(*tensors, padding, layout)
            assert torch.allclose(out, expected, atol=1e-11)
            grad = torch.randn_like(expected)
            actual = torch.autograd.grad(out, inputs, grad)
            for one, two in zip(actual, torch.autograd.grad(expected, inputs, grad), strict=True):
                assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize(("query_sizes", "key_sizes", "stride", "memory"), [g for g in GRIDS if g[0][0] > 1])
def test_factored_sums_give_the_dense_sums_and_gradients(tiles, query_sizes, key_sizes, stride, memory):
    torch.manual_seed(0)
    layout = Layout(query_sizes, key_sizes, stride)
    inputs, tensors = leaves(layout, False, False, "query", memory)
    out = factored_sums(*tensors[3:], query_sizes, key_sizes, stride)
    expected = dense(*tensors, None, layout)
    assert torch.allclose(out, expected, atol=1e-11)
    grad = torch.randn_like(expected)
    actual = torch.autograd.grad(out, inputs, grad)
    for one, two in zip(actual, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(one, two, atol=1e-10)


def test_the_operators_are_well_formed_for_compilers():
    torch.manual_seed(0)
    layout = Layout((3, 4), (2, 2), 2)
    for memory in ("features outside", "features inside"):
        _, tensors = leaves(layout, True, True, "query", memory)
        arguments = (*tensors, None, (3, 4), (2, 2), 2, False, None, 0.0, None)
        torch.library.opcheck(tiled_attention, arguments)
        torch.library.opcheck(factored_sums, (*tensors[3:], (3, 4), (2, 2), 2))


def make(terms: str, ndim: int, algorithm: str = "auto", **settings) -> TransformerAttention:
    torch.manual_seed(1)
    attention = TransformerAttention(8, 2, terms, ndim=ndim, algorithm=algorithm, **settings).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("ndim", [1, 2])
def test_each_algorithm_that_fits_gives_the_definition(terms, ndim):
    x = torch.randn(2, 6, 8) if ndim == 1 else torch.randn(2, 8, 3, 4)
    x = x.double().requires_grad_()
    mask = torch.zeros(2, 6) if ndim == 1 else torch.zeros(2, 3, 4)
    mask[1, -1:] = 1
    grad = torch.randn_like(x)
    used = set()
    for padding, stride in itertools.product((None, mask.bool()), (1, 2)):
        reference = make(terms, ndim, "definition", kv_stride=stride)
        expected = reference(x, key_padding_mask=padding)
        wanted = torch.autograd.grad(expected, [x, *reference.parameters()], grad)
        names = dict(reference.named_parameters())
        for algorithm in ("pooled", "separable", "factored", "fused", "tiled"):
            attention = make(terms, ndim, algorithm, kv_stride=stride)
            if unfit(algorithm, terms, ndim, Layout((1, 6), (1, 6), 1), padding is not None, 0.0):
                with pytest.raises(ValueError, match=f"algorithm='{algorithm}' cannot compute this attention: it "):
                    attention(x, key_padding_mask=padding)
                continue
            used.add(algorithm)
            out = attention(x, key_padding_mask=padding)
            assert torch.allclose(out, expected, atol=1e-10), algorithm
            actual = torch.autograd.grad(out, [x, *attention.parameters()], grad)
            for name, one, two in zip(["x", *names], actual, wanted, strict=True):
                assert torch.allclose(one, two, atol=1e-9), (algorithm, name)
    assert "tiled" in used
    assert ("pooled" in used) == (terms == "0010")
    assert ("separable" in used) == (terms in ("0001", "0011"))
    assert ("factored" in used) == (ndim == 2 and terms[0] == "0" and terms[1] == "1")
    assert ("fused" in used) == (terms in ("1000", "1010"))


@pytest.mark.parametrize("terms", ["1000", "1111", "1001", "1110"])
@pytest.mark.parametrize("ndim", [1, 2])
def test_flex_attention_adds_the_same_position_energies(terms, ndim):
    # Without a GPU only its forward pass can be run, by torch's own slow form of the same kernel.
    x = torch.randn(2, 6, 32) if ndim == 1 else torch.randn(2, 32, 3, 4)
    attention = TransformerAttention(32, 2, terms, ndim=ndim, kv_stride=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        expected = attention(x)
        attention.algorithm = "flex"
        assert torch.allclose(attention(x), expected, atol=1e-5)


def test_what_is_chosen():
    def chosen(terms, ndim=2, device="cpu", padded=False, dropout=0.0, **settings):
        sizes = (20, 30) if ndim == 2 else (1, 30)
        return choose(terms, ndim, Layout(sizes, sizes, 1, **settings), padded, dropout, torch.device(device))

    assert chosen("0010") == "pooled"
    assert chosen("0010", causal=True) == chosen("0010", window=3) == chosen("0010", dropout=0.1) == "tiled"
    assert chosen("0001") == chosen("0011") == chosen("0011", ndim=1, causal=True) == "separable"
    assert chosen("0011", causal=True) == "tiled"  # reading order does not separate
    assert chosen("0100") == chosen("0111") == "factored"
    assert chosen("0111", ndim=1) == "tiled"
    assert chosen("1000") == chosen("1010", padded=True) == "fused"
    assert chosen("1000", causal=True, padded=True) == chosen("1000", window=5) == "tiled"
    assert {chosen(terms) for terms in ("1111", "1101", "1011", "1001", "1100", "1110")} == {"tiled"}
    assert chosen("1111", device="cuda") == "flex"
    assert chosen("1111", device="cuda", padded=True) == "tiled"
    long = Layout((1, 5000), (1, 5000), 1)
    assert choose("0001", 1, long, False, 0.0, torch.device("cpu")) == "tiled"  # no weight for every pair


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match=r"algorithm must be one of .*'tiled'.*, got 'quick'"):
        TransformerAttention(8, 2, algorithm="quick")  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", ["0001", "0011", "0100", "0101", "0110", "0111"])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_extreme_energies_do_not_vanish(terms, scale, monkeypatch):
    # Keys salient where positions are not: products of exponentials of +-200 underflow, sums of energies do not.
    fallbacks = []
    tiled_way = algorithms.tiled
    monkeypatch.setattr(algorithms, "tiled", lambda p, dropout=0.0: fallbacks.append(1) or tiled_way(p, dropout))
    attention = TransformerAttention(8, 2, terms, ndim=2).float()
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
    reference = make_copy(attention, "definition")
    wanted_input = x.detach().double().requires_grad_()
    expected = reference(wanted_input)
    assert torch.allclose(out.double(), expected, atol=2e-3 * expected.abs().max().item())
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, x, grad)
    (wanted,) = torch.autograd.grad(expected, wanted_input, grad.double())
    assert torch.isfinite(actual).all()
    assert torch.allclose(actual.double(), wanted, atol=2e-2 * wanted.abs().max().item())
    if terms[2] == "0" or scale == 1:
        assert not fallbacks  # one softmax along each axis cannot vanish
    elif terms == "0011":
        assert fallbacks


def make_copy(attention: TransformerAttention, algorithm: str) -> TransformerAttention:
    copy = TransformerAttention(attention.dim, attention.num_heads, attention.terms, ndim=2, algorithm=algorithm)
    copy.load_state_dict(attention.state_dict())
    return copy.double()


def test_dropped_weights_are_the_same_in_both_passes():
    attention = make("1111", 1, dropout=0.5).train()
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)

    def run(value: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(value)

    assert torch.autograd.gradcheck(run, x)
    torch.manual_seed(3)
    first = attention(x)
    assert not torch.equal(first, attention(x))  # another draw
    torch.manual_seed(3)
    assert torch.equal(first, attention(x))


def test_the_mean_over_dropped_weights_is_the_weight():
    attention = make("1001", 1, dropout=0.3).train()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        mean = torch.stack([attention(x) for _ in range(3000)]).mean(0)
        expected = attention.eval()(x)
    assert torch.allclose(mean, expected, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("terms", ["1111", "1000", "0100", "0001"])
def test_compiled_in_one_graph(terms):
    torch._dynamo.reset()
    attention = make(terms, 2)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), attention(x)
    assert torch.allclose(out, expected)
    grad = torch.randn_like(out)
    assert torch.allclose(*(torch.autograd.grad(y, x, grad)[0] for y in (out, expected)))


def test_compiled_where_a_choice_depends_on_the_numbers():
    torch._dynamo.reset()
    for terms in ("0011", "0111"):
        attention = make(terms, 2)
        x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
        assert torch.allclose(torch.compile(attention, backend="aot_eager")(x), attention(x))


class TestThreads:
    def test_an_error_in_a_piece_is_raised_after_all_pieces(self):
        done = []

        def work(piece, _):
            if piece == 1:
                raise RuntimeError("piece 1")
            done.append(piece)

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            with pytest.raises(RuntimeError, match="piece 1"):
                threads.run_pieces(work, range(6), list, torch.device("cpu"))
        finally:
            torch.set_num_threads(before)
        assert sorted(done) == [0, 2, 3, 4, 5]

    def test_each_thread_has_its_own_tools_and_one_core(self):
        seen = []
        before = torch.get_num_threads()
        try:
            for count in (2, 3):
                torch.set_num_threads(count)
                threads.run_pieces(
                    lambda _, tools: seen.append((id(tools), torch.get_num_threads(), torch.is_grad_enabled())),
                    range(20),
                    dict,
                    torch.device("cpu"),
                )
                assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(before)
        assert len(seen) == 40
        assert {(number, grad) for _, number, grad in seen} == {(1, False)}

    def test_under_inference_mode(self, monkeypatch):
        monkeypatch.setattr(tiled, "TILE_ELEMENTS", 50)
        monkeypatch.setattr(tiled, "SHARED_TILE_ELEMENTS", 100)
        attention = make("1111", 2)
        x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
        expected = attention(x)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            with torch.inference_mode():
                assert torch.allclose(attention(x), expected)
        finally:
            torch.set_num_threads(before)


def test_tiles_cover_every_query_once():
    for window, causal in ((None, False), (3, False), (7, True), (None, True)):
        layout = Layout((13, 17), (7, 9), 2, causal=causal, window=window)
        seen = torch.zeros(4, 3, 13, 17, dtype=torch.long)
        for tile in itertools.chain.from_iterable(layout.tiles(4, 3)):
            seen[tile.heads, tile.samples, tile.queries[0], tile.queries[1]] += 1
        assert seen.eq(1).all()
    assert not any(Layout((0, 5), (0, 5), 1).tiles(2, 2))
