"""Linear layers of an attention, by the fastest product that gives what calling the layer gives.

Other people replace, wrap and hook these layers: adapters (LoRA), quantisation, pruning, weight and spectral
normalisation, FSDP, recorders of activations. Such a layer is always called; only an unmodified `nn.Linear` may have
its weight multiplied directly.
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
    """Whether hooks would notice a call of a module, or its `forward` is not that of its class."""
    return (
        "forward" in vars(module)
        or any(getattr(module, name, None) for name in _HOOKS)
        or any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)
    )


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a layer does nothing but multiply with its weight: an `nn.Linear` without hooks of any kind.

    Weights that are subclasses of tensors, as those of quantised layers, multiply in their own way.
    """
    if type(layer) not in (nn.Linear, Linear) or is_hooked(layer):
        return False
    return all(tensor is None or type(tensor) in _OWN_TYPES for tensor in (layer.weight, layer.bias))


def has_only_weight(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is plain and adds no bias, so that its weight says all."""
    return is_plain(layer) and getattr(layer, "bias", None) is None


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer to the features of `[..., in]`."""
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias)
    projected: Tensor = layer(x)
    return projected


def project_map(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer to the features of `[B, in, N]`: `[B, out, N]`, in the memory layout that is fastest to make."""
    if is_plain(layer) and x.shape[2] >= 4 * x.shape[1]:
        weight = layer.weight.expand(x.shape[0], -1, -1)
        return torch.bmm(weight, x) if layer.bias is None else torch.baddbmm(layer.bias[:, None], weight, x)
    # Of many features at few places, torch's layer is faster, also where the features of a place lie apart.
    projected: Tensor = layer(x.transpose(1, 2))
    return projected.transpose(1, 2)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off, on devices that have it (meta does not)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
