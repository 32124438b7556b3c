"""Whether operations are being looked into: by forward-mode derivatives, by `torch.func`, or by batched gradients.

Our own operators and torch's fused ones have no rule for these; the modules then compute with plain operations. What is
asked of torch here is private to it. Where a part is missing, its answer is no, and torch itself raises an error.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

_functorch: Any = getattr(torch._C, "_functorch", None)


def not_compiled(function: F) -> F:
    """A function around which `torch.compile` breaks its graph."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def constant_when_compiled(function: F) -> F:
    """A function whose result is a constant of a compiled graph; its arguments must be none of the graph's values."""
    return cast(F, torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


def is_transformed(*tensors: Tensor) -> bool:
    """Whether some transform is under way, or one of the tensors stands for a batch of gradients."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    if (active is not None and active()) or getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    batched = getattr(_functorch, "is_legacy_batchedtensor", None)
    return batched is not None and any(batched(tensor) for tensor in tensors)
