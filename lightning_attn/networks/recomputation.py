"""Activation checkpointing: layers that store their inputs only, and compute the rest again in the backward pass.

Losses and gradients are bitwise identical, dropout included, if the device's kernels are deterministic. A training step
takes longer by about the forward pass of these layers.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


class RecomputableLayer:
    """A base of modules whose activations can be computed again in the backward pass, beside `nn.Module`.

    Attributes:
        recomputes: Whether they are; `recompute_activations` sets it.
    """

    recomputes: bool = False

    @property
    def has_attention(self) -> bool:
        """Whether the layer has an attention, or a deformable convolution, whose activations are many."""
        raise NotImplementedError

    def run(self, compute: Callable[..., T], *inputs: Any) -> T:
        """Calls `compute` with the inputs; stores its activations, or if the layer recomputes them, the inputs only.

        Args:
            compute: The layer, or a part of it; must not change its inputs.
            *inputs: Tensors and other values.
        """
        if not (self.recomputes and torch.is_grad_enabled()):
            return compute(*inputs)
        assert isinstance(self, nn.Module), "a base of modules"
        contexts = contextlib.nullcontext(), _StatisticsKept(self)
        result: T = checkpoint(compute, *inputs, use_reentrant=False, context_fn=lambda: contexts)
        return result


def recompute_activations(network: nn.Module) -> int:
    """Makes all layers with attention of a network recompute their activations; returns their number."""
    layers = [one for one in network.modules() if isinstance(one, RecomputableLayer) and one.has_attention]
    for layer in layers:
        layer.recomputes = True
    return len(layers)


class _StatisticsKept(contextlib.AbstractContextManager[None]):
    """Keeps batch normalisation from counting a batch twice: meanwhile copies of its statistics are updated instead."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._statistics: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def __enter__(self) -> None:
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
        self._statistics = [
            (one, dict(one.named_buffers())) for one in self._layer.modules() if isinstance(one, norms) and one.training
        ]
        for norm, buffers in self._statistics:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for norm, buffers in self._statistics:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
