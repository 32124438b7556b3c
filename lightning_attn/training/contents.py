"""Checks of the values of a checkpoint: the kind of each key, and whether a state fits the object that takes it."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_attn.errors import InputError
from lightning_attn.training.checkpoint_keys import (
    AVERAGING_KEY,
    BACKBONE_NAME_KEY,
    CALLBACKS_KEY,
    CURRENT_WEIGHTS_KEY,
    EPOCH_KEY,
    LIGHTNING_VERSION_KEY,
    LINES_KEY,
    LOOPS_KEY,
    MEMBERS_KEY,
    OPTIMIZERS_KEY,
    RANDOM_STREAMS_KEY,
    RUN_KEY,
    SCHEDULES_KEY,
    STEP_KEY,
    TASK_KEY,
    WEIGHTS_KEY,
)

__all__ = ["ContentsError", "require_contents", "require_optimizer_state", "require_plain", "require_same_structure"]

_MOST_VALUES = 100_000
_DEEPEST = 40
_LARGEST = 1 << 53
_LARGEST_NUMBER = 1 << 1000  # that a float can hold
# Of optimizers of torch, by the name in their state: what has the shape of its parameter.
_LIKE_PARAMETER = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "ax", "prev", "step_size"),
)


class ContentsError(InputError):
    """A value of a checkpoint is of a wrong kind; the message continues after the file's name."""


def require_contents(checkpoint: Mapping[str, Any]) -> None:
    """Refuses a checkpoint with a value of a wrong kind; what a value means is checked by its reader.

    Raises:
        ContentsError: Names the key.
    """
    wrong = next((name for name in checkpoint if not _is_text(name)), None)
    if wrong is not None:
        raise ContentsError(f"is damaged: it has {str(wrong)[:80]!a} for a name")
    _require_weights(WEIGHTS_KEY, checkpoint[WEIGHTS_KEY])
    for key in (CURRENT_WEIGHTS_KEY, AVERAGING_KEY):
        if key in checkpoint:
            _require_weights(key, checkpoint[key])
    if CURRENT_WEIGHTS_KEY in checkpoint:
        require_same_structure(CURRENT_WEIGHTS_KEY, checkpoint[CURRENT_WEIGHTS_KEY], checkpoint[WEIGHTS_KEY])
    for key in (STEP_KEY, EPOCH_KEY, LINES_KEY):
        if key in checkpoint:
            _require_count(key, checkpoint[key])
    for key, kind in ((LOOPS_KEY, dict), (CALLBACKS_KEY, dict), (OPTIMIZERS_KEY, list), (SCHEDULES_KEY, list)):
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise ContentsError(f"is damaged: {key} is no {kind.__name__}")
    for name, state in checkpoint.get(CALLBACKS_KEY, {}).items():
        if not isinstance(name, str) or not isinstance(state, dict):
            raise ContentsError(f"is damaged: {CALLBACKS_KEY}.{name} is no state of a callback")
    version = checkpoint.get(LIGHTNING_VERSION_KEY, "2.0.0")
    if not isinstance(version, str) or not re.fullmatch(r"[2-9]\.\d+(\.\d+)?[\w.+-]*", version):
        raise ContentsError(f"is of PyTorch Lightning {str(version)[:40]!r}, whose checkpoints cannot be read")
    _require_random_streams(checkpoint.get(RANDOM_STREAMS_KEY, []))
    run = checkpoint.get(RUN_KEY)
    if run is not None:
        require_plain(RUN_KEY, run)
        configuration = run.get("configuration", {}) if isinstance(run, dict) else None
        parts = [run.get("name", ""), run.get("logger_ids", {})] if isinstance(run, dict) else []
        if not isinstance(configuration, dict) or not _is_text(parts[0]) or not isinstance(parts[1], dict):
            raise ContentsError(f"is damaged: {RUN_KEY} is not a name and a configuration")
    if TASK_KEY in checkpoint:
        require_plain(TASK_KEY, checkpoint[TASK_KEY])
        if not isinstance(checkpoint[TASK_KEY], dict):
            raise ContentsError("is damaged: what it says of its task is not a name, a class and its arguments")
    _require_members(checkpoint.get(MEMBERS_KEY, {}))


def _require_members(members: Any) -> None:
    """Refuses parts of a joint training that do not say what each of its tasks is."""
    require_plain(MEMBERS_KEY, members)
    if not isinstance(members, dict):
        raise ContentsError(f"is damaged: {MEMBERS_KEY} is no dict")
    for name, member in members.items():
        if not isinstance(name, str) or not isinstance(member, dict) or WEIGHTS_KEY in member:
            raise ContentsError(f"is damaged: {MEMBERS_KEY}.{str(name)[:80]} is not what a task stores")
        task, backbone = member.get(TASK_KEY), member.get(BACKBONE_NAME_KEY)
        if not isinstance(task, dict) or not isinstance(task.get("name"), str):
            raise ContentsError(f"is damaged: {MEMBERS_KEY}.{name[:80]} does not say which task it is")
        if not isinstance(backbone, str) or not backbone:
            raise ContentsError(f"is damaged: {MEMBERS_KEY}.{name[:80]} does not say what it shares")


def _require_weights(key: str, weights: Any) -> None:
    if not isinstance(weights, dict) or not all(
        _is_text(name) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise ContentsError(f"is no checkpoint of a network: its {key!r} is not tensors by name")


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be written."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff\0]", value)


def _require_count(key: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ContentsError(f"is damaged: {key} is {str(value)[:40]!r} and not a number of times")


def require_plain(key: str, value: Any) -> None:
    """Refuses what is not dictionaries, lists, numbers, texts and null, or is far more than a configuration.

    A value that occurs several times counts each time: 60 lists that each hold the next one twice are 2^60 lists.

    Raises:
        ContentsError: Names the key.
    """
    number = 0
    pending: list[tuple[str, Any, int]] = [(key, value, 0)]
    while pending:
        name, one, depth = pending.pop()
        number += 1
        if number > _MOST_VALUES or depth > _DEEPEST:
            what = f"nested more than {_DEEPEST} deep" if depth > _DEEPEST else f"more than {_MOST_VALUES:,} values"
            raise ContentsError(f"is damaged: {key} holds {what}, which is no configuration ({name[:80]})")
        if isinstance(one, dict):
            wrong = next((item for item in one if type(item) not in (str, int, bool, float, type(None))), None)
            if wrong is not None:
                raise ContentsError(f"is damaged: {name[:80]} has a {type(wrong).__name__} for a name")
            pending += [(f"{name}.{item}", inner, depth + 1) for item, inner in one.items()]
        elif type(one) in (list, tuple):
            pending += [(f"{name}[{place}]", inner, depth + 1) for place, inner in enumerate(one)]
        elif one is not None and type(one) not in (bool, int, float, str):
            raise ContentsError(f"is damaged: {name[:80]} is a {type(one).__name__}, and no plain value")
        elif type(one) is int and abs(one) >= 1 << 64:
            raise ContentsError(f"is damaged: {name[:80]} is a number of {one.bit_length()} bits")


def require_same_structure(key: str, stored: Any, current: Any, *, counts: bool = True) -> None:
    """Refuses a state whose names, kinds, shapes or lengths are not those of the state that it is put into.

    Counts and numbers must be finite, and counts not below zero.

    Args:
        key: Of the stored state, for messages.
        stored: Of a checkpoint.
        current: The state of the same object now.
        counts: Whether what is an integer now must be a count.

    Raises:
        ContentsError: Names the key.
    """
    if isinstance(current, dict):
        if not isinstance(stored, dict) or stored.keys() != current.keys():
            here = sorted(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
            raise ContentsError(f"is damaged: {key} holds {str(here)[:200]}, and not {sorted(map(str, current))}")
        for name, value in current.items():
            require_same_structure(f"{key}.{name}", stored[name], value, counts=counts)
    elif isinstance(current, Tensor):
        if not isinstance(stored, Tensor) or stored.shape != current.shape:
            found = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
            raise ContentsError(f"is damaged: {key} is {found}, and not {tuple(current.shape)}")
    elif isinstance(current, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(current):
            raise ContentsError(f"is damaged: {key} has not {len(current)} entries")
        for place, value in enumerate(current):
            require_same_structure(f"{key}[{place}]", stored[place], value, counts=counts)
    elif isinstance(current, bool) or not isinstance(current, int | float):
        if current is not None and type(stored) is not type(current):
            raise ContentsError(f"is damaged: {key} is {str(stored)[:40]!r}, and no {type(current).__name__}")
    elif stored == current and isinstance(stored, float):
        return  # such as the infinity that a best value begins with
    elif not _is_number(stored):
        raise ContentsError(f"is damaged: {key} is {str(stored)[:40]!r}, and no finite number")
    elif counts and isinstance(current, int):
        _require_count(key, stored)


def require_optimizer_state(key: str, stored: Any, optimizer: Optimizer) -> int:
    """Refuses a state that does not fit the parameters of an optimizer; fused optimizers write past its end.

    Args:
        key: Of the stored state, for messages.
        stored: Of a checkpoint.
        optimizer: What it will be loaded into.

    Returns:
        How many parameters it says nothing of: they may never have had a gradient.

    Raises:
        ContentsError: Names the key.
    """
    groups = stored.get("param_groups") if isinstance(stored, dict) else None
    states = stored.get("state") if isinstance(stored, dict) else None
    if not isinstance(states, dict) or not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        raise ContentsError(f"is damaged: {key} is no state of an optimizer of {len(optimizer.param_groups)} groups")
    parameters: dict[Any, Tensor] = {}
    for number, (group, current) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or len(numbers) != len(current["params"]):
            raise ContentsError(
                f"is damaged: {key}.param_groups[{number}] is not of {len(current['params'])} parameters"
            )
        if not all(type(one) is int for one in numbers) or set(numbers) & parameters.keys():
            raise ContentsError(f"is damaged: {key}.param_groups[{number}].params names a parameter twice")
        parameters |= dict(zip(numbers, current["params"], strict=True))
        for name, value in current.items():
            if name != "params" and name in group and not _is_same_kind(group[name], value):
                raise ContentsError(
                    f"is damaged: {key}.param_groups[{number}].{name} is {str(group[name])[:40]!r}, and here {value!r}"
                )
    adaptive = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    needed = ("step", "exp_avg", "exp_avg_sq") if adaptive else ()
    for number, state in states.items():
        if number not in parameters or not isinstance(state, dict):
            raise ContentsError(f"is damaged: {key}.state holds {str(number)[:40]!r}, which is no parameter")
        lacking = [name for name in needed if name not in state]
        if lacking:
            raise ContentsError(f"is damaged: {key}.state[{number}] has no {lacking[0]}")
        for name, value in state.items():
            where = f"{key}.state[{number}].{name}"
            if name in _LIKE_PARAMETER and (value is not None or name in needed):
                require_same_structure(where, value, parameters[number])
                if not value.is_floating_point():
                    raise ContentsError(f"is damaged: {where} has the type {value.dtype}")
            elif name == "step":
                step = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
                if isinstance(step, Tensor) or not _is_number(step) or not 0 <= step < _LARGEST:
                    raise ContentsError(f"is damaged: {where} is no number of steps")
                if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64):
                    raise ContentsError(f"is damaged: {where} has the type {value.dtype}")
    return len(parameters) - len(states) if states else 0


def _is_same_kind(stored: Any, current: Any) -> bool:
    if isinstance(current, bool) or isinstance(stored, bool) or current is None or stored is None:
        # Options that choose an implementation may be null, or decided.
        return stored is None or isinstance(stored, bool) or (current is None and _is_number(stored))
    if isinstance(current, list | tuple):
        return isinstance(stored, list | tuple) and all(map(_is_number, stored)) and len(stored) == len(current)
    return _is_number(stored) if _is_number(current) else type(stored) is type(current)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _LARGEST_NUMBER if isinstance(value, int) else math.isfinite(value)


def _require_random_streams(streams: Any) -> None:
    """Refuses states that the generators would not check, or would refuse in their own words."""
    if not isinstance(streams, list) or len(streams) > 1 << 20:
        raise ContentsError(f"is damaged: {RANDOM_STREAMS_KEY} is no list of ranks")
    for rank, stream in enumerate(streams):
        try:
            version, words, gauss = stream["python"]
            fine = version == 3 and len(words) == 625 and all(type(one) is int and 0 <= one < 1 << 32 for one in words)
            fine = fine and words[-1] <= 624 and (gauss is None or _is_number(gauss))
            kind, keys, place, has_gauss, cached = stream["numpy"]
            fine = fine and kind == "MT19937" and keys.shape == (624,) and keys.dtype == torch.int64
            fine = fine and bool((keys >= 0).all()) and bool((keys <= np.iinfo(np.uint32).max).all())
            # NumPy reads past the end of its table if the place is too large.
            fine = fine and type(place) is int and 0 <= place <= 624 and has_gauss in (0, 1) and _is_number(cached)
            for name in ("torch", "cuda"):
                state = stream.get(name)
                if state is not None or name == "torch":
                    fine = fine and state.dtype == torch.uint8 and state.ndim == 1 and state.numel() < 1 << 16
            fine = fine and stream["torch"].numel() == torch.get_rng_state().numel()
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError):
            fine = False
        if not fine:
            raise ContentsError(f"is damaged: {RANDOM_STREAMS_KEY}[{rank}] is no state of random generators")
