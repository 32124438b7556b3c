r"""Parallel text in the layout ``root/{train,valid,test}.{en,de}``: one sentence a line, line n pairs with line n.

Only ``\n`` ends a line (a ``\r`` before it is dropped): real corpora hold U+2028, form feeds and their like inside
sentences, and every tool that counts lines counts ``\n``.
"""

import glob
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Cleaning:
    """Which training pairs are left out. Validation and test text is never cleaned.

    Words are what blanks separate. The first reason that holds, in the order of the fields, is the one counted.

    Args:
        drop_empty: leaves out pairs with an empty side.
        max_characters: longest side in characters, so that broken lines cost no time.
        min_length: fewest words on either side.
        max_length: most words on either side.
        max_ratio: largest ratio of the words of the longer side to those of the shorter one.
        drop_identical: leaves out pairs whose sides are the same text.
        max_tokens: longest side in vocabulary pieces.

    Raises:
        ValueError: if a bound is negative or they leave nothing.
    """

    drop_empty: bool = True
    max_characters: int = 5000
    min_length: int = 1
    max_length: int = 250
    max_ratio: float = 3.0
    drop_identical: bool = True
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.min_length < 0:
            raise ValueError(f"cleaning.min_length: {self.min_length} is negative; give 0 or more words.")
        if self.max_length < max(self.min_length, 1):
            raise ValueError(
                f"cleaning.max_length: {self.max_length} is less than min_length {self.min_length} or 1 and would "
                "leave no pair; raise it."
            )
        if self.max_ratio < 1:
            raise ValueError(f"cleaning.max_ratio: {self.max_ratio} would leave no pair; give 1.0 or more.")
        for name in ("max_characters", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"cleaning.{name}: {getattr(self, name)} would leave no pair; give 1 or more.")

    def reason(self, source: str, target: str) -> str:
        """Why a pair is left out before it is cut into tokens: the name of a field, or "" when it is kept."""
        if self.drop_empty and not (source and target):
            return "drop_empty"
        if max(len(source), len(target)) > self.max_characters:
            return "max_characters"
        source_words, target_words = len(source.split()), len(target.split())
        fewer, more = sorted((source_words, target_words))
        if fewer < self.min_length:
            return "min_length"
        if more > self.max_length:
            return "max_length"
        if fewer and more > self.max_ratio * fewer:
            return "max_ratio"
        if self.drop_identical and source == target:
            return "drop_identical"
        return ""


@dataclass(frozen=True)
class FilePair:
    """The two files of one part of a corpus."""

    source: Path
    target: Path


@dataclass(frozen=True)
class FileSummary:
    """What one pass over a file tells.

    Args:
        digest: BLAKE2b of the content, 32 hexadecimal digits.
        lines: number of lines; text after the last line end counts as one.
    """

    digest: str
    lines: int


def find_pairs(root: Path, pattern: str, source_language: str, target_language: str) -> list[FilePair]:
    """The files ``root/<pattern>.<language>`` of both languages, sorted by name.

    Args:
        root: the corpus folder.
        pattern: a file name without its language, such as "valid", or a glob, such as "train*".
        source_language: ending of the source files.
        target_language: ending of the target files.

    Raises:
        FileNotFoundError: if the folder or a file is missing, or a file has no counterpart.
    """
    layout = f"{{train,valid,test}}.{{{source_language},{target_language}}}"
    if not root.is_dir():
        raise FileNotFoundError(
            f"root: the folder {root} does not exist. Give the folder that holds {layout} (--data.root FOLDER), or let "
            "WMT14 be fetched into it with --data.download true."
        )
    names: dict[str, set[str]] = {}
    for language in (source_language, target_language):
        ending = f".{language}"
        paths = sorted(root.glob(pattern + ending)) if glob.has_magic(pattern) else [root / (pattern + ending)]
        names[language] = {path.name.removesuffix(ending) for path in paths if path.is_file()}
    either = sorted(names[source_language] | names[target_language])
    if not either:
        raise FileNotFoundError(
            f"{root}: {pattern}.{source_language} and {pattern}.{target_language} are missing. The layout is {layout} "
            "in that folder, one sentence a line (see 'Data' in the README); --data.download true fetches WMT14."
        )
    for name in either:
        for language in (source_language, target_language):
            if name not in names[language]:
                other = target_language if language == source_language else source_language
                raise FileNotFoundError(
                    f"{root / (name + '.' + language)} is missing, but {root / (name + '.' + other)} is there. Add the "
                    f"file, or move the other away; the layout is {layout}."
                )
    return [FilePair(root / f"{name}.{source_language}", root / f"{name}.{target_language}") for name in either]


def summarise(path: Path) -> FileSummary:
    """Hashes a file and counts its lines in one streaming pass.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is empty.
    """
    digest = hashlib.blake2b(digest_size=16)
    lines, last = 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            lines += block.count(b"\n")
            last = block
    if not last:
        raise ValueError(f"{path}: the file is empty. Give a file with one sentence a line.")
    return FileSummary(digest.hexdigest(), lines + (not last.endswith(b"\n")))


def check_counts(pair: FilePair, source_lines: int, target_lines: int) -> None:
    """Refuses files whose numbers of lines differ.

    Raises:
        ValueError: saying both counts.
    """
    if source_lines != target_lines:
        raise ValueError(
            f"{pair.source} has {source_lines} lines, but {pair.target} has {target_lines}. Line n of one must be the "
            "translation of line n of the other; a download that broke off, or a tool that splits lines at other "
            "characters than \\n, is the usual cause. Make them the same length."
        )


def decode_line(line: bytes, path: Path, number: int) -> str:
    r"""Text of one line as read from a binary file, without its line end and the byte order mark of a first line.

    Args:
        line: the bytes, ending in ``\n``, ``\r\n`` or nothing.
        path: the file, for the message.
        number: the line, from 1.

    Raises:
        ValueError: if it is not UTF-8; names the file and the line.
    """
    content = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not UTF-8 (byte 0x{content[error.start]:02x} at position {error.start + 1} of the "
            f"line). Convert the file, for instance with: iconv -f ISO-8859-1 -t UTF-8 {path.name}"
        ) from error
    return text.removeprefix("\ufeff") if number == 1 else text


def read_lines(path: Path) -> Iterator[str]:
    """Streams the lines of a UTF-8 file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield decode_line(line, path, number)


@dataclass(frozen=True)
class LineBlock:
    """Consecutive lines of a file pair, still as bytes: the unit of work that goes to one process.

    Args:
        pair: where the lines come from.
        first: number of the first line, from 1.
        source: lines with their line ends.
        target: as many lines.
    """

    pair: FilePair
    first: int
    source: list[bytes]
    target: list[bytes]

    def __len__(self) -> int:
        return len(self.source)

    def texts(self, start: int = 0, step: int = 1) -> Iterator[tuple[str, str]]:
        """Decodes every ``step``-th pair from index ``start`` on.

        Raises:
            ValueError: if a line is not UTF-8.
        """
        for index in range(start, len(self.source), step):
            number = self.first + index
            yield (
                decode_line(self.source[index], self.pair.source, number),
                decode_line(self.target[index], self.pair.target, number),
            )


def read_blocks(pairs: Iterable[FilePair], size: int) -> Iterator[LineBlock]:
    """Streams corpus parts, one after the other, as blocks of at most ``size`` line pairs.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if the files of a pair have different numbers of lines.
    """
    for pair in pairs:
        first = 1
        with pair.source.open("rb") as source_file, pair.target.open("rb") as target_file:
            while True:
                source = list(itertools.islice(source_file, size))
                target = list(itertools.islice(target_file, size))
                if len(source) != len(target):
                    check_counts(pair, summarise(pair.source).lines, summarise(pair.target).lines)
                if not source:
                    break
                yield LineBlock(pair, first, source, target)
                first += len(source)


def read_evaluation(pair: FilePair) -> tuple[list[str], list[str]]:
    """Reads a validation or test set whole; nothing is cleaned away.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is empty or not UTF-8, has an empty line, or their numbers of lines differ.
    """
    texts = []
    for path in (pair.source, pair.target):
        lines = list(read_lines(path))
        if not lines:
            raise ValueError(f"{path}: the file is empty. Give a file with one sentence a line.")
        texts.append(lines)
    source, target = texts
    check_counts(pair, len(source), len(target))
    for path, lines in ((pair.source, source), (pair.target, target)):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ValueError(
                    f"{path}, line {number}: the line is empty. Evaluation text is not cleaned, so take line {number} "
                    f"out of both {pair.source.name} and {pair.target.name}, or fill it in."
                )
    return source, target
