import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.downloads import wmt14 as wmt14_sources
from datamodules.downloads.transfer import DownloadError
from datamodules.downloads.wmt14 import OFFICIAL_URL, WMT14_PARTS, CorpusPart, download_wmt14, read_sgm

LINES = {"valid": 4, "test": 5, "train-news-commentary-v9": 6, "train-europarl-v7": 2_000, "train-commoncrawl": 9}


def sgm(language: str, count: int, kind: str = "srcset") -> bytes:
    segments = "".join(f'<seg id="{n}">{language} segment {n} &amp; more</seg>\n' for n in range(count))
    return f'<{kind} setid="x" srclang="any">\n<doc docid="1">\n<p>\n{segments}</p>\n</doc>\n</{kind}>\n'.encode()


def text(language: str, count: int) -> bytes:
    # Real training text has empty lines, carriage returns and U+2028 inside sentences.
    lines = [f"{language} {n} {hashlib.sha256(str(n).encode()).hexdigest()}" for n in range(count)]
    lines[0], lines[1] = "", f"{language}\r in\u2028side"
    return "".join(f"{line}\n" for line in lines).encode()


def pack(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def contents(part: CorpusPart) -> dict[str, bytes]:
    """The files of a small archive with the member names of the real one, and some more that are not wanted."""
    files = {"training/europarl-v7.cs-en.cs": b"jiny\n", "README": b"Nothing to see.\n"}
    for language, member in part.members.items():
        make = sgm if member.endswith(".sgm") else text
        files[member] = make(language, LINES[part.name])
    return files


def put(mirror, part: CorpusPart, files: Mapping[str, bytes]) -> CorpusPart:
    """Serves an archive, and gives the part the checksums that it needs."""
    data = mirror.archives[part.path] = pack(files)
    return replace(
        part,
        lines=LINES[part.name],
        size=len(data) if part.size is not None else None,
        sha256=hashlib.sha256(data).hexdigest() if part.sha256 else None,
        md5=hashlib.md5(data).hexdigest() if part.md5 else None,
    )


@pytest.fixture
def parts(mirror) -> list[CorpusPart]:
    return [put(mirror, part, contents(part)) for part in WMT14_PARTS]


def corpus(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name not in ("downloads", wmt14_sources.MANIFEST_NAME))


ALL = sorted(f"{name}.{language}" for name in LINES for language in ("en", "de"))


def test_official_facts():
    assert OFFICIAL_URL == "https://www.statmt.org"
    assert {part.name: part.lines for part in WMT14_PARTS if not part.name.startswith("train")} == {
        "valid": 3000,
        "test": 3003,
    }
    assert sum(part.lines for part in WMT14_PARTS if part.name.startswith("train")) == 4_520_620
    for part in WMT14_PARTS:
        assert part.archive(OFFICIAL_URL).checksum is not None
        assert part.archive(OFFICIAL_URL).url.startswith("https://www.statmt.org/wmt1")
        assert list(part.members) == ["en", "de"]
    assert len({part.archive(OFFICIAL_URL).name for part in WMT14_PARTS}) == len(WMT14_PARTS)


def test_agrees_with_sacrebleus_definitions():
    from sacrebleu.dataset import DATASETS

    for name, part in (("wmt13", WMT14_PARTS[0]), ("wmt14/full", WMT14_PARTS[1])):
        dataset = DATASETS[name]
        assert dataset.md5 == [part.md5]
        assert [url.replace("//statmt", "//www.statmt") for url in dataset.data] == [part.archive(OFFICIAL_URL).url]
        assert list(dataset.langpairs["en-de"]) == list(part.members.values())


def test_whole_conversion(mirror, parts, tmp_path):
    root = tmp_path / "wmt14"
    download_wmt14(root, mirror.url + "/", parts, show_progress=False)
    assert corpus(root) == ALL
    for part in parts:
        for language, member in part.members.items():
            written = (root / f"{part.name}.{language}").read_bytes()
            if member.endswith(".sgm"):
                expected = "".join(f"{language} segment {n} & more\n" for n in range(LINES[part.name])).encode()
            else:
                expected = contents(part)[member]
            assert written == expected
    assert sorted(path for path, _ in mirror.requests) == sorted(part.path for part in parts)


def test_second_call_needs_neither_server_nor_archives(mirror, parts, tmp_path):
    download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    for archive in (tmp_path / "downloads").iterdir():
        archive.unlink()
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in ALL}
    mirror.requests.clear()
    download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert mirror.requests == []
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in ALL} == times


def test_a_call_that_stopped_in_the_middle_is_finished_by_the_next(mirror, parts, tmp_path, monkeypatch):
    europarl = next(part for part in parts if "europarl" in part.name)
    mirror.breaks[europarl.path] = 20_000
    monkeypatch.setattr("time.sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))  # between attempts
    with pytest.raises(KeyboardInterrupt):
        download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert corpus(tmp_path) == sorted(name for name in ALL if not re.match("train-(europarl|commoncrawl)", name))
    monkeypatch.undo()
    mirror.requests.clear()
    download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert corpus(tmp_path) == ALL
    assert mirror.requests == [(europarl.path, "bytes=20000-"), (parts[-1].path, None)]


def test_a_conversion_that_stopped_in_the_middle_leaves_no_half_part(mirror, parts, tmp_path, monkeypatch):
    extract, calls = wmt14_sources.extract_members, []

    def interrupted(archive, members, **options):
        calls.append(archive)
        extract(archive, members, **options)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(wmt14_sources, "extract_members", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert corpus(tmp_path) == ["test.de", "test.en", "valid.de", "valid.en"]
    download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert corpus(tmp_path) == ALL
    assert len(calls) == 6  # the third one again, and the two that were left


def test_a_file_that_was_lost_or_cut_is_made_again(mirror, parts, tmp_path):
    download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    whole = (tmp_path / "train-europarl-v7.de").read_bytes()
    (tmp_path / "train-europarl-v7.de").write_bytes(whole[:5000])
    (tmp_path / "valid.en").unlink()
    mirror.requests.clear()
    download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert (tmp_path / "train-europarl-v7.de").read_bytes() == whole
    assert corpus(tmp_path) == ALL
    assert mirror.requests == []  # from the archives that are there


@pytest.mark.parametrize(("name", "language", "change"), [("test", "de", -1), ("train-commoncrawl", "en", 1)])
def test_wrong_line_counts_are_detected(mirror, parts, tmp_path, name, language, change):
    index = [part.name for part in parts].index(name)
    part, files = parts[index], contents(parts[index])
    make = sgm if part.members[language].endswith(".sgm") else text
    files[part.members[language]] = make(language, LINES[name] + change)
    parts[index] = put(mirror, part, files)
    with pytest.raises(ValueError, match=f"wrong number of lines for {name}; expected {LINES[name]} on both") as error:
        download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    for side, member in part.members.items():
        assert f"{member}: {LINES[name] + change * (side == language)}" in str(error.value)
    assert corpus(tmp_path) == sorted(f"{part.name}.{lang}" for part in parts[:index] for lang in ("en", "de"))


def test_wrong_archive_is_refused(mirror, parts, tmp_path):
    mirror.archives[parts[0].path] = pack({"else": b"other\n"})
    with pytest.raises(DownloadError, match=r"wmt13/test\.tgz: wrong md5 checksum"):
        download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert corpus(tmp_path) == []
    assert list((tmp_path / "downloads").iterdir()) == []


def test_archive_put_there_by_hand_is_used_and_checked(mirror, parts, tmp_path):
    data = mirror.archives.pop(parts[2].path)
    with pytest.raises(DownloadError, match="answered 404") as error:
        download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    place = Path(re.search(r"download that address to (\S+) and run", str(error.value))[1])
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DownloadError, match="sha256"):
        download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    place.write_bytes(data)
    download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert corpus(tmp_path) == ALL


def test_somebody_elses_files_are_left_alone(mirror, parts, tmp_path):
    (tmp_path / "test.de").write_text("Meins.\n")
    with pytest.raises(FileExistsError, match=r"already holds test\.de.*another folder"):
        download_wmt14(tmp_path, mirror.url, parts, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["test.de"]
    assert mirror.requests == []


def test_sgm_with_entities_attributes_and_line_breaks(tmp_path):
    path = tmp_path / "set.sgm"
    path.write_text(
        '\ufeff<?xml version="1.0"?>\n<!DOCTYPE mteval SYSTEM "x.dtd">\n'
        "<refset setid='n' trglang=de><doc docid=a><hl>\n"
        '<seg id="1">Erste &amp; zweite</seg> <SEG ID=2 lang="de" >AT&T  &quot;so&quot;</SEG>\n'
        "<seg id='3'>über\n  zwei\tZeilen </seg></hl><p><seg id=4>&lt;b&gt; &#8211; &#x2013; &apos;&para &copy;</seg>\n"
        "<seg id=5></seg></p></doc></refset>\n",
        encoding="utf-8",
    )
    assert read_sgm(path) == ["Erste & zweite", 'AT&T "so"', "über zwei Zeilen", "<b> – – '&para &copy;", ""]


def test_sgm_that_is_broken(tmp_path):
    path = tmp_path / "set.sgm"
    path.write_text("<seg id=1>one</seg><seg id=2>two")
    with pytest.raises(ValueError, match="opens 2 segments and closes 1"):
        read_sgm(path)
    path.write_bytes("<seg id=1>grün</seg>".encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 12\)"):
        read_sgm(path)
