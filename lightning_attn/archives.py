"""Reads untrusted files of `torch.save`: sizes and contents are checked before memory is allocated."""

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
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_attn.errors import InputError

__all__ = ["ArchiveError", "forget_readings", "read_archive", "reading_once", "shared_reading"]

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: lengths of its name and of its extra field
_MAX_RECORDS = 1_000_000
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_MAX_DEPTH = 100
_MAX_VALUES = 1_000_000
_MAX_TUPLE_VALUES = 100_000  # including those of nested tuples
_PLAIN = (bool, int, float, str, bytes, torch.Size, torch.dtype)


_readings: dict[tuple[object, ...], Any] | None = None  # by reader and state of the file, within `reading_once`
Contents = TypeVar("Contents")


class ArchiveError(InputError):
    """A file that is not a valid archive of tensors and plain values; its message continues after the file's name."""


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


def shared_reading(read: Callable[[Path], Contents]) -> Callable[[Path], Contents]:
    """Makes a function that reads a file of tensors and plain values take part in `reading_once`.

    Every caller gets containers of its own, which it may change, and the same tensors, which it may not.
    """

    def shared(path: Path) -> Contents:
        if _readings is None:
            return read(path)
        status = path.stat()
        key = (read, path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in _readings:
            _readings[key] = read(path)
        contents: Contents = _readings[key]
        return copy.deepcopy(contents, {id(tensor): tensor for _, tensor in _tensors_in(contents)})

    return shared


def read_archive(path: Path, legacy: bool = False) -> Any:
    """Reads a file of `torch.save` on the CPU, with memory-mapped tensors, without running code from it.

    Args:
        path: The file.
        legacy: Also read the format of torch before 1.6, as of older pretrained weights, into memory; its sizes are not
            checked first. Such a reading is not shared.

    Raises:
        ArchiveError: If the file is truncated, damaged, compressed, claims larger contents than it has, or contains
            anything else than tensors of ordinary dtypes and plain values.
        OSError: If the system cannot read it.
    """
    return _checked(path, legacy=True) if legacy else _shared_archive(path)


def _checked(path: Path, *, legacy: bool) -> Any:
    # The directory of an archive is at the end of the file: a truncated file has none.
    if zipfile.is_zipfile(path):
        load = _load_mapped
    elif legacy:
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    else:
        size = path.stat().st_size
        raise ArchiveError(f"({size} bytes) is not a complete checkpoint: it is truncated or another kind of file")
    try:
        contents = load(path)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if named is None and load is not _load_mapped:
            raise ArchiveError("is damaged, or not a file of torch.save") from error
        raise ArchiveError(
            f"contains objects other than tensors and plain values{f' ({named[1]})' if named else ''}, which could run "
            "code when loaded. Nothing was run. Do not use it unless you trust its origin."
        ) from error
    except ArchiveError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise ArchiveError(f"is damaged: {error}") from error
    except NotImplementedError as error:
        raise ArchiveError("is damaged: a tensor in it is sparse, quantised or without data") from error
    except Exception as error:  # damaged pickles raise errors of many kinds
        message = str(error).rstrip(".")
        raise ArchiveError(f"is damaged: {type(error).__name__}{f': {message}' if message else ''}") from error
    for key, tensor in _tensors_in(contents):
        fault = _plain_tensor_fault(tensor)
        if fault is not None:
            raise ArchiveError(f"is damaged: {key} {fault}")
    return contents


@shared_reading
def _shared_archive(path: Path) -> Any:
    return _checked(path, legacy=False)


def _load_mapped(path: Path) -> Any:
    """Loads an archive with memory-mapped tensors, after checking that the file contains all their bytes."""
    status = path.stat()
    records = _record_sizes(path, status.st_ino, status.st_size, status.st_mtime_ns)
    # Without data first: the offset of each tensor's data in the file, and its size.
    offsets = []
    for key, tensor in _tensors_in(torch.load(path, map_location="meta", weights_only=True)):
        storage = tensor.untyped_storage()
        offset: int = getattr(storage, "_checkpoint_offset", -1)
        if offset not in records:
            raise ArchiveError(f"is not an archive of torch.save: {key} is not at its expected offset")
        size = records[offset]
        if storage.nbytes() > size:
            raise ArchiveError(f"is damaged: it contains {size:,} bytes of {key} instead of {storage.nbytes():,}")
        offsets.append(offset)
    contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    _require_offsets(contents, offsets)
    return contents


def _require_offsets(contents: Any, offsets: list[int]) -> None:
    """Refuses tensors whose addresses do not correspond to the checked offsets in the file."""
    storages = [tensor.untyped_storage() for _, tensor in _tensors_in(contents)]
    bases = {s.data_ptr() - offset for s, offset in zip(storages, offsets, strict=True) if s.nbytes() > 0}
    if len(bases) > 1:
        raise ArchiveError("is damaged: its tensors are not at the offsets of its directory")


def _require_small_tuples(pickled: bytes) -> None:
    """Refuses tuples of exponential size by mutual nesting: hashing one, as a dictionary's key, would not end.

    Simulates the pickle's stack by numbers of values.
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
                if stack[-1] > _MAX_TUPLE_VALUES:
                    raise ArchiveError(f"is damaged: a tuple in it has more than {_MAX_TUPLE_VALUES:,} values")
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
        raise ArchiveError("is damaged: its pickle is invalid") from error


@functools.lru_cache(maxsize=16)
def _record_sizes(path: Path, *status: int) -> dict[int, int]:
    """The size of each record of an archive by the offset of its data; cached for each state of a file.

    Also verifies checksums, which torch does not, and checks the pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records: dict[int, int] = {}
            names: set[str] = set()
            for record in archive.infolist():
                # A compressed record may expand to a thousand times the file's size, and torch writes none.
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise ArchiveError(f"is damaged: {record.filename!r} in it is compressed")
                if record.filename in names or len(names) > _MAX_RECORDS:
                    raise ArchiveError(f"is damaged: {record.filename!r} is in it twice, or it has too many records")
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
                raise ArchiveError("is damaged: it is shorter than its contents")
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
    """All tensors in nested containers, with their paths.

    Raises:
        ArchiveError: If there is anything else than tensors, containers and plain values, or they are nested too deeply
            or too many, where repeated ones count each time.
    """
    number = 0
    pending: list[tuple[Any, str, int]] = [(contents, "", 0)]
    while pending:
        value, key, depth = pending.pop()
        number += 1
        if number > _MAX_VALUES or depth > _MAX_DEPTH:
            # 40 lists that each contain the next one twice are small in the file, but 2^40 values to traverse.
            problem = (
                f"values nested more than {_MAX_DEPTH} deep"
                if depth > _MAX_DEPTH
                else f"more than {_MAX_VALUES:,} values"
            )
            raise ArchiveError(f"is damaged: {key.partition('.')[0]} contains {problem}")
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, dict | list | tuple | set) and not isinstance(value, torch.Size):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, item in items:
                item_key = f"{key}.{str(name)[:80]}" if key else str(name)[:80]
                pending.append((item, item_key if len(item_key) < 400 else f"{item_key[:200]}...", depth + 1))
        elif value is not None and not isinstance(value, _PLAIN):
            raise ArchiveError(f"is damaged: {key} is a {type(value).__name__}")


def _plain_tensor_fault(tensor: Tensor) -> str | None:
    """Why a tensor is invalid in our checkpoints: sparse, quantised, without data, of another dtype, overlapping."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is not a dense tensor ({'quantised' if tensor.is_quantized else tensor.layout})"
    if tensor.dtype not in _DTYPES:
        return f"has the dtype {tensor.dtype}, which no checkpoint has"
    if tensor.is_meta:
        return "has no data"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return f"claims {tensor.numel():,} numbers, more than there are"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims {tensor.numel():,} numbers, more than there are"
    return None
