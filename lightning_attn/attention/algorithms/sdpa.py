"""E1, alone or with E3, by torch's fused kernels: `scaled_dot_product_attention` of U z_q (+ u), V^C x_k and W' x_k."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.algorithms.dense import MAX_WEIGHTS

_MIN_WEIGHTS_HALF = 8 * MAX_WEIGHTS
"""From here on the CPU's kernel is as fast as tiles in half precision."""


class SDPA(Algorithm):
    """One call of `scaled_dot_product_attention`."""

    name = "sdpa"

    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        """See `Algorithm.unsupported_reason`."""
        e1, e2, _, e4 = problem.uses
        if not e1 or e2 or e4:
            return "it needs E1 without E2 and E4: the fused kernels take no position energy with a gradient"
        return None

    def is_suitable(self, problem: AttentionProblem) -> bool:
        """Where the kernels keep their memory of O(N) and their speed: see `takes_flag_only`."""
        if problem.transformed or not takes_flag_only(problem):
            return False
        if problem.device == "cpu":  # its kernel drops no weights, and takes padding, but not beside the causal flag
            if problem.dropout > 0 or (problem.padded and problem.layout.causal):
                return False
            half = problem.dtype in (torch.bfloat16, torch.float16)  # its backward pass is slow where weights are few
            return problem.exported or problem.num_weights > (_MIN_WEIGHTS_HALF if half else MAX_WEIGHTS)
        return not problem.padded  # a mask leaves the fastest kernels; augmented_sdpa does without

    def compute(self, inputs: AttentionInputs) -> Tensor:
        """See `Algorithm.compute`."""
        energies, layout = inputs.energies(), inputs.layout
        assert energies.content_query is not None, "E1 is on"
        assert energies.key is not None, "E1 is on"
        value = inputs.projected_value()
        only_causal = layout.causal and layout.aligned and layout.window is None
        if only_causal and inputs.key_padding_mask is None and inputs.attention_mask is None:
            return fused_attention(energies.content_query, energies.key, value, inputs.dropout, is_causal=True)
        hidden = inputs.hidden(0, layout.num_queries)
        return fused_attention(energies.content_query, energies.key, value, inputs.dropout, hidden=hidden)


def takes_flag_only(problem: AttentionProblem) -> bool:
    """Whether the kernels need no mask of pairs, which would have to be held: at most their own causal flag."""
    if problem.layout.window is not None or problem.masked:
        return False
    return not problem.layout.causal or problem.layout.aligned


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
    hidden: Tensor | None = None,
    fully_masked: Tensor | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` with zeros for queries that see no key, and NaN where an energy is not a number.

    Args:
        query: `[B, M, N_q, width]`.
        key: `[B, M, N_k, width]`.
        value: `[B, M, N_k, d]`.
        dropout: Probability of dropping a weight.
        is_causal: Hide the keys with larger numbers than the query.
        hidden: True where a key is hidden from a query, to broadcast against `[B, M, N_q, N_k]`; not with `is_causal`.
        fully_masked: True where a query sees no key, to broadcast against `[B, M, N_q, 1]`; found from `hidden`.
    """
    visible = None
    if hidden is not None:
        # The kernels give means of everything, or NaN, to a query without a visible key.
        fully_masked = hidden.all(dim=-1, keepdim=True)
        visible = fully_masked | ~hidden
    # The features of a token side by side, or the CPU's kernel is several times slower.
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, is_causal=is_causal, scale=1.0
    )
    if query.device.type == "cpu":
        # That kernel takes a row of NaN energies for one that sees no key, and returns zeros. Zero times what is finite
        # is zero, so that nothing can overflow here; zero times anything else is NaN.
        with torch.no_grad():
            unsound = (query * 0.0).sum(dim=-1, keepdim=True) + (key * 0.0).sum(dim=(-2, -1)).view(*key.shape[:2], 1, 1)
        out = out + unsound
    return out if fully_masked is None else out.masked_fill(fully_masked, 0.0)
