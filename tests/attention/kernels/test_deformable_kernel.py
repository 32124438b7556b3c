"""Triton kernels of deformable convolution: interpreted, on CUDA, compiled for Hopper without a device, and fake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode  # noqa: PLC2701 - torch has no public name
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention import deformable
from lightning_attn.attention.deformable import DeformableConv, deformable_conv

CASES = Path(__file__).with_name("deformable_kernel_cases.py")
SHARED_MEMORY = 227 * 1024  # of a block on sm_90

needs_triton = pytest.mark.skipif(not deformable.HAS_TRITON, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(marks):
    run_cases(marks, interpret=True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    run_cases("slow or not slow", interpret=False)


def run_cases(marks: str, interpret: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = str(int(interpret))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(CASES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets and compiles nothing")
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
    import triton

    from lightning_attn.attention.kernels import deformable as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    # The operator runs on the CPU with uninitialised memory instead of each kernel's results.
    monkeypatch.setattr(triton.runtime.JITFunction, "run", record)
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
        report, shared = resources(kernel, arguments, tmp_path)
        assert re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report) == ["0"] * 3, report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= 255
        assert shared <= SHARED_MEMORY
    assert len(names) == len(launches) == 4


def resources(kernel, arguments, folder: Path) -> tuple[str, int]:
    """What ptxas reports for a kernel compiled for sm_90 with these arguments, and its bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.int32: "i32",
        torch.int64: "i64",
    }
    signature, constants, aligned = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + types[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                aligned[(position,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = folder / "kernel.ptx"
    path.write_text(compiled.asm["ptx"])
    assembler = triton.knobs.nvidia.ptxas.path
    command = [assembler, "-v", "--gpu-name=sm_90a", str(path), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return report, compiled.metadata.shared


class Recorded(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})


@needs_triton
@pytest.mark.parametrize("modulated", [False, True])
def test_a_map_on_cuda_runs_in_one_operator_without_reading_a_number(modulated):
    # Fake tensors refuse every read of a value, as a synchronisation with the device would be. Their gradients cannot
    # be computed on a device that does not exist, so the operator of the backward pass is called by itself.
    with FakeTensorMode(), Recorded() as recorded:
        module = DeformableConv(8, 6, modulated=modulated, stride=2, device="cuda")
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


def test_without_triton_a_map_on_cuda_is_torchvisions(monkeypatch):
    monkeypatch.setattr(deformable, "HAS_TRITON", False)
    with FakeTensorMode(), Recorded() as recorded:
        DeformableConv(8, 6, device="cuda")(torch.empty(2, 8, 5, 6, device="cuda"))
    assert "torchvision::deform_conv2d" in recorded.names
    with pytest.raises(ValueError, match=r"algorithm='triton' needs the package triton, which is not installed: inst"):
        DeformableConv(8, 6, algorithm="triton")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets on every device")
def test_the_kernels_refuse_other_devices_and_sequences():
    module = DeformableConv(3, 4, algorithm="triton")
    with pytest.raises(ValueError, match=r"algorithm='triton' needs a CUDA device, got x on 'cpu'.* use 'auto'"):
        module(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"algorithm='triton' supports maps only; for sequences.* 'auto' or 'gather'"):
        deformable_conv(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(2, 3, 3), algorithm="triton")
