"""Maps of terms against the definition, and figures by what stands in them."""

import errno
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - torch has no public name
from torch.utils._pytree import tree_leaves  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention import AttentionSpec, GatedResidual, TransformerAttention, reference
from lightning_attn.attention.deformable import DeformableConv
from lightning_attn.attention.dynamic import DynamicConv
from lightning_attn.attention.spec import TERM_SETS
from lightning_attn.networks.translation.transformer import Transformer
from lightning_attn.visualization import (
    SamplingPoints,
    cross_attention_maps,
    draw_dynamic_kernels,
    draw_sampling_points,
    draw_term_maps,
    draw_token_matrix,
    draw_translation_attention,
    dynamic_kernel,
    recorded_inputs,
    sampling_points,
    save_figure,
    term_maps,
    translation_attention,
)

DIM, HEADS = 8, 2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(terms="1111", ndim=2, **settings):
    attention = TransformerAttention(DIM, HEADS, terms, ndim, **settings).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def draw_map(*size, batch=1):
    return torch.randn(batch, DIM, *size, dtype=torch.float64)


def draw_sentence(length, batch=1):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@torch.no_grad()
def by_definition(attention, query, key, mask=None):
    """Energies, weights of each term alone, weights of the whole and keys seen, for all queries of the first sample."""
    parameters = reference.parameters_of(attention)
    energies = reference.term_energies(
        query, key, parameters, num_heads=HEADS, terms=attention.terms, kv_stride=attention.kv_stride,
        scale=attention.scale,
    )  # fmt: skip
    regions = reference.supporting_keys(
        query, key, window=attention.window, kv_stride=attention.kv_stride, causal=attention.causal,
        key_padding_mask=mask,
    )  # fmt: skip
    alone = {name: reference.normalised_weights({name: energy}, regions)[0] for name, energy in energies.items()}
    seen = torch.zeros(next(iter(energies.values())).shape[2:], dtype=torch.bool)
    for q, region in enumerate(regions[0]):
        seen[q, region] = True
    whole = reference.normalised_weights(energies, regions)[0]
    return {name: energy[0] for name, energy in energies.items()}, alone, whole, seen


def check(maps, expected, rows, shape):
    energies, alone, whole, seen = expected
    assert list(maps.energies) == list(maps.weights) == list(energies)
    for name in energies:
        torch.testing.assert_close(maps.energies[name], energies[name][:, rows].reshape(-1, *shape))
        torch.testing.assert_close(maps.weights[name], alone[name][:, rows].reshape(-1, *shape))
    torch.testing.assert_close(maps.whole, whole[:, rows].reshape(-1, *shape))
    assert torch.equal(maps.visible, seen[rows].reshape(shape))


# --- Arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"kv_stride": 2, "scale": 0.5}, {"causal": True}], ids=str)
def test_maps_of_a_query_are_those_of_the_definition(terms, settings):
    attention, x = make(terms, **settings), draw_map(3, 4)
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[0, 0, 1:] = mask[0, 2, 2] = True
    shape = (2, 2) if "kv_stride" in settings else (3, 4)
    maps = term_maps(attention, x, position=(1, 2), key_padding_mask=mask)
    check(maps, by_definition(attention, x, x, mask), 6, shape)
    assert (maps.position, maps.key_size, maps.kv_stride) == ((1, 2), (3, 4), attention.kv_stride)
    assert not maps.whole.requires_grad


@pytest.mark.parametrize("settings", [{}, {"window": 3, "causal": True}, {"kv_stride": 2}], ids=str)
def test_maps_of_a_sentence_are_those_of_the_definition(settings):
    attention, x = make(ndim=1, **settings), draw_sentence(5)
    expected, keys = by_definition(attention, x, x), 3 if "kv_stride" in settings else 5
    whole_sentence = term_maps(attention, x)
    check(whole_sentence, expected, slice(None), (5, keys))
    assert whole_sentence.position is None
    one = term_maps(attention, x, position=3)
    check(one, expected, 3, (keys,))
    assert one.position == (3,)


def test_queries_and_keys_may_be_two_sets():
    attention, query, key = make(ndim=1), draw_sentence(3), draw_sentence(5)
    mask = torch.tensor([[False, False, True, False, True]])
    maps = term_maps(attention, query, key, key_padding_mask=mask)
    check(maps, by_definition(attention, query, key, mask), slice(None), (3, 5))
    attention, query, key = make(), draw_map(2, 3), draw_map(3, 2)
    check(term_maps(attention, query, key, (1, 0)), by_definition(attention, query, key), 3, (3, 2))


def test_sample_residual_and_causal_argument():
    attention, x = make(causal=False), draw_map(2, 3, batch=3)
    mask = torch.zeros(3, 2, 3, dtype=torch.bool)
    mask[1, 0, 0] = True
    maps = term_maps(GatedResidual(attention), x, position=4, sample=1, key_padding_mask=mask)
    check(maps, by_definition(attention, x[1:2], x[1:2], mask[1:2]), 4, (2, 3))
    assert maps.position == (1, 1)
    seen = term_maps(attention, x, position=(1, 0), causal=True).visible
    assert seen.tolist() == [[True, True, True], [True, False, False]]


def test_mean_and_heads():
    maps = term_maps(make("0110"), draw_map(3, 3), position=(0, 0))
    mean = maps.mean()
    assert (maps.num_heads, mean.num_heads) == (HEADS, 1)
    torch.testing.assert_close(mean.whole[0], (maps.whole[0] + maps.whole[1]) / 2)
    torch.testing.assert_close(mean.weights["E2"][0], maps.weights["E2"].mean(0))
    torch.testing.assert_close(mean.energies["E3"][0], maps.energies["E3"].mean(0))
    assert torch.equal(maps.head(1).energies["E3"][0], maps.energies["E3"][1])
    torch.testing.assert_close(mean.whole.sum(), torch.ones((), dtype=torch.float64))


def test_a_query_that_sees_nothing_has_zeros_and_can_be_drawn():
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    maps = term_maps(make(), draw_map(2, 3), position=(0, 0), key_padding_mask=mask)
    assert not maps.visible.any()
    assert maps.whole.count_nonzero() == 0
    assert maps.weights["E1"].count_nonzero() == 0
    for quantity in ("weights", "energies"):
        draw_term_maps(maps, quantity=quantity).canvas.draw()


def test_half_precision_gives_float32():
    attention = make("0011").to(torch.bfloat16)
    maps = term_maps(attention, draw_map(2, 3).to(torch.bfloat16), position=(0, 0))
    assert maps.whole.dtype == maps.weights["E3"].dtype == maps.energies["E4"].dtype == torch.float32
    torch.testing.assert_close(maps.weights["E4"].sum((1, 2)), torch.ones(HEADS))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_one_query_of_a_large_map_needs_no_square_matrix():
    attention, x = make(), draw_map(40, 50)
    with LargestTensor() as largest:
        term_maps(attention, x, position=(20, 20))
    assert largest.elements < 2000**2 / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"position is required for a map: pass \(row, column\)"),
        (
            {"position": (3, 0)},
            r"position=\(3, 0\) is not a query of a map of 3 rows and 4 columns; positions count from 0",
        ),
        ({"position": (0, -1)}, r"position=\(0, -1\) is not a query"),
        ({"position": 12}, r"position=12 is not a query of a map of 3 rows and 4 columns"),
        ({"position": (0, 0, 0)}, r"position=\(0, 0, 0\) is not a query"),
        ({"position": (0, 0), "sample": 1}, r"sample=1 is not in the batch of 1"),
        ({"position": (0, 0), "key": torch.zeros(1, 2, DIM)}, r"key must be \[B, C, H, W\] .* got shape \(1, 2, 8\)"),
        ({"position": (0, 0), "key_padding_mask": torch.zeros(1, 2, 2, dtype=torch.bool)}, r"\(1, 3, 4\) of the keys"),
    ],
)
def test_what_cannot_be_mapped(arguments, message):
    with pytest.raises(ValueError, match=message):
        term_maps(make(), draw_map(3, 4), **arguments)


def test_positions_of_a_sentence_and_modules_without_terms():
    with pytest.raises(ValueError, match="position=5 is not a query of a sentence of 5"):
        term_maps(make(ndim=1), draw_sentence(5), position=5)
    with pytest.raises(ValueError, match=r"query must be \[B, L, C\] for this attention, got shape \(1, 8, 2, 2\)"):
        term_maps(make(ndim=1), draw_map(2, 2))
    with pytest.raises(ValueError, match="attention is a Linear: only a TransformerAttention has terms"):
        term_maps(nn.Linear(2, 2), draw_sentence(5))


# --- Inside networks -------------------------------------------------------------------------------------------------


def tiny_transformer():
    spec = AttentionSpec(num_heads=2)
    return Transformer(9, 0, spec, spec, dim=8, hidden_dim=8, encoder_layers=1, decoder_layers=2, dropout=0.0).eval()


def test_inputs_are_recorded_inside_a_network():
    network, source, target = tiny_transformer(), torch.tensor([[4, 5, 6, 3]]), torch.tensor([[2, 7, 8]])
    attention = network.decoder[1].cross_attention
    inputs = recorded_inputs(attention, lambda: network(source, target))
    maps = term_maps(attention, **inputs)
    torch.testing.assert_close(maps.whole, cross_attention_maps(network, source, target)[1])
    decoder = term_maps(
        network.decoder[0].self_attention,
        **recorded_inputs(network.decoder[0].self_attention, lambda: network(source, target)),
    )
    assert decoder.visible.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert not attention._forward_pre_hooks


def test_an_attention_that_did_not_run_whole_is_refused():
    network, source = tiny_transformer(), torch.tensor([[4, 5, 6, 3]])
    attention = network.decoder[0].cross_attention
    with pytest.raises(ValueError, match="call did not run the attention"):
        recorded_inputs(attention, lambda: network.encode(source))

    def decode():
        attention(torch.zeros(1, 1, 8), cache=attention.new_cache(torch.zeros(1, 4, 8)))

    with pytest.raises(ValueError, match="with a cache, step by step"):
        recorded_inputs(attention, decode)
    with pytest.raises(ZeroDivisionError):
        recorded_inputs(attention, lambda: 1 / 0)
    assert not attention._forward_pre_hooks


# --- Figures ---------------------------------------------------------------------------------------------------------


def panels_of(figure):
    """The axes of a figure without colour bars and without those that are switched off."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and axes.axison]


def colour_bar_label(figure):
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    return bar.get_ylabel()


def drawn(axes):
    """The map itself, the last image of a panel."""
    return np.ma.filled(axes.images[-1].get_array().astype(float), np.nan)


def test_a_column_for_each_term_and_one_for_the_whole():
    maps = term_maps(make("1011"), draw_map(3, 4), position=(1, 2))
    figure = draw_term_maps(maps)
    titles = [axes.get_title().split(":")[0] for axes in panels_of(figure)]
    assert titles == ["E1", "E3", "E4", "whole"]
    mean = maps.mean()
    for axes, values in zip(
        panels_of(figure), [*(mean.weights[name] for name in ("E1", "E3", "E4")), mean.whole], strict=True
    ):
        np.testing.assert_allclose(drawn(axes), 12 * values[0].numpy())  # multiples of an even share
        ((column, row),) = axes.lines[0].get_xydata()
        assert (row, column) == (1, 2)
    norms = {id(axes.images[-1].norm) for axes in panels_of(figure)}
    assert len(norms) == 1, "all panels have one scale"
    norm = panels_of(figure)[0].images[-1].norm
    assert isinstance(norm, LogNorm)
    assert norm.vmin == 1
    assert norm.vmax == pytest.approx(max(2, *(np.nanmax(drawn(axes)) for axes in panels_of(figure))))
    assert colour_bar_label(figure) == "weight × number of keys"
    assert "row 1, column 2 of a 3 × 4 map" in figure.get_suptitle()


def test_rows_for_heads_and_chosen_terms():
    maps = term_maps(make(), draw_map(3, 4), position=(0, 0))
    figure = draw_term_maps(maps, heads="both", terms=("E3", "E1"), title="chosen")
    panels = panels_of(figure)
    assert [axes.get_ylabel() for axes in panels[::3]] == ["mean over heads", "head 1", "head 2"]
    assert [axes.get_title().split(":")[0] for axes in panels[:3]] == ["E3", "E1", "whole"]
    np.testing.assert_allclose(drawn(panels[7]), 12 * maps.weights["E1"][1].numpy())
    assert len(panels_of(draw_term_maps(maps, heads="each"))) == 10
    assert figure.get_suptitle() == "chosen"


def test_energies_are_drawn_around_their_mean():
    maps = term_maps(make("1001", window=3), draw_map(3, 5), position=(1, 1))
    e1, e4, whole = panels_of(draw_term_maps(maps, quantity="energies"))
    total = (maps.energies["E1"] + maps.energies["E4"]).mean(0).numpy()
    expected = np.where(maps.visible, total - total[maps.visible.numpy()].mean(), np.nan)
    np.testing.assert_allclose(drawn(whole), expected)
    assert np.isnan(drawn(e1)[:, 3:]).all(), "keys outside the window"
    assert e4.images[-1].norm.vmin == -e4.images[-1].norm.vmax


def test_keys_lie_on_the_pixels_they_come_from():
    """A key in the image's corner must colour the image's corner, whatever the stride and the size of the image."""
    attention = make("0010", kv_stride=2)
    x = torch.zeros(1, DIM, 5, 7, dtype=torch.float64)
    x[0, :, 4, 6] = 50 * torch.linalg.lstsq(attention.key_proj.weight, attention.key_bias.flatten()).solution.detach()
    maps = term_maps(attention, x, position=(2, 3))
    image = np.zeros((80, 112), dtype=np.uint8)
    _, panel, _ = panels_of(draw_term_maps(maps, image))
    left, right, bottom, top = panel.images[-1].get_extent()
    values = drawn(panel)
    row, column = np.unravel_index(np.nanargmax(values), values.shape)
    assert (row, column) == (2, 3)
    centre = left + (column + 0.5) * (right - left) / values.shape[1], top + (row + 0.5) * (bottom - top) / len(values)
    assert centre == (6, 4)
    # The image spans the positions -0.5 to 6.5, so position 6 is the middle of the pixels 96 to 111.
    left, right, bottom, top = panel.images[0].get_extent()
    assert (left, right, bottom, top) == (-0.5, 6.5, 4.5, -0.5)
    assert panel.get_xlim() == (-0.5, 6.5)
    assert panel.get_ylim() == (4.5, -0.5)


def test_images_of_every_kind_are_the_same():
    maps = term_maps(make("0010"), draw_map(4, 6), position=(0, 0))
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    kinds = [picture, picture / 255.0, torch.tensor(picture).movedim(2, 0), torch.tensor(picture / 255).movedim(2, 0)]
    for kind in kinds:
        np.testing.assert_allclose(drawn(panels_of(draw_term_maps(maps, kind))[0]), picture / 255)
    grey = picture[..., 0]
    for kind in (grey, torch.tensor(grey), torch.tensor(grey)[None]):
        shown = drawn(panels_of(draw_term_maps(maps, kind))[0])
        np.testing.assert_allclose(shown, np.repeat(grey[..., None], 3, axis=2) / 255)


@pytest.mark.parametrize(
    ("size", "pixels", "fits"),
    [
        ((25, 42), (800, 1344), True),
        ((25, 42), (800, 1333), False),  # what a network pads: where its positions lie must be said
        ((25, 42), (800, 1000), False),
        ((25, 42), (1344, 800), False),
        ((10, 15), (300, 451), False),
        ((1, 1), (30, 90), True),  # anything may be one position
        ((4, 6), (4, 6), True),
        ((4, 6), (8, 18), False),  # no squares
    ],
)
def test_an_image_alone_must_be_cut_into_equal_squares(size, pixels, fits):
    maps = term_maps(make("0010"), draw_map(*size), position=(0, 0))
    if fits:
        draw_term_maps(maps, np.zeros(pixels))
    else:
        message = f"image of {pixels[0]} × {pixels[1]} pixels cannot be cut into {size[0]} × {size[1]} equal squares"
        with pytest.raises(ValueError, match=f"{message}.*grid=PixelGrid"):
            draw_term_maps(maps, np.zeros(pixels))


def test_what_cannot_be_drawn():
    maps = term_maps(make("0011"), draw_map(4, 6), position=(0, 0))
    sentence = term_maps(make("0011", ndim=1), draw_sentence(3))
    for call, message in (
        (lambda: draw_term_maps(maps, terms=("E2",)), r"terms: 'E2' is off in this attention; .*\['E3', 'E4'\]"),
        (lambda: draw_term_maps(maps, terms=("E9",)), r"terms: 'E9' is off"),
        (lambda: draw_term_maps(maps, heads="all"), "heads must be 'mean', 'each', 'both' or .*, got 'all'"),
        (lambda: draw_term_maps(maps, heads=9), r"heads: 9 is none of the heads 1 to \d"),
        (lambda: draw_term_maps(maps, quantity="logits"), "quantity must be 'weights' or 'energies', got 'logits'"),
        (lambda: draw_term_maps(maps, np.zeros((4, 6, 2))), r"image must be .* got shape \(4, 6, 2\)"),
        (lambda: draw_term_maps(maps, np.full((4, 6), 3.0)), "its values are from 3 to 3: undo the normalisation"),
        (lambda: draw_term_maps(maps, np.full((4, 6), np.nan)), "its values are from nan to nan"),
        (lambda: draw_term_maps(sentence), "use draw_token_matrix"),
        (lambda: draw_token_matrix(maps, ["a"], ["b"]), "use draw_term_maps"),
        (lambda: draw_token_matrix(sentence, ["a"] * 2, ["b"] * 3), "queries: 2 names for 3 tokens"),
        (lambda: draw_token_matrix(sentence, ["a"] * 3, ["b"] * 4), "keys: 4 names for 3 tokens"),
        (lambda: draw_token_matrix(sentence, ["a"] * 3, ["b"] * 3, terms=["E1"]), "'E1' is off"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_token_matrices_name_queries_and_the_keys_that_take_part():
    attention = make(ndim=1, kv_stride=2, causal=True)
    maps = term_maps(attention, draw_sentence(5))
    figure = draw_token_matrix(maps, list("abcde"), list("vwxyz"), title="a title", key_label="source")
    panels = panels_of(figure)
    assert [axes.get_title().split(":")[0] for axes in panels] == ["E1", "E2", "E3", "E4", "whole"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["v", "x", "z"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list("abcde")
    expected = maps.whole.mean(0).masked_fill(~maps.visible, math.nan).numpy()
    np.testing.assert_allclose(drawn(panels[-1]), expected)
    assert len({id(axes.images[-1].norm) for axes in panels}) == 1
    assert figure.get_suptitle() == "a title"
    assert figure.get_supxlabel() == "source  —  grey: keys hidden from the query"
    assert len(panels_of(draw_token_matrix(maps, list("abcde"), list("vwxyz"), heads="each", terms=()))) == HEADS


def test_a_single_query_of_a_sentence_and_a_sentence_without_tokens():
    attention = make(ndim=1)
    maps = term_maps(attention, draw_sentence(4), position=2)
    (panel,) = panels_of(draw_token_matrix(maps, ["query"], list("abcd"), terms=()))
    np.testing.assert_allclose(drawn(panel), maps.whole.mean(0, keepdim=True).numpy())
    empty = term_maps(attention, draw_sentence(0))
    assert empty.whole.shape == (HEADS, 0, 0)


def test_long_sentences_stay_drawable():
    maps = term_maps(make("0011", ndim=1), draw_sentence(120))
    figure = draw_token_matrix(maps, ["token"] * 120, ["token"] * 120)
    assert max(figure.get_size_inches()) < 45


def test_figures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    maps = term_maps(make("0010"), draw_map(2, 3), position=(0, 0))
    for name in ("a.png", "a.svg", "deeper/a.pdf"):
        draw_term_maps(maps, path=tmp_path / name)
        first = (tmp_path / name).read_bytes()
        draw_term_maps(maps, path=str(tmp_path / name))
        assert len(first) > 1000
        assert (tmp_path / name).read_bytes() == first, "the same figure gives the same bytes"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"path='.*a\.txt' must end with the format of the figure, one of \["):
        draw_term_maps(maps, path=tmp_path / "a.txt")
    with pytest.raises(OSError, match=r"a\.png"):
        draw_term_maps(maps, path=tmp_path / "a.png" / "b.png")

    def full(self, file, **settings):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        save_figure(Figure(), tmp_path / "new.png")
    assert sorted(tmp_path.rglob("*")) == before


class Letters:
    """A vocabulary of single letters."""

    pad_id = 0

    def pieces(self, ids):
        return [f"\u2581{'pqrstuvwxyz'[i]}" for i in ids]


def test_the_attention_of_a_translation_is_drawn(tmp_path):
    source, target = torch.tensor([[4, 5, 6, 3, 0, 0]]), torch.tensor([[2, 7, 8, 3, 0]])
    draw_translation_attention(tiny_transformer(), Letters(), source, target, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_attention_of_a_translation_as_plain_values():
    source, target = torch.tensor([[4, 5, 6, 3, 0, 0]]), torch.tensor([[2, 7, 8, 3, 0]])
    network = tiny_transformer()
    encoder, cross = translation_attention(network, Letters(), source, target)
    assert (encoder["queries"], encoder["keys"]) == (["_t", "_u", "_v", "_s"],) * 2
    assert cross["queries"] == ["_w", "_x", "_s"]
    expected = cross_attention_maps(network, source[:, :4], target[:, :3])[-1].mean(0)
    assert torch.tensor(cross["weights"]["whole"]) == pytest.approx(expected, abs=1e-4)
    assert torch.tensor(encoder["weights"]["whole"]).sum(1) == pytest.approx(1.0, abs=1e-3)


def test_weights_as_lists_are_relative_in_a_map_and_hidden_keys_have_none():
    module = make("0010", window=3)
    maps = term_maps(module, draw_map(4, 5), position=(0, 0))
    lists = maps.as_lists()
    assert [*lists] == ["E3", "whole"]
    visible = [value for row in lists["whole"] for value in row if value is not None]
    assert len(visible) == 4, "a window of 3 x 3 in the corner"
    assert sum(visible) == pytest.approx(4.0, abs=1e-3)


# --- Convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"dilation": 2}, {"padding": 0}, {"kernel_size": 5}], ids=str)
def test_sampling_points_are_where_the_convolution_reads(modulated, settings):
    """A convolution of one tap over a map that holds its own row and column gives the place where this tap reads."""
    height, width = 20, 24
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = torch.stack((rows, columns, torch.ones(height, width), torch.randn(height, width)))[None].double()
    convolution = DeformableConv(4, 3, modulated=modulated, bias=False, **settings).double()
    nn.init.normal_(convolution.offset.weight, std=0.01)
    nn.init.normal_(convolution.offset.bias, std=0.3)
    position = (6, 5)
    points = sampling_points(convolution, torch.cat((torch.zeros_like(x), x)), position, sample=1)
    size = convolution.kernel_size[0]
    assert points.size == (height, width)
    for tap in range(size**2):
        with torch.no_grad():
            convolution.weight.zero_()
            convolution.weight[:, :, tap // size, tap % size] = torch.eye(3, 4)
            row, column, share = convolution(x)[0, :, position[0], position[1]]
        torch.testing.assert_close(share, points.modulation[tap])
        torch.testing.assert_close(torch.stack((row, column)) / share, points.points[tap])
    nn.init.zeros_(convolution.offset.weight)
    nn.init.zeros_(convolution.offset.bias)
    still = sampling_points(convolution, x, position)
    assert torch.equal(still.points, still.grid)
    assert torch.equal(still.grid, points.grid)


def test_padding_does_not_move_sampling_points():
    convolution, x = DeformableConv(DIM, DIM).double(), draw_map(4, 5)
    nn.init.normal_(convolution.offset.weight)
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[..., 3:] = True
    points = sampling_points(convolution, x, (1, 2), key_padding_mask=mask)
    torch.testing.assert_close(points.points, sampling_points(convolution, x.masked_fill(mask[:, None], 0), 7).points)


@pytest.mark.parametrize("ndim", [1, 2])
def test_dynamic_kernels_are_those_that_the_convolution_uses(ndim):
    convolution = DynamicConv(DIM, kernel_size=3, groups=4, ndim=ndim).double()
    for parameter in convolution.parameters():
        nn.init.normal_(parameter)
    x = draw_sentence(5, batch=2) if ndim == 1 else draw_map(4, 5, batch=2)
    position = 2 if ndim == 1 else (1, 3)
    kernel = dynamic_kernel(convolution, x, position, sample=1)
    assert kernel.shape == (4, *[3] * ndim)
    torch.testing.assert_close(kernel.flatten(1).sum(1), torch.ones(4, dtype=torch.float64))
    with torch.no_grad():
        content = F.glu(convolution.input_proj(x if ndim == 1 else x.movedim(1, -1)), dim=-1)[1]
        region = content[1:4] if ndim == 1 else content[0:3, 2:5]
        by_channel = kernel.repeat_interleave(2, dim=0).movedim(0, -1)
        expected = convolution.out_proj((by_channel * region).flatten(0, -2).sum(0))
        output = convolution(x)[1]
        torch.testing.assert_close(output[2] if ndim == 1 else output[:, 1, 3], expected)


def test_figures_of_convolutions(tmp_path):
    convolution, x = DeformableConv(DIM, DIM, modulated=True).double(), draw_map(4, 6)
    nn.init.normal_(convolution.offset.weight, std=0.1)
    points = [sampling_points(convolution, x, position) for position in ((1, 1), (2, 4))]
    figure = draw_sampling_points(points, np.zeros((32, 48)), tmp_path / "points.png")
    (axes,) = figure.axes
    rings, discs = axes.collections[2:]
    np.testing.assert_allclose(rings.get_offsets(), points[1].grid.flip(1).numpy())
    np.testing.assert_allclose(discs.get_offsets(), points[1].points.flip(1).numpy())
    assert axes.get_xlabel().endswith("area: modulation")
    kernels = {"one": torch.rand(4, 3, 3), "other": torch.rand(4, 3, 3)}
    figure = draw_dynamic_kernels(kernels, tmp_path / "kernels.svg")
    assert [axes.get_ylabel() for axes in panels_of(figure)[::4]] == ["one", "other"]
    np.testing.assert_allclose(drawn(panels_of(figure)[6]), kernels["other"][2], rtol=1e-6)
    assert len(panels_of(draw_dynamic_kernels(torch.rand(4, 7)))) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.svg", "points.png"]


def test_errors_of_convolutions():
    convolution, x = DeformableConv(DIM, DIM, stride=2).double(), draw_map(4, 6)
    point = SamplingPoints(torch.zeros(9, 2), torch.zeros(9, 2), torch.ones(9), (4, 6))
    for call, message in (
        (
            lambda: sampling_points(convolution, x, (2, 0)),
            "position=.* is not a query of a map of 2 rows and 3 columns",
        ),
        (lambda: sampling_points(convolution, x, (0, 0), sample=2), "sample=2 is not in the batch of 1"),
        (lambda: sampling_points(DeformableConv(DIM, DIM, ndim=1), draw_sentence(3), 0), "need a map.*ndim=1"),
        (
            lambda: dynamic_kernel(DynamicConv(DIM, groups=4), torch.zeros(1, 3, DIM), 3),
            "not a query of a sentence of 3",
        ),
        (lambda: dynamic_kernel(DynamicConv(DIM, groups=4), torch.zeros(1, 3, DIM), 0, sample=-1), "sample=-1"),
        (lambda: draw_sampling_points([]), "points: 0 queries; pass 1 to 4"),
        (lambda: draw_sampling_points([point] * 5), "points: 5 queries"),
        (lambda: draw_sampling_points(point, np.zeros((6, 4))), "cannot be cut into 4 × 6 equal squares"),
        (lambda: draw_dynamic_kernels({}), "kernels must be one or more of the same shape"),
        (lambda: draw_dynamic_kernels({"a": torch.rand(2, 3), "b": torch.rand(2, 5)}), r"\(2, 3\), \(2, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- The documentation's figures -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_figures_of_the_documentation_can_be_made(tmp_path):
    folder = Path(__file__).parents[2] / "docs" / "figures"
    for name, options in (("make_attention_figures", {"steps": 2}), ("make_trade_off_figure", {})):
        specification = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        script = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(script)
        script.main(tmp_path, **options)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in folder.glob("*.png"))
    assert max(path.stat().st_size for path in folder.glob("*.png")) < 100_000
