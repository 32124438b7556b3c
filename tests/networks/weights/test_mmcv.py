"""Weights of mmcv's module in ours: against a re-statement of its sums, against Eq. 2, and against mmcv itself."""

import math

import pytest
import torch
from torch import nn

from lightning_attn.attention import GatedResidual, TransformerAttention, reference
from lightning_attn.attention.spec import TERM_SETS
from lightning_attn.networks.weights.mmcv import attention_prefixes, convert_state, from_mmcv, to_mmcv

WRONG_IN_MMCV = ["0100", "0110", "1100", "1110"]
RIGHT_IN_MMCV = [terms for terms in TERM_SETS if terms not in WRONG_IN_MMCV]
AMBIGUOUS = {"0110", "1110", "1001", "1101", "0111", "1011", "1111"}
DIM, HEADS = 16, 4
SIZES = [(5, 5), (4, 7)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_state(terms, dim=DIM, dtype=torch.float32, prefix=""):
    """A state as mmcv's module has it, with every number random, written out by hand."""
    e1, e2, e3, e4 = (bit == "1" for bit in terms)
    shapes = {
        "appr_bias": (dim,) if e3 else None,
        "geom_bias": (dim,) if e4 else None,
        "gamma": (1,),
        "query_conv.weight": (dim, dim, 1, 1) if e1 or e2 else None,
        "key_conv.weight": (dim, dim, 1, 1) if e1 or e3 else None,
        "value_conv.weight": (dim, dim, 1, 1),
        "appr_geom_fc_x.weight": (dim, dim // 2) if e2 or e4 else None,
        "appr_geom_fc_y.weight": (dim, dim // 2) if e2 or e4 else None,
        "proj_conv.weight": (dim, dim, 1, 1),
        "proj_conv.bias": (dim,),
    }
    return {prefix + name: torch.randn(shape, dtype=dtype) * 0.4 for name, shape in shapes.items() if shape}


def generalized_attention(state, x, terms, num_heads, kv_stride):
    """What mmcv's module means to compute: all pairs at once, offsets query minus key, one energy per axis."""
    e1, e2, e3, e4 = (bit == "1" for bit in terms)
    batch, channels, height, width = x.shape
    rows, columns = (torch.arange(n, dtype=x.dtype) for n in (height, width))
    key_rows, key_columns = rows[::kv_stride], columns[::kv_stride]

    def heads(name, grid):
        projected = torch.einsum("oi,bihw->bohw", state[f"{name}.weight"][:, :, 0, 0], grid)
        return projected.reshape(batch, num_heads, channels // num_heads, *grid.shape[2:])

    keys = x[:, :, ::kv_stride, ::kv_stride]
    energy = x.new_zeros(batch, num_heads, height, width, len(key_rows), len(key_columns))
    if e1:
        energy += torch.einsum("bmdhw,bmdij->bmhwij", heads("query_conv", x), heads("key_conv", keys))
    if e3:
        energy += torch.einsum("md,bmdij->bmij", state["appr_bias"].reshape(num_heads, -1), heads("key_conv", keys))[
            :, :, None, None
        ]
    if e2 or e4:
        wavelengths = 1000 ** (4 / channels * torch.arange(channels // 4, dtype=x.dtype))
        asking = x.new_zeros(batch, num_heads, channels // num_heads, height, width)
        if e2:
            asking = asking + heads("query_conv", x)
        if e4:
            asking = asking + state["geom_bias"].reshape(1, num_heads, -1, 1, 1)
        for axis, own, other, equation in (
            ("x", columns, key_columns, "bmdhw,wjmd->bmhwj"),
            ("y", rows, key_rows, "bmdhw,himd->bmhwi"),
        ):
            angles = (own[:, None] - other[None, :])[..., None] / wavelengths
            encoding = torch.cat((angles.sin(), angles.cos()), dim=-1)
            position = encoding @ state[f"appr_geom_fc_{axis}.weight"].T / math.sqrt(2)
            part = torch.einsum(equation, asking, position.unflatten(-1, (num_heads, -1)))
            energy += part[..., None, :] if axis == "x" else part[..., None]
    weights = energy.flatten(4).softmax(-1).unflatten(4, energy.shape[4:])
    pooled = torch.einsum("bmhwij,bmdij->bmdhw", weights, heads("value_conv", keys)).flatten(1, 2)
    out = torch.einsum("oi,bihw->bohw", state["proj_conv.weight"][:, :, 0, 0], pooled)
    return x + state["gamma"] * (out + state["proj_conv.bias"][:, None, None])


def definition_of(module: GatedResidual, x):
    attention = module.attention
    attended = reference.transformer_attention(
        x,
        x,
        reference.parameters_of(attention),
        num_heads=attention.num_heads,
        terms=attention.terms,
        kv_stride=attention.kv_stride,
    )
    return x + module.gamma * attended


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
def test_outputs_are_those_of_the_state(terms, kv_stride):
    state = make_state(terms, dtype=torch.float64)
    module = from_mmcv(state, HEADS, kv_stride, terms=terms)
    assert module.gamma.item() == state["gamma"].item() != 0
    assert module.attention.terms == terms
    assert module.attention.kv_stride == kv_stride
    for size in SIZES:
        x = torch.randn(2, DIM, *size, dtype=torch.float64)
        torch.testing.assert_close(module(x), generalized_attention(state, x, terms, HEADS, kv_stride))


@pytest.mark.parametrize("terms", ["0110", "1110", "1111"])
def test_outputs_are_those_of_the_definition(terms):
    module = from_mmcv(make_state(terms, dtype=torch.float64), HEADS, 2, terms=terms)
    x = torch.randn(1, DIM, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x), definition_of(module, x))


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
def test_outputs_are_those_of_mmcv(terms, kv_stride):
    bricks = pytest.importorskip("mmcv.cnn.bricks", exc_type=ImportError)
    theirs = bricks.GeneralizedAttention(DIM, num_heads=HEADS, attention_type=terms, kv_stride=kv_stride)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = from_mmcv(theirs)
    assert {name: value.shape for name, value in to_mmcv(ours).items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    square, oblong = (torch.randn(2, DIM, *size) for size in SIZES)
    with torch.no_grad():
        if terms in RIGHT_IN_MMCV:
            for x in (square, oblong):
                torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
        else:  # mmcv's error, which this test would notice being mended
            assert not torch.allclose(ours(square), theirs(square), atol=1e-2)
            with pytest.raises(RuntimeError, match="size of tensor"):
                theirs(oblong)
        for x in (square, oblong):
            expected = generalized_attention(theirs.state_dict(), x, terms, HEADS, kv_stride)
            torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [256, 512])
def test_the_widths_of_a_resnet_agree_within_1e_5(dim):
    bricks = pytest.importorskip("mmcv.cnn.bricks", exc_type=ImportError)
    theirs = bricks.GeneralizedAttention(dim, num_heads=8, attention_type="1111", kv_stride=2)
    nn.init.constant_(theirs.gamma, 1.0)
    x = torch.relu(torch.randn(1, dim, 12, 17))  # as after the block's 3x3 convolution
    with torch.no_grad():
        torch.testing.assert_close(from_mmcv(theirs)(x), theirs(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("terms", TERM_SETS)
def test_terms_are_read_from_the_names_where_these_tell(terms):
    state = make_state(terms)
    if terms in AMBIGUOUS:
        with pytest.raises(ValueError, match=r"fit each of \[.*'" + terms + r"'.*\]; pass the module's own"):
            convert_state(state, HEADS)
    else:
        assert from_mmcv(state, HEADS, 1).attention.terms == terms


@pytest.mark.parametrize("terms", TERM_SETS)
def test_there_and_back_gives_the_same_numbers(terms):
    state = make_state(terms)
    back = to_mmcv(from_mmcv(state, HEADS, 2, terms=terms))
    assert back.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("terms", TERM_SETS)
def test_a_scale_goes_into_the_weights_on_the_way_out(terms):
    module = GatedResidual(TransformerAttention(DIM, HEADS, terms, ndim=2, kv_stride=2, scale=0.5)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, DIM, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), generalized_attention(to_mmcv(module), x, terms, HEADS, 2))


def test_a_block_is_found_in_a_whole_detector():
    names = ["backbone.layer3.0.gen_attention_block.", "backbone.layer4.2.gen_attention_block."]
    detector = {"backbone.conv1.weight": torch.zeros(1), "neck.proj_conv.bias": torch.zeros(1)}
    for name in names:
        detector |= make_state("0010", prefix=name)
    assert attention_prefixes(detector) == names
    for prefix in (names[1], names[1].rstrip(".")):
        module = from_mmcv(detector, 8, 2, prefix=prefix)
        torch.testing.assert_close(module.attention.key_bias.flatten(), detector[f"{names[1]}appr_bias"])
    with pytest.raises(ValueError, match=r"prefix='': no GeneralizedAttention found.*layer3\.0.*layer4\.2"):
        from_mmcv(detector, 8, 2)
    with pytest.raises(ValueError, match=r"prefix='neck\.': no GeneralizedAttention found.*layer3\.0"):
        convert_state(detector, 8, prefix="neck")


def test_weights_keep_their_type_and_are_copies():
    state = make_state("0011", dtype=torch.bfloat16)
    module = from_mmcv(state, HEADS, 1)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    before = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    converted = convert_state(state, HEADS)
    for value in converted.values():
        value.zero_()
    assert all(torch.equal(state[name], before[name]) for name in state)


class LooksLikeTheirs(nn.Module):
    """The attributes of mmcv's module that are read."""

    def __init__(self, terms="1111", **settings):
        super().__init__()
        self.attention_type = [bit == "1" for bit in terms]
        self.num_heads, self.kv_stride, self.q_stride, self.position_magnitude = HEADS, 2, 1, 1
        self.__dict__.update(settings)
        self.state = make_state(terms)

    def state_dict(self, *args, **kwargs):
        return self.state


def test_settings_are_taken_from_a_module():
    network = nn.Sequential(nn.Identity(), LooksLikeTheirs("1101"))
    module = from_mmcv(network, prefix="1")
    assert (module.attention.terms, module.attention.kv_stride, module.attention.num_heads) == ("1101", 2, HEADS)
    assert from_mmcv(network[1], num_heads=HEADS, kv_stride=2, terms="1101").attention.terms == "1101"
    for arguments, message in (
        ({"num_heads": 8}, "num_heads=8, but the module has 4"),
        ({"kv_stride": 1}, "kv_stride=1, but the module has 2"),
        ({"terms": "1111"}, "terms='1111', but the module has '1101'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mmcv(network[1], **arguments)
    with pytest.raises(ValueError, match=r"is a Sequential, not a GeneralizedAttention; .*\['1'\]"):
        from_mmcv(network)
    with pytest.raises(ValueError, match=r"prefix='2': .*2"):
        from_mmcv(network, prefix="2")
    for setting in ("q_stride", "position_magnitude"):
        with pytest.raises(ValueError, match=f"the module has {setting}=2; ours supports 1 only"):
            from_mmcv(LooksLikeTheirs(**{setting: 2}))


def test_a_local_range_needs_a_window_of_ours():
    state = make_state("0100") | {"local_constraint_map": torch.zeros(2, 2, 2, 2, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"contains local_constraint_map.*one key too far.*window=n_k"):
        from_mmcv(state, HEADS, 1)
    module = from_mmcv(state, HEADS, 1, window=3)
    assert (module.attention.window, module.attention.terms) == (3, "0100")


def test_what_is_wrong_with_a_state_is_listed():
    state = make_state("1011")
    for arguments, message in (
        ({"kv_stride": 2}, r"num_heads: not contained in a state"),
        ({}, r"num_heads and kv_stride: not contained in a state"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mmcv(state, **arguments)
    with pytest.raises(ValueError, match=r"does not fit terms='0010': missing names \[\], unexpected names .*geom"):
        convert_state(state, HEADS, terms="0010")
    with pytest.raises(ValueError, match=r"does not fit terms='0010'.*The names fit \['0111', '1011', '1111'\]"):
        convert_state(state, HEADS, terms="0010")
    with pytest.raises(ValueError, match=r"quote|Quote"):
        convert_state(state, HEADS, terms=1011)
    broken = {name: value for name, value in make_state("0010").items() if name != "gamma"} | {"alpha": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"any terms \(nearest: '0010'\): missing names \['gamma'\], unexpected names \['alpha'\]"
    ):
        convert_state(broken, HEADS)
    with pytest.raises(ValueError, match=r"state does not fit any terms .*missing names \['appr_bias'"):
        convert_state({}, HEADS)
    with pytest.raises(ValueError, match=r'pass checkpoint\["state_dict"\]'):
        convert_state({"meta": {}, "state_dict": state}, HEADS)
    with pytest.raises(ValueError, match=r"must contain tensors only, but not all of these are: \['gamma'\]"):
        convert_state(state | {"gamma": 0.5}, HEADS, terms="1011")


def test_shapes_that_do_not_fit_are_listed():
    state = make_state("0101")
    state["appr_geom_fc_x.weight"] = torch.zeros(DIM, 4)
    state["query_conv.weight"] = torch.zeros(DIM, 8, 1, 1)
    with pytest.raises(
        ValueError,
        match=r"16 channels: query_conv.weight \(16, 8, 1, 1\) instead of \(16, 16, 1, 1\); "
        r"appr_geom_fc_x.weight \(16, 4\) instead of \(16, 8\).*position_embedding_dim",
    ):
        convert_state(state, HEADS)
    with pytest.raises(ValueError, match=r"num_heads=5 does not divide the 16 channels .* \[1, 2, 4, 8, 16\]"):
        convert_state(make_state("0010"), 5)
    rounded = make_state("0010")
    rounded["value_conv.weight"] = torch.zeros(15, DIM, 1, 1)  # 5 heads of 3
    with pytest.raises(ValueError, match=r"value_conv.weight has 15 rows for 16 channels: mmcv rounds"):
        convert_state(rounded, 5)


def test_what_mmcv_does_not_have_is_not_handed_out():
    for settings, message in (
        ({"ndim": 1}, "ndim=1"),
        ({"ndim": 2, "window": 3}, "window=3"),
        ({"ndim": 2, "causal": True}, "causal=True"),
    ):
        module = GatedResidual(TransformerAttention(DIM, HEADS, **settings))
        with pytest.raises(ValueError, match=f"has {message}; mmcv's module supports"):
            to_mmcv(module)
    with pytest.raises(ValueError, match=r"module.attention is a Identity"):
        to_mmcv(GatedResidual(nn.Identity()))
