"""Commands of a shell, taken apart as far as the tests need: variables, globs, and the programs in a line."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

_OPERATORS = ("|", "||", "|&", "&&", ";", "&", "(", ")")
_REDIRECTIONS = (">", ">>", "<", ">&", "2>", "&>", "<<<")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class UnknownVariableError(ValueError):
    """A variable that nothing has set."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One program of a line.

    Attributes:
        words: The program and its arguments.
        variables: Of its environment, set before it.
    """

    words: tuple[str, ...]
    variables: Mapping[str, str]


def calls(text: str, variables: dict[str, str], folder: Path) -> list[Call]:
    """The programs of a line, with variables and globs expanded; assignments change `variables`.

    Lines with loops, here-documents or substitutions are bash's: what is found of them is not complete.

    Args:
        text: The line.
        variables: Of the shell; `NAME=value` adds to them.
        folder: Where globs are expanded.

    Raises:
        UnknownVariableError: If a variable has no value.
    """
    text = text.partition("<<")[0].replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;()<>")
    lexer.whitespace_split = True
    found: list[Call] = []
    words: list[str] = []

    def end() -> None:
        mine, set_here = list(words), {}
        while mine and (match := _ASSIGNMENT.fullmatch(mine[0])):
            set_here[match[1]] = match[2]
            mine.pop(0)
        if mine:
            found.append(Call(tuple(mine), set_here))
        else:
            variables.update(set_here)
        words.clear()

    skip = False
    for word in lexer:
        if skip or word in _REDIRECTIONS:
            skip = not skip
        elif word in _OPERATORS:
            end()
        else:
            words += _expanded(word, variables, folder)
    end()
    return found


def is_simple(text: str) -> bool:
    """Whether a line is one program without operators, substitutions and redirections."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="|&;()<>")
    lexer.whitespace_split = True
    words = list(lexer)
    return not any(word in (*_OPERATORS, *_REDIRECTIONS, "<<") or "$(" in word or "`" in word for word in words)


def _expanded(word: str, variables: Mapping[str, str], folder: Path) -> list[str]:
    if "$(" in word:
        return [word]

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise UnknownVariableError(f"${name} has no value: no command before it on the page sets {name}=...")
        return variables[name]

    word = _VARIABLE.sub(value, word)
    if any(character in word for character in "*?[") and not word.startswith("/"):
        return sorted(path.relative_to(folder).as_posix() for path in folder.glob(word)) or [word]
    return [word]
