"""E4, alone or with E3: the exponential of a sum over axes is a product, so that the softmax separates by axis.

For every pair of a column of queries and a row of keys, a softmax along the row gives a mean of its values and a
log-sum-exp; a softmax over the rows, with the log-sum-exps added to its energy, gives the mean of the means. This is
exact and subtracts maxima in both steps. N (rows + columns) exponentials instead of N^2.
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.energies import Energies
from lightning_attn.attention.layout import Layout, masked_softmax
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import without_autocast
from lightning_attn.attention.transforms import is_exporting, is_transformed


class Separable(Algorithm):
    """A softmax along x inside of one along y."""

    name = "separable"

    @override
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        if problem.terms not in ("0001", "0011"):
            return "it needs terms '0001' or '0011', whose weights depend on the offset and the key alone"
        if problem.ndim == 1:
            return "it needs maps (ndim=2): a sentence has only one axis"
        if problem.layout.causal:
            return "a causal mask does not separate into rows and columns"
        if problem.masked:
            return "an attention_mask does not separate into rows and columns"
        if problem.dropout > 0:
            return "it has no dropout"
        return None

    @override
    def is_suitable(self, problem: AttentionProblem) -> bool:
        return True

    @override
    def compute(self, inputs: AttentionInputs) -> Tensor:
        energies, layout = inputs.energies(), inputs.layout
        value, padding = inputs.projected_value(), inputs.padding()
        dtype = computation_dtype(value)
        with without_autocast(value.device):
            grid = torch.unflatten(value.to(dtype), 2, layout.key_sizes)  # [B, M, key rows, key columns, d]
            energy_y, energy_x = _energies_by_axis(energies)
            hidden_y, hidden_x = _hidden_by_axis(inputs)
            if energies.key_energy is None and padding is None:
                along_y, along_x = masked_softmax(energy_y, hidden_y), masked_softmax(energy_x, hidden_x)
                sums = torch.einsum("mxk,bmjkd->bmjxd", along_x, grid)
                sums = torch.einsum("myj,bmjxd->bmyxd", along_y, sums)
            else:
                sums = _two_steps(layout, energies.key_energy, padding, energy_y, energy_x, hidden_y, hidden_x, grid)
        return sums.flatten(2, 3).to(value.dtype)


def _energies_by_axis(energies: Energies) -> tuple[Tensor, Tensor]:
    """E4 along y and along x, `[M, queries along it, keys along it]`."""
    along_y, along_x = energies.along_axes()
    assert along_y is not None, "maps have two axes"
    assert along_x is not None, "E4 is on"
    return along_y[0, :, :, 0], along_x[0, :, 0]


def _hidden_by_axis(inputs: AttentionInputs) -> list[Tensor | None]:
    """True where the window hides a key along y, and along x, `[queries along it, keys along it]`."""
    if not inputs.layout.masked:
        return [None, None]
    axes = [inputs.layout.axis(axis) for axis in (0, 1)]
    return [axis.hidden_from(torch.arange(axis.num_queries, device=inputs.query.device)) for axis in axes]


def _two_steps(
    layout: Layout,
    key_energy: Tensor | None,
    padding: Tensor | None,
    energy_y: Tensor,
    energy_x: Tensor,
    hidden_y: Tensor | None,
    hidden_x: Tensor | None,
    grid: Tensor,
) -> Tensor:
    """The two softmaxes that the module's docstring describes, `[B, M, rows, columns, d]`."""
    energy = energy_x[None, :, None]  # [1, M, 1, columns, key columns]
    if key_energy is not None:
        energy = energy + torch.unflatten(key_energy.to(grid.dtype), 2, layout.key_sizes).unsqueeze(3)
    hidden = hidden_x
    if padding is not None:
        by_row = torch.unflatten(padding, 1, layout.key_sizes)[:, None, :, None]
        hidden = by_row if hidden is None else hidden | by_row
    lowest = torch.finfo(grid.dtype).min
    if hidden is not None:
        energy = energy.masked_fill(hidden, lowest)
    weights, total = softmax_and_logsumexp(energy)  # total: [B, M, key rows, columns]
    means = weights @ grid  # [B, M, key rows, columns, d]
    outer = energy_y[None, :, None] + total.permute(0, 1, 3, 2).unsqueeze(3)  # [B, M, columns, rows, key rows]
    if hidden is not None:
        empty = hidden.all(dim=-1)  # no key of the row is visible from the column, [.., key rows, columns]
        empty = empty.expand(*empty.shape[:-2], layout.key_sizes[0], layout.query_sizes[1]).transpose(-1, -2)
        hidden_y = empty.unsqueeze(-2) if hidden_y is None else hidden_y | empty.unsqueeze(-2)
    weights = masked_softmax(outer, hidden_y)
    return (weights @ means.transpose(2, 3)).transpose(2, 3)


def softmax_and_logsumexp(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last axis, by one exponential of each element instead of two."""
    if is_transformed() or is_exporting():
        total = torch.logsumexp(energy, dim=-1)
        return torch.exp(energy - total.unsqueeze(-1)), total
    result: tuple[Tensor, Tensor] = _SoftmaxAndLogSumExp.apply(energy)
    return result


class _SoftmaxAndLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, energy: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(energy, dim=-1)
        total = energy.amax(dim=-1) - weights.amax(dim=-1).log()  # of the largest: log p = e - log-sum-exp
        ctx.save_for_backward(weights)
        return weights, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors  # an output: derivatives of this pass flow through it
        mean = torch.linalg.vecdot(weights, grad)
        result: Tensor = weights * (grad + (grad_total - mean).unsqueeze(-1))
        return result
