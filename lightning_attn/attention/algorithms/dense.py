"""Every weight held at once, in operations of torch alone: for small inputs, and where something must see each step.

Differentiable to any order, forward and backward, under every transform. Memory grows with N_q N_k.
"""

import torch
from torch import Tensor

from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.dropout import dropout_factors, new_seed
from lightning_attn.attention.energies import multiplies_fast_in_half
from lightning_attn.attention.layout import masked_softmax
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import without_autocast

MAX_WEIGHTS = 512 * 1024
"""Up to here the weights of all heads and samples are faster at once than in tiles or in a fused kernel, which begin to
pay as weights leave the caches; measured on one and two cores."""

_BLOCK_WEIGHTS = 1 << 24
"""Weights held at once (64 MiB in float32) where more than that are asked for: then queries come in blocks."""


class Dense(Algorithm):
    """Softmax of the summed energies, then one product with the values."""

    name = "dense"

    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        """It computes every attention."""
        return None

    def is_suitable(self, problem: AttentionProblem) -> bool:
        """For few weights on a CPU, and where our own operators would not be seen through."""
        if problem.transformed or problem.exported or problem.device == "meta":
            return True
        return problem.device == "cpu" and problem.num_weights <= MAX_WEIGHTS

    def compute(self, inputs: AttentionInputs) -> Tensor:
        """See `Algorithm.compute`."""
        energies, value = inputs.energies(), inputs.projected_value()
        batch, heads, num_keys, _ = value.shape
        num_queries, device, dtype = inputs.layout.num_queries, value.device, computation_dtype(value)
        product_dtype = value.dtype if multiplies_fast_in_half(value) else dtype
        seed = new_seed() if inputs.dropout > 0 else None

        def block(start: int, stop: int) -> Tensor:
            weights = masked_softmax(energies.rows(start, stop), inputs.hidden(start, stop))
            if seed is not None:
                rows = torch.arange(batch * heads, device=device).view(batch, heads, 1) * num_queries
                rows = rows + torch.arange(start, stop, device=device)
                weights = weights * dropout_factors(seed, inputs.dropout, dtype, rows, num_keys)
            return torch.matmul(weights.to(product_dtype), value.to(product_dtype)).to(value.dtype)

        with without_autocast(device):
            num_weights = batch * heads * num_queries * num_keys
            # In an export the sizes of sentences are not known yet: these are never so long.
            if not isinstance(num_weights, int) or num_weights <= _BLOCK_WEIGHTS:
                return block(0, num_queries)
            at_once = max(1, _BLOCK_WEIGHTS // (batch * heads * num_keys))
            starts = range(0, num_queries, at_once)
            return torch.cat([block(start, min(start + at_once, num_queries)) for start in starts], dim=2)
