"""Eq. 1 to 8 written literally, with loops over heads, queries and keys: the tests compare all others with it."""

from torch import Tensor
from typing_extensions import override

from lightning_attn.attention import reference
from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem


class Reference(Algorithm):
    """`attention/reference.py`; never chosen, far too slow for anything but tests."""

    name = "reference"

    @override
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        if not problem.plain_projections:
            return "it multiplies with the weights of unmodified linear layers, and a projection is replaced or hooked"
        if problem.dropout > 0:
            return "it has no dropout"
        return None

    @override
    def is_suitable(self, problem: AttentionProblem) -> bool:
        return False

    @override
    def compute(self, inputs: AttentionInputs) -> Tensor:
        attention = inputs.attention
        mask = inputs.attention_mask
        return reference.weighted_values(
            inputs.query,
            inputs.key,
            inputs.value,
            reference.parameters_of(attention),
            num_heads=attention.num_heads,
            terms=attention.terms,
            scale=attention.scale,
            window=attention.window,
            kv_stride=attention.kv_stride,
            causal=inputs.layout.causal,
            key_padding_mask=inputs.key_padding_mask,
            attention_mask=mask if mask is None else mask.expand(len(inputs.query), attention.num_heads, -1, -1),
        )
