"""Applies the linear layers of an attention by the fastest product that equals calling the layer.

Users replace, wrap and hook these layers: adapters (LoRA), quantisation, pruning, weight and spectral normalisation,
FSDP, recorders of activations. Such a layer is always called; only the weight of an unmodified `nn.Linear` is
multiplied directly.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor  # noqa: PLC2701 - torch has no public name
from torch.nn.modules import module as torch_module

from lightning_attn.attention.cpu.linear import Linear, linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN_TYPES = (Tensor, nn.Parameter, FakeTensor)
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` that is not that of its class."""
    return (
        "forward" in vars(module)
        or any(getattr(module, name, None) for name in _HOOKS)
        or any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)
    )


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a layer only multiplies with its weight: an `nn.Linear` without hooks of any kind.

    Tensor subclasses as weights, such as those of quantised layers, override the multiplication and are not plain.
    """
    if type(layer) not in (nn.Linear, Linear) or is_hooked(layer):
        return False
    return all(tensor is None or type(tensor) in _OWN_TYPES for tensor in (layer.weight, layer.bias))


def has_only_weight(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is plain and has no bias, so that it is a product with its weight."""
    return is_plain(layer) and getattr(layer, "bias", None) is None


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer to the features of `[..., in]`."""
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias)
    projected: Tensor = layer(x)
    return projected


def project_map(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer to the features of `[B, in, N]`: `[B, out, N]`, in the memory layout that is fastest."""
    if is_plain(layer) and x.shape[2] >= 4 * x.shape[1]:
        weight = layer.weight.expand(x.shape[0], -1, -1)
        return torch.bmm(weight, x) if layer.bias is None else torch.baddbmm(layer.bias[:, None], weight, x)
    # For many features at few positions the layer is faster, even if the features of a position are not contiguous.
    projected: Tensor = layer(x.transpose(1, 2))
    return projected.transpose(1, 2)


def has_autocast(device: str) -> bool:
    """Whether a kind of device supports autocast; meta does not."""
    # torch.compile of torch 2.11 cannot trace the second question.
    return device != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disables autocast on devices that support it."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else contextlib.nullcontext()
