"""All attention weights in memory at once, in plain torch operations: for small inputs, export and `torch.func`.

Differentiable to any order, in forward and backward mode, under every transform. Memory grows with N_q N_k.
"""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.dropout import dropout_factors, new_seed
from lightning_attn.attention.energies import multiplies_fast_in_half
from lightning_attn.attention.layout import masked_softmax
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import without_autocast

MAX_WEIGHTS = 512 * 1024
"""Up to this number of weights of all heads and samples this is faster than tiles or a fused kernel, which win once the
weights exceed the CPU caches; measured on one and two cores."""

BLOCK_WEIGHTS = 1 << 24
"""Weights in memory at once (64 MiB in float32); larger problems are computed in blocks of queries."""


class Dense(Algorithm):
    """Softmax of the summed energies, then one product with the values."""

    name = "dense"

    @override
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        return None

    @override
    def is_suitable(self, problem: AttentionProblem) -> bool:
        """For few weights on a CPU, and for transforms, export and the meta device, which need plain operations."""
        if problem.transformed or problem.exported or problem.device == "meta":
            return True
        return problem.device == "cpu" and problem.num_weights <= MAX_WEIGHTS

    @override
    def compute(self, inputs: AttentionInputs) -> Tensor:
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
            # In an export sentence lengths are symbolic; sentences never need more than one block.
            if not isinstance(num_weights, int) or num_weights <= BLOCK_WEIGHTS:
                return block(0, num_queries)
            block_queries = max(1, BLOCK_WEIGHTS // (batch * heads * num_keys))
            starts = range(0, num_queries, block_queries)
            return torch.cat([block(start, min(start + block_queries, num_queries)) for start in starts], dim=2)
