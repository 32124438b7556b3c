"""Whether operations are being looked into: by forward-mode derivatives, by `torch.func`, or by batched gradients.

Our own operators and torch's fused ones have no rule for these; the modules then compute with plain operations. What is
asked of torch here is private to it. Where a part is missing, its answer is no, and torch itself raises an error.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Any = getattr(torch._C, "_functorch", None)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether some transform is under way, or one of the tensors stands for a batch of gradients."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    if (active is not None and active()) or getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    batched = getattr(_functorch, "is_legacy_batchedtensor", None)
    return batched is not None and any(batched(tensor) for tensor in tensors)
