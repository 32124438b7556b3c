"""Training text as token ids in memory-mapped files, built once and found by a hash of its inputs.

A cache folder holds::

    <key>/manifest.json            settings, input files, numbers of pairs that cleaning left out
    <key>/vocabulary.model         the sentencepiece model
    <key>/{source,target}.ids      the concatenated ids of all sentences (uint16 where the vocabulary fits, else int32)
    <key>/{source,target}.offsets  int64, one more than sentences: sentence i is ids[offsets[i]:offsets[i + 1]]
    files/<name>.json              content hashes of the input files, so that a large corpus is hashed only once

An entry is built under a temporary name and renamed when it is complete: it appears atomically, and two processes that
build the same entry at the same time both succeed.
"""

import collections
import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import shutil
import signal
import socket
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_attn.datamodules.machine import available_cores, user_cache_folder
from lightning_attn.datamodules.translation.new_processes import without_main_module
from lightning_attn.datamodules.translation.parallel_text import (
    Cleaning,
    FilePair,
    FileSummary,
    LineBlock,
    check_counts,
    read_blocks,
    summarise,
)
from lightning_attn.datamodules.translation.vocabulary import Vocabulary, VocabularyOptions, train_vocabulary
from lightning_attn.errors import InputError, MissingFileError, UnusableFileError
from lightning_attn.processes import is_running, start_of

_FORMAT = 2
_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
)
_OWNER = "owner"  # file in the folder of an entry that is being built: which process builds it
BLOCK_LINES = 10_000
# Below this, starting processes takes longer than the work.
MIN_LINES_FOR_POOL = 100_000
# The reading process cannot feed more.
_MAX_PROCESSES = 32
# Byte pair encoding hardly gains from more pairs, but takes about 1 KB of memory for every distinct word.
VOCABULARY_PAIRS = 500_000

Ids = npt.NDArray[np.integer[Any]]


class TokenArray:
    """Sentences of token ids, concatenated in one flat array.

    Args:
        ids: all ids, `[N]`.
        offsets: sentence i is ``ids[offsets[i]:offsets[i + 1]]``, `[sentences + 1]`.
    """

    def __init__(self, ids: Ids, offsets: npt.NDArray[np.int64]) -> None:
        self.ids = ids
        self.offsets = offsets
        self._files: tuple[str, str, str] | None = None
        self._maps: list[mmap.mmap] = []

    @classmethod
    def from_lists(cls, sentences: Iterable[list[int]]) -> "TokenArray":
        """Holds sentences in memory."""
        ids, lengths = _flatten(list(sentences), np.dtype(np.int32))
        return cls(ids, _offsets([lengths]))

    @classmethod
    def open(cls, ids: str, offsets: str, dtype: str) -> "TokenArray":
        """Maps two files into memory; a pickled copy maps them again instead of holding the content.

        Args:
            ids: path of the raw ids.
            offsets: path of the raw int64 offsets.
            dtype: type of the ids.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if the files do not belong together.
        """
        maps = []
        for path in (ids, offsets):
            with Path(path).open("rb") as file:
                maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        array = cls(np.frombuffer(maps[0], dtype=dtype), np.frombuffer(maps[1], dtype=np.int64))
        if array.offsets[-1] != len(array.ids):
            raise InputError(f"{ids} holds {len(array.ids)} ids instead of {array.offsets[-1]}")
        array._files, array._maps = (ids, offsets, dtype), maps
        return array

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Number of ids of every sentence, `[sentences]`."""
        return np.diff(self.offsets).astype(np.int32)

    def release(self) -> None:
        """Releases mapped pages, so that they do not accumulate in the memory of every process that reads.

        They stay in the system's page cache.
        """
        if sys.platform != "win32" and hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Ids:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._files is not None:
            return TokenArray.open, self._files
        return TokenArray, (self.ids, self.offsets)


@dataclass(frozen=True)
class TokenCache:
    """An opened cache entry.

    Args:
        folder: its folder.
        vocabulary: the vocabulary its ids belong to.
        source: the source sentences.
        target: the target sentences.
        manifest: its inputs and settings; ``manifest["left_out"]`` counts the pairs that cleaning left out, by reason.
    """

    folder: Path
    vocabulary: Vocabulary
    source: TokenArray
    target: TokenArray
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "TokenCache":
        """Opens a complete entry.

        Raises:
            FileNotFoundError: if it does not exist.
            ValueError: if it is damaged.
        """
        if not folder.is_dir():
            raise MissingFileError(
                f"{folder}: no token cache for these files and settings. Call prepare_data() first, as the Trainer "
                "does before setup()."
            )
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            vocabulary = Vocabulary((folder / "vocabulary.model").read_bytes())
            source, target = (
                TokenArray.open(str(folder / f"{side}.ids"), str(folder / f"{side}.offsets"), manifest["dtype"])
                for side in ("source", "target")
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{folder}: this token cache is damaged ({error}). Delete the folder to rebuild it."
            ) from error
        return cls(folder, vocabulary, source, target, manifest)


@dataclass(frozen=True)
class Preparation:
    """All that the content of a cache entry depends on.

    Args:
        pairs: the training files, in order.
        source_language: language of the first file of each pair.
        target_language: language of the second.
        vocabulary_size: ids of the joint vocabulary.
        cleaning: which pairs are left out.
        vocabulary_options: how the vocabulary is trained.
        vocabulary: an existing vocabulary to use instead of training one.
    """

    pairs: tuple[FilePair, ...]
    source_language: str
    target_language: str
    vocabulary_size: int
    cleaning: Cleaning
    vocabulary_options: VocabularyOptions = VocabularyOptions()  # noqa: RUF009 (frozen)
    vocabulary: Vocabulary | None = None

    def summaries(self, cache: Path) -> list[tuple[FileSummary, FileSummary]]:
        """Hash and line count of every file, from the cache where the file has not changed.

        Raises:
            ValueError: if a file is empty or the line counts of a pair differ.
        """
        found = []
        for pair in self.pairs:
            source, target = _summarise_once(pair.source, cache), _summarise_once(pair.target, cache)
            check_counts(pair, source.lines, target.lines)
            found.append((source, target))
        return found

    def key(self, cache: Path) -> str:
        """The name of the entry: a hash of the files' content, the settings and the format."""
        described = {
            "format": _FORMAT,
            "files": [[source.digest, target.digest] for source, target in self.summaries(cache)],
            "languages": [self.source_language, self.target_language],
            "vocabulary": self._described_vocabulary(),
            "cleaning": asdict(self.cleaning),
        }
        return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=10).hexdigest()

    def _described_vocabulary(self) -> Any:
        if self.vocabulary is not None:
            return hashlib.blake2b(self.vocabulary.model, digest_size=16).hexdigest()
        return [self.vocabulary_size, VOCABULARY_PAIRS, asdict(self.vocabulary_options)]

    def build(self, cache: Path, processes: int = 0, show_progress: bool = True) -> Path:
        """Builds the entry unless it exists.

        Lines are streamed to the processes in blocks, so memory does not grow with the corpus.

        Args:
            cache: the cache folder; created if it is missing.
            processes: number of processes that tokenise the text; 0 means one per core.
            show_progress: draws progress bars on stderr.

        Returns:
            The folder of the entry.

        Raises:
            OSError: if the cache cannot be written; nothing of it is left behind.
            ValueError: on bad text (the message names file and line), or if cleaning leaves no pair.
        """
        folder = cache / self.key(cache)
        if folder.is_dir():
            return folder
        try:
            # Not tempfile.mkdtemp: other users of a shared corpus folder must be able to read the entry.
            scratch = cache / f".{folder.name}-{uuid.uuid4().hex}"
            cache.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(cache)
            scratch.mkdir()
            try:
                (scratch / _OWNER).write_text(_this_process(), encoding="utf-8")
                self._write(scratch, cache, processes, show_progress)
                (scratch / _OWNER).unlink()
                _move(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            if error.errno in _UNWRITABLE:
                raise UnusableFileError(
                    error.errno,
                    f"the token cache in {cache} cannot be written ({error.strerror}); nothing is left half-written. "
                    "Make room or give another folder with --data.cache_dir FOLDER",
                ) from error
            raise
        return folder

    def _write(self, folder: Path, cache: Path, processes: int, show_progress: bool) -> None:
        summaries = self.summaries(cache)
        lines = sum(source.lines for source, _ in summaries)
        with _progress(show_progress) as progress:
            vocabulary = self._train_vocabulary(lines, progress)
            (folder / "vocabulary.model").write_bytes(vocabulary.model)
            dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.int32)
            left_out: Counter[str] = Counter()
            lengths: dict[str, list[npt.NDArray[np.int32]]] = {"source": [], "target": []}
            task = progress.add_task("tokenising training text", total=lines)
            with (folder / "source.ids").open("wb") as source, (folder / "target.ids").open("wb") as target:
                files = {"source": source, "target": target}
                encoder = _Encoder(vocabulary, self.cleaning, dtype)
                for block in _encode(read_blocks(self.pairs, BLOCK_LINES), encoder, lines, processes):
                    for side, (ids, block_lengths) in block.sides.items():
                        files[side].write(ids.tobytes())  # tofile loses errno
                        lengths[side].append(block_lengths)
                    left_out.update(block.left_out)
                    progress.advance(task, block.lines)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
        kept = lines - left_out.total()
        if not kept:
            raise self._nothing_left(left_out)
        for side in ("source", "target"):
            (folder / f"{side}.offsets").write_bytes(_offsets(lengths[side]).tobytes())
        manifest = {
            "format": _FORMAT,
            "files": [
                {"source": str(pair.source), "target": str(pair.target), "pairs": source.lines}
                | {"source_digest": source.digest, "target_digest": target.digest}
                for pair, (source, target) in zip(self.pairs, summaries, strict=True)
            ],
            "languages": [self.source_language, self.target_language],
            "vocabulary_size": self.vocabulary_size,
            "cleaning": asdict(self.cleaning),
            "dtype": dtype.name,
            "pairs_read": lines,
            "pairs_kept": kept,
            "left_out": dict(left_out),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def _nothing_left(self, left_out: Counter[str]) -> ValueError:
        counts = Counter({reason: count for reason, count in left_out.items() if reason})
        return ValueError(
            f"cleaning: none of the {counts.total():,} training pairs is left ({_spell(counts)}). Loosen these "
            f"(--data.cleaning.{counts.most_common(1)[0][0]}) or check {self.pairs[0].source} and "
            f"{self.pairs[0].target}."
        )

    def _train_vocabulary(self, lines: int, progress: Progress) -> Vocabulary:
        """Trains on every k-th pair that passes cleaning, with the smallest k that gives few enough pairs."""
        step = -(-lines // VOCABULARY_PAIRS)
        task = progress.add_task("reading text for the vocabulary", total=lines)
        training = progress.add_task(
            f"training a vocabulary of {self.vocabulary_size} pieces", total=None, visible=False
        )

        if self.vocabulary is not None:
            progress.remove_task(task)
            progress.remove_task(training)
            return self.vocabulary
        left_out: Counter[str] = Counter()

        def sentences() -> Iterator[str]:
            seen = 0
            for block in read_blocks(self.pairs, BLOCK_LINES):
                for source, target in block.texts(-seen % step, step):
                    reason = self.cleaning.reason(source, target)
                    left_out[reason] += 1
                    if not reason:
                        yield source
                        yield target
                seen += len(block)
                progress.advance(task, len(block))
            if not left_out[""]:
                raise self._nothing_left(left_out)
            progress.update(training, visible=True)

        vocabulary = train_vocabulary(sentences(), self.vocabulary_size, options=self.vocabulary_options)
        progress.update(training, total=1, completed=1)
        return vocabulary


@dataclass(frozen=True)
class _EncodedBlock:
    lines: int
    sides: dict[str, tuple[Ids, npt.NDArray[np.int32]]]
    left_out: Counter[str]


@dataclass(frozen=True)
class _Encoder:
    """Cleans and tokenises a block of lines."""

    vocabulary: Vocabulary
    cleaning: Cleaning
    dtype: "np.dtype[Any]"

    def __call__(self, block: LineBlock) -> _EncodedBlock:
        left_out: Counter[str] = Counter()
        texts: list[tuple[str, str]] = []
        for source, target in block.texts():
            if reason := self.cleaning.reason(source, target):
                left_out[reason] += 1
            else:
                texts.append((source, target))
        source_ids = self.vocabulary.encode_batch([source for source, _ in texts])
        target_ids = self.vocabulary.encode_batch([target for _, target in texts])
        bound = self.cleaning.max_tokens
        short = [len(s) <= bound and len(t) <= bound for s, t in zip(source_ids, target_ids, strict=True)]
        if not all(short):
            left_out["max_tokens"] += short.count(False)
        sides = {
            "source": _flatten(list(itertools.compress(source_ids, short)), self.dtype),
            "target": _flatten(list(itertools.compress(target_ids, short)), self.dtype),
        }
        return _EncodedBlock(len(block), sides, left_out)


_worker_encoder: _Encoder | None = None


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    # Ctrl-C reaches the whole process group; the parent process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_encoder = encoder


def _encode_in_worker(block: LineBlock) -> _EncodedBlock:
    assert _worker_encoder is not None
    return _worker_encoder(block)


def _encode(blocks: Iterable[LineBlock], encoder: _Encoder, lines: int, processes: int) -> Iterator[_EncodedBlock]:
    """Encodes blocks in order, in this process or in a pool that never holds more than a few blocks."""
    processes = min(processes or min(available_cores(), _MAX_PROCESSES), -(-lines // BLOCK_LINES))
    if processes == 1 or lines < MIN_LINES_FOR_POOL:
        yield from map(encoder, blocks)
        return
    pool = ProcessPoolExecutor(
        processes,
        mp_context=without_main_module(),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    try:
        waiting: collections.deque[Future[_EncodedBlock]] = collections.deque()
        for block in blocks:
            waiting.append(pool.submit(_encode_in_worker, block))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            f"preparation_processes: one of {processes} processes that tokenise text died. Lack of memory is the "
            "usual cause: use fewer with --data.preparation_processes N."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_cache_folder(root: Path) -> Path:
    """``root/cache``, or a folder of the user's cache when the corpus folder is read-only.

    A folder whose permissions forbid writing counts as read-only also for a superuser. The user's cache is
    ``$XDG_CACHE_HOME/lightning_attn``, by default ``~/.cache/lightning_attn``.
    """
    inside = root / "cache"
    place = inside if inside.is_dir() else root
    writable = place.is_dir() and place.stat().st_mode & 0o222 and os.access(place, os.W_OK | os.X_OK)
    return inside if writable else user_cache_folder()


def _summarise_once(path: Path, cache: Path) -> FileSummary:
    """The summary of a file, cached by its path and valid while size and times are unchanged."""
    stat = path.stat()
    place = str(path.resolve())
    state = [place, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = cache / "files" / f"{path.name}-{hashlib.blake2b(place.encode(), digest_size=6).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        noted = json.loads(note.read_text(encoding="utf-8"))
        if noted["state"] == state:
            return FileSummary(noted["digest"], noted["lines"])
    summary = summarise(path)
    # The cached summary only saves time, so failing to write it is no error.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        scratch = note.with_name(f".{note.name}-{os.getpid()}")
        try:
            scratch.write_text(json.dumps({"state": state, **asdict(summary)}) + "\n", encoding="utf-8")
            scratch.replace(note)
        finally:
            scratch.unlink(missing_ok=True)
    return summary


def _this_process() -> str:
    """This process by host, number and start."""
    return f"{socket.gethostname()} {os.getpid()} {start_of(os.getpid())}"


def _remove_abandoned(cache: Path) -> None:
    """Removes what processes of this host that were killed while they made an entry have left behind."""
    for path in cache.glob(f".*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            host, process, start = (*path.read_text(encoding="utf-8").split(" "), "")[:3]
            if host == socket.gethostname() and start and not is_running(int(process), start):
                shutil.rmtree(path.parent, ignore_errors=True)


def _move(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        # Another process was faster; its entry has the same content.
        if not folder.is_dir():
            raise


def _flatten(sentences: list[list[int]], dtype: "np.dtype[Any]") -> tuple[Ids, npt.NDArray[np.int32]]:
    lengths = np.fromiter(map(len, sentences), dtype=np.int32, count=len(sentences))
    ids = np.fromiter(itertools.chain.from_iterable(sentences), dtype=dtype, count=int(lengths.sum()))
    return ids, lengths


def _offsets(lengths: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(sum(map(len, lengths)) + 1, dtype=np.int64)
    np.cumsum(np.concatenate(lengths), out=offsets[1:])
    return offsets


def _spell(left_out: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in left_out.most_common())


def _progress(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    )
