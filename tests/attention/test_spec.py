"""AttentionSpec: what it accepts, and what it says about the rest."""

import dataclasses
import itertools
import json
import math

import pytest

from lightning_attn.attention import AttentionSpec
from lightning_attn.attention.spec import TERM_SETS


def test_the_defaults_are_the_paper_s():
    spec = AttentionSpec()
    assert (spec.mechanism, spec.terms, spec.num_heads, spec.scale) == ("transformer", "1111", 8, 1.0)
    assert (spec.window, spec.kv_stride, spec.dropout) == (None, 1, 0.0)
    assert (spec.convolution, spec.groups, spec.kernel_size, spec.algorithm) == ("regular", 16, 3, "auto")


@pytest.mark.parametrize("mechanism", ["transformer", "dynamic", "none"])
@pytest.mark.parametrize("convolution", ["regular", "deformable", "modulated_deformable"])
def test_every_convolution_goes_with_every_mechanism(mechanism, convolution):
    spec = AttentionSpec(mechanism=mechanism, convolution=convolution)
    assert (spec.mechanism, spec.convolution) == (mechanism, convolution)


def test_a_window_on_a_dynamic_convolution_is_refused():
    """It would be ignored: whoever sets it means the kernel's size."""
    with pytest.raises(ValueError, match=r"window=31 .*mechanism: transformer.*kernel_size.*window: null"):
        AttentionSpec(mechanism="dynamic", window=31)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mechanism": "dynamic", "terms": "0010"}, "terms='0010': not used by mechanism='dynamic'.*: transformer"),
        ({"mechanism": "none", "terms": "0010"}, "terms='0010': not used by mechanism='none'"),
        (
            {"mechanism": "dynamic", "kv_stride": 2},
            r"kv_stride=2: .*, set to the default \(kv_stride: 1\)",
        ),
        ({"kernel_size": 5}, "kernel_size=5: not used by mechanism='transformer'.*choose mechanism: dynamic"),
    ],
)
def test_options_of_another_mechanism_are_refused(fields, message):
    """They would be ignored, and another network would be trained than the one that was asked for."""
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)


def test_an_algorithm_for_a_dynamic_convolution_is_refused():
    with pytest.raises(ValueError, match=r"algorithm='tiled' is for mechanism: transformer.*algorithm: auto"):
        AttentionSpec(mechanism="dynamic", algorithm="tiled")


def test_the_term_sets_are_all_but_none():
    assert list(TERM_SETS) == ["".join(bits) for bits in itertools.product("01", repeat=4) if "1" in bits]


@pytest.mark.parametrize("terms", TERM_SETS)
def test_every_term_set_is_accepted(terms):
    assert AttentionSpec(terms=terms).terms == terms


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mechanism", "transfomer", r"mechanism .*'transformer', 'dynamic', 'none'.*got 'transfomer'"),
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
        ("convolution", "deform", r"convolution .*'regular', 'deformable', 'modulated_deformable'.*got 'deform'"),
        ("convolution", None, r"convolution .*'regular'.*got None"),
        ("convolution", True, r"convolution .*got True"),
        ("groups", 0, r"groups .*got 0"),
        ("groups", -16, r"groups .*got -16"),
        ("groups", 16.0, r"groups .*got 16\.0"),
        ("groups", True, r"groups .*got True"),
        ("groups", "16", r"groups .*got '16'"),
        ("groups", None, r"groups .*got None"),
        ("kernel_size", 4, r"kernel_size must be odd.*got 4: use 3 or 5\."),
        ("kernel_size", 0, r"kernel_size .*at least 1, got 0"),
        ("kernel_size", -3, r"kernel_size .*got -3"),
        ("kernel_size", 3.0, r"kernel_size .*got 3\.0"),
        ("kernel_size", True, r"kernel_size .*got True"),
        ("kernel_size", "3", r"kernel_size .*got '3'"),
        ("kernel_size", None, r"kernel_size .*got None"),
        ("kernel_size", [3, 3], r"kernel_size .*got \[3, 3\]"),
        ("algorithm", "fast", r"algorithm .*'auto', .*'reference'.*got 'fast'"),
        ("algorithm", None, r"algorithm .*got None"),
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
        AttentionSpec(mechanism="none", convolution="modulated_deformable"),
        AttentionSpec(mechanism="dynamic", groups=4, kernel_size=31, dropout=0.1),
        AttentionSpec(terms="0110", num_heads=3, window=5, kv_stride=2, scale=0.125, dropout=0.1, algorithm="tiled"),
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
