"""Chunked cross entropy of the output projection, which never has all logits in memory at once."""

from typing import Any

import torch
from torch import Tensor

from lightning_attn.attention.cpu.linear import linear

# Rows of logits in memory at a time: enough for full-speed matrix products, few enough to stay in a CPU's cache.
CHUNK_ROWS = 256
# On other devices the fewer calls the better: with 37,000 classes, 0.3 GB in float32. Not measured.
DEVICE_CHUNK_ROWS = 2048


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes gradients chunk by chunk in the forward pass, while the logits are still in cache."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, ignored: int | None
    ) -> tuple[Tensor, Tensor]:
        classes = weight.shape[0]
        operand = weight.to(hidden.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        sums = hidden.new_zeros(2, dtype=torch.float64)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        chunk_rows = CHUNK_ROWS if hidden.device.type == "cpu" else DEVICE_CHUNK_ROWS
        for start in range(0, hidden.shape[0], chunk_rows):
            rows, labels = hidden[start : start + chunk_rows], target[start : start + chunk_rows, None]
            skipped = None if ignored is None else labels == ignored
            logits = linear(rows, operand)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            probabilities = torch.softmax(logits, dim=-1)
            # The highest probability, which cannot underflow, gives the normaliser without more exponentials.
            log_normaliser = logits.amax(dim=-1, keepdim=True) - probabilities.amax(dim=-1, keepdim=True).log_()
            of_label = log_normaliser - logits.gather(1, labels)
            of_all = log_normaliser - logits.mean(dim=-1, keepdim=True)
            if skipped is not None:
                of_label, of_all = of_label.masked_fill_(skipped, 0), of_all.masked_fill_(skipped, 0)
            likelihood, uniform = of_label.sum(dtype=torch.float64), of_all.sum(dtype=torch.float64)
            sums += torch.stack(((1 - label_smoothing) * likelihood + label_smoothing * uniform, likelihood))
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = softmax - smoothed target
            gradient = probabilities.sub_(label_smoothing / classes)
            gradient.scatter_add_(1, labels, gradient.new_full((1, 1), label_smoothing - 1).expand(labels.shape))
            gradient = gradient if skipped is None else gradient.masked_fill_(skipped, 0)
            gradient = gradient.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[start : start + chunk_rows] = linear(gradient, operand.t())
            if needs_weight and weight_grad.dtype == rows.dtype:
                weight_grad.addmm_(gradient.t(), rows)
            elif needs_weight:
                weight_grad += gradient.t() @ rows
        ctx.save_for_backward(hidden_grad, weight_grad if needs_weight else None)
        ctx.weight_dtype = weight.dtype
        loss, likelihood_sum = sums.to(torch.promote_types(hidden.dtype, torch.float32)).unbind()
        ctx.mark_non_differentiable(likelihood_sum)
        return loss, likelihood_sum

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * loss_grad.to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * loss_grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float = 0.0, ignored: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy, summed over rows, of the logits `hidden @ weight.T`.

    The same result as `F.cross_entropy(F.linear(hidden, weight), target, label_smoothing=..., reduction="sum")` with
    a few hundred rows of logits in memory instead of all. (torch's `linear_cross_entropy` is chunked only without label
    smoothing.) Supports `backward` once; no second derivatives.

    Args:
        hidden: `[N, C]`; its dtype (or that of autocast) is the dtype of the matrix products.
        weight: `[V, C]`.
        target: `[N]`, class indices.
        label_smoothing: Probability mass that is spread evenly over all classes.
        ignored: A class whose rows count nothing, such as padding; None for no such class. Selecting the other rows
            first is as good, but a GPU would make the host wait for their number.

    Returns:
        The smoothed loss, and the plain negative log likelihood without gradient, both summed over N, in nats.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, likelihood = _SummedCrossEntropy.apply(hidden, weight, target, label_smoothing, ignored)
    return loss, likelihood
