import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.downloads import coco as coco_sources
from datamodules.downloads.coco import COCO_PARTS, OFFICIAL_URL, CocoPart, download_coco
from datamodules.downloads.transfer import DownloadError

COUNTS = {"annotations/annotations_trainval2017.zip": 2, "zips/val2017.zip": 3, "zips/train2017.zip": 25}


def contents(path: str) -> dict[str, bytes]:
    """The files of a small archive with the member names of the real one, and some that are not wanted."""
    if path.startswith("annotations"):
        kinds = ("instances", "captions", "person_keypoints")
        names = [f"annotations/{kind}_{split}2017.json" for kind in kinds for split in ("train", "val")]
        return {name: json.dumps({"name": name}).encode() for name in names}
    split = path.removeprefix("zips/").removesuffix(".zip")
    files = {f"{split}/{number:012d}.jpg": bytes([number]) * (1000 + number) for number in range(COUNTS[path])}
    return {f"{split}/": b"", **files, f"{split}/../../evil.jpg": b"evil", "/tmp/000000000001.jpg": b"evil"}


def pack(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def put(mirror, part: CocoPart, files: Mapping[str, bytes]) -> CocoPart:
    """Serves an archive, and gives the part the facts that it needs."""
    data = mirror.archives[part.path] = pack(files)
    return replace(part, count=COUNTS[part.path], size=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def parts(mirror) -> list[CocoPart]:
    return [put(mirror, part, contents(part.path)) for part in COCO_PARTS]


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "downloads" not in path.parts and path.name != coco_sources.MANIFEST_NAME
    }


def expected(parts: list[CocoPart]) -> dict[str, bytes]:
    return {
        name: data for part in parts for name, data in contents(part.path).items() if re.fullmatch(part.members, name)
    }


def test_official_facts():
    assert OFFICIAL_URL == "http://images.cocodataset.org"
    assert [part.archive(OFFICIAL_URL).url for part in COCO_PARTS] == [
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "http://images.cocodataset.org/zips/val2017.zip",
        "http://images.cocodataset.org/zips/train2017.zip",
    ]
    assert [part.count for part in COCO_PARTS] == [2, 5_000, 118_287]
    assert [round(part.size / 2**20) for part in COCO_PARTS] == [241, 778, 18_441]
    assert all(part.archive(OFFICIAL_URL).checksum[0] == "sha256" for part in COCO_PARTS)


def test_everything_is_unpacked_and_nothing_else(mirror, parts, tmp_path):
    root = tmp_path / "deep" / "coco"
    download_coco(root, base_url=mirror.url + "/", parts=parts, show_progress=False)
    assert files(root) == expected(parts)
    assert len(files(root)) == 30
    assert not list(tmp_path.rglob("evil*"))
    assert [path for path, _ in mirror.requests] == [part.path for part in parts]


def test_only_what_a_split_needs(mirror, parts, tmp_path):
    download_coco(tmp_path, ["val2017"], mirror.url, parts, show_progress=False)
    assert files(tmp_path) == expected(parts[:2])
    mirror.requests.clear()
    download_coco(tmp_path, ["train2017", "val2017"], mirror.url, parts, show_progress=False)
    assert files(tmp_path) == expected(parts)
    assert [path for path, _ in mirror.requests] == [parts[2].path]
    download_coco(tmp_path / "other", [], mirror.url, parts, show_progress=False)
    assert files(tmp_path / "other") == {}


def test_second_call_needs_neither_server_nor_archives(mirror, parts, tmp_path):
    download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    for archive in (tmp_path / "downloads").iterdir():
        archive.unlink()
    mirror.requests.clear()
    download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert mirror.requests == []
    (tmp_path / "val2017" / f"{1:012d}.jpg").unlink()
    download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert [path for path, _ in mirror.requests] == [parts[1].path], "a file that was lost is fetched again"
    assert files(tmp_path) == expected(parts)


def test_a_download_that_stopped_is_finished_by_the_next_call(mirror, parts, tmp_path, monkeypatch):
    mirror.breaks[parts[2].path] = 20_000
    monkeypatch.setattr("time.sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))  # between attempts
    with pytest.raises(KeyboardInterrupt):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert files(tmp_path) == expected(parts[:2])
    monkeypatch.undo()
    mirror.requests.clear()
    download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert files(tmp_path) == expected(parts)
    assert mirror.requests == [(parts[2].path, "bytes=20000-")]


def test_unpacking_that_stopped_goes_on_where_it_was(mirror, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_sources, "MEMBERS_AT_ONCE", 10)
    extract, calls = coco_sources.extract_members, []

    def interrupted(archive, members, **options):
        calls.append(sorted(members))
        if len(calls) == 4:  # annotations, val, the first ten of train
            raise KeyboardInterrupt
        extract(archive, members, **options)

    monkeypatch.setattr(coco_sources, "extract_members", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert len(list((tmp_path / "train2017").iterdir())) == 10
    cut = tmp_path / "train2017" / f"{3:012d}.jpg"
    cut.write_bytes(cut.read_bytes()[:100])
    download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert files(tmp_path) == expected(parts)
    assert [len(members) for members in calls[4:]] == [10, 6]


def test_a_wrong_number_of_files_is_refused(mirror, parts, tmp_path):
    changed = contents(parts[1].path)
    del changed["val2017/000000000002.jpg"]
    parts[1] = put(mirror, parts[1], changed)
    with pytest.raises(ValueError, match=r"val2017\.zip has the wrong number of files .*expected 3, got 2\. Nothing"):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert files(tmp_path) == expected(parts[:1])


def test_damage_inside_an_archive_is_found(mirror, parts, tmp_path):
    data = bytearray(pack(contents(parts[1].path)))
    data[data.index(bytes([2]) * 500) + 300] ^= 1
    mirror.archives[parts[1].path] = bytes(data)
    parts[1] = replace(parts[1], sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(OSError, match=r"val2017\.zip is damaged or cut short \(Bad CRC-32"):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert files(tmp_path) == expected(parts[:1])


def test_a_wrong_archive_is_refused(mirror, parts, tmp_path):
    size = len(mirror.archives[parts[0].path])
    mirror.archives[parts[0].path] = b"<html>log in</html>"
    with pytest.raises(DownloadError, match=rf"wrong size; expected {size:,} bytes, got 19"):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    mirror.archives[parts[0].path] = b"x" * size
    with pytest.raises(DownloadError, match="wrong sha256 checksum"):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    parts[0] = replace(parts[0], sha256=hashlib.sha256(b"x" * size).hexdigest())
    with pytest.raises(OSError, match=r"annotations_trainval2017\.zip is damaged \(File is not a zip file\)"):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert files(tmp_path) == {}


def test_somebody_elses_files_are_left_alone(mirror, parts, tmp_path):
    (tmp_path / "val2017").mkdir()
    with pytest.raises(FileExistsError, match=r"already holds val2017.*--data\.download false"):
        download_coco(tmp_path, base_url=mirror.url, parts=parts, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["val2017"]
    assert mirror.requests == []


def test_splits_that_are_not_offered(mirror, parts, tmp_path):
    with pytest.raises(ValueError, match="there is no split 'val2014' to download, only train2017 and val2017"):
        download_coco(tmp_path / "new", ["val2014"], mirror.url, parts, show_progress=False)
    assert not (tmp_path / "new").exists()
