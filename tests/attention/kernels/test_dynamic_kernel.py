"""Triton kernels of dynamic convolution: interpreted, on CUDA, compiled for Hopper without a device, and fake."""

from pathlib import Path

import pytest
import torch
from kernel_checks import Recorded, compile_for_hopper, compiles, needs_triton, record_launches, run_cases
from torch._subclasses import FakeTensorMode  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention import dynamic
from lightning_attn.attention.dynamic import DynamicConv

CASES = Path(__file__).with_name("dynamic_kernel_cases.py")
FORWARD, BACKWARD = "lightning_attn::dynamic_kernel", "lightning_attn::dynamic_kernel_backward"
TAPS = "lightning_attn::dynamic_taps"


@needs_triton
def test_interpreted():
    run_cases(CASES, "not slow", interpret=True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    run_cases(CASES, "slow or not slow", interpret=False)


@needs_triton
@compiles
@pytest.mark.parametrize(
    ("dtype", "taps", "channels"),
    [
        (torch.bfloat16, 31, 16),
        (torch.float32, 13, 16),
        *(
            pytest.param(dtype, taps, channels, marks=pytest.mark.slow)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for taps in (3, 13, 31)
            for channels in (16, 32)
        ),
    ],
)
def test_compiles_for_hopper_without_spilled_registers(dtype, taps, channels, tmp_path, monkeypatch):
    from lightning_attn.attention.kernels import dynamic as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", 1)  # blocks as for large maps
    launches = record_launches(monkeypatch)
    logits = torch.zeros(1, 1, taps * taps, 2, 64, dtype=dtype, requires_grad=True)
    value = torch.zeros(1, 1, channels, 2, 64, dtype=dtype, requires_grad=True)
    kernels.softmax_and_aggregate(logits, value, taps, -1).sum().backward()
    names = set()
    for kernel, arguments in launches:
        names.add(kernel.__name__)
        assert arguments["block"] == kernels.MAX_BLOCK
        code = compile_for_hopper(kernel, arguments, tmp_path)
        # A thread loads vectors, and has all channels of a position: sums over them exchange nothing between threads.
        assert "ld.global.v4.b32" in code
        assert "shfl" not in code
    assert len(names) == len(launches) == 3


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_on_cuda_runs_in_one_operator_without_reading_a_number(dtype):
    # Fake tensors refuse every read of a value, as a synchronisation with the device would be. Their gradients cannot
    # be computed on a device that does not exist, so the operator of the backward pass is called by itself.
    with FakeTensorMode(), Recorded() as recorded:
        x = torch.empty(2, 8, 9, 12, device="cuda", dtype=dtype)
        mask = torch.empty(2, 9, 12, device="cuda", dtype=torch.bool)
        y = DynamicConv(8, 5, 2, 2, device="cuda", dtype=dtype)(x, key_padding_mask=mask)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        logits = torch.empty(2, 2, 25, 9, 12, device="cuda", dtype=dtype)
        value = torch.empty(2, 2, 4, 9, 12, device="cuda", dtype=dtype)
        out, normaliser = torch.ops.lightning_attn.dynamic_kernel(logits, value, 5, -2)
        assert (out.shape, out.dtype, normaliser.shape) == (value.shape, torch.float32, (2, 2, 9, 12))
        gradients = torch.ops.lightning_attn.dynamic_kernel_backward(out, logits, value, out, normaliser, 5, -2)
        for gradient, tensor in zip(gradients, (logits, value), strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert {FORWARD, BACKWARD} <= recorded.names
    assert TAPS not in recorded.names
    assert "aten::_softmax" not in recorded.names


@needs_triton
def test_large_kernels_on_cuda_are_computed_in_few_blocks():
    calls = []

    class Counted(Recorded):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.extend(args[0].shape for _ in range(func.name() == FORWARD))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with FakeTensorMode(), Counted():
        DynamicConv(256, 31, ndim=2, device="cuda")(torch.empty(2, 256, 50, 84, device="cuda"))
    assert calls == [(2, 16, 961, 25, 84)] * 2


@needs_triton
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renorm_padding": True}, r"it supports no renorm_padding=True"),
        ({"weight_softmax": False}, r"it supports no weight_softmax=False"),
        ({"dropout": 0.25}, r"it supports no dropout, got dropout=0\.25 in training mode"),
        (
            {"dtype": torch.float64},
            r"it supports float32, float16 and bfloat16, and the convolution is in torch\.float64",
        ),
    ],
)
def test_what_the_kernel_does_not_support_is_summed_tap_by_tap(settings, message):
    with FakeTensorMode(), Recorded() as recorded:
        x = torch.empty(1, 8, 5, 6, device="cuda", dtype=settings.get("dtype"))
        DynamicConv(8, 3, 2, 2, device="cuda", **settings)(x)
        assert TAPS in recorded.names
        assert FORWARD not in recorded.names
        error = rf"algorithm='triton' cannot compute this convolution: {message}\. Use 'auto'"
        with pytest.raises(ValueError, match=error):
            DynamicConv(8, 3, 2, 2, algorithm="triton", device="cuda", **settings)(x)


@needs_triton
def test_dropout_outside_of_training_is_none():
    with FakeTensorMode(), Recorded() as recorded:
        module = DynamicConv(8, 3, 2, 2, dropout=0.25, device="cuda").eval()
        module(torch.empty(1, 8, 5, 6, device="cuda"))
    assert FORWARD in recorded.names


def test_without_triton_a_map_on_cuda_is_summed_tap_by_tap(monkeypatch):
    monkeypatch.setattr(dynamic, "HAS_TRITON", False)
    with FakeTensorMode(), Recorded() as recorded:
        DynamicConv(8, 3, 2, 2, device="cuda")(torch.empty(1, 8, 5, 6, device="cuda"))
    assert TAPS in recorded.names
    with pytest.raises(ValueError, match=r"algorithm='triton'.*: the package triton is not installed\. Use 'auto'"):
        DynamicConv(8, 3, 2, 2, algorithm="triton")


@needs_triton
@compiles  # interpreted, the kernels run on every device
def test_the_kernels_refuse_other_devices_and_sequences():
    x = torch.zeros(1, 8, 5, 6)
    with pytest.raises(ValueError, match=r"cannot compute this convolution: x is on 'cpu', not on a CUDA device\. Use"):
        DynamicConv(8, 3, 2, 2, algorithm="triton")(x)
    with pytest.raises(ValueError, match=r"algorithm must be one of \['auto', 'band', 'reference'\] for ndim=1"):
        DynamicConv(8, 3, 2, 1, algorithm="triton")
    with Recorded() as recorded:
        DynamicConv(8, 3, 2, 2)(x)
    assert TAPS in recorded.names


@needs_triton
def test_transforms_use_plain_operations():
    with FakeTensorMode(), Recorded() as recorded:
        module = DynamicConv(8, 3, 2, 2, device="cuda")
        y = torch.func.vmap(module)(torch.empty(2, 1, 8, 5, 6, device="cuda"))
    assert y.shape == (2, 1, 8, 5, 6)
    assert not {FORWARD, TAPS} & recorded.names
