r"""Reads parallel text in the layout ``root/{train,valid,test}.{en,de}``: one sentence per line, aligned by line.

Only ``\n`` ends a line (a ``\r`` before it is dropped): real corpora have U+2028, form feeds and the like inside
sentences, and every tool that counts lines counts ``\n``.
"""

import glob
import gzip
import hashlib
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from lightning_attn.errors import InputError, MissingFileError

_BLOCK = 1 << 22
_GZIP, _TABLE = ".gz", ".tsv"

# Scripts without blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese, Japanese.
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)


def is_blank(text: str) -> bool:
    """Whether a line has only white space of any kind: it then has no translation."""
    return not text.strip()


def count_words(text: str) -> int:
    """Number of words separated by blanks; every character of a script without blanks is a word too."""
    if text.isascii():
        return len(text.split())
    return len(_WITHOUT_BLANKS.sub(" x ", text).split())


@dataclass(frozen=True)
class Cleaning:
    """Which training pairs are left out. Validation and test text is never cleaned.

    Words are separated by blanks; each character of Chinese, Japanese, Thai and other scripts without blanks is a word.
    A pair is counted under the first reason that applies, in the order of the fields.

    Args:
        drop_empty: leaves out pairs with an empty side.
        max_characters: longest side in characters, so that broken lines take no time.
        min_length: fewest words on either side.
        max_length: most words on either side.
        max_ratio: largest ratio of the words of the longer side to those of the shorter one.
        drop_identical: leaves out pairs whose sides are the same text.
        max_tokens: longest side in vocabulary pieces.

    Raises:
        ValueError: if a bound is negative or leaves no pair.
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
            raise InputError(f"cleaning.min_length: {self.min_length} is negative; give 0 or more words.")
        if self.max_length < max(self.min_length, 1):
            raise InputError(
                f"cleaning.max_length: {self.max_length} is less than min_length {self.min_length} or 1 and would "
                "leave no pair; raise it."
            )
        if self.max_ratio < 1:
            raise InputError(f"cleaning.max_ratio: {self.max_ratio} would leave no pair; give 1.0 or more.")
        for name in ("max_characters", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"cleaning.{name}: {getattr(self, name)} would leave no pair; give 1 or more.")

    def reason(self, source: str, target: str) -> str:
        """Why a pair is left out before it is tokenised: the name of a field, or "" if it is used."""
        if self.drop_empty and (is_blank(source) or is_blank(target)):
            return "drop_empty"
        if max(len(source), len(target)) > self.max_characters:
            return "max_characters"
        source_words, target_words = count_words(source), count_words(target)
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
    """The two files of one part of a corpus, or the one table that holds both: source, tab, target.

    Files whose names end in ".gz" are compressed.
    """

    source: Path
    target: Path

    @property
    def is_table(self) -> bool:
        """Whether both sides are columns of one file."""
        return self.source == self.target


@dataclass(frozen=True)
class FileSummary:
    """Hash and length of a file.

    Args:
        digest: BLAKE2b of the content, 32 hexadecimal digits.
        lines: number of lines; text after the last line end counts as one.
    """

    digest: str
    lines: int


def find_pairs(root: Path, pattern: str, source_language: str, target_language: str) -> list[FilePair]:
    """The files `root/<pattern>.<language>` of both languages, or tables `root/<pattern>.tsv`, sorted by name.

    Any of them may be compressed, with a further ".gz".

    Args:
        root: the corpus folder.
        pattern: a file name without its language, such as "valid", or a glob, such as "train*".
        source_language: ending of the source files.
        target_language: ending of the target files.

    Raises:
        FileNotFoundError: if the folder or a file is missing, or a file has no counterpart.
        ValueError: if a name exists in two forms.
    """
    layout = f"{{train,valid,test}}.{{{source_language},{target_language}}}"
    if not root.is_dir():
        raise MissingFileError(
            f"root: the folder {root} does not exist. Give the folder that holds {layout} (--data.root FOLDER). For "
            "WMT14, --data.download true fetches it into that folder."
        )
    sides = [_named(root, pattern, f".{language}") for language in (source_language, target_language)]
    tables = _named(root, pattern, _TABLE)
    either = sorted(sides[0].keys() | sides[1].keys() | tables.keys())
    if not either:
        fetched = "; --data.download true fetches WMT14" if {source_language, target_language} == {"en", "de"} else ""
        raise MissingFileError(
            f"{root}: {pattern}.{source_language} and {pattern}.{target_language} are missing. The layout is {layout} "
            "in that folder, one sentence a line, or tables such as train.tsv (see docs/translation.md); files of "
            "other languages or names are chosen by --data.source_language, --data.target_language, "
            '--data.train_files, --data.valid_files ("" for a training without validation) and --data.test_files'
            f"{fetched}. {_contents(root)}"
        )
    pairs = []
    for name in either:
        if name in tables:
            if name in sides[0] or name in sides[1]:
                raise InputError(f"{tables[name]}: {name} exists as a table and as text too. Move one away.")
            pairs.append(FilePair(tables[name], tables[name]))
            continue
        for language, mine, other in ((source_language, 0, 1), (target_language, 1, 0)):
            if name not in sides[mine]:
                option = "source_language" if mine == 0 else "target_language"
                raise MissingFileError(
                    f"{root / (name + '.' + language)} is missing, but {sides[other][name]} exists. Add the file, "
                    f"or give its ending (--data.{option}, which is {language!r}); "
                    f"{_endings(root, name)}the layout is {layout}."
                )
        pairs.append(FilePair(sides[0][name], sides[1][name]))
    return pairs


def _endings(root: Path, name: str) -> str:
    """The files of a split in any language, for a message."""
    found = sorted(path.name for path in root.glob(f"{glob.escape(name)}.*"))
    return f"found {', '.join(found[:8])}; " if found else ""


def _contents(root: Path) -> str:
    """The contents of a folder, for a message."""
    names = sorted(path.name for path in root.iterdir())
    return f"It holds {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}." if names else "It is empty."


def find_source(root: Path, name: str, language: str) -> FilePair:
    """The source side of a split, whose target may not exist; a table with only a source column is enough.

    Raises:
        FileNotFoundError: if it is missing.
    """
    for ending in (f".{language}", _TABLE):
        found = _named(root, name, ending)
        if found:
            path = found[min(found)]
            return FilePair(path, path) if ending == _TABLE else FilePair(path, Path())
    raise MissingFileError(
        f"{root / f'{name}.{language}'} does not exist. Give the folder that has it (--data.root FOLDER), the name of "
        "the file without its language (--data.test_files NAME), or any text file (--data.predict_file FILE)."
    )


def _named(root: Path, pattern: str, ending: str) -> dict[str, Path]:
    """The files of a pattern and a suffix, compressed or not, by their names without it."""
    found: dict[str, Path] = {}
    for full in (ending, ending + _GZIP):
        paths = sorted(root.glob(pattern + full)) if glob.has_magic(pattern) else [root / (pattern + full)]
        for path in paths:
            if path.is_file():
                name = path.name.removesuffix(full)
                if name in found:
                    raise InputError(
                        f"{found[name]} and {path} are the same file, one of them compressed. Move one away."
                    )
                found[name] = path
    return found


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file as bytes, decompressed if its name ends in ".gz".

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    with cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == _GZIP else path.open("rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} is not a complete gzip file ({error}). Copy or download it again.") from error


def summarise(path: Path) -> FileSummary:
    """Hashes a file and counts its lines in one streaming pass.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is empty.
    """
    digest = hashlib.blake2b(digest_size=16)
    lines, last = 0, b""
    with opened(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            lines += block.count(b"\n")
            last = block
    if not last:
        raise InputError(f"{path}: the file is empty. Give a file with one sentence a line.")
    return FileSummary(digest.hexdigest(), lines + (not last.endswith(b"\n")))


def check_counts(pair: FilePair, source_lines: int, target_lines: int) -> None:
    """Refuses files whose numbers of lines differ.

    Raises:
        ValueError: saying both counts.
    """
    if source_lines != target_lines:
        raise InputError(
            f"{pair.source} has {source_lines} lines, but {pair.target} has {target_lines}. Line n of one must be the "
            "translation of line n of the other; an interrupted download, or a tool that splits lines at other "
            "characters than \\n, is the usual cause. Make them the same length."
        )


def decode_line(line: bytes, path: Path, number: int) -> str:
    r"""Text of one line as read from a binary file, without its line end and, in a first line, the byte order mark.

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
        raise InputError(
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
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            yield decode_line(line, path, number)


def _columns(path: Path, lines: Iterable[bytes], first: int) -> Iterator[tuple[bytes, bytes]]:
    """Source and target of the lines of a table.

    Raises:
        ValueError: if a line has no tab; the message names the file and the line.
    """
    for number, line in enumerate(lines, start=first):
        columns = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
        if len(columns) < 2:
            raise InputError(
                f"{path}, line {number}: there is no tab between source and target. Correct the line, or give two "
                "files of text."
            )
        yield columns[0], columns[1]


def read_source(pair: FilePair) -> list[str]:
    """The source side of a pair from `find_source`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is empty, or a line is not UTF-8.
    """
    lines = list(read_lines(pair.source))
    if not lines:
        raise InputError(f"{pair.source}: the file is empty. Give a file with one sentence a line.")
    return [line.partition("\t")[0] for line in lines] if pair.is_table else lines


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
        with opened(pair.source) as source_file, opened(pair.target) as target_file:
            while True:
                source = list(itertools.islice(source_file, size))
                if pair.is_table:
                    columns = list(_columns(pair.source, source, first))
                    source, target = [one for one, _ in columns], [two for _, two in columns]
                else:
                    target = list(itertools.islice(target_file, size))
                if len(source) != len(target):
                    check_counts(pair, summarise(pair.source).lines, summarise(pair.target).lines)
                if not source:
                    break
                yield LineBlock(pair, first, source, target)
                first += len(source)


def read_evaluation(pair: FilePair) -> tuple[list[str], list[str]]:
    """Reads a validation or test set, without cleaning.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is empty or not UTF-8, has an empty line, or their numbers of lines differ.
    """
    texts: tuple[list[str], list[str]]
    if pair.is_table:
        both = [texts for block in read_blocks([pair], 1 << 16) for texts in block.texts()]
        texts = [source for source, _ in both], [target for _, target in both]
    else:
        texts = list(read_lines(pair.source)), list(read_lines(pair.target))
    for path, lines in zip((pair.source, pair.target), texts, strict=True):
        if not lines:
            raise InputError(f"{path}: the file is empty. Give a file with one sentence a line.")
    source, target = texts
    check_counts(pair, len(source), len(target))
    for path, lines in ((pair.source, source), (pair.target, target)):
        for number, line in enumerate(lines, start=1):
            if is_blank(line):
                where = "both columns" if pair.is_table else f"both {pair.source.name} and {pair.target.name}"
                what = "column" if pair.is_table else "line"
                raise InputError(
                    f"{path}, line {number}: the {what} is empty. Evaluation text is not cleaned, so "
                    f"remove line {number} from {where}, or fill it in."
                )
    return source, target
