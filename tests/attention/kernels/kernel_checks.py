"""What the tests of all Triton kernels share: interpreting them, compiling them for Hopper, recording operators."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention.kernels import HAS_TRITON

SHARED_MEMORY = 227 * 1024  # of a block on sm_90

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets and compiles nothing"
)


def run_cases(cases: Path, marks: str, interpret: bool) -> None:
    """Runs a file of tests by a Python of its own, since Triton decides when it is imported whether it interprets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = str(int(interpret))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def record_launches(monkeypatch) -> list[tuple]:
    """From now on kernels are not launched, and their results are uninitialised memory.

    Returns:
        The kernels and their arguments by name, as they are launched.
    """
    import triton

    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", record)
    return launches


def compile_for_hopper(kernel, arguments, folder: Path) -> str:
    """Compiles a kernel for sm_90 with these arguments, checks what it needs of the device, and returns its PTX."""
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
    assert re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report) == ["0"] * 3, report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 255
    assert compiled.metadata.shared <= SHARED_MEMORY
    return compiled.asm["ptx"]


class Recorded(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})
