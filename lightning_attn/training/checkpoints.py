"""Reading checkpoints safely, with errors that name what is wrong, and writing them atomically."""

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.archives import ArchiveError, forget_readings, read_archive, shared_reading
from lightning_attn.errors import InputError, MissingFileError
from lightning_attn.io import missing_checkpoint, write_file, write_json
from lightning_attn.networks.weights.torchvision import COUNTER, names_added_by_attention
from lightning_attn.training.callback_states import placed_in, relative_to
from lightning_attn.training.checkpoint_keys import (
    BACKBONE_NAME_KEY,
    CALLBACKS_KEY,
    CURRENT_WEIGHTS_KEY,
    EPOCH_KEY,
    FORMAT,
    FORMAT_KEY,
    LIGHTNING_VERSION_KEY,
    MEMBERS_KEY,
    RUN_KEY,
    STEP_KEY,
    TASK_KEY,
    TRAINING_KEYS,
    WEIGHTS_KEY,
    StoredRun,
    StoredTask,
)
from lightning_attn.training.contents import ContentsError, require_contents

Weights = Literal["averaged", "current"]
"""Of a run that averages: the average, or the weights that are trained. Without averaging there is no difference."""

SAFETENSORS = ".safetensors"
_SPAWNED_WEIGHTS = ".temp.ckpt"  # by which Lightning's spawned ranks hand their weights to the process that began them
_WEIGHTS = f"{WEIGHTS_KEY}/"


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code that it may contain.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is cut short, damaged, holds more than plain values and tensors, or was written by
            a later version.
    """
    path = Path(path)
    if missing := missing_checkpoint(path):
        raise MissingFileError(missing)
    try:
        checkpoint = _read_safetensors(path) if path.suffix == SAFETENSORS else read_archive(path)
    except ArchiveError as error:
        advice = "" if str(error).endswith(".") else ". Use another checkpoint of the same run."
        raise CheckpointError(f"{path} {error}{advice}") from error
    if not isinstance(checkpoint, dict) or WEIGHTS_KEY not in checkpoint:
        raise CheckpointError(f"{path} is a PyTorch file, but not a checkpoint: it has no {WEIGHTS_KEY!r}.")
    try:
        require_contents(checkpoint)
    except ContentsError as error:
        raise CheckpointError(f"{path} {error}. Use another checkpoint of the same run.") from error
    # Several names of one tensor take as much memory as several tensors once they are computed with.
    claimed = sum(value.numel() * value.element_size() for value in checkpoint[WEIGHTS_KEY].values())
    if claimed > 8 * path.stat().st_size + (1 << 20):
        raise CheckpointError(
            f"{path} is damaged: its {WEIGHTS_KEY} claims {claimed:,} bytes, far more than the file has."
        )
    found = checkpoint.get(FORMAT_KEY, FORMAT)
    if found != FORMAT:
        raise CheckpointError(
            f"{path} was written by another version of lightning_attn: its format is {found!r}, and this version reads "
            f"{FORMAT}. Use the version that the run directory names (run.json)."
        )
    return checkpoint


def write_safetensors(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint as safetensors, which holds tensors and nothing else, and a JSON file of the same name.

    Args:
        checkpoint: As `read_checkpoint` returns it; what a training is resumed with is left out.
        path: A file that ends in ".safetensors".

    Raises:
        OSError: If a file cannot be written.
        CheckpointError: If it holds what JSON cannot.
    """
    kept = {name: value for name, value in checkpoint.items() if name not in TRAINING_KEYS}
    # Each its own copy: tied weights have one memory, which safetensors refuse.
    named = {f"{_WEIGHTS}{name}": value for name, value in kept.pop(WEIGHTS_KEY).items()}
    named |= {name: kept.pop(name) for name, value in list(kept.items()) if isinstance(value, Tensor)}
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in named.items()}
    for name, value in kept.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{name} of the checkpoint cannot be written as JSON: {error}.") from error
    write_json(path.with_suffix(".json"), kept)
    write_file(path, lambda file: file.write(safetensors.torch.save(tensors)))


@shared_reading
def _read_safetensors(path: Path) -> dict[str, Any]:
    """What `write_safetensors` wrote."""
    described = path.with_suffix(".json")
    if not described.is_file():
        raise MissingFileError(f"{described} is not there, which says what the weights in {path} belong to.")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Export it again.") from error
    try:
        rest = json.loads(described.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{described} is damaged: {error}. Export it again.") from error
    if not isinstance(rest, dict):
        raise CheckpointError(f"{described} holds no object; export it again.")
    weights = {name.removeprefix(_WEIGHTS): value for name, value in tensors.items() if name.startswith(_WEIGHTS)}
    others = {name: value for name, value in tensors.items() if not name.startswith(_WEIGHTS)}
    for name in TRAINING_KEYS:  # an exported model has none; a training would resume with them
        rest.pop(name, None)
    return rest | others | {WEIGHTS_KEY: weights}


def stored_task(checkpoint: dict[str, Any], what: str | Path) -> StoredTask:
    """Name, class and arguments of the task that wrote a checkpoint.

    Args:
        checkpoint: What `read_checkpoint` returned.
        what: The checkpoint, for messages.

    Raises:
        CheckpointError: If none of ours did, or what it says of it is damaged.
    """
    if TASK_KEY not in checkpoint:
        raise CheckpointError(f"{what} was not written by a task of lightning_attn: it names no task.")
    task: StoredTask = checkpoint[TASK_KEY]
    kinds = {"name": str, "class_path": str, "arguments": dict}
    if not all(isinstance(task.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{what} is damaged: what it says of its task is not a name, a class and its arguments.")
    return task


SHARED_BACKBONE = "backbone."
"""What the names of a joint network's shared weights begin with."""


def member_prefix(name: str) -> str:
    """What the names of a member's own weights begin with in a joint network."""
    return f"{MEMBERS_KEY}.{name}."


def member_checkpoint(checkpoint: dict[str, Any], name: str, path: str | Path) -> dict[str, Any]:
    """The part of one task of a joint training, as a training of that task alone would have written it.

    Args:
        checkpoint: What `read_checkpoint` returned.
        name: The task's name in the joint training.
        path: For messages.

    Raises:
        CheckpointError: If there is no such task.
    """
    members = checkpoint.get(MEMBERS_KEY, {})
    if name not in members:
        has = f"the tasks {', '.join(members)}" if members else "one task only; leave out which"
        raise CheckpointError(f"{path} has no task {name!r}: it has {has}.")
    own, backbone = member_prefix(name), f"{members[name][BACKBONE_NAME_KEY]}."
    weights = {}
    for key, value in checkpoint[WEIGHTS_KEY].items():
        if key.startswith(SHARED_BACKBONE):
            weights[backbone + key.removeprefix(SHARED_BACKBONE)] = value
        elif key.startswith(own):
            weights[key.removeprefix(own)] = value
    kept = {key: checkpoint[key] for key in (EPOCH_KEY, STEP_KEY, LIGHTNING_VERSION_KEY) if key in checkpoint}
    own_keys: dict[str, Any] = members[name]
    run = stored_run(checkpoint)
    configuration = _configuration_of(name, run.get("configuration"), own_keys[TASK_KEY])
    if configuration is not None:
        kept[RUN_KEY] = {**run, "configuration": configuration}
    return kept | own_keys | {WEIGHTS_KEY: weights}


def _configuration_of(name: str, joint: Any, task: StoredTask) -> dict[str, Any] | None:
    """The configuration that trains one task of a joint configuration alone; None if that is none."""
    try:
        data = joint["data"]["init_args"]["members"][name]
    except (KeyError, TypeError):
        return None
    return {**joint, "model": {"class_path": task["class_path"], "init_args": task["arguments"]}, "data": data}


def members_of_task(checkpoint: Mapping[str, Any], task_name: str) -> list[str]:
    """The names of those tasks of a joint training that are of a kind, by its `task_name`."""
    members = checkpoint.get(MEMBERS_KEY, {})
    return [name for name, member in members.items() if member[TASK_KEY]["name"] == task_name]


def stored_run(checkpoint: Mapping[str, Any]) -> StoredRun:
    """The run that wrote a checkpoint; empty if none of ours did."""
    run: StoredRun | None = checkpoint.get(RUN_KEY)
    return {} if run is None else run


def count_numbers(weights: Mapping[str, Tensor]) -> int:
    """How many numbers some weights are."""
    return sum(value.numel() for value in weights.values())


def crc32_of(tensors: Iterable[Tensor]) -> int:
    """A checksum of the bytes of some tensors, to distinguish networks."""
    checksum = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        checksum = zlib.crc32(flat.numpy().data, checksum)
    return checksum


def choose_weights(checkpoint: dict[str, Any], weights: Weights, path: str | Path) -> None:
    """Makes one of the two sets of weights that a run with averaging stores the checkpoint's `state_dict`.

    Args:
        checkpoint: What `read_checkpoint` returned; the averaged ones are its `state_dict`.
        weights: Which.
        path: For messages.

    Raises:
        CheckpointError: If "current" is asked for and there is one set only.
        ValueError: If `weights` is neither.
    """
    if weights not in get_args(Weights):
        raise InputError(f"weights must be 'averaged' or 'current', got {weights!r}.")
    if weights == "averaged":
        return
    if CURRENT_WEIGHTS_KEY not in checkpoint:
        raise CheckpointError(
            f"{path} holds one set of weights: it was trained without averaging. Use weights='averaged', the default."
        )
    checkpoint[WEIGHTS_KEY] = checkpoint[CURRENT_WEIGHTS_KEY]


def described_differences(stored: dict[str, Any], current: dict[str, Any], prefix: str = "") -> str:
    """Indented lines about what differs between two nested dicts of plain values, after a line that they belong to.

    Args:
        stored: What a checkpoint has.
        current: What there is now.
        prefix: What the names begin with.

    Returns:
        Nothing if all is the same.
    """
    changed = _differences(stored, current, prefix)
    return "".join(f"\n  {name}: {old!r} in the checkpoint, {new!r} now" for name, old, new in changed)


def is_same(one: Any, two: Any) -> bool:
    """Whether nested values and tensors are equal."""
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(is_same(value, two[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(is_same, one, two))
    return bool(one == two)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif not is_same(before, after):
            tensors = isinstance(before, Tensor) or isinstance(after, Tensor)
            found.append((prefix + name, _Brief(before), _Brief(after)) if tensors else (prefix + name, before, after))
    return found


class _Brief:
    """A value whose contents are too long for a message."""

    def __init__(self, value: object) -> None:
        self.text = f"{value.numel():,} values" if isinstance(value, Tensor) else repr(value)

    def __repr__(self) -> str:
        return self.text


def described_mismatches(stored: dict[str, Tensor], current: dict[str, Tensor], most: int | None = 8) -> str:
    """Indented lines about names and shapes of weights that differ, after a line that they belong to.

    Args:
        stored: What a checkpoint has.
        current: What there is now.
        most: How many lines at most; None for all.

    Returns:
        Nothing if all is the same.
    """
    lines = []
    for name in sorted(stored.keys() | current.keys()):
        if name not in current:
            lines.append(f"{name} {tuple(stored[name].shape)}: only in the checkpoint")
        elif name not in stored:
            lines.append(f"{name} {tuple(current[name].shape)}: only in the network")
        elif stored[name].shape != current[name].shape:
            lines.append(f"{name}: {tuple(stored[name].shape)} in the checkpoint, {tuple(current[name].shape)} now")
    shown = lines[:most]
    more = f"\n  and {len(lines) - len(shown)} more" if len(lines) > len(shown) else ""
    return "".join(f"\n  {line}" for line in shown) + more


@dataclasses.dataclass(frozen=True)
class OutputRows:
    """How the rows of a tensor belong to the classes or pieces of a network: `[groups, background + names, each]`.

    Attributes:
        each: Rows in a row for each name, such as the four numbers of a box.
        background: Whether the rows of a background come before those of the names.
    """

    each: int = 1
    background: bool = False

    def matched(self, stored: Tensor, current: Tensor, old: Sequence[str], new: Sequence[str]) -> Tensor:
        """`current` with the rows of `stored` for every name that both have."""
        place = {name: number + self.background for number, name in enumerate(old)}
        pairs = [(place[name], number + self.background) for number, name in enumerate(new) if name in place]
        pairs += [(0, 0)] if self.background else []
        sources, targets = (torch.tensor(column, dtype=torch.long) for column in zip(*pairs, strict=True))
        result = current.detach().cpu().clone()
        shapes = [(-1, len(names) + self.background, self.each, *stored.shape[1:]) for names in (old, new)]
        if stored.shape[1:] == current.shape[1:]:
            result.view(shapes[1])[:, targets] = stored.view(shapes[0])[:, sources].to(result.dtype)
        return result


def load_initial_weights(
    module: nn.Module,
    path: str | Path,
    *,
    strict: bool,
    foreign: Mapping[str, Tensor] | None = None,
    stored: Mapping[str, Tensor] | None = None,
) -> None:
    """Copies the weights of a checkpoint into a network that may have another attention.

    Args:
        module: The network, or a task that has one.
        path: A checkpoint of a run with the same task.
        strict: Whether names and shapes must be the same. Otherwise what fits is copied, and the log lists the rest.
        foreign: What another library's `path` holds, by the names of `module`. What attention adds may be missing.
        stored: The weights of the checkpoint, if they were read and matched already.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be used, does not fit, or nothing in it does.
    """
    current = module.state_dict()
    if stored is None:
        stored = read_checkpoint(path)[WEIGHTS_KEY] if foreign is None else foreign
    stored = dict(stored)
    new = set() if foreign is None else names_added_by_attention(module) - stored.keys()
    counters = {name for name in current if foreign is not None and name.endswith(COUNTER)}
    needed = {name: value for name, value in current.items() if name not in new | counters}
    mismatches = described_mismatches(stored, needed, None)
    if mismatches and strict:
        raise CheckpointError(
            f"initial_weights: {path} does not fit the network:{described_mismatches(stored, needed)}\nTo take what "
            "fits, set --run.initial_weights_strict false."
        )
    fitting = {name: value for name, value in stored.items() if name in current and value.shape == current[name].shape}
    if not fitting:
        raise CheckpointError(f"initial_weights: nothing in {path} fits the network; it is of another kind.")
    module.load_state_dict(fitting, strict=False)
    rest = f"; not taken, or new:{mismatches}" if mismatches else "."
    added = f"; {len(new)} of the attention start anew" if new else ""
    rank_zero_info(f"Initial weights: {len(fitting)} of {len(current)} tensors from {path}{added}{rest}")


class AtomicCheckpointIO(CheckpointIO):
    """How Lightning's Trainer writes and reads checkpoints here.

    A checkpoint replaces the one of the same name when it is complete and on the disk: whatever happens while it is
    written, one of the two is there. (Lightning's own way moves it from the system's temporary folder, which is a copy
    if that is another disk.) It is read by `read_checkpoint`, whatever Lightning is asked for.

    Paths in states of callbacks are written relative to the run directory, and read relative to that of the checkpoint.

    Args:
        weights: Which weights are taken from a checkpoint that is read.
        directory: The run directory.
    """

    def __init__(self, weights: Weights = "averaged", directory: Path | None = None) -> None:
        self.weights, self.directory = weights, directory

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: If it cannot be written; the older one is still there.
        """
        if self.directory is not None and CALLBACKS_KEY in checkpoint:
            checkpoint = checkpoint | {CALLBACKS_KEY: relative_to(checkpoint[CALLBACKS_KEY], self.directory)}
        try:
            write_file(Path(path), lambda file: torch.save(checkpoint, file), replace=True)
        except RuntimeError as error:
            # Whatever the cause, torch's writer ends with an error about its position in the file.
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            if cause is not None and "unexpected pos" in str(error):
                raise cause from None
            raise

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU; see `read_checkpoint`.

        Raises:
            CheckpointError: Also if a state of a callback names files outside of the checkpoint's directory.
        """
        if Path(path).name == _SPAWNED_WEIGHTS:
            weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return weights
        checkpoint = read_checkpoint(path)
        forget_readings()  # a training changes the states of its optimizer in place
        choose_weights(checkpoint, self.weights, path)
        try:
            return checkpoint | {CALLBACKS_KEY: placed_in(checkpoint.get(CALLBACKS_KEY, {}), Path(path).parent)}
        except ContentsError as error:
            raise CheckpointError(f"{path} {error}. Use another checkpoint of the same run.") from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint; nothing else, whatever a state of a callback may name."""
        if Path(path).suffix == ".ckpt":
            Path(path).unlink(missing_ok=True)
