"""build_attention: every combination of Fig. 2 against its parts put together by hand, and what it refuses."""

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck

from lightning_attn.attention import (
    AttendedConvolution,
    AttentionSpec,
    DeformableAttention,
    DeformableConv,
    DynamicConv,
    GatedResidual,
    TransformerAttention,
    build_attention,
    offset_parameters,
    reference,
)

DIM, LENGTH = 8, 7
SPECS = {
    "1111": AttentionSpec(terms="1111", num_heads=2, scale=0.7),
    "0010": AttentionSpec(terms="0010", num_heads=2, kv_stride=2),
    "0100 window": AttentionSpec(terms="0100", num_heads=4, window=3),
    "dynamic": AttentionSpec(mechanism="dynamic", groups=2, kernel_size=5),
    "none": AttentionSpec(mechanism="none"),
}
CONVOLUTIONS = ("regular", "deformable", "modulated_deformable")
COMBINATIONS = [
    pytest.param(AttentionSpec(**spec.as_dict() | {"convolution": convolution}), id=f"{convolution} {name}")
    for (name, spec), convolution in itertools.product(SPECS.items(), CONVOLUTIONS)
]
SEQUENCES = [case for case in COMBINATIONS if case.id != "regular none"]  # which is no module


def randomised(module):
    """In double precision, and nothing is zero: offsets are fractions of a position, gates are open."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double().eval()


def literal_mechanism(spec, ndim, causal=False):
    """The mechanism as the equations are written, built by hand."""
    if spec.mechanism == "dynamic":
        return DynamicConv(DIM, spec.kernel_size, spec.groups, ndim, causal, algorithm="reference")
    return TransformerAttention(
        DIM,
        spec.num_heads,
        spec.terms,
        ndim,
        window=spec.window,
        kv_stride=spec.kv_stride,
        scale=spec.scale,
        causal=causal,
        algorithm="reference",
    )


def with_state_of(module, copied):
    module.load_state_dict(copied.state_dict())
    return module.double().eval()


def sentences():
    return torch.randn(2, LENGTH, DIM, dtype=torch.float64)


def padding():
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[1, -3:] = True
    return mask


# --- Sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["self", "causal"])
@pytest.mark.parametrize("spec", SEQUENCES)
def test_a_sequence_gets_the_unit_and_the_mechanism_of_the_spec(spec, role):
    module = randomised(build_attention(spec, DIM, 1, role))
    x, mask, causal = sentences(), padding() if role == "self" else None, role == "causal"
    if spec.convolution == "regular":
        expected = with_state_of(literal_mechanism(spec, 1, causal), module)(x, key_padding_mask=mask)
    else:
        assert isinstance(module, DeformableAttention)
        modulated = spec.convolution == "modulated_deformable"
        unit = DeformableConv(DIM, DIM, 3, ndim=1, modulated=modulated, causal=causal, algorithm="reference")
        expected = with_state_of(unit, module.convolution)(x, key_padding_mask=mask)
        if spec.mechanism != "none":
            attention = with_state_of(literal_mechanism(spec, 1, causal), module.attention)
            expected = expected + attention(expected, key_padding_mask=mask)
    actual = module(x, key_padding_mask=mask)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", SEQUENCES)
def test_a_causal_sequence_sees_no_later_token(spec):
    module = randomised(build_attention(spec, DIM, 1, "causal"))
    x = sentences()
    before = module(x)
    noticed = []
    for token in range(1, LENGTH):
        changed = x.clone()
        changed[:, token] += 10
        after = module(changed)
        torch.testing.assert_close(after[:, :token], before[:, :token], rtol=0, atol=1e-12)
        noticed.append(not torch.allclose(after[:, token:], before[:, token:]))
    # E3 alone with kv_stride=2 does not see the odd tokens at all.
    assert all(noticed) or (spec.terms == "0010" and noticed[1::2] == [True] * 3)


@pytest.mark.parametrize("spec", SEQUENCES)
def test_padding_never_reaches_a_valid_position(spec):
    module = randomised(build_attention(spec, DIM, 1, "self"))
    x = sentences()
    x[1, -3:] = 100.0
    together = module(x, key_padding_mask=padding())
    torch.testing.assert_close(together[:1], module(x[:1]))
    torch.testing.assert_close(together[1:, :-3], module(x[1:, :-3]))


@pytest.mark.parametrize("spec", SEQUENCES)
def test_decoding_step_by_step_is_the_causal_pass(spec):
    """In pieces of one and of several tokens, with rows that a beam search swaps, doubles and drops."""
    module = randomised(build_attention(spec, DIM, 1, "causal"))
    x = sentences()
    cache, rows = module.new_cache(), torch.tensor([0, 1])
    start = 0
    with torch.no_grad():
        for tokens, kept in ((1, [1, 0]), (1, [0, 1, 1]), (3, [2, 0]), (2, [1])):
            actual = module(x[rows, start : start + tokens], cache=cache)
            torch.testing.assert_close(actual, module(x[rows, : start + tokens])[:, start:], rtol=1e-9, atol=1e-9)
            start += tokens
            kept = torch.tensor(kept)
            cache.reorder(kept)
            rows = rows[kept]
    assert start == LENGTH


def test_only_a_causal_unit_is_decoded_step_by_step():
    module = build_attention(AttentionSpec(num_heads=2, convolution="deformable"), DIM, 1, "self")
    with pytest.raises(ValueError, match="new_cache: only a causal convolution"):
        module.new_cache()


# --- Maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", COMBINATIONS)
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_a_map_gets_the_attended_convolution_of_a_residual_block(spec, norm):
    geometry = {"in_channels": 6, "stride": 2, "dilation": 1} if norm is None else {"dilation": 2, "bias": True}
    module = build_attention(spec, DIM, 2, norm=norm, **geometry)
    assert isinstance(module, AttendedConvolution)
    randomised(module)
    x = torch.randn(2, geometry.get("in_channels", DIM), 3, 4, dtype=torch.float64)
    weight, bias = module.convolution.weight, module.convolution.bias
    assert weight.shape == (DIM, x.shape[1], 3, 3)
    assert (bias is not None) == geometry.get("bias", False)
    stride, dilation = geometry.get("stride", 1), geometry["dilation"]
    if spec.convolution == "regular":
        expected = F.conv2d(x, weight, bias, stride, padding=dilation, dilation=dilation)
    else:
        moved = F.conv2d(x, *module.convolution.offset.parameters(), stride, padding=dilation, dilation=dilation)
        assert moved.shape[1] == (27 if spec.convolution == "modulated_deformable" else 18)
        tap_weights = moved[:, 18:].sigmoid() if spec.convolution == "modulated_deformable" else None
        expected = reference.deformable_convolution(
            x, moved[:, :18], weight, bias, mask=tap_weights, stride=stride, dilation=dilation, padding=dilation
        )
    if norm is not None:
        statistics = (module.norm.running_mean, module.norm.running_var)
        expected = F.batch_norm(expected, *statistics, module.norm.weight, module.norm.bias).relu()
    mask = torch.zeros(2, *expected.shape[2:], dtype=torch.bool)
    mask[0, 1:, 1] = True
    if spec.mechanism == "none":
        assert module.attention is None
    else:
        assert isinstance(module.attention, GatedResidual)
        literal = with_state_of(literal_mechanism(spec, 2), module.attention.attention)
        expected = expected + module.attention.gamma * literal(expected, key_padding_mask=mask)
    torch.testing.assert_close(module(x, key_padding_mask=mask), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", COMBINATIONS)
def test_a_map_starts_as_the_convolution_alone(spec):
    module = build_attention(spec, DIM, 2)
    x = torch.randn(2, DIM, 4, 5)
    y = module(x)
    plain = F.conv2d(x, module.convolution.weight, padding=1)  # offsets start at zero, modulation at one half
    torch.testing.assert_close(y, plain / 2 if spec.convolution == "modulated_deformable" else plain)
    if module.attention is not None:
        assert module.attention.gamma.shape == ()
        y.square().sum().backward()
        assert module.attention.gamma.grad != 0  # but learns from the first step on


def test_a_residual_block_takes_the_parts_and_keeps_its_names():
    """A ResNet's own weights load into it; only the attention's and the offsets' are new."""
    pretrained = Bottleneck(4 * DIM, DIM, stride=1).state_dict()
    for spec in (SPECS["1111"], AttentionSpec(num_heads=2, convolution="deformable")):
        block = Bottleneck(4 * DIM, DIM, stride=1)
        built = build_attention(spec, DIM, 2)
        block.conv2, block.attention = built.convolution, built.attention
        missing, unexpected = block.load_state_dict(pretrained, strict=False)
        assert not unexpected
        assert all(name.startswith(("attention.", "conv2.offset.")) for name in missing)
        assert torch.equal(block.conv2.weight, pretrained["conv2.weight"])


@pytest.mark.parametrize("name", SPECS)
def test_a_head_is_the_gated_attention_whatever_the_convolution_of_the_blocks(name):
    specs = [AttentionSpec(**SPECS[name].as_dict() | {"convolution": convolution}) for convolution in CONVOLUTIONS]
    heads = [build_attention(spec, DIM, 2, "head") for spec in specs]
    if name == "none":
        assert heads == [None] * 3
        return
    x = torch.randn(2, DIM, 4, 5, dtype=torch.float64)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, 2:] = True
    state = randomised(heads[0]).state_dict()
    literal = with_state_of(literal_mechanism(specs[0], 2), heads[0].attention)
    expected = x + state["gamma"] * literal(x, key_padding_mask=mask)
    for head in heads:
        assert isinstance(head, GatedResidual)
        head.double().load_state_dict(state)
        torch.testing.assert_close(head(x, key_padding_mask=mask), expected, rtol=1e-9, atol=1e-9)


# --- All combinations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", COMBINATIONS)
@pytest.mark.parametrize(("ndim", "role"), [(1, "self"), (1, "causal"), (2, "self"), (2, "head")])
def test_every_parameter_gets_a_gradient_and_the_state_comes_back(spec, ndim, role):
    module = build_attention(spec, DIM, ndim, role)
    if module is None:
        assert spec.mechanism == "none"
        assert spec.convolution == "regular" or role == "head"
        return
    randomised(module).train()
    x = sentences() if ndim == 1 else torch.randn(2, DIM, 4, 5, dtype=torch.float64)
    y = module(x)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    offsets = {id(parameter) for parameter in offset_parameters(module)}
    named = {id(p) for name, p in module.named_parameters() if name.startswith("convolution.offset.")}
    assert offsets == named
    assert bool(offsets) == (spec.convolution != "regular" and role != "head")

    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = build_attention(spec, DIM, ndim, role).double()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(x), y)


def test_fields_reach_the_transformer_attention():
    fields = {"terms": "0111", "num_heads": 2, "window": 5, "kv_stride": 2, "scale": 0.5, "dropout": 0.25}
    for algorithm, role in itertools.product(["auto", "tiled"], ["self", "causal", "cross"]):
        attention = build_attention(AttentionSpec(**fields, algorithm=algorithm), DIM, 1, role)
        assert isinstance(attention, TransformerAttention)
        assert {name: getattr(attention, name) for name in fields} == fields
        assert (attention.dim, attention.ndim, attention.causal) == (DIM, 1, role == "causal")
        assert attention.algorithm == algorithm
        hidden = attention.eval().weights(torch.randn(1, 4, DIM))[0, :, 1, 1] == 0  # key 2 comes after query 1
        assert hidden.all() if role == "causal" else not hidden.any()


@pytest.mark.parametrize("ndim", [1, 2])
def test_fields_reach_the_dynamic_convolution(ndim):
    spec = AttentionSpec(mechanism="dynamic", groups=4, kernel_size=7, dropout=0.25)
    module = build_attention(spec, DIM, 1) if ndim == 1 else build_attention(spec, DIM, 2, "head").attention
    assert isinstance(module, DynamicConv)
    assert (module.dim, module.ndim, module.groups, module.kernel_size, module.dropout) == (DIM, ndim, 4, 7, 0.25)


def test_no_attention_on_a_sequence_is_no_module():
    for role in ("self", "causal"):
        assert build_attention(SPECS["none"], DIM, 1, role) is None


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (AttentionSpec(), (12, 1, "self"), r"dim=12 .*num_heads=8"),
        (AttentionSpec(num_heads=3), (6, 2, "self"), r"dim=6 .*multiple of 4"),
        (SPECS["dynamic"], (9, 1, "self"), r"groups=2"),
        (SPECS["1111"], (8, 3, "self"), r"ndim .*got 3"),
        (SPECS["1111"], (8, 1, "decoder"), r"role .*'self', 'causal', 'cross' or 'head', got 'decoder'"),
        (SPECS["none"], (8, 1, "cross"), r"mechanism 'none'.*encoder-decoder.*source.*Use mechanism: transformer"),
        (
            SPECS["dynamic"],
            (8, 1, "cross"),
            r"mechanism 'dynamic'.*encoder-decoder.*neighbours.*self-attention only\. Use mechanism: transformer\.",
        ),
        (
            AttentionSpec(num_heads=2, convolution="modulated_deformable"),
            (8, 1, "cross"),
            r"convolution 'modulated_deformable'.*encoder-decoder.*common positions.*Use convolution: regular\.",
        ),
        (SPECS["1111"], (8, 2, "causal"), r"role 'causal' is for sequences.*TransformerAttention itself"),
        (SPECS["1111"], (8, 2, "cross"), r"role 'cross' is for sequences.*TransformerAttention itself"),
        (SPECS["1111"], (8, 1, "head"), r"role 'head' is for maps \(ndim=2\)"),
    ],
)
def test_a_spec_that_does_not_fit_its_slot_is_refused(spec, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_attention(spec, *arguments)


@pytest.mark.parametrize("slot", [(1, "self"), (1, "cross"), (2, "head")])
@pytest.mark.parametrize(
    "argument", [{"in_channels": 4}, {"stride": 2}, {"dilation": 2}, {"bias": True}, {"norm": nn.BatchNorm2d}]
)
def test_what_describes_the_convolution_is_refused_where_there_is_none(slot, argument):
    with pytest.raises(ValueError, match=r"belong to the 3x3 convolution of ndim=2, role='self'; leave them out"):
        build_attention(SPECS["1111"], DIM, *slot, **argument)
