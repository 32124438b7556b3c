import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from datamodules.downloads import transfer as downloads
from datamodules.downloads.transfer import DownloadError, RemoteFile, extract_members, fetch

CONTENT = random.Random(0).randbytes(600_000)
OTHER = random.Random(1).randbytes(600_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server on 127.0.0.1 does, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    etag: str | None = '"one"'
    ranges: bool = True  # answers ranges
    honest: bool = True  # compares If-Range
    breaks: list[int] = field(default_factory=list)  # of the next answers: bytes of the body after which to hang up
    statuses: list[int] = field(default_factory=list)  # of the next answers: refuse with this status
    length: int | None = None  # a Content-Length that is not true
    chunked: bool = False
    redirect: str | None = None
    requests: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def server(serve) -> Server:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            state.requests.append(dict(self.headers))
            self.close_connection = True
            if state.redirect:
                self.send_response(302)
                self.send_header("Location", state.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = not state.honest or self.headers.get("If-Range", state.etag) == state.etag
            start = int(wanted[1]) if wanted and state.ranges and same else 0
            if start and start >= len(state.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for begin in range(0, len(body), 100_000):
                    block = body[begin : begin + 100_000]
                    if state.breaks and begin >= state.breaks[0]:
                        state.breaks.pop(0)
                        return
                    self.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")
                return
            self.send_header("Content-Length", str(len(body) if state.length is None else state.length))
            self.end_headers()
            self.wfile.write(body[: state.breaks.pop(0)] if state.breaks else body)

    state.url = f"{serve(Handler)}/data/file.bin"
    return state


def get(file: RemoteFile, folder: Path, **options) -> Path:
    return fetch(file, folder, **{"backoff": 0.001, "timeout": 5.0, "show_progress": False, **options})


def remote(server: Server, **facts) -> RemoteFile:
    return RemoteFile(server.url, "file.bin", **facts)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "facts", [{}, {"size": len(CONTENT), "sha256": SHA256}, {"md5": hashlib.md5(CONTENT).hexdigest()}]
)
def test_fetches_and_then_makes_no_traffic(server, tmp_path, facts):
    path = get(remote(server, **facts), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]
    assert get(remote(server, **facts), path.parent, verify=True) == path
    assert len(server.requests) == 1


def test_progress_goes_to_stderr(server, tmp_path, capsys):
    get(remote(server), tmp_path, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "file.bin" in err


def test_resumes_where_the_connection_broke(server, tmp_path):
    server.breaks = [200_000, 150_000]
    path = get(remote(server, size=len(CONTENT)), tmp_path)
    assert path.read_bytes() == CONTENT
    ranges = [(request.get("Range"), request.get("If-Range")) for request in server.requests]
    assert ranges == [(None, None), ("bytes=200000-", '"one"'), ("bytes=350000-", '"one"')]
    assert names(tmp_path) == ["file.bin"]


def test_resumes_in_a_later_call(server, tmp_path):
    server.breaks = [100_000]
    with pytest.raises(
        DownloadError, match=r"was interrupted 1 times.*100,000 of 600,000.*100,000 bytes are kept in .*\.part"
    ):
        get(remote(server), tmp_path, attempts=1)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.json"]
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=100000-"


def test_starts_over_if_the_server_ignores_ranges(server, tmp_path):
    server.breaks, server.ranges = [200_000], False
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert "Range" in server.requests[1]


@pytest.mark.parametrize("honest", [True, False])
def test_starts_over_if_the_file_changed_between_attempts(server, tmp_path, honest):
    server.breaks, server.honest = [200_000], honest
    with pytest.raises(DownloadError):
        get(remote(server), tmp_path, attempts=1)
    server.content, server.etag = OTHER, '"two"'
    assert get(remote(server), tmp_path).read_bytes() == OTHER  # a server that ignores If-Range sends the new ETag


def test_starts_over_without_anything_that_tells_a_changed_file(server, tmp_path):
    server.breaks, server.etag = [200_000], None
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert "Range" not in server.requests[1]


def test_weak_etag_is_not_used_to_resume(server, tmp_path):
    server.breaks, server.etag = [200_000], 'W/"one"'
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert "Range" not in server.requests[1]


def test_resumes_by_checksum_alone_and_notices_a_changed_file(server, tmp_path):
    server.breaks, server.etag = [200_000], None
    assert get(remote(server, sha256=SHA256), tmp_path / "same").read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=200000-"
    server.breaks = [200_000]
    with pytest.raises(DownloadError):
        get(remote(server, sha256=SHA256), tmp_path / "changed", attempts=1)
    server.content = OTHER
    with pytest.raises(DownloadError, match="wrong sha256"):
        get(remote(server, sha256=SHA256), tmp_path / "changed")
    assert names(tmp_path / "changed") == []


def test_partial_file_of_another_address_is_not_continued(server, tmp_path):
    server.breaks = [200_000]
    with pytest.raises(DownloadError):
        get(RemoteFile(server.url + "?old", "file.bin"), tmp_path, attempts=1)
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert "Range" not in server.requests[1]


def test_complete_partial_file_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    (tmp_path / "file.bin.part.json").write_text(json.dumps({"url": server.url, "version": '"one"'}))
    assert get(remote(server), tmp_path).read_bytes() == CONTENT  # 416: there is nothing after the last byte
    assert len(server.requests) == 1


def test_partial_file_longer_than_the_servers_is_dropped(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.bin.part.json").write_text(json.dumps({"url": server.url, "version": '"one"'}))
    assert get(remote(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_chunked_answers(server, tmp_path, size):
    server.chunked, server.breaks = True, [300_000]
    assert get(remote(server, size=size), tmp_path).read_bytes() == CONTENT


def test_gives_up_when_no_attempt_gets_further(server, tmp_path):
    server.breaks, server.ranges = [200_000] * 50, False
    with pytest.raises(DownloadError, match=r"was interrupted 4 times in a row.*You can also download") as error:
        get(remote(server), tmp_path, attempts=4)
    assert server.url in str(error.value)
    assert len(server.requests) == 4
    assert "file.bin" not in names(tmp_path)


def test_attempts_that_get_further_do_not_count(server, tmp_path):
    server.breaks = [50_000] * 11
    assert get(remote(server), tmp_path, attempts=2).read_bytes() == CONTENT
    assert len(server.requests) == 12


def test_passing_server_errors_are_tried_again(server, tmp_path):
    server.statuses = [503, 429, 500]
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_no_server(tmp_path):
    with pytest.raises(DownloadError, match=r"was interrupted 2 times in a row.*refused"):
        get(RemoteFile("http://127.0.0.1:9/file.bin", "file.bin"), tmp_path, attempts=2)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_refusals_name_the_address_and_what_to_do(server, tmp_path, status):
    server.statuses = [status] * 9
    with pytest.raises(DownloadError) as error:
        get(remote(server), tmp_path)
    assert f"{server.url}: the server answered {status}" in str(error.value)
    assert f"download that address to {tmp_path / 'file.bin'}" in str(error.value)
    assert len(server.requests) == 1
    assert names(tmp_path) == []


def test_wrong_bytes_are_removed(server, tmp_path):
    server.content = OTHER
    with pytest.raises(DownloadError) as error:
        get(remote(server, size=len(CONTENT), sha256=SHA256), tmp_path)
    message = str(error.value)
    assert server.url in message
    assert f"expected {SHA256}, got {hashlib.sha256(OTHER).hexdigest()}" in message
    assert names(tmp_path) == []
    server.content = CONTENT
    assert get(remote(server, size=len(CONTENT), sha256=SHA256), tmp_path).read_bytes() == CONTENT


def test_wrong_size_is_noticed_before_the_download(server, tmp_path):
    server.content = b"<html>Please log in</html>"
    with pytest.raises(DownloadError, match=r"wrong size; expected 600,000 bytes, got 26"):
        get(remote(server, size=len(CONTENT)), tmp_path)
    assert names(tmp_path) == []
    assert len(server.requests) == 1


def test_too_small_content_length_is_noticed(server, tmp_path):
    server.length = 400_000  # the client stops reading there
    with pytest.raises(DownloadError, match="wrong size"):
        get(remote(server, size=len(CONTENT)), tmp_path / "size")
    with pytest.raises(DownloadError, match="wrong sha256"):
        get(remote(server, sha256=SHA256), tmp_path / "checksum")
    assert names(tmp_path / "size") == names(tmp_path / "checksum") == []


def test_endless_answer_is_cut_off(server, tmp_path):
    server.chunked, server.content = True, CONTENT * 3
    with pytest.raises(DownloadError, match="wrong size"):
        get(remote(server, size=len(CONTENT)), tmp_path)
    assert names(tmp_path) == []


def test_existing_file_is_never_overwritten(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"file\.bin has 4 bytes, expected are 600,000.*Move .* away"):
        get(remote(server, size=len(CONTENT)), tmp_path)
    with pytest.raises(DownloadError, match=rf"the sha256 checksum .*expected is {SHA256}"):
        get(remote(server, sha256=SHA256), tmp_path, verify=True)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert server.requests == []


def test_redirection_is_followed_to_http_only(server, tmp_path):
    for target in ("ftp://127.0.0.1/file.bin", "file:///etc/passwd"):
        server.redirect = target
        with pytest.raises(DownloadError):
            get(remote(server), tmp_path)
    assert names(tmp_path) == []
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"url": "file:///etc/passwd"}, "only http:// and https://"),
        ({"url": "ftp://example.org/x"}, "only http:// and https://"),
        ({"url": "http:///x"}, "only http:// and https://"),
        ({"name": "../x"}, "plain file name"),
        ({"name": "/x"}, "plain file name"),
        ({"name": ".."}, "plain file name"),
        ({"name": "a\\b"}, "plain file name"),
        ({"size": -1}, "size=-1"),
        ({"sha256": "12"}, "64 lower-case"),
        ({"md5": "X" * 32}, "32 lower-case"),
    ],
)
def test_wrong_facts_are_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        RemoteFile(**{"url": "http://example.org/x", "name": "x", **facts})


def test_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"disk is full: 600,000 more bytes are needed for file\.bin") as error:
        get(remote(server), tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_that_becomes_full_leaves_nothing(server, tmp_path, monkeypatch):
    open_path = Path.open

    def full(self, mode="r", *arguments, **options):
        return open_path(Path("/dev/full") if "a" in mode else self, mode, *arguments, **options)

    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    (tmp_path / "file.bin.part.json").write_text(json.dumps({"url": server.url, "version": '"one"'}))
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"disk is full: 599,000 more bytes are needed.*free some space"):
        get(remote(server), tmp_path)
    assert names(tmp_path) == []


# Archives


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz", extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, mode) as archive:
        for info in extra:
            archive.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


FILES = {"a/one.txt": b"one\n" * 50_000, "a/two.txt": b"two\n", "three.txt": b"three\n"}


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:xz", "zip"])
def test_chosen_members_are_extracted(tmp_path, kind):
    archive = tmp_path / "archive"
    _ = make_zip(archive, FILES) if kind == "zip" else make_tar(archive, FILES, kind)
    out = tmp_path / "out"
    targets = {"three.txt": out / "3", "a/one.txt": out / "deep" / "1"}
    extract_members(archive, targets, show_progress=False)
    assert targets["three.txt"].read_bytes() == FILES["three.txt"]
    assert targets["a/one.txt"].read_bytes() == FILES["a/one.txt"]
    assert names(out) == ["3", "deep"]
    assert names(out / "deep") == ["1"]


def test_leading_dot_in_member_names_does_not_matter(tmp_path):
    archive = make_tar(tmp_path / "archive", {f"./{name}": content for name, content in FILES.items()})
    extract_members(archive, {"three.txt": tmp_path / "3"}, show_progress=False)
    assert (tmp_path / "3").read_bytes() == FILES["three.txt"]


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_nothing_is_written_outside_the_targets(tmp_path, make):
    folder = tmp_path / "inner"
    folder.mkdir()
    evil = {"../evil": b"1", f"{tmp_path}/evil": b"2", "a/../../evil": b"3", "good": b"4"}
    extract_members(make(folder / "archive", evil), {"good": folder / "good"}, show_progress=False)
    extract_members(folder / "archive", {"../evil": folder / "chosen"}, show_progress=False)
    assert names(tmp_path) == ["inner"]
    assert names(folder) == ["archive", "chosen", "good"]
    assert (folder / "chosen").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("kind", "target"),
    [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "good"), (tarfile.CHRTYPE, ""), (tarfile.DIRTYPE, "")],
)
def test_links_devices_and_folders_in_tars_are_refused(tmp_path, kind, target):
    archive = make_tar(tmp_path / "archive", {"good": b"1"}, extra=(special("bad", kind, target),))
    with pytest.raises(ValueError, match="bad is not a regular file"):
        extract_members(archive, {"good": tmp_path / "good", "bad": tmp_path / "bad"}, show_progress=False)
    assert names(tmp_path) == ["archive"]


def test_links_in_zips_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        info = zipfile.ZipInfo("bad")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
        archive.writestr("folder/", "")
    for member in ("bad", "folder/"):
        with pytest.raises(ValueError, match="not a regular file"):
            extract_members(tmp_path / "archive", {member: tmp_path / "out"}, show_progress=False)
    assert names(tmp_path) == ["archive"]


def test_target_that_is_a_link_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "target").symlink_to(victim)
    extract_members(make_tar(tmp_path / "archive", FILES), {"three.txt": tmp_path / "target"}, show_progress=False)
    assert victim.read_text() == "untouched"
    assert not (tmp_path / "target").is_symlink()


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_missing_member_is_named_and_nothing_written(tmp_path, make):
    archive = make(tmp_path / "archive", FILES)
    with pytest.raises(FileNotFoundError, match=r"does not hold four\.txt"):
        extract_members(archive, {"three.txt": tmp_path / "3", "four.txt": tmp_path / "4"}, show_progress=False)
    assert names(tmp_path) == ["archive"]


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:xz", "zip"])
def test_archive_cut_short_leaves_nothing(tmp_path, kind):
    archive, files = tmp_path / "archive", {"first": b"1", "big": random.Random(0).randbytes(300_000)}
    _ = make_zip(archive, files) if kind == "zip" else make_tar(archive, files, kind)
    os.truncate(archive, 150_000)
    with pytest.raises(OSError, match=r"damaged or cut short.*download it again"):
        extract_members(archive, {"first": tmp_path / "1", "big": tmp_path / "2"}, show_progress=False)
    assert names(tmp_path) == ["archive"]


def test_something_that_is_no_archive(tmp_path):
    (tmp_path / "archive").write_text("<html>Not found</html>")
    with pytest.raises(OSError, match="damaged or cut short"):
        extract_members(tmp_path / "archive", {"x": tmp_path / "x"}, show_progress=False)


def test_full_disk_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "archive", FILES)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"disk is full while unpacking .*archive") as error:
        extract_members(archive, {"three.txt": tmp_path / "3"}, show_progress=False)
    assert error.value.filename == str(tmp_path)
    assert names(tmp_path) == ["archive"]
