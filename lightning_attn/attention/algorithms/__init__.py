"""Exact algorithms for Transformer attention (Eq. 2), each for the inputs that it is cheapest for.

All compute Eq. 2 and 8. Cost with N_q queries, N_k keys on a grid of `rows x columns`, and C features:

    pooled           E3                   N_k C: one pooled vector for all queries
    separable        E4, E3 + E4; maps    N_q (rows + columns) C: one softmax along each axis
    dense            any                  N_q N_k C, all weights in memory at once, in plain torch operations
    sdpa             E1, E1 + E3          N_q N_k C in torch's fused kernels
    augmented_sdpa   any                  N_q N_k (C + r) in the same kernels, with r extra features of queries and keys
    tiled            any                  N_q N_k C tile by tile; N_q n_k^2 C in a window of n_k
    reference        any                  the equations as written, in loops

A new algorithm is a file with a subclass of `base.Algorithm`, and an entry in `ORDER`.
"""

from lightning_attn.attention.algorithms.augmented_sdpa import AugmentedSDPA
from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.algorithms.dense import Dense
from lightning_attn.attention.algorithms.pooled import Pooled
from lightning_attn.attention.algorithms.reference import Reference
from lightning_attn.attention.algorithms.sdpa import SDPA
from lightning_attn.attention.algorithms.separable import Separable
from lightning_attn.attention.algorithms.tiled import Tiled
from lightning_attn.errors import InputError

ORDER: tuple[Algorithm, ...] = (
    Pooled(),  # far cheaper than anything else
    Separable(),  # likewise
    SDPA(),  # without position energies the fused kernels are the fastest, except on small inputs
    Dense(),  # few weights: the fewest operations win. Also for tracing and transforms, which need plain operations
    AugmentedSDPA(),  # position energies on devices whose kernels handle longer features well
    Tiled(),  # everything else
    Reference(),
)
"""`"auto"` selects the first of these that supports an attention and is suitable for it (docs/performance.md)."""


def select_algorithm(name: str, problem: AttentionProblem) -> Algorithm:
    """Returns the algorithm of this name, or for `"auto"` the fastest for this attention, by measurement.

    Raises:
        ValueError: If the algorithm of this name cannot compute this attention; the message says why.
    """
    for algorithm in ORDER:
        reason = algorithm.unsupported_reason(problem)
        if name == "auto":
            if reason is None and algorithm.is_suitable(problem):
                return algorithm
        elif algorithm.name == name:
            if reason is None:
                return algorithm
            raise InputError(
                f"algorithm={name!r} cannot compute this attention: {reason}. "
                'Use "auto", which takes the fastest that can.'
            )
    raise InputError(f"algorithm must be one of {[a.name for a in ORDER]} or 'auto', got {name!r}.")


__all__ = ["ORDER", "Algorithm", "AttentionInputs", "AttentionProblem", "select_algorithm"]
