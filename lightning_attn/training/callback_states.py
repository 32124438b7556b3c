"""Files that states of callbacks name: stored relative to the run directory, which may be moved, and kept inside it."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, Timer
from torch import Tensor

from lightning_attn.training.checkpoint_keys import CALLBACKS_KEY
from lightning_attn.training.contents import ContentsError, require_same_structure

__all__ = ["placed_in", "relative_to", "require_callback_states"]

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath")
_PATH_KEYS = "best_k_models"  # scores by path
_OF_MODEL_CHECKPOINT = "kth_best_model_path"


def relative_to(states: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """States of callbacks whose paths inside a directory are written relative to it.

    Args:
        states: As Lightning collects them, by key.
        directory: The run directory.
    """
    root = directory.resolve()

    def relative(path: str) -> str:
        there = PurePath(path)
        return str(there.relative_to(root)) if path and there.is_relative_to(root) else path

    return {key: _with_paths(state, relative) for key, state in states.items()}


def placed_in(states: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The reverse of `relative_to`, for the directory in which the checkpoint lies now.

    Raises:
        ContentsError: If a path leads out of the directory.
    """
    root = directory.resolve()
    found = {}
    for key, state in states.items():
        if _OF_MODEL_CHECKPOINT in state:
            _require_model_checkpoint(key, state)

        own = state.get("dirpath") or ""

        def placed(path: str, key: str = key, own: str = own) -> str:
            there = root / path
            # A directory of its own counts for Lightning only where this call gives the callback the same one.
            inside = there.resolve().is_relative_to(root) or (Path(own).is_absolute() and there.is_relative_to(own))
            if ".." in there.parts or "::" in path or not inside:
                raise ContentsError(
                    f"is damaged: {CALLBACKS_KEY}.{key.partition('{')[0]} names {path[:200]!r}, which is not in {root}"
                )
            return str(there) if path else path

        found[key] = _with_paths(state, placed)
    return found


def _with_paths(state: Any, change: Any) -> Any:
    if not isinstance(state, dict) or _OF_MODEL_CHECKPOINT not in state:
        return state
    changed = state | {name: change(state[name]) for name in _PATHS if isinstance(state.get(name), str)}
    return changed | {_PATH_KEYS: {change(path): score for path, score in state.get(_PATH_KEYS, {}).items()}}


def _require_model_checkpoint(key: str, state: Mapping[str, Any]) -> None:
    """Refuses a state of a ModelCheckpoint whose parts are of other kinds."""
    key = key.partition("{")[0]
    for name in _PATHS:
        if not isinstance(state.get(name, ""), str) or "\0" in state.get(name, ""):
            raise ContentsError(f"is damaged: {CALLBACKS_KEY}.{key}.{name} is no path")
    best = state.get(_PATH_KEYS, {})
    if not isinstance(best, dict) or not all(isinstance(path, str) for path in best):
        raise ContentsError(f"is damaged: {CALLBACKS_KEY}.{key}.{_PATH_KEYS} is no table of scores by path")
    best_step = state.get("best_step", 0)
    if type(best_step) is not int or best_step < 0:
        raise ContentsError(f"is damaged: {CALLBACKS_KEY}.{key}.best_step is {str(best_step)[:40]!r}")
    scores = {name: state.get(name) for name in ("best_model_score", "current_score", "kth_value")}
    for name, score in (scores | best).items():
        if score is not None and not (isinstance(score, Tensor) and score.numel() == 1):
            raise ContentsError(f"is damaged: {CALLBACKS_KEY}.{key}: the score of {name[:80]!r} is no number")


def require_callback_states(states: Mapping[str, Any], callbacks: Iterable[pl.Callback]) -> None:
    """Refuses states that do not fit the callbacks that they are for, of those whose states have one structure.

    Raises:
        ContentsError: Names the key.
    """
    for callback in callbacks:
        state = states.get(callback.state_key)
        is_known = isinstance(callback, EarlyStopping | Timer) or type(callback).__module__.startswith(
            "lightning_attn."
        )
        if state is not None and is_known and _OF_MODEL_CHECKPOINT not in state:
            # A Timer's elapsed time is the integer 0 at first, and later a float of seconds.
            require_same_structure(f"{CALLBACKS_KEY}.{callback.state_key}", state, callback.state_dict(), counts=False)
