"""Downloads that resume, are checked, and never leave an incomplete file; and safe unpacking of archives."""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lightning_attn.errors import ExistingFileError, InputError, MissingFileError, UnusableFileError
from lightning_attn.io import read_manifest, write_json

__all__ = ["DownloadError", "RemoteFile", "claim_folder", "extract_members", "fetch"]

_BLOCK = 1 << 18
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class DownloadError(UnusableFileError):
    """A file could not be downloaded, or is not the expected one."""


class _FailedAttemptError(Exception):
    """An attempt failed in a way that may not occur again."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, with its known properties.

    Args:
        url: Where it is; http or https.
        name: Its name in the local folder, without directories.
        size: Bytes, if known.
        sha256: SHA-256 in 64 hexadecimal digits, if published.
        md5: MD5 in 32 hexadecimal digits, if no better checksum is published.

    Raises:
        ValueError: If a value is not of that form.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"url={self.url!r}: only http:// and https:// addresses are downloaded.")
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise InputError(f"name={self.name!r}: give a plain file name, without directories.")
        if self.size is not None and self.size < 0:
            raise InputError(f"size={self.size}: give the number of bytes, or None if it is not known.")
        for field, value, digits in (("sha256", self.sha256, 64), ("md5", self.md5, 32)):
            if value is not None and not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
                raise InputError(f"{field}={value!r}: give {digits} lower-case hexadecimal digits, or None.")

    @property
    def checksum(self) -> tuple[str, str] | None:
        """Algorithm and expected value of the strongest checksum that is known."""
        if self.sha256:
            return "sha256", self.sha256
        return ("md5", self.md5) if self.md5 else None


def claim_folder(root: Path, manifest: str, names: Sequence[str]) -> dict[str, Any]:
    """Prepares a folder for the parts of a data set, which a manifest in it lists.

    Args:
        root: The folder; created if it does not exist.
        manifest: File name of the manifest.
        names: What the parts are stored as.

    Returns:
        The manifest: what earlier downloads have completed.

    Raises:
        FileExistsError: If something of these names is in the folder, and no manifest; it is not changed.
    """
    done = read_manifest(root / manifest)
    if done is not None:
        return done
    present = [name for name in names if (root / name).exists()]
    if present:
        raise ExistingFileError(
            f"{root} already holds {', '.join(present)}, which this program did not download. They are "
            "not changed: use another folder for the download, or turn it off (--data.download false)."
        )
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / manifest, {}, replace=True)
    return {}


def fetch(
    file: RemoteFile,
    folder: Path,
    *,
    verify: bool = False,
    attempts: int = 6,
    backoff: float = 1.0,
    timeout: float = 60.0,
    show_progress: bool = True,
) -> Path:
    """Downloads a file, unless it exists.

    Bytes go to `<name>.part`. An interrupted download is resumed, in the same call or in a later one, if the server
    supports ranges and states (by ETag or date) that its file has not changed, or if there is a checksum; otherwise it
    starts over. Size and checksum are checked before the file gets its final name, so a file under that name is
    complete. One process at a time may download a given file into a folder.

    Args:
        file: The file.
        folder: Local folder; created if it is missing.
        verify: Whether the checksum of an existing file is checked too; its size is always checked.
        attempts: How many times in a row a download may be interrupted without progress.
        backoff: Seconds to wait after the first interruption; doubled each time, up to a minute.
        timeout: Seconds of silence after which a connection counts as broken.
        show_progress: Shows a progress bar on stderr.

    Returns:
        The path of the complete file.

    Raises:
        DownloadError: If the server refuses, the connection keeps failing, or size or checksum are not as expected (a
            file with a wrong checksum is removed). The message has the address, and how to download it by hand.
        OSError: If the disk is full; the unfinished file is removed.
    """
    target = folder / file.name
    if target.exists():
        _check_existing(target, file, verify)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = _Partial(folder, file)
    breaks, furthest = 0, partial.size()
    try:
        with _progress(show_progress) as progress:
            task = progress.add_task(file.name, total=file.size)
            while True:
                try:
                    _receive(partial, timeout, lambda done, total: progress.update(task, completed=done, total=total))
                    break
                except _FailedAttemptError as error:
                    # Only an attempt that got further than all before it resets the count: a server that always fails
                    # at the same byte and cannot resume must not be asked for ever.
                    breaks = 1 if partial.size() > furthest else breaks + 1
                    furthest = max(furthest, partial.size())
                    if breaks >= attempts:
                        raise DownloadError(
                            f"{file.url}: the download was interrupted {attempts} times in a row, the last time by: "
                            f"{error}. {partial.size():,} bytes are kept in {partial.path} for the next call. "
                            f"{partial.by_hand()}"
                        ) from error
                    time.sleep(min(backoff * 2 ** (breaks - 1), 60.0))
        partial.finish()
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, DownloadError):
            partial.raise_full(error)
        raise
    return target


class _Partial:
    """The unfinished file, and a note of the version of the server's file that its bytes are from."""

    def __init__(self, folder: Path, file: RemoteFile) -> None:
        self.file = file
        self.target = folder / file.name
        self.path = folder / f"{file.name}.part"
        self.note = folder / f"{file.name}.part.json"
        self.total = file.size

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def version(self) -> str | None:
        """The server's identifier of the version that these bytes are from: a strong ETag or a date."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return str(note["version"]) if note.get("url") == self.file.url else None

    def start_over(self, version: str | None) -> None:
        self.discard()
        if version is not None:
            self.note.write_text(json.dumps({"url": self.file.url, "version": version}), encoding="utf-8")

    def finish(self) -> None:
        """Gives the file its final name if size and checksum are right, and removes it otherwise."""
        file, size = self.file, self.size()
        if file.size is not None and size != file.size:
            self.raise_wrong_size(size)
        if file.checksum:
            algorithm, expected = file.checksum
            got = _digest(self.path, algorithm)
            if got != expected:
                self.discard()
                raise DownloadError(
                    f"{file.url}: wrong {algorithm} checksum; expected {expected}, got {got}. The download was "
                    "removed. Run again; if this happens again, the file on the server has changed."
                )
        self.path.replace(self.target)
        self.discard()

    def by_hand(self) -> str:
        return f"You can also download that address to {self.target} and run again."

    def raise_wrong_size(self, size: int) -> NoReturn:
        self.discard()
        raise DownloadError(
            f"{self.file.url}: wrong size; expected {self.file.size:,} bytes, got {size:,}. Nothing was kept. Either a "
            "proxy or a log-in page answered, or the file on the server has changed. "
            f"{self.by_hand()}"
        )

    def raise_full(self, cause: OSError | None = None) -> NoReturn:
        missing = f"{self.total - self.size():,} more bytes are" if self.total is not None else "more space is"
        self.discard()
        folder = self.path.parent
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {missing} needed for {self.file.name}. The unfinished download was removed; free some "
            "space or use another folder, and run again",
            str(folder),
        ) from cause


def _receive(partial: _Partial, timeout: float, report: Callable[[int, int | None], None]) -> None:
    """One attempt: requests the missing bytes and appends them.

    Raises:
        _FailedAttemptError: If another attempt may succeed.
    """
    file = partial.file
    offset, version = partial.size(), partial.version()
    if version is None and file.checksum is None:
        offset = 0  # a change of the server's file in between would not be noticed
    if offset and offset == file.size:
        return
    request = urllib.request.Request(file.url, headers={"User-Agent": "lightning_attn", "Accept-Encoding": "identity"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        if version is not None:
            request.add_header("If-Range", version)
    try:
        with _opener().open(request, timeout=timeout) as response:
            _append(partial, response, offset, version, report)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:
            if _content_range(error.headers.get("Content-Range"))[1] == offset:
                return  # the file is complete
            partial.discard()
            raise _FailedAttemptError("the server has no more bytes than were received before, or fewer") from error
        if error.code in _TRANSIENT_STATUS:
            raise _FailedAttemptError(f"HTTP {error.code} {error.reason}") from error
        raise DownloadError(
            f"{file.url}: the server answered {error.code} {error.reason}. {partial.by_hand()}"
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError | str):  # a string: an address of another kind
            raise DownloadError(f"{file.url}: {error.reason}. {partial.by_hand()}") from error
        raise _FailedAttemptError(str(error.reason)) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _FailedAttemptError(f"{type(error).__name__} {error}".strip()) from error


def _append(
    partial: _Partial,
    response: http.client.HTTPResponse,
    offset: int,
    version: str | None,
    report: Callable[[int, int | None], None],
) -> None:
    """Appends the body of a response after `offset` bytes, or writes all of it if the server sends the whole file."""
    file, headers = partial.file, response.headers
    etag = headers.get("ETag")
    sent_version = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    if response.status == 206:
        start, partial.total = _content_range(headers.get("Content-Range"))
        changed = version is not None and sent_version is not None and sent_version != version
        if start != offset or changed:
            partial.discard()
            raise _FailedAttemptError("the server sent another part than requested, or of another version of the file")
    else:
        length = headers.get("Content-Length") or ""
        offset, partial.total = 0, int(length) if length.isdigit() else None
        partial.start_over(sent_version)
    if partial.total is None:
        partial.total = file.size
    elif file.size is not None and partial.total != file.size:
        partial.raise_wrong_size(partial.total)
    if partial.total is not None and partial.total - offset > shutil.disk_usage(partial.path.parent).free:
        partial.raise_full()
    report(offset, partial.total)
    with partial.path.open("ab") as out:
        while block := response.read1(_BLOCK):
            out.write(block)
            offset += len(block)
            if partial.total is not None and offset > partial.total:
                partial.raise_wrong_size(offset)
            report(offset, partial.total)
        out.flush()
        os.fsync(out.fileno())
    if partial.total is not None and offset < partial.total:
        raise _FailedAttemptError(f"the connection was closed after {offset:,} of {partial.total:,} bytes")


def extract_members(archive: Path, members: Mapping[str, Path], *, show_progress: bool = True) -> None:
    """Extracts some members of a tar (of any compression) or zip archive.

    Only the given targets are written, whatever names the archive holds; links, devices and folders are refused. The
    targets appear when all members have been read completely.

    Args:
        archive: The archive.
        members: Target of each member, by its name in the archive.
        show_progress: Shows a progress bar on stderr.

    Raises:
        FileNotFoundError: If the archive lacks a member.
        ValueError: If a member is not a regular file.
        OSError: If the archive is damaged, or the disk is full.
    """
    wanted = {_normalised(name): name for name in members}
    finished: dict[Path, Path] = {}
    try:
        with _progress(show_progress) as progress:
            task = progress.add_task(archive.name, total=archive.stat().st_size)
            for name, source in _regular_files(
                archive, set(wanted), lambda done: progress.update(task, completed=done)
            ):
                target = members[wanted.pop(name)]
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.part")
                finished[temporary] = target
                with temporary.open("wb") as out:
                    shutil.copyfileobj(source, out, _BLOCK)
                if not wanted:
                    break
        if wanted:
            raise MissingFileError(
                f"{archive} does not hold {', '.join(sorted(wanted.values()))}. It is not the archive that was "
                "expected; remove it and download it again."
            )
        for temporary, target in finished.items():
            temporary.replace(target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UnusableFileError(
            f"{archive} is damaged or cut short ({error}); remove it and download it again."
        ) from error
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full while unpacking {archive}; free some space and run again",
                str(next(iter(finished.values()), archive).parent),
            ) from error
        raise
    finally:
        for temporary in finished:
            temporary.unlink(missing_ok=True)


def _regular_files(archive: Path, wanted: set[str], report: Callable[[int], None]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the wanted members of an archive in its own order, open for reading."""
    with archive.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        with zipfile.ZipFile(archive) as packed:
            done = 0
            for info in packed.infolist():
                done += info.compress_size
                name = _normalised(info.filename)
                if name not in wanted:
                    continue
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on a Unix system
                if info.is_dir() or kind not in (0, stat.S_IFREG):
                    raise InputError(f"{archive}: {info.filename} is not a regular file; it is not unpacked.")
                with packed.open(info) as content:
                    yield name, content
                report(done)
        return
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as stream:
        for member in stream:
            report(raw.tell())
            name = _normalised(member.name)
            if name not in wanted:
                continue
            source = stream.extractfile(member) if member.isreg() else None
            if source is None:
                raise InputError(f"{archive}: {member.name} is not a regular file; it is not unpacked.")
            yield name, source


def _normalised(name: str) -> str:
    return name.removeprefix("./")


def _check_existing(path: Path, file: RemoteFile, verify: bool) -> None:
    fix = f"Move {path} away and run again to download it."
    if not path.is_file():
        raise DownloadError(f"{path} is not a file. {fix}")
    if file.size is not None and path.stat().st_size != file.size:
        raise DownloadError(f"{path} has {path.stat().st_size:,} bytes, expected are {file.size:,} ({file.url}). {fix}")
    if verify and file.checksum:
        algorithm, expected = file.checksum
        got = _digest(path, algorithm)
        if got != expected:
            raise DownloadError(
                f"{path} has the {algorithm} checksum {got}, expected is {expected} ({file.url}). {fix}"
            )


def _content_range(header: str | None) -> tuple[int | None, int | None]:
    """First byte and total size from `bytes 5-9/10` or `bytes */10`."""
    match = re.fullmatch(r"bytes\s+(?:(\d+)-\d+|\*)/(\d+|\*)", (header or "").strip())
    if not match:
        return None, None
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows http and https only, so that no redirection leads to another kind of address."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


@contextmanager
def _progress(show: bool) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        yield progress
