"""AttentionSpec, and build_attention, which turns one into a module."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from lightning_attn.attention import AttentionSpec, TransformerAttention, build_attention


def test_the_defaults_are_the_paper_s():
    spec = AttentionSpec()
    assert (spec.mechanism, spec.terms, spec.num_heads, spec.scale) == ("transformer", "1111", 8, 1.0)
    assert (spec.window, spec.kv_stride, spec.dropout) == (None, 1, 0.0)


@pytest.mark.parametrize("terms", ["".join(bits) for bits in itertools.product("01", repeat=4) if "1" in bits])
def test_every_term_set_is_accepted(terms):
    assert AttentionSpec(terms=terms).terms == terms


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mechanism", "transfomer", r"mechanism .*'transformer'.*'none'.*got 'transfomer'"),
        ("mechanism", None, r"mechanism .*got None"),
        ("terms", "0000", r"terms '0000'.*mechanism: none"),
        ("terms", "11", r"terms .*'0110'.*got '11'"),
        ("terms", "11111", r"terms .*got '11111'"),
        ("terms", "2222", r"terms .*got '2222'"),
        ("terms", "", r"terms .*got ''"),
        ("terms", "1 11", r"terms .*got '1 11'"),
        ("terms", "\u0661\u0661\u0661\u0661", r"terms .*got"),  # digits for str.isdigit, but not 0 and 1
        ("terms", 8, r"terms .*int 8\..*[Qq]uote"),
        ("terms", 1111, r"terms .*int 1111\..*[Qq]uote"),
        ("terms", 0b0, r"terms .*int 0\..*[Qq]uote"),
        ("terms", 110.0, r"terms .*float 110\.0\..*[Qq]uote"),
        ("terms", True, r"terms .*True"),
        ("terms", None, r"terms .*None"),
        ("num_heads", 0, r"num_heads .*got 0"),
        ("num_heads", -8, r"num_heads .*got -8"),
        ("num_heads", 2.0, r"num_heads .*got 2\.0"),
        ("num_heads", True, r"num_heads .*got True"),
        ("num_heads", "8", r"num_heads .*got '8'"),
        ("window", 4, r"window must be odd.*got 4: use 3 or 5"),
        ("window", 0, r"window .*got 0"),
        ("window", -3, r"window .*got -3"),
        ("window", 3.0, r"window .*got 3\.0"),
        ("kv_stride", 0, r"kv_stride .*got 0"),
        ("kv_stride", None, r"kv_stride .*got None"),
        ("scale", 0.0, r"scale .*got 0\.0"),
        ("scale", -0.5, r"scale .*got -0\.5"),
        ("scale", math.inf, r"scale .*finite.*got inf"),
        ("scale", math.nan, r"scale .*got nan"),
        ("scale", "0.125", r"scale .*got '0\.125'"),
        ("scale", None, r"scale .*got None"),
        ("dropout", 1.0, r"dropout .*below 1, got 1\.0"),
        ("dropout", -0.1, r"dropout .*got -0\.1"),
        ("dropout", math.nan, r"dropout .*got nan"),
        ("dropout", "0.1", r"dropout .*got '0\.1'"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**{field: value})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(AttentionSpec(), **{field: value})


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(),
        AttentionSpec(mechanism="none"),
        AttentionSpec(terms="0110", num_heads=3, window=5, kv_stride=2, scale=0.125, dropout=0.1),
    ],
)
def test_plain_values_give_the_spec_back(spec):
    plain = spec.as_dict()
    assert AttentionSpec(**plain) == spec
    assert json.loads(json.dumps(plain)) == plain  # nothing but numbers, strings and null


def test_a_spec_cannot_change_and_can_be_a_key():
    spec = AttentionSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.terms = "0010"
    assert len({spec, AttentionSpec(), AttentionSpec(terms="0010")}) == 2


@pytest.mark.parametrize("role", ["self", "causal", "cross"])
def test_every_field_reaches_the_module(role):
    spec = AttentionSpec(terms="0111", num_heads=2, window=5, kv_stride=2, scale=0.5, dropout=0.25)
    attention = build_attention(spec, 8, 1, role)
    assert isinstance(attention, TransformerAttention)
    for field in ("terms", "num_heads", "window", "kv_stride", "scale", "dropout"):
        assert getattr(attention, field) == getattr(spec, field)
    assert (attention.dim, attention.ndim, attention.causal) == (8, 1, role == "causal")
    x = torch.randn(1, 4, 8)
    hidden = attention.eval().weights(x)[0, :, 1, 1] == 0  # key 2 comes after query 1
    assert hidden.all() if role == "causal" else not hidden.any()


def test_a_map_gets_the_gated_residual_form():
    residual = build_attention(AttentionSpec(num_heads=2), 8, 2, "self")
    x = torch.randn(1, 8, 3, 4, requires_grad=True)
    y = residual(x)
    assert torch.equal(y, x)  # gamma starts at zero
    y.square().sum().backward()
    assert residual.gamma.grad != 0  # but learns from the first step on
    with torch.no_grad():
        residual.gamma.fill_(2.0)
    torch.testing.assert_close(residual(x), x + 2 * residual.attention(x))


@pytest.mark.parametrize("ndim", [1, 2])
def test_no_attention_is_no_module(ndim):
    spec = AttentionSpec(mechanism="none")
    assert build_attention(spec, 8, ndim, "self") is None
    assert build_attention(spec, 8, ndim, "causal") is None
    with pytest.raises(ValueError, match=r"mechanism 'none'.*encoder-decoder.*source"):
        build_attention(spec, 8, ndim, "cross")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((AttentionSpec(), 12, 1, "self"), r"dim=12 .*num_heads=8"),
        ((AttentionSpec(num_heads=3), 6, 2, "self"), r"dim=6 .*multiple of 4"),
        ((AttentionSpec(), 8, 3, "self"), r"ndim .*got 3"),
        ((AttentionSpec(), 8, 1, "decoder"), r"role .*'self'.*'causal'.*'cross'.*got 'decoder'"),
    ],
)
def test_a_spec_that_does_not_fit_its_slot_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_attention(*arguments)
