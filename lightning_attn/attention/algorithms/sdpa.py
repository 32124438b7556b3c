"""E1, alone or with E3, by torch's fused kernels: `scaled_dot_product_attention` of U z_q (+ u), V^C x_k and W' x_k."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.algorithms.dense import MAX_WEIGHTS
from lightning_attn.attention.layout import masked_softmax
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.transforms import is_transformed

_MIN_WEIGHTS_HALF = 8 * MAX_WEIGHTS
"""From this number of weights on, the CPU's kernel is as fast as tiles in half precision."""


class SDPA(Algorithm):
    """One call of `scaled_dot_product_attention`."""

    name = "sdpa"

    @override
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        e1, e2, _, e4 = problem.uses
        if not e1 or e2 or e4:
            return "it needs E1 without E2 and E4: the fused kernels take no position energy with a gradient"
        return None

    @override
    def is_suitable(self, problem: AttentionProblem) -> bool:
        """Where the kernels need O(N) memory and are fast: see `needs_no_mask`."""
        if problem.transformed or not needs_no_mask(problem):
            return False
        if problem.device == "cpu":  # its kernel has no dropout, and supports padding, but not with the causal flag
            if problem.dropout > 0 or (problem.padded and problem.layout.causal):
                return False
            half = problem.dtype in (torch.bfloat16, torch.float16)  # its backward pass is slow where weights are few
            return problem.exported or problem.num_weights > (_MIN_WEIGHTS_HALF if half else MAX_WEIGHTS)
        return not problem.padded  # the fastest kernels support no mask; augmented_sdpa needs none

    @override
    def compute(self, inputs: AttentionInputs) -> Tensor:
        energies, layout = inputs.energies(), inputs.layout
        assert energies.content_query is not None, "E1 is on"
        assert energies.key is not None, "E1 is on"
        value = inputs.projected_value()
        only_causal = layout.causal and layout.aligned and layout.window is None
        if only_causal and inputs.key_padding_mask is None and inputs.attention_mask is None:
            return fused_attention(energies.content_query, energies.key, value, inputs.dropout, is_causal=True)
        hidden = inputs.hidden(0, layout.num_queries)
        return fused_attention(energies.content_query, energies.key, value, inputs.dropout, hidden=hidden)


class _TwiceDifferentiable(torch.autograd.Function):
    """The fused kernel; for second derivatives, which it lacks, the backward pass is built from plain operations."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        dropout: float,
        is_causal: bool,
    ) -> Tensor:
        ctx.options = visible, dropout, is_causal
        ctx.save_for_backward(query, key, value)
        with torch.enable_grad():
            ctx.inner = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            ctx.out = _kernel(*ctx.inner, *ctx.options)
        out: Tensor = ctx.out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled() and not is_transformed(grad):
            gradients = torch.autograd.grad(ctx.out, ctx.inner, grad, retain_graph=True)
            return (*gradients, None, None, None)
        visible, dropout, is_causal = ctx.options
        if dropout > 0:
            raise ValueError(
                f"dropout={dropout:g}: second derivatives need the dropout mask of the fused kernel, which does not "
                'return it. Use algorithm="dense" or "tiled", or the module in evaluation mode.'
            )
        with torch.enable_grad():
            inputs = ctx.saved_tensors
            dtype = computation_dtype(inputs[0])
            query, key, value = (tensor.to(dtype) for tensor in inputs)
            hidden = None if visible is None else ~visible
            if is_causal:
                hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
            out = masked_softmax(query @ key.transpose(2, 3), hidden) @ value
            needed = [tensor for tensor in inputs if tensor.requires_grad]
            found = iter(torch.autograd.grad(out, needed, grad.to(dtype), create_graph=True))
            return (*(next(found) if tensor.requires_grad else None for tensor in inputs), None, None, None)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, dropout: float, is_causal: bool
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, is_causal=is_causal, scale=1.0
    )


def needs_no_mask(problem: AttentionProblem) -> bool:
    """Whether the kernels need no mask tensor `[N_q, N_k]`: at most their causal flag."""
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
    """`scaled_dot_product_attention` with zeros for queries that see no key, and NaN where an energy is NaN.

    Args:
        query: `[B, M, N_q, width]`.
        key: `[B, M, N_k, width]`.
        value: `[B, M, N_k, d]`.
        dropout: Probability of dropping a weight.
        is_causal: Hide the keys with larger index than the query.
        hidden: True where a key is hidden from a query, to broadcast against `[B, M, N_q, N_k]`; not with `is_causal`.
        fully_masked: True where a query sees no key, to broadcast against `[B, M, N_q, 1]`; `hidden` replaces it.
    """
    visible = None
    if hidden is not None:
        # The kernels return the mean of all values, or NaN, for a query without a visible key.
        fully_masked = hidden.all(dim=-1, keepdim=True)
        visible = fully_masked | ~hidden
    # Features of a token must be contiguous, or the CPU's kernel is several times slower.
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    options: tuple[Any, ...] = (visible, dropout, is_causal)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if needs_gradient and type(query) is Tensor and not torch.compiler.is_compiling() and not is_transformed():
        out: Tensor = _TwiceDifferentiable.apply(query, key, value, *options)
    else:
        out = _kernel(query, key, value, *options)
    if query.device.type == "cpu":
        # That kernel treats a row of NaN energies as fully masked, and returns zeros. Zero times a finite number is
        # zero, without overflow; zero times anything else is NaN.
        with torch.no_grad():
            nan_or_zero = (query * 0.0).sum(dim=-1, keepdim=True)
            nan_or_zero = nan_or_zero + (key * 0.0).sum(dim=(-2, -1)).view(*key.shape[:2], 1, 1)
        out = out + nan_or_zero
    return out if fully_masked is None else out.masked_fill(fully_masked, 0.0)
