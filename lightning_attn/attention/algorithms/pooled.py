"""E3 alone: all queries have the same weights and so the same pooled vector, computed once. O(N_k C)."""

from torch import Tensor
from typing_extensions import override

from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.layout import masked_softmax


class Pooled(Algorithm):
    """Pools the keys before the values are projected."""

    name = "pooled"

    @override
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        if problem.terms != "0010":
            return "it needs terms '0010', whose weights are the same for every query"
        if not problem.same_keys_for_all:
            return "it needs every query to see the same keys: no causal mask, window or attention_mask"
        if problem.dropout > 0:
            return "it has no dropout"
        return None

    @override
    def is_suitable(self, problem: AttentionProblem) -> bool:
        return True

    @override
    def compute(self, inputs: AttentionInputs) -> Tensor:
        energy = inputs.energies().key_energy
        assert energy is not None, "E3 is on, E1 is not"
        padding = inputs.padding()
        return inputs.pooled_value(masked_softmax(energy, None if padding is None else padding[:, None]))
