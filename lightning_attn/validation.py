"""Validation of arguments, with one rule and one message for each kind, for all packages."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_attn.errors import InputError


def require_int(name: str, value: object, least: int = 1) -> None:
    """Raises an error unless a value is an integer of at least `least`.

    Raises:
        ValueError: With the argument's name and the value; so do all functions here.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}.")


def require_odd(name: str, value: object, otherwise: str = "") -> None:
    """Raises an error unless a value is a positive odd integer; `otherwise` is a further fix for the message."""
    require_int(name, value)
    assert isinstance(value, int), "checked above"
    if value % 2 == 0:
        raise InputError(
            f"{name} must be odd, so that it has a middle, got {value}: use {value - 1} or {value + 1}{otherwise}."
        )


def require_window(window: object) -> None:
    """Raises an error unless a value is a positive odd integer, or two of them, for y and for x."""
    sizes = window if isinstance(window, tuple | list) else (window,)
    if len(sizes) not in (1, 2) or (len(sizes) == 1 and isinstance(window, tuple | list)):
        raise InputError(f"window must be one odd number, or two (n_y, n_x), got {window!r}; null for all keys.")
    for size in sizes:
        require_odd("window", size, ", or null for all keys")


def require_bool(name: str, value: object) -> None:
    """Raises an error unless a value is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}.")


def require_ndim(ndim: int) -> None:
    """Raises an error unless a value is 1 or 2."""
    if ndim not in (1, 2):
        raise ValueError(f"ndim must be 1 (sequences) or 2 (maps), got {ndim!r}.")


def require_dropout(dropout: float) -> None:
    """Raises an error unless a value is a probability below one."""
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"dropout must be at least 0 and below 1, got {dropout!r}; use 0.0 for no dropout.")


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float; True and False are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse_unused(spec: Any, choice: str, used_by: Mapping[Any, Collection[str]]) -> None:
    """Raises an error for options that the choice of a spec does not use, which would silently have no effect.

    Args:
        spec: A dataclass.
        choice: Its field with the choice.
        used_by: By values of that field, the fields that only these values use.
    """
    chosen = getattr(spec, choice)
    used = used_by.get(chosen, ())
    unused = {name for names in used_by.values() for name in names if name not in used}
    given = {
        field.name: (value, field.default)
        for field in dataclasses.fields(spec)
        if field.name in unused
        and (tuple(value) if isinstance(value := getattr(spec, field.name), list) else value) != field.default
    }
    if given:
        owners = [str(owner) for owner, names in used_by.items() if given.keys() & set(names)]
        options = ", ".join(f"{name}={value!r}" for name, (value, _) in given.items())
        defaults = ", ".join(f"{name}: {_as_yaml(default)}" for name, (_, default) in given.items())
        raise InputError(
            f"{options}: not used by {choice}={chosen!r}. Leave out, set to the default ({defaults}), or choose "
            f"{choice}: {' or '.join(owners)}."
        )


def _as_yaml(value: object) -> str:
    """A value as it is written in YAML and on the command line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return "null" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def divisors(number: int) -> list[int]:
    """All divisors of a number, for messages with the valid values."""
    return [n for n in range(1, number + 1) if number % n == 0]


def check_input(name: str, x: Tensor, ndim: int, channels: int, channels_name: str = "dim") -> None:
    """Raises an error unless a tensor is floating-point, `[B, L, C]` (`ndim=1`) or `[B, C, H, W]` (`ndim=2`).

    Args:
        name: Name of `x` in messages.
        x: The tensor.
        ndim: 1 or 2.
        channels: C.
        channels_name: The argument that C comes from.
    """
    layout = "[B, L, C]" if ndim == 1 else "[B, C, H, W]"
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor {layout}, got {type(x).__name__}; use torch.as_tensor.")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point type, got {x.dtype}.")
    if x.dim() != ndim + 2:
        raise ValueError(f"{name} must be {layout} for ndim={ndim}, got {x.dim()} dimensions, shape {tuple(x.shape)}.")
    if x.shape[-1 if ndim == 1 else 1] != channels:
        raise ValueError(f"{name} must be {layout} with C = {channels_name} = {channels}, got shape {tuple(x.shape)}.")


def check_mask(mask: Tensor | None, x: Tensor, owner: str) -> None:
    """Raises an error unless a `key_padding_mask` is a bool tensor with one element for each position of `x`.

    Args:
        mask: The mask; None for none.
        x: The masked tensor, `[B, L, C]` or `[B, C, H, W]`.
        owner: A name for `x` in the message.
    """
    if mask is None:
        return
    expected = (x.shape[0], *(x.shape[1:2] if x.dim() == 3 else x.shape[2:]))
    require_mask("key_padding_mask", mask, "padded")
    if tuple(mask.shape) != expected:
        raise ValueError(f"key_padding_mask must have the shape {expected} of {owner}, got {tuple(mask.shape)}.")


def require_mask(name: str, mask: object, meaning: str) -> None:
    """Raises an error unless a value is a bool tensor."""
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor of bool, True where {meaning}, got {type(mask).__name__}; "
            "use torch.as_tensor."
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, True where {meaning}, got {mask.dtype}.")
