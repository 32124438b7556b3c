"""Downloads the official COCO 2017 images and annotations into `root/annotations/` and `root/{split}/`.

An archive is checked by its size and SHA-256 when it has been downloaded, each file by the checksum in the archive when
it is unpacked, and their number by the known number of COCO.
"""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_attn.datamodules.downloads.transfer import RemoteFile, claim_folder, extract_members, fetch
from lightning_attn.errors import InputError, UnusableFileError
from lightning_attn.io import write_json

__all__ = ["COCO_PARTS", "OFFICIAL_URL", "CocoPart", "download_coco"]

OFFICIAL_URL = "http://images.cocodataset.org"  # its certificate is for another name, so https fails
ARCHIVE_FOLDER = "downloads"
MANIFEST_NAME = "coco_sources.json"

# Unpacked together: a larger number loses more at an interruption, a smaller one rereads the 118,000 names more often.
MEMBERS_AT_ONCE = 10_000


@dataclass(frozen=True)
class CocoPart:
    """An archive, and the files in it that are unpacked.

    Args:
        path: Path of the archive below the base address.
        members: A regular expression for the names of these files; they keep their names.
        count: Their expected number.
        splits: The splits that need it.
        size: Bytes of the archive.
        sha256: Its SHA-256.
    """

    path: str
    members: str
    count: int
    splits: tuple[str, ...]
    size: int
    sha256: str

    def archive(self, base_url: str) -> RemoteFile:
        """The archive on a server that mirrors the official one."""
        return RemoteFile(f"{base_url.rstrip('/')}/{self.path}", self.path.rpartition("/")[2], self.size, self.sha256)


# Sizes and SHA-256: TensorFlow Datasets, url_checksums/coco.txt.
COCO_PARTS: Sequence[CocoPart] = (
    CocoPart(
        path="annotations/annotations_trainval2017.zip",
        members=r"annotations/instances_(train|val)2017\.json",
        count=2,
        splits=("train2017", "val2017"),
        size=252_907_541,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
    CocoPart(
        path="zips/val2017.zip",
        members=r"val2017/\d{12}\.jpg",
        count=5_000,
        splits=("val2017",),
        size=815_585_330,
        sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    ),
    CocoPart(
        path="zips/train2017.zip",
        members=r"train2017/\d{12}\.jpg",
        count=118_287,
        splits=("train2017",),
        size=19_336_861_798,
        sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
)
"""The archives, small ones first: a wrong address or a closed network shows within seconds."""


def download_coco(
    root: Path,
    splits: Sequence[str] = ("train2017", "val2017"),
    base_url: str = OFFICIAL_URL,
    parts: Sequence[CocoPart] = COCO_PARTS,
    *,
    show_progress: bool = True,
) -> None:
    """Downloads and unpacks COCO 2017; finished parts are skipped.

    The archives (19 GiB for both splits) stay in `root/downloads`, which may be removed afterwards. The next call
    resumes an interrupted one; one process at a time may write to a folder.

    Args:
        root: Folder of the data; created if it is missing.
        splits: The splits that are needed.
        base_url: The official server or a mirror with the same paths.
        parts: The archives.
        show_progress: Shows progress bars on stderr.

    Raises:
        DownloadError: If an archive cannot be downloaded or is not the expected one.
        FileExistsError: If `root` holds such files that this function did not write; they are not changed.
        ValueError: If there is no such split, or an archive holds another number of files; nothing of it is unpacked.
        OSError: If an archive is damaged, or the disk is full.
    """
    root = Path(root)
    offered = sorted({split for part in parts for split in part.splits})
    for split in splits:
        if split not in offered:
            raise InputError(
                f"download: there is no split {split!r} to download, only {' and '.join(offered)}. Name one of them, "
                "or turn the download off (--data.download false)."
            )
    needed = [part for part in parts if set(part.splits) & set(splits)]
    manifest = root / MANIFEST_NAME
    done = claim_folder(root, MANIFEST_NAME, ["annotations", *offered])
    for part in needed:
        if done.get(part.path) == part.count == _present(root, part):
            continue
        # `verify`, because an archive that was put there by hand has not been checked yet.
        archive = fetch(part.archive(base_url), root / ARCHIVE_FOLDER, verify=True, show_progress=show_progress)
        _unpack(part, archive, root, show_progress)
        done[part.path] = part.count
        write_json(manifest, done, replace=True)


def _unpack(part: CocoPart, archive: Path, root: Path, show_progress: bool) -> None:
    """Writes the files of a part, except those that an earlier call has written."""
    try:
        with zipfile.ZipFile(archive) as packed:
            # Only names that match the expression are written, so none can be outside of the folder.
            sizes = {info.filename: info.file_size for info in packed.infolist() if _matches(part, info.filename)}
    except zipfile.BadZipFile as error:
        raise UnusableFileError(f"{archive} is damaged ({error}); remove it and run again.") from error
    if len(sizes) != part.count:
        raise InputError(
            f"{archive} has the wrong number of files {part.members}; expected {part.count:,}, got {len(sizes):,}. "
            f"Nothing of it was unpacked; remove {archive} and run again."
        )
    # A file gets its name when it is complete, so one of the right size was unpacked by an earlier call.
    left = [name for name, size in sizes.items() if not _has_size(root / name, size)]
    for start in range(0, len(left), MEMBERS_AT_ONCE):
        members = {name: root / name for name in left[start : start + MEMBERS_AT_ONCE]}
        extract_members(archive, members, show_progress=show_progress)


def _matches(part: CocoPart, name: str) -> bool:
    return re.fullmatch(part.members, name, re.ASCII) is not None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _present(root: Path, part: CocoPart) -> int:
    """Number of existing files of a part, by their names."""
    folder = root / part.members.partition("/")[0]
    if not folder.is_dir():
        return 0
    return sum(_matches(part, f"{folder.name}/{path.name}") for path in folder.iterdir())
