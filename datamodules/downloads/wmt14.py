"""Downloads the official WMT14 English-German text and converts it to `root/{train*,valid,test}.{en,de}`.

Training data are Europarl v7, Common Crawl and News Commentary v9, each a part of its own (`train-europarl-v7.en` and
so on: read them with `train_files: "train*"`). newstest2013 is the validation set, the full newstest2014 the test set.
"""

import html
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_attn.datamodules.downloads.transfer import RemoteFile, claim_folder, extract_members, fetch
from lightning_attn.errors import InputError
from lightning_attn.io import write_json

__all__ = ["OFFICIAL_URL", "WMT14_PARTS", "CorpusPart", "download_wmt14", "read_sgm"]

OFFICIAL_URL = "https://www.statmt.org"
ARCHIVE_FOLDER = "downloads"
MANIFEST_NAME = "wmt14_sources.json"


@dataclass(frozen=True)
class CorpusPart:
    """One part of the corpus, and the archive it is in.

    Args:
        name: Name of its files in the corpus folder, without the language.
        path: Path of the archive below the base address.
        members: The archive's member of each language; one ending in ".sgm" is converted to plain text.
        lines: Sentences on either side.
        size: Bytes of the archive, if known.
        sha256: Its SHA-256, if published.
        md5: Its MD5, where that is what is published.
    """

    name: str
    path: str
    members: Mapping[str, str]
    lines: int
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None

    def archive(self, base_url: str) -> RemoteFile:
        """The archive on a server that mirrors the official one."""
        url = f"{base_url.rstrip('/')}/{self.path}"
        return RemoteFile(url, self.path.replace("/", "-"), self.size, self.sha256, self.md5)


# Sizes and SHA-256 of the training archives: TensorFlow Datasets, url_checksums/wmt14_translate.txt. MD5 of the test
# sets: sacreBLEU's data set definitions, which also say that newstest2013 has its references in the "src" files. The
# numbers of training sentences are those of the files as `wc -l` counts them; together they are the 4,520,620 of WMT14.
WMT14_PARTS: Sequence[CorpusPart] = (
    CorpusPart(
        name="valid",
        path="wmt13/test.tgz",
        members={"en": "test/newstest2013-src.en.sgm", "de": "test/newstest2013-src.de.sgm"},
        lines=3_000,
        md5="48eca5d02f637af44e85186847141f67",
    ),
    CorpusPart(
        name="test",
        path="wmt14/test-full.tgz",
        members={"en": "test-full/newstest2014-deen-src.en.sgm", "de": "test-full/newstest2014-deen-ref.de.sgm"},
        lines=3_003,
        md5="a8cd784e006feb32ac6f3d9ec7eb389a",
    ),
    CorpusPart(
        name="train-news-commentary-v9",
        path="wmt14/training-parallel-nc-v9.tgz",
        members={
            "en": "training/news-commentary-v9.de-en.en",
            "de": "training/news-commentary-v9.de-en.de",
        },
        lines=201_288,
        size=80_418_416,
        sha256="cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
    ),
    CorpusPart(
        name="train-europarl-v7",
        path="wmt13/training-parallel-europarl-v7.tgz",
        members={"en": "training/europarl-v7.de-en.en", "de": "training/europarl-v7.de-en.de"},
        lines=1_920_209,
        size=657_632_379,
        sha256="0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
    ),
    CorpusPart(
        name="train-commoncrawl",
        path="wmt13/training-parallel-commoncrawl.tgz",
        members={"en": "commoncrawl.de-en.en", "de": "commoncrawl.de-en.de"},
        lines=2_399_123,
        size=918_311_367,
        sha256="c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
    ),
)
"""The archives, small ones first: a wrong address or a closed network shows within seconds."""


def download_wmt14(
    root: Path,
    base_url: str = OFFICIAL_URL,
    parts: Sequence[CorpusPart] = WMT14_PARTS,
    *,
    show_progress: bool = True,
) -> None:
    """Downloads the official WMT14 English-German text and converts it; finished parts are skipped.

    The archives (1.7 GB) stay in `root/downloads`, which may be removed afterwards. The next call resumes an
    interrupted one; one process at a time may write to a folder. Training text is written unchanged.

    Args:
        root: Folder of the corpus; created if it is missing.
        base_url: The official server or a mirror with the same paths.
        parts: The parts to download.
        show_progress: Shows progress bars on stderr.

    Raises:
        DownloadError: If an archive cannot be downloaded or is not the expected one.
        FileExistsError: If `root` holds corpus files that this function did not write; they are not changed.
        ValueError: If a part does not have the expected number of lines; nothing of it is written.
        OSError: If the disk is full.
    """
    root = Path(root)
    manifest = root / MANIFEST_NAME
    names = [f"{part.name}.{language}" for part in parts for language in part.members]
    done = claim_folder(root, MANIFEST_NAME, names)
    for part in parts:
        files = {language: root / f"{part.name}.{language}" for language in part.members}
        sizes = {path.name: path.stat().st_size for path in files.values() if path.exists()}
        if len(sizes) == len(files) and all(done.get(name) == size for name, size in sizes.items()):
            continue
        # `verify`, because an archive that was put there by hand has not been checked yet.
        archive = fetch(part.archive(base_url), root / ARCHIVE_FOLDER, verify=True, show_progress=show_progress)
        done |= _convert(part, archive, files, show_progress)
        write_json(manifest, done, replace=True)


def read_sgm(path: Path) -> list[str]:
    """Reads the segments of a WMT test set in its SGML-like format, in the order of the file.

    The format looks like XML but is not: attributes may be unquoted and ampersands stand alone. White space, line ends
    included, becomes single blanks, and XML's own entities and numeric ones are replaced by their characters.

    Raises:
        ValueError: If the file is not UTF-8 or a segment is not closed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start:,}); download its archive again.") from error
    segments = re.findall(r"<seg\b[^>]*>(.*?)</seg\s*>", text, re.DOTALL | re.IGNORECASE)
    opened = len(re.findall(r"<seg\b", text, re.IGNORECASE))
    if opened != len(segments):
        raise InputError(f"{path} opens {opened:,} segments and closes {len(segments):,}; download its archive again.")
    return [" ".join(_ENTITY.sub(lambda match: html.unescape(match[0]), segment).split()) for segment in segments]


# Only complete references: html.unescape alone would also take "&para" out of the middle of a word.
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|#\d+|#x[0-9a-f]+);", re.IGNORECASE)


def _convert(part: CorpusPart, archive: Path, files: Mapping[str, Path], show_progress: bool) -> dict[str, int]:
    """Writes a part's files, and returns their sizes by name."""
    scratch = next(iter(files.values())).parent / ".wmt14_sources.part"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        members = {member: scratch / f"{language}{Path(member).suffix}" for language, member in part.members.items()}
        extract_members(archive, members, show_progress=show_progress)
        converted: dict[str, Path] = {}
        for language, member in part.members.items():
            converted[language] = members[member]
            if member.endswith(".sgm"):
                converted[language] = scratch / language
                text = "".join(f"{segment}\n" for segment in read_sgm(members[member]))
                converted[language].write_bytes(text.encode())
        counts = {language: _count_lines(path) for language, path in converted.items()}
        if any(count != part.lines for count in counts.values()):
            found = ", ".join(f"{part.members[language]}: {count:,}" for language, count in counts.items())
            raise InputError(
                f"{archive} has the wrong number of lines for {part.name}; expected {part.lines:,} on both sides, got "
                f"{found}. Nothing of it was written; remove {archive} and run again."
            )
        for language, path in files.items():
            converted[language].replace(path)
        return {path.name: path.stat().st_size for path in files.values()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _count_lines(path: Path) -> int:
    r"""Lines as `\n` ends them; text after the last one counts too."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            lines, last = lines + block.count(b"\n"), block
    return lines + (not last.endswith(b"\n"))
