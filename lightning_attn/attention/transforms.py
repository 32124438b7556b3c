"""Detects forward-mode derivatives, `torch.func` transforms, batched gradients and dispatch modes.

Our custom operators and torch's fused ones have no rule for these; the modules then use plain operations. The functions
queried here are private to torch. Where one is missing, the answer is no, and torch itself raises an error.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

_functorch: Any = getattr(torch._C, "_functorch", None)


def not_compiled(function: F) -> F:
    """Excludes a function from `torch.compile`, which breaks its graph there."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def constant_when_compiled(function: F) -> F:
    """Makes a function's result a constant of a compiled graph; its arguments must not be values of the graph."""
    return cast(F, torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


def is_exporting() -> bool:
    """Whether `torch.export` traces a program.

    In torch 2.11 `torch.compiler.is_exporting()` is also true in functions that are only compiled.
    """
    exporting: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if exporting is None else exporting


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform is active, or one of the tensors is a batch of gradients (`is_grads_batched`)."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    if (active is not None and active()) or getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    batched = getattr(_functorch, "is_legacy_batchedtensor", None)
    return batched is not None and any(batched(tensor) for tensor in tensors)


def has_dispatch_mode() -> bool:
    """Whether a dispatch mode is active, such as `FlopCounterMode`, which sees every operator that runs."""
    length = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return length is not None and length() > 0
