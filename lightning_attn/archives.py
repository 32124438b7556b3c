"""Reading files of `torch.save` that may come from anybody: sizes and contents are checked before memory is taken."""

import contextlib
import copy
import functools
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lightning_attn.errors import InputError

__all__ = ["ArchiveError", "forget_readings", "read_archive", "reading_once", "shared_reading"]

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: lengths of its name and of what else stands before its data
_MOST_RECORDS = 1_000_000
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_DEEPEST = 100
_MOST_VALUES = 1_000_000
_LARGEST_TUPLE = 100_000  # values in it, and in those that it holds
_PLAIN = (bool, int, float, str, bytes, torch.Size, torch.dtype)


_readings: dict[tuple[object, ...], Any] | None = None  # by reader and state of the file, within `reading_once`
Contents = TypeVar("Contents")
Arguments = ParamSpec("Arguments")


class ArchiveError(InputError):
    """A file that is no sound archive of tensors and plain values; the message continues after the file's name."""


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within it, a file is read once, however often functions that are a `shared_reading` are asked for it.

    What is kept takes hardly any memory, since its tensors are mapped from the file.
    """
    global _readings
    if _readings is not None:
        yield
        return
    _readings = {}
    try:
        yield
    finally:
        _readings = None


def forget_readings() -> None:
    """Keeps nothing of what was read so far: to be called before a tensor of it is changed in place."""
    if _readings:
        _readings.clear()


def shared_reading(
    read: Callable[Concatenate[Path, Arguments], Contents],
) -> Callable[Concatenate[Path, Arguments], Contents]:
    """Makes a function that reads a file of tensors and plain values take part in `reading_once`.

    Every caller gets containers of its own, which it may change, and the same tensors, which it may not.
    """

    def shared(path: Path, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Contents:
        if _readings is None:
            return read(path, *arguments, **options)
        status = path.stat()
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        key = (read, path.absolute(), *state, *arguments, *sorted(options.items()))
        if key not in _readings:
            _readings[key] = read(path, *arguments, **options)
        contents: Contents = _readings[key]
        return copy.deepcopy(contents, {id(tensor): tensor for _, tensor in _tensors_in(contents)})

    functools.update_wrapper(shared, read)
    return shared


@shared_reading
def read_archive(path: Path, legacy: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU, its tensors mapped from the file; no code in it is run.

    Args:
        path: The file.
        legacy: Also reads the format of torch before 1.6, as older pretrained weights have it, into memory; what it
            claims to hold is not checked before.

    Raises:
        ArchiveError: If the file is cut short, damaged, compressed, claims to hold more than it does, or holds anything
            else than tensors of ordinary numbers and plain values.
        OSError: If the system cannot read it.
    """
    # The directory of an archive stands at the end of the file: a file that was cut short has none.
    if zipfile.is_zipfile(path):
        load = _mapped
    elif legacy:
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    else:
        size = path.stat().st_size
        raise ArchiveError(f"({size} bytes) is not a whole checkpoint: it was cut short or is something else")
    try:
        contents = load(path)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if named is None and load is not _mapped:
            raise ArchiveError("is damaged, or something else than torch.save writes") from error
        raise ArchiveError(
            f"holds objects other than tensors and plain values{f' ({named[1]})' if named else ''}, which could run "
            "code when loaded. Nothing was run. Do not use it if you do not know who made it."
        ) from error
    except ArchiveError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise ArchiveError(f"is damaged: {error}") from error
    except NotImplementedError as error:
        raise ArchiveError("is damaged: a tensor in it is sparse, quantised or without data") from error
    except Exception as error:  # of the many that a damaged pickle can end in
        said = str(error).rstrip(".")
        raise ArchiveError(f"is damaged: {type(error).__name__}{f': {said}' if said else ''}") from error
    for key, tensor in _tensors_in(contents):
        fault = _plain_tensor_fault(tensor)
        if fault is not None:
            raise ArchiveError(f"is damaged: {key} {fault}")
    return contents


def _mapped(path: Path) -> Any:
    """The contents of an archive, after its tensors were found to lie in the file with all their bytes."""
    status = path.stat()
    records = _records(path, status.st_ino, status.st_size, status.st_mtime_ns)
    # Without data first: where each tensor's data would lie in the file, and how much of it there would be.
    places = []
    for key, tensor in _tensors_in(torch.load(path, map_location="meta", weights_only=True)):
        storage = tensor.untyped_storage()
        place: int = getattr(storage, "_checkpoint_offset", -1)
        if place not in records:
            raise ArchiveError(f"is no archive as torch writes it: {key} is not where it should be")
        there = records[place]
        if storage.nbytes() > there:
            raise ArchiveError(f"is damaged: of {key} it holds {there:,} bytes, and not {storage.nbytes():,}")
        places.append(place)
    contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    _require_places(contents, places)
    return contents


def _require_places(contents: Any, places: list[int]) -> None:
    """Refuses tensors that came from elsewhere in the file than was said before: all lie as far apart as there."""
    starts = [tensor.untyped_storage() for _, tensor in _tensors_in(contents)]
    begins = {storage.data_ptr() - place for storage, place in zip(starts, places, strict=True) if storage.nbytes() > 0}
    if len(begins) > 1:
        raise ArchiveError("is damaged: its tensors are not where its directory says")


def _require_small_tuples(pickled: bytes) -> None:
    """Refuses tuples of tuples that hold one another: as a name in a dictionary, hashing one would take for ever.

    Follows what the pickle builds by the number of values alone.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}

    def pop_to_mark() -> list[int]:
        begin = marks.pop()
        taken = stack[begin:]
        del stack[begin:]
        return taken

    try:
        for operation, argument, _ in pickletools.genops(pickled):
            name = operation.name
            if name == "MARK":
                marks.append(len(stack))
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name.startswith("TUPLE"):
                count = int(name[5:] or 0)
                taken = [stack.pop() for _ in range(count)] if count else pop_to_mark()
                stack.append(1 + sum(taken))
                if stack[-1] > _LARGEST_TUPLE:
                    raise ArchiveError(f"is damaged: a tuple in it holds more than {_LARGEST_TUPLE:,} values")
            elif name in ("APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK"):
                pop_to_mark()
            elif name in ("LIST", "DICT", "FROZENSET"):
                stack.append(1 + sum(pop_to_mark()))
            elif name in ("APPEND", "POP", "BUILD"):
                stack.pop()
            elif name == "SETITEM":
                del stack[-2:]
            elif name in ("REDUCE", "NEWOBJ"):
                stack.append(1 + stack.pop() + stack.pop())
            elif name == "BINPERSID":
                stack[-1] = 1
            elif operation.stack_after and not operation.stack_before:
                stack.append(1)
    except ArchiveError:
        raise
    except (IndexError, KeyError, ValueError) as error:
        raise ArchiveError("is damaged: its pickle is none") from error


@functools.lru_cache(maxsize=16)
def _records(path: Path, *status: int) -> dict[int, int]:
    """Where the data of each record of an archive begins, and its size; once for each state of a file.

    Compares contents with their checksums, which torch does not, and looks through the pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records: dict[int, int] = {}
            names: set[str] = set()
            for record in archive.infolist():
                # A compressed record may be a thousand times as large as the file, and torch writes none.
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise ArchiveError(f"is damaged: {record.filename!r} in it is compressed")
                if record.filename in names or len(names) > _MOST_RECORDS:
                    raise ArchiveError(f"is damaged: {record.filename!r} is in it twice, or there are too many")
                names.add(record.filename)
                file.seek(record.header_offset)
                begin = record.header_offset + 30 + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
                records[begin] = record.file_size
            end = 0
            for begin in sorted(records):
                if begin < end:
                    raise ArchiveError("is damaged: parts of it overlap")
                end = begin + records[begin]
            if end > path.stat().st_size:
                raise ArchiveError("is damaged: it is shorter than what it should hold")
            damaged = archive.testzip()
            for name in names if damaged is None else ():
                if name.endswith("/data.pkl"):
                    _require_small_tuples(archive.read(name))
    except ArchiveError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system could not read it
        raise ArchiveError(f"is damaged ({error})") from error
    if damaged is not None:
        raise ArchiveError(f"is damaged ({damaged})")
    return records


def _tensors_in(contents: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers, with where they stand.

    Raises:
        ArchiveError: If there is anything else than tensors, containers and plain values, they are nested too deeply,
            or there are too many of them, counted as often as they stand somewhere.
    """
    number = 0
    pending: list[tuple[Any, str, int]] = [(contents, "", 0)]
    while pending:
        value, key, depth = pending.pop()
        number += 1
        if number > _MOST_VALUES or depth > _DEEPEST:
            # Lists that each hold the next one twice are few in the file, and 2^40 to whoever walks over them.
            what = (
                f"values nested more than {_DEEPEST} deep" if depth > _DEEPEST else f"more than {_MOST_VALUES:,} values"
            )
            raise ArchiveError(f"is damaged: {key.partition('.')[0]} holds {what}")
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, dict | list | tuple | set) and not isinstance(value, torch.Size):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, item in items:
                place = f"{key}.{str(name)[:80]}" if key else str(name)[:80]
                pending.append((item, place if len(place) < 400 else f"{place[:200]}...", depth + 1))
        elif value is not None and not isinstance(value, _PLAIN):
            raise ArchiveError(f"is damaged: {key} is a {type(value).__name__}")


def _plain_tensor_fault(tensor: Tensor) -> str | None:
    """Why a tensor is none of a checkpoint of ours: sparse, quantised, without data, of other numbers, overlapping."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is no dense tensor ({'quantised' if tensor.is_quantized else tensor.layout})"
    if tensor.dtype not in _DTYPES:
        return f"has the type {tensor.dtype}, which no checkpoint has"
    if tensor.is_meta:
        return "has no data"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return f"claims {tensor.numel():,} numbers, more than there are"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims {tensor.numel():,} numbers, more than there are"
    return None
