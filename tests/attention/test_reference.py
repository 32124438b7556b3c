"""The definition itself against facts that were not derived from it: hand-made numbers and torch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_attn.attention import TransformerAttention
from lightning_attn.attention.reference import (
    AttentionParameters,
    normalised_weights,
    parameters_of,
    relative_encoding,
    supporting_keys,
    term_energies,
    transformer_attention,
)
from lightning_attn.attention.spec import TERM_SETS


def random_parameters(dim: int, num_heads: int, seed: int = 0) -> AttentionParameters:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    return AttentionParameters(
        value_weight=draw(dim, dim),
        out_weight=draw(dim, dim),
        out_bias=draw(dim),
        query_weight=draw(dim, dim),
        key_weight=draw(dim, dim),
        position_weight=draw(dim, dim),
        key_bias=draw(num_heads, dim // num_heads),
        position_bias=draw(num_heads, dim // num_heads),
    )


@pytest.mark.parametrize("terms", TERM_SETS)
def test_parameters_of_a_module_are_its_own(terms):
    attention = TransformerAttention(8, 2, terms)
    own = dict(attention.named_parameters())
    for field, name in {
        "query_weight": "query_proj.weight",
        "key_weight": "key_proj.weight",
        "value_weight": "value_proj.weight",
        "position_weight": "position_proj.weight",
        "key_bias": "key_bias",
        "position_bias": "position_bias",
        "out_weight": "out_proj.weight",
        "out_bias": "out_proj.bias",
    }.items():
        assert getattr(parameters_of(attention), field) is own.pop(name, None)
    assert not own


def test_two_tokens_computed_by_hand():
    # One head, two features, every matrix the identity: each energy can be written down.
    identity = torch.eye(2, dtype=torch.float64)
    a, b, c, d = 0.3, -0.7, 1.1, 0.4
    u0, u1, v0, v1 = 0.2, -0.5, 0.9, 0.6
    x = torch.tensor([[[a, b], [c, d]]], dtype=torch.float64)
    parameters = AttentionParameters(
        value_weight=identity,
        out_weight=2 * identity,
        out_bias=torch.tensor([10.0, 20.0], dtype=torch.float64),
        query_weight=identity,
        key_weight=identity,
        position_weight=identity,
        key_bias=torch.tensor([[u0, u1]], dtype=torch.float64),
        position_bias=torch.tensor([[v0, v1]], dtype=torch.float64),
    )
    sin, cos = math.sin(1), math.cos(1)  # of the offset 1 with the wavelength 1000^0; the key minus the query
    expected = {
        "E1": [[a * a + b * b, a * c + b * d], [a * c + b * d, c * c + d * d]],
        "E2": [[b, a * sin + b * cos], [-c * sin + d * cos, d]],
        "E3": [[u0 * a + u1 * b, u0 * c + u1 * d]] * 2,
        "E4": [[v1, v0 * sin + v1 * cos], [-v0 * sin + v1 * cos, v1]],
    }
    energies = term_energies(x, x, parameters, num_heads=1, terms="1111")
    assert list(energies) == ["E1", "E2", "E3", "E4"]
    for name, values in expected.items():
        torch.testing.assert_close(energies[name][0, 0], torch.tensor(values, dtype=torch.float64), msg=name)

    outputs = []
    for q in range(2):
        first, second = (math.exp(sum(expected[name][q][k] for name in expected)) for k in range(2))
        share = first / (first + second)
        outputs.append([2 * (share * a + (1 - share) * c) + 10, 2 * (share * b + (1 - share) * d) + 20])
    y = transformer_attention(x, x, parameters, num_heads=1, terms="1111")
    torch.testing.assert_close(y[0], torch.tensor(outputs, dtype=torch.float64))


def test_encoding_of_a_map_puts_x_before_y():
    x, y = 3, -2
    expected = []
    for o in (x, y):  # eight features: four per axis, two wavelengths each
        expected += [math.sin(o), math.sin(o / 1000**0.5), math.cos(o), math.cos(o / 1000**0.5)]
    torch.testing.assert_close(relative_encoding((x, y), 8), torch.tensor(expected, dtype=torch.float64))


def test_position_energy_of_a_map_computed_by_hand():
    # A map of 2 rows and 1 column: only the y half of the encoding differs between the keys.
    x = torch.ones(1, 4, 2, 1, dtype=torch.float64)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    parameters = AttentionParameters(
        value_weight=zero,
        out_weight=zero,
        out_bias=torch.zeros(4, dtype=torch.float64),
        position_weight=torch.eye(4, dtype=torch.float64),
        position_bias=torch.tensor([[1.0, 2.0, 3.0, 5.0]], dtype=torch.float64),
    )
    energy = term_energies(x, x, parameters, num_heads=1, terms="0001", scale=0.5)["E4"][0, 0]
    here = 2 + 5
    below = 2 + 3 * math.sin(1) + 5 * math.cos(1)
    above = 2 - 3 * math.sin(1) + 5 * math.cos(1)
    expected = torch.tensor([[here, below], [above, here]], dtype=torch.float64) * 0.5 / math.sqrt(2)
    torch.testing.assert_close(energy, expected)


def test_terms_share_their_matrices_and_add_up():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    parameters = random_parameters(8, 2)
    single = {}
    for terms in ("1000", "0100", "0010", "0001"):
        single |= term_energies(x, x, parameters, num_heads=2, terms=terms)
    both = term_energies(x, x, parameters, num_heads=2, terms="1111")
    for name, energy in single.items():
        torch.testing.assert_close(both[name], energy)
    everything = [[list(range(5))] * 5] * 2
    expected = sum(single.values(), torch.zeros(())).softmax(-1)
    torch.testing.assert_close(normalised_weights(both, everything), expected)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_query_and_key_content_alone_is_scaled_dot_product_attention(num_heads, causal):
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    parameters = random_parameters(8, num_heads)
    settings = {"num_heads": num_heads, "terms": "1000", "scale": (8 // num_heads) ** -0.5, "causal": causal}
    y = transformer_attention(x, x, parameters, **settings)

    def split(weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q, k, v = (split(w) for w in (parameters.query_weight, parameters.key_weight, parameters.value_weight))
    peer = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, F.linear(peer, parameters.out_weight, parameters.out_bias))


def test_encoder_decoder_content_attention_is_torch_multihead_attention():
    dim, num_heads = 8, 2
    peer = torch.nn.MultiheadAttention(dim, num_heads, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(peer.out_proj.bias)
    wq, wk, wv = peer.in_proj_weight.chunk(3)
    parameters = AttentionParameters(
        value_weight=wv,
        out_weight=peer.out_proj.weight,
        out_bias=peer.out_proj.bias,
        query_weight=wq,
        key_weight=wk,
    )
    query, key = torch.randn(2, 4, dim, dtype=torch.float64), torch.randn(2, 6, dim, dtype=torch.float64)
    mask = torch.tensor([[False] * 6, [False, True, False, False, True, True]])
    expected, weights = peer(query, key, key, key_padding_mask=mask, average_attn_weights=False)
    settings = {"num_heads": num_heads, "terms": "1000", "scale": 0.5}
    y = transformer_attention(query, key, parameters, key_padding_mask=mask, **settings)
    torch.testing.assert_close(y, expected)
    regions = supporting_keys(query, key, key_padding_mask=mask)
    torch.testing.assert_close(normalised_weights(term_energies(query, key, parameters, **settings), regions), weights)


def test_zero_energies_give_the_mean_of_the_values():
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    zero, one = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    parameters = AttentionParameters(one, one, zero[0], query_weight=zero, key_weight=zero)
    y = transformer_attention(x, x, parameters, num_heads=2, terms="1000")
    torch.testing.assert_close(y, x.mean((2, 3), keepdim=True).expand_as(x))


def test_relative_position_alone_does_not_depend_on_where_the_query_is():
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    parameters = random_parameters(8, 2)
    energies = term_energies(x, x, parameters, num_heads=2, terms="0001")
    energy = energies["E4"]
    torch.testing.assert_close(energy[:, :, 1:, 1:], energy[:, :, :-1, :-1])
    assert (energy[:, :, 0, 1:] - energy[:, :, 1:, 0]).abs().min() > 1e-3  # left and right are told apart
    weights = normalised_weights(energies, supporting_keys(x, x, window=3))
    torch.testing.assert_close(weights[:, :, 2:7, 2:7], weights[:, :, 1:6, 1:6])


def test_key_content_alone_gives_every_query_the_same_weights():
    x = torch.randn(2, 8, 2, 3, dtype=torch.float64)
    energy = term_energies(x, x, random_parameters(8, 2), num_heads=2, terms="0010")["E3"]
    torch.testing.assert_close(energy, energy[:, :, :1].expand_as(energy))
    assert energy.std(-1).min() > 1e-3


def test_a_constant_added_to_the_energies_of_a_query_changes_nothing():
    energies = {"E1": torch.randn(1, 2, 3, 4, dtype=torch.float64)}
    regions = [[[0, 1, 3], [2], [0, 1, 2, 3]]]
    weights = normalised_weights(energies, regions)
    shifted = {"E1": energies["E1"], "E2": torch.tensor([500.0, -800.0, 3.0], dtype=torch.float64)[:, None]}
    shifted["E2"] = shifted["E2"].expand(1, 2, 3, 4)
    torch.testing.assert_close(normalised_weights(shifted, regions), weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 3, dtype=torch.float64))
    assert weights[0, 0, 0, 2] == 0
    assert weights[0, 1, 1].tolist() == [0, 0, 1, 0]


def test_supporting_keys_of_a_sentence():
    x = torch.zeros(1, 5, 4)
    assert supporting_keys(x, x, window=3)[0] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    assert supporting_keys(x, x, causal=True)[0] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    # With stride 2 the keys are the tokens 0, 2, 4, numbered 0, 1, 2; the window still counts tokens.
    assert supporting_keys(x, x, kv_stride=2, window=3)[0] == [[0], [0, 1], [1], [1, 2], [2]]
    assert supporting_keys(x, x, kv_stride=2, window=1)[0] == [[0], [], [1], [], [2]]
    mask = torch.tensor([[False, True, True, False, False]])
    assert supporting_keys(x, x, kv_stride=2, causal=True, key_padding_mask=mask)[0] == [[0], [0], [0], [0], [0, 2]]


def test_supporting_keys_of_a_map():
    query, key = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 3, 3)
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[1, 0, 2] = True
    regions = supporting_keys(query, key, kv_stride=2, key_padding_mask=mask)
    assert regions == [[[0, 1, 2, 3]] * 4, [[0, 2, 3]] * 4]  # the corners; the top right one is padding
    assert supporting_keys(query, query, causal=True)[0] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    # Queries (0,0), (1,0), (0,1), (1,1) as (x, y) with keys at x, y = 0, 2.
    assert supporting_keys(query, key, kv_stride=2, window=3)[0] == [[0], [0, 1], [0, 2], [0, 1, 2, 3]]


def test_a_query_without_keys_gets_the_bias():
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    parameters = random_parameters(8, 2)
    y = transformer_attention(x, x, parameters, num_heads=2, terms="1111", window=1, kv_stride=2)
    torch.testing.assert_close(y[0, 1], parameters.out_bias)
    assert (y[0, 0] - parameters.out_bias).abs().max() > 1e-3


def test_offsets_between_two_sets_are_key_minus_query():
    parameters = random_parameters(8, 2)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    whole = term_energies(x, x, parameters, num_heads=2, terms="0101")
    part = term_energies(x[:, :2], x, parameters, num_heads=2, terms="0101", kv_stride=3)
    for name in ("E2", "E4"):
        torch.testing.assert_close(part[name], whole[name][:, :, :2, [0, 3]])


def test_errors():
    x = torch.randn(1, 2, 4)
    bare = AttentionParameters(torch.eye(4), torch.eye(4), torch.zeros(4))
    with pytest.raises(ValueError, match="query_weight is None, but a term that is on needs it"):
        term_energies(x, x, bare, num_heads=1, terms="1000")
    with pytest.raises(ValueError, match="dim is 6, but 2 axes need a positive multiple of 4"):
        relative_encoding((1, 2), 6)
    with pytest.raises(ValueError, match=r"got a tensor of shape \(4, 4\)"):
        term_energies(torch.eye(4), x, bare, num_heads=1, terms="1000")
