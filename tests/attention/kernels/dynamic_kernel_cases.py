"""Dynamic convolution by our kernels against sums tap by tap in float64, and against the definition.

`test_dynamic_kernel.py` runs this file, since Triton decides when it is imported whether it interprets kernels. They
have no `tl.dot`, which is what the interpreter computes wrongly in bfloat16.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_attn.attention import dynamic
from lightning_attn.attention.dynamic import DynamicConv
from lightning_attn.attention.kernels import dynamic as kernels
from lightning_attn.attention.taps import aggregate_by_taps
from lightning_attn.study.profile import count_multiply_adds

DEVICE = "cpu" if kernels.RUNS_ANYWHERE else "cuda"
# Of values, which are in float32, and of gradients, which are rounded to the dtype: the interpreter cuts bits off.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPERATOR = torch.ops.lightning_attn.dynamic_kernel.default


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()


def draw_inputs(batch=1, groups=1, channels=3, size=(3, 4), value_rows=None, taps=(3, 3), dtype=torch.float32):
    rows, columns = size
    logits = draw(batch, groups, math.prod(taps), rows, columns, dtype=dtype, scale=2.0)
    return logits, draw(batch, groups, channels, value_rows or rows, columns, dtype=dtype)


def by_taps(logits: Tensor, value: Tensor, taps_x: int, first: int) -> Tensor:
    return aggregate_by_taps(logits.softmax(2).unflatten(2, (-1, taps_x)), value, first)


def results(function, inputs, *settings, grad=None) -> list[Tensor]:
    out = function(*inputs, *settings)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out) if grad is None else grad.to(out))]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within a tolerance, relative to the largest number of the expected one."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double().cpu() - b.double().cpu()).abs().max()
        assert error <= tolerance * b.abs().max().cpu(), f"result {number}: {error}"


def in_float64(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.detach().cpu().double().requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"batch": 2, "groups": 2}, -1),
        ({"channels": 16, "value_rows": 5, "taps": (5, 3)}, -2),  # a block of rows, and kernels that are not square
        ({"channels": 40, "size": (2, 4), "taps": (1, 3)}, 0),  # several chunks, and channels of zeros
        ({"size": (1, 1), "channels": 2}, -1),
        ({"size": (2, 6), "channels": 1, "value_rows": 5}, 0),
        ({"size": (2, 3), "value_rows": 4}, 3),  # the last query's last taps are below the map
        ({"size": (3, 2), "taps": (5, 7)}, -2),  # a kernel larger than the map
        ({"size": (4, 17), "channels": 4, "taps": (1, 1)}, 0),  # several programs
    ],
)
def test_numbers_and_gradients_of_sums_tap_by_tap(settings, first, dtype):
    inputs = draw_inputs(**settings, dtype=dtype)
    taps_x = settings.get("taps", (3, 3))[1]
    grad = draw(*inputs[1].shape[:3], *inputs[0].shape[3:], dtype=dtype)
    actual = results(kernels.softmax_and_aggregate, inputs, taps_x, first, grad=grad)
    expected = results(by_taps, in_float64(inputs), taps_x, first, grad=grad)
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype]
    assert expected[0].abs().max() > 0
    assert_near(actual[:1], expected[:1], TOLERANCES[torch.float32])
    for gradient, exact in zip(actual[1:], expected[1:], strict=True):
        if exact.any():
            assert_near([gradient], [exact], TOLERANCES[dtype])
        else:  # of a single tap, whose weight is one
            assert gradient.abs().max() < 1e-6


def test_values_that_no_query_reads_and_queries_that_read_no_value():
    for first in (3, -6):
        out, grad_logits, grad_value = results(kernels.softmax_and_aggregate, draw_inputs(), 3, first)
        assert not any(x.any() for x in (out, grad_logits, grad_value))


def test_logits_and_values_of_different_dtypes():
    logits, value = draw_inputs()[0].detach().half().requires_grad_(), draw_inputs()[1]
    actual = results(kernels.softmax_and_aggregate, (logits, value), 3, -1)
    assert [x.dtype for x in actual] == [torch.float32, torch.float16, torch.float32]
    assert_near(actual, results(by_taps, in_float64((logits, value)), 3, -1), TOLERANCES[torch.float16])


@pytest.mark.parametrize("layout", ["taps before samples", "rows of a larger map", "channels last"])
def test_any_strides(layout):
    logits, value = draw_inputs(batch=2, groups=2)
    expected = results(kernels.softmax_and_aggregate, (logits, value), 3, -1)
    with torch.no_grad():
        if layout == "taps before samples":
            other = logits.movedim(0, 2).contiguous().movedim(2, 0)
        elif layout == "rows of a larger map":
            other = torch.cat((torch.full_like(logits, math.nan), logits), dim=3)[:, :, :, 3:]
        else:
            other = logits.movedim(2, -1).contiguous().movedim(-1, 2)
        assert other.stride() != logits.stride()
        value = torch.cat((value, torch.full_like(value, math.nan)), dim=-1)[..., :4]
    actual = results(kernels.softmax_and_aggregate, (other.requires_grad_(), value.requires_grad_()), 3, -1)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_the_same_numbers_every_time():
    inputs = draw_inputs(channels=8, size=(5, 9))
    first = results(kernels.softmax_and_aggregate, inputs, 3, -1)
    for a, b in zip(results(kernels.softmax_and_aggregate, inputs, 3, -1), first, strict=True):
        assert torch.equal(a, b)


def test_logits_of_any_size():
    logits, value = draw_inputs()
    with torch.no_grad():
        logits.mul_(10.0)
        logits[:, :, :4, 0] = -math.inf  # the first rows of taps of some queries
    actual = results(kernels.softmax_and_aggregate, (logits, value), 3, -1)
    assert all(x.isfinite().all() for x in actual)
    assert_near(actual, results(by_taps, in_float64((logits, value)), 3, -1), 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_reach_their_own_query_only(bad):
    logits, value = draw_inputs()
    with torch.no_grad():
        logits[0, 0, 5, 2, 3] = bad
    out = kernels.softmax_and_aggregate(logits, value, 3, -1)
    assert out[0, 0, :, 2, 3].isnan().all()
    assert out.isnan().sum() == 3


@pytest.mark.parametrize("layout", ["contiguous", "taps before samples", "channels last"])
def test_the_operator_keeps_the_rules_of_torch(layout):
    logits, value = draw_inputs(batch=2, size=(2, 3), taps=(1, 3))
    order = {"contiguous": (0, 0), "taps before samples": (0, 2), "channels last": (2, -1)}[layout]
    logits = logits.detach().movedim(*order).contiguous().movedim(*order[::-1]).requires_grad_()
    torch.library.opcheck(OPERATOR, (logits, value, 3, 0))


def test_second_derivatives_are_those_of_sums_tap_by_tap():
    def second(function, inputs):
        gradients = torch.autograd.grad(function(*inputs, 3, -1).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)

    inputs = draw_inputs()
    assert_near(second(kernels.softmax_and_aggregate, inputs), second(by_taps, in_float64(inputs)), 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu", reason="needs 15 GB of a GPU")
def test_more_logits_than_32_bits_can_count():
    logits = torch.empty(2, 16, 961, 270, 270, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_()
    assert logits.numel() > 2**31
    value = draw(2, 16, 1, 270, 270, dtype=torch.bfloat16)
    everything = results(kernels.softmax_and_aggregate, (logits, value), 31, -15)
    last = [x.detach()[1:].requires_grad_() for x in (logits, value)]
    for a, b in zip(everything, results(kernels.softmax_and_aggregate, last, 31, -15), strict=True):
        assert torch.equal(a[1:], b)
    assert everything[0][1].any()


def make(kernel_size=3, dim=4, groups=2, **settings) -> DynamicConv:
    module = DynamicConv(dim, kernel_size, groups, 2, **({"algorithm": "triton"} | settings), device=DEVICE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5)
    return module


def module_results(module, x: Tensor, **settings) -> list[Tensor]:
    y = module(x, **settings)
    grad = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, *module.parameters()), grad)]


def padding(*size: int) -> Tensor:
    mask = torch.zeros(1, *size, dtype=torch.bool, device=DEVICE)
    mask[:, 1:, ::2] = True
    return mask


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("size", "kernel_size"), [((1, 1), 3), ((3, 4), 3), ((3, 2), 5), ((2, 3), 1)])
def test_the_module_is_the_definition(size, kernel_size, whole, monkeypatch):
    if not whole:  # blocks of two rows, computed again in the backward pass
        monkeypatch.setattr(dynamic, "TRITON_KERNEL_ELEMENTS", 1)
        monkeypatch.setattr(dynamic, "TRITON_BLOCK_ELEMENTS", 2 * size[1] * 2 * kernel_size**2)
    module, x, mask = make(kernel_size), draw(1, 4, *size), padding(*size)
    actual = module_results(module, x, key_padding_mask=mask)
    with torch.no_grad():
        assert torch.equal(module(x, key_padding_mask=mask), actual[0])
    module.algorithm = "reference"
    expected = module_results(module, x, key_padding_mask=mask)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(dtype):
    module, x = make(dim=16), draw(1, 16, 6, 5)
    expected = module_results(module, x)
    with torch.autocast(DEVICE, dtype):
        actual = module_results(module, x)
    assert actual[0].dtype == dtype
    assert all(a.dtype == torch.float32 for a in actual[1:])
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


def test_a_hooked_predictor_is_called_once(monkeypatch):
    monkeypatch.setattr(dynamic, "TRITON_KERNEL_ELEMENTS", 1)
    monkeypatch.setattr(dynamic, "TRITON_BLOCK_ELEMENTS", 1)
    module, x = make(), draw(1, 4, 2, 3)
    expected = module_results(module, x)
    calls = []
    module.kernel_proj.register_forward_hook(lambda *_: calls.append(1))
    assert_near(module_results(module, x), expected, 1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_compiles_into_one_graph(whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(dynamic, "TRITON_KERNEL_ELEMENTS", 1)
        monkeypatch.setattr(dynamic, "TRITON_BLOCK_ELEMENTS", 2 * 3 * 9)  # two blocks
    module, x = make(), draw(1, 4, 2, 3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x, key_padding_mask=padding(2, 3))
    actual = [y, *torch.autograd.grad(y.sum(), (x, *module.parameters()))]
    y = module(x, key_padding_mask=padding(2, 3))
    expected = [y, *torch.autograd.grad(y.sum(), (x, *module.parameters()))]
    assert_near(actual, expected, 1e-5)


def test_an_empty_batch():
    module, x = make(), draw(0, 4, 3, 4)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_multiply_adds_are_counted():
    module, x = make(), draw(1, 4, 3, 4)
    positions, taps = 3 * 4, 9
    projections = positions * 4 * (2 * 4 + 2 * taps + 4)
    sums = positions * 4 * taps
    assert count_multiply_adds(module, x.detach()).by_operator["lightning_attn.dynamic_kernel"] == sums
    count = count_multiply_adds(module, x, backward=True).by_operator
    assert count["lightning_attn.dynamic_kernel_backward"] == 2 * sums
    products = sum(number for name, number in count.items() if name in ("aten.mm", "aten.convolution"))
    assert products >= projections
