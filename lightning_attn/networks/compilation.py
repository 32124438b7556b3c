"""Compilation of a network's inner modules by `torch.compile`, in place, so that parameters keep their names.

Attentions and deformable convolutions are called outside of the compiled graphs. They choose among algorithms by size,
loop over blocks, and have constants for every size of a map, all of which would be compiled again for each size. Only
the layers around them are compiled: norms, activations, dropout, residual connections, and convolutions with these.
"""

import os
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from lightning_attn.attention.transforms import is_exporting, not_compiled
from lightning_attn.errors import InputError

CompileBackend = Literal["inductor", "aot_eager"]
"""`inductor` generates code; `aot_eager`, for machines without a compiler, runs captured graphs by torch's kernels."""

# Every kind of layer has a graph of its own, in training and in evaluation; torch counts them together, up to 8.
_GRAPHS_OF_A_FUNCTION = 64


def outside_graph(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Calls a module, which no compiled graph then contains."""
    if torch.compiler.is_compiling() and not is_exporting():
        return _called(module, *inputs, **options)
    return module(*inputs, **options)


@not_compiled
def _called(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    return module(*inputs, **options)


def compile_modules(modules: Sequence[nn.Module], backend: CompileBackend) -> None:
    """Compiles modules in place, when they are called first, for inputs of all sizes.

    Args:
        modules: The modules. Names of parameters stay, and copies of a module are not compiled.
        backend: Of `torch.compile`.

    Raises:
        ValueError: If the backend needs a compiler, and none is installed.
    """
    if backend == "inductor":
        _require_compiler()
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_OF_A_FUNCTION)
    # Inductor would otherwise choose the memory format of a convolution by the size of its map, and compile a graph for
    # that size alone; here all maps become channels last, which their graph has to be given.
    options = {"force_layout_optimization": True} if backend == "inductor" else None
    for module in modules:
        module.compile(backend=backend, dynamic=True, options=options)


def _require_compiler() -> None:
    """Inductor compiles C++ for CPUs, and the launchers of its GPU kernels."""
    candidates = [os.environ.get("CXX", ""), os.environ.get("CC", ""), "g++", "clang++", "gcc", "clang"]
    if not any(name and shutil.which(name) for name in candidates):
        raise InputError(
            "compile: true needs a C++ compiler, and neither g++ nor clang++ is installed (the variable CXX names "
            "another). Install one, or set compile to false; aot_eager needs none, but saves no time."
        )
