"""Triton kernels of deformable convolution: interpreted, on CUDA, compiled for Hopper without a device, and fake."""

from pathlib import Path

import pytest
import torch
from kernel_checks import Recorded, compile_for_hopper, compiles, needs_triton, record_launches, run_cases
from torch._subclasses import FakeTensorMode  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention import deformable
from lightning_attn.attention.deformable import DeformableConv, deformable_conv

CASES = Path(__file__).with_name("deformable_kernel_cases.py")


@needs_triton
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(marks):
    run_cases(CASES, marks, interpret=True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    run_cases(CASES, "slow or not slow", interpret=False)


@needs_triton
@compiles
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"channels": 120, "groups": 2, "offset_groups": 3}),
    ],
    ids=str,
)
def test_compiles_for_hopper_without_spilled_registers(dtype, settings, tmp_path, monkeypatch):
    from lightning_attn.attention.kernels import deformable as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = record_launches(monkeypatch)
    settings = {"channels": 256, "groups": 1, "offset_groups": 1} | settings
    channels, offsets = settings["channels"], settings["offset_groups"] * 9
    inputs = [
        torch.zeros(1, channels, 3, 4, dtype=dtype),
        torch.zeros(1, 2 * offsets, 3, 4),
        torch.zeros(4, channels // settings["groups"], 3, 3, dtype=dtype),
        None,
        torch.zeros(1, offsets, 3, 4),
    ]
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    y = kernels.deformable_conv(*inputs, (1, 1), (1, 1), (1, 1), dtype)
    torch.autograd.grad(y.sum(), leaves)

    names = set()
    for kernel, arguments in launches:
        names.add(kernel.__name__)
        compile_for_hopper(kernel, arguments, tmp_path)
    assert len(names) == len(launches) == 4


@needs_triton
@pytest.mark.parametrize("modulated", [False, True])
def test_a_map_on_cuda_runs_in_one_operator_without_reading_a_number(modulated):
    # Fake tensors refuse every read of a value, as a synchronisation with the device would be. Their gradients cannot
    # be computed on a device that does not exist, so the operator of the backward pass is called by itself.
    with FakeTensorMode(), Recorded() as recorded:
        module = DeformableConv(8, 6, modulated=modulated, stride=2, algorithm="triton", device="cuda")
        x = torch.empty(2, 8, 9, 12, device="cuda").to(memory_format=torch.channels_last)
        y = module(x)
        assert y.shape == (2, 6, 5, 6)
        assert y.is_contiguous(memory_format=torch.channels_last)
        offset = torch.empty(2, 18, 5, 6, device="cuda")
        mask = torch.empty(2, 9, 5, 6, device="cuda") if modulated else None
        inputs = [x, offset, module.weight, mask]
        gradients = torch.ops.lightning_attn.deformable_conv_backward(
            y, *inputs, (2, 2), (1, 1), (1, 1), torch.float32, [t is not None for t in inputs]
        )
        for gradient, tensor in zip(gradients, [t for t in inputs if t is not None], strict=True):
            assert gradient.shape == tensor.shape
            assert gradient.device == tensor.device
    assert {"lightning_attn::deformable_conv", "lightning_attn::deformable_conv_backward"} <= recorded.names
    assert not any("deform_conv2d" in name for name in recorded.names)


@needs_triton
@pytest.mark.parametrize(
    ("deterministic", "operator"), [(False, "torchvision::deform_conv2d"), (True, "lightning_attn::deformable_conv")]
)
def test_what_is_chosen_on_cuda(deterministic, operator):
    torch.use_deterministic_algorithms(deterministic)
    try:
        with FakeTensorMode(), Recorded() as recorded:
            DeformableConv(8, 6, device="cuda")(torch.empty(2, 8, 5, 6, device="cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert operator in recorded.names


def test_without_triton_a_map_on_cuda_is_torchvisions(monkeypatch):
    monkeypatch.setattr(deformable, "HAS_TRITON", False)
    with FakeTensorMode(), Recorded() as recorded:
        DeformableConv(8, 6, device="cuda")(torch.empty(2, 8, 5, 6, device="cuda"))
    assert "torchvision::deform_conv2d" in recorded.names
    with pytest.raises(ValueError, match=r"algorithm='triton' needs the package triton, which is not installed: inst"):
        DeformableConv(8, 6, algorithm="triton")


@needs_triton
@compiles  # interpreted, the kernels run on every device
def test_the_kernels_refuse_other_devices_and_sequences():
    module = DeformableConv(3, 4, algorithm="triton")
    with pytest.raises(ValueError, match=r"algorithm='triton' needs a CUDA device, got x on 'cpu'.* use 'auto'"):
        module(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"algorithm='triton' supports maps only; for sequences.* 'auto' or 'gather'"):
        deformable_conv(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(2, 3, 3), algorithm="triton")
