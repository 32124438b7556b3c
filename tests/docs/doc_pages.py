"""The pages of the documentation: their fenced blocks, commands, headings and links."""

import dataclasses
import functools
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHELL = ("bash", "sh", "shell", "console")

_FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")
_NOT_RUN = re.compile(r"<!--\s*not run in tests:\s*(.+?)\s*-->")
_SAVED_AS = re.compile(r"<!--\s*saved as\s+(\S+)\s*-->")


def pages() -> list[str]:
    """Paths of all pages, relative to the repository."""
    found = [REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "checkpoints/README.md")]
    found += sorted((REPOSITORY / "docs").rglob("*.md"))
    return [path.relative_to(REPOSITORY).as_posix() for path in found]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as a reader's shell gets it.

    Attributes:
        page: Path of the page.
        line: Of the page, from 1 on.
        text: With continued lines, without the prompt.
        reason: Why the page says that it is not run, or "".
    """

    page: str
    line: int
    text: str
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path of the page.
        line: Of its fence, from 1 on.
        language: Behind the fence, or "".
        lines: Its content, without the indentation of the fence.
        reason: Why the page says that it is not run, or "".
        saved_as: The file that readers are told to save it as, or "".
    """

    page: str
    line: int
    language: str
    lines: tuple[str, ...]
    reason: str = ""
    saved_as: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def is_session(self) -> bool:
        """Whether lines with a prompt are commands, and the others what these print."""
        return self.language in (*SHELL, "", "text") and self.lines[:1] != () and self.lines[0].startswith("$ ")

    def commands(self) -> list[Command]:
        """Its commands, if it is a block of a shell."""
        if not self.is_session and self.language not in SHELL:
            return []
        found: list[Command] = []
        numbered = [(self.line + number, line) for number, line in enumerate(self.lines, start=1)]
        while numbered:
            number, line = numbered.pop(0)
            if self.is_session:
                if not line.startswith("$ "):
                    continue
                line = line.removeprefix("$ ")
            text = line
            while numbered and not _is_complete(text):
                text += "\n" + numbered.pop(0)[1]
            if text.strip() and not text.lstrip().startswith("#"):
                found.append(Command(self.page, number, text.strip(), self.reason))
        return found


@functools.cache
def _is_complete(text: str) -> bool:
    """Whether a shell would not wait for more lines."""
    if text.endswith("\\"):
        return False
    if not re.search(r"<<|\b(do|then|case)\b|[({'\"`]", text):
        return True
    checked = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
    return not checked.stderr


@functools.cache
def blocks(page: str) -> tuple[Block, ...]:
    """The fenced blocks of a page."""
    lines = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
    found, start, number = [], 0, 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if opened is None:
            number += 1
            continue
        closing = re.compile(rf"^\s*{re.escape(opened['fence'])}\s*$")
        end = number + 1
        while end < len(lines) and not closing.match(lines[end]):
            end += 1
        assert end < len(lines), f"{page}:{number + 1}: this block has no end"
        content = tuple(line.removeprefix(opened["indent"]) for line in lines[number + 1 : end])
        before = "\n".join(lines[start:number]).rstrip()
        # Marks directly before the block, one or several.
        marks = re.search(r"(?:<!--[^\n]*-->\s*)*\Z", before)[0]
        reason, saved = _NOT_RUN.search(marks), _SAVED_AS.search(marks)
        found.append(
            Block(
                page,
                number + 1,
                opened["language"],
                content,
                reason[1] if reason else "",
                saved[1] if saved else "",
            )
        )
        number = start = end + 1
    return tuple(found)


def commands(page: str) -> list[Command]:
    """All commands of a page, in order."""
    return [command for block in blocks(page) for command in block.commands()]


def prose(page: str) -> list[tuple[int, str]]:
    """Numbers and texts of the lines outside of blocks; code spans and comments are blank."""
    lines = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        for number in range(block.line - 1, block.line + len(block.lines) + 1):
            lines[number] = ""
    text = re.sub(r"<!--.*?-->", lambda match: re.sub(r"[^\n]", "", match[0]), "\n".join(lines), flags=re.DOTALL)
    return list(enumerate(text.splitlines(), start=1))


@functools.cache
def anchors(page: str) -> frozenset[str]:
    """What `#...` of a link may be: GitHub's names of the headings, and names in HTML."""
    found: list[str] = []
    for _, line in prose(page):
        found += re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", line)
        heading = re.match(r"#{1,6}\s+(.*?)\s*#*\s*$", line)
        if heading is not None:
            own = re.search(r"\{\s*#([\w-]+)[^}]*\}$", heading[1])  # of the site's generator
            if own is not None:
                found.append(own[1])
            name = slug(heading[1])
            repeated = sum(one == name or re.fullmatch(rf"{re.escape(name)}-\d+", one) is not None for one in found)
            found.append(f"{name}-{repeated}" if repeated else name)
    return frozenset(found)


def slug(heading: str) -> str:
    """GitHub's name of a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # links keep their texts
    text = re.sub(r"<[^>]+>", "", text).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def links(page: str) -> list[tuple[int, str]]:
    """Lines and targets of the links and images of a page."""
    found = []
    for number, line in prose(page):
        # A code span can be the text of a link, but what is in it is no link.
        plain = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "code", line)
        found += [(number, match[1]) for match in re.finditer(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", plain)]
        found += [(number, match[1]) for match in re.finditer(r"^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", plain)]
        found += [
            (number, match[1]) for match in re.finditer(r"<(?:img|a|source)\b[^>]*?(?:src|href)=\"([^\"]+)\"", line)
        ]
    return found
