"""The equal mean of the weights of several checkpoints, as one checkpoint that can be evaluated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_attn.errors import ExistingFileError, InputError
from lightning_attn.io import unused_path, written_together
from lightning_attn.training.checkpoint_keys import (
    AVERAGED_KEY,
    EPOCH_KEY,
    MEMBERS_KEY,
    RUN_KEY,
    STEP_KEY,
    TASK_KEY,
    TRAINING_KEYS,
    WEIGHTS_KEY,
)
from lightning_attn.training.checkpoints import (
    SAFETENSORS,
    AtomicCheckpointIO,
    CheckpointError,
    described_differences,
    described_mismatches,
    is_same,
    read_checkpoint,
    stored_task,
    write_safetensors,
)


def average_checkpoints(paths: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Averages checkpoints of one network, such as the last few of a run (Vaswani et al. 2017 take five).

    Floating-point weights and statistics are averaged in float64; integers, such as the number of batches that
    statistics are from, are the last checkpoint's. What a training is resumed with is left out.

    Args:
        paths: Two checkpoints or more, of the same task and network, with the same classes or vocabulary.
        output: The file to write, which must not be there; with the ending ".safetensors" as `export` writes it. None
            for `average.ckpt` beside the first, or `average-2.ckpt` and so on.

    Returns:
        The file.

    Raises:
        ValueError: If there are fewer than two.
        CheckpointError: If one cannot be used, or two do not fit each other; the message says what differs.
        FileExistsError: If `output` is there.
        FileNotFoundError: If a checkpoint is not there.
    """
    if len(paths) < 2:
        raise InputError(f"average: {len(paths)} checkpoint is no number to average over; give two or more.")
    path = unused_path(Path(paths[0]).parent / "average.ckpt") if output is None else Path(output)
    if path.exists():
        raise ExistingFileError(f"output: {path} is there already, and nothing is overwritten. Give another name.")
    sums: dict[str, Tensor] = {}
    first: dict[str, Any] = {}
    for number, one in enumerate(paths):
        checkpoint = read_checkpoint(one)
        stored_task(checkpoint, one)
        if not number:
            first = checkpoint
        else:
            _check_fit(first, checkpoint, f"{paths[0]} and {one}")
        for name, value in checkpoint[WEIGHTS_KEY].items():
            if not value.is_floating_point():
                sums[name] = value.clone()
            elif number:
                sums[name] += value.double()
            else:
                sums[name] = value.double()
    weights = {
        name: (sums[name] / len(paths)).to(value.dtype) if value.is_floating_point() else sums[name]
        for name, value in first[WEIGHTS_KEY].items()
    }
    kept = {name: value for name, value in first.items() if name not in TRAINING_KEYS}
    averaged = kept | {WEIGHTS_KEY: weights, AVERAGED_KEY: [str(one) for one in paths]}
    if path.suffix == SAFETENSORS:
        with written_together(path.parent) as scratch:
            write_safetensors(averaged, scratch / path.name)
    else:
        AtomicCheckpointIO().save_checkpoint(averaged, path)
    return path


def _check_fit(first: dict[str, Any], other: dict[str, Any], names: str) -> None:
    mismatches = described_mismatches(other[WEIGHTS_KEY], first[WEIGHTS_KEY])
    if mismatches:
        raise CheckpointError(f"{names} hold different networks (the second's, the first's):{mismatches}")
    of_training = {WEIGHTS_KEY, EPOCH_KEY, STEP_KEY, AVERAGED_KEY, RUN_KEY, *TRAINING_KEYS}
    for name in sorted((first.keys() | other.keys()) - of_training):
        one, two = first.get(name), other.get(name)
        if name == TASK_KEY:
            one, two = _named(one), _named(two)
        elif name == MEMBERS_KEY:
            one, two = (
                {key: _meaning(member) for key, member in members.items()} for members in (one or {}, two or {})
            )
        if not is_same(one, two):
            found = described_differences({name: one}, {name: two})
            raise CheckpointError(f"{names} mean different things by their outputs:{found}")


def _named(task: Any) -> Any:
    """The name of a task: its learning rate and the like may differ."""
    return task and task["name"]


def _meaning(member: dict[str, Any]) -> dict[str, Any]:
    """What a task of a joint training means by its outputs."""
    return member | {TASK_KEY: _named(member[TASK_KEY])}
