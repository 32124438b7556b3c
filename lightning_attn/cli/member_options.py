"""Options of the members of a joint training, which are objects by names of the user: model.tasks and data.members."""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

__all__ = [
    "MEMBERS",
    "MemberOption",
    "member_options",
    "members_of_text",
    "nulls_as_text",
    "unknown_member",
    "with_member",
]

MEMBERS = {"model": "tasks", "data": "members"}
"""By section: the argument that holds members."""

_OPTION = re.compile(
    r"--(?P<section>model|data)\.(?:init_args\.)?(?P<argument>tasks|members)\.(?P<name>[^.=]+)"
    r"(?:\.(?:init_args\.)?(?P<key>[^.=]+)[^=]*)?(?P<value>=.*)?",
    re.DOTALL,
)
_NULLS = ("null", "Null", "NULL", "~")


@dataclasses.dataclass(frozen=True)
class MemberOption:
    """An option of one member on the command line.

    Attributes:
        section: "model" or "data".
        name: The member's.
        key: Which of its arguments is given; empty where the member as a whole is, or its class.
        value: What is given.
    """

    section: str
    name: str
    key: str
    value: str

    @property
    def path(self) -> str:
        """Of the member, such as "model.tasks.detection"."""
        return f"{self.section}.{MEMBERS[self.section]}.{self.name}"

    def named_in(self, message: str) -> str | None:
        """A parser's message about this option, which knows its class alone, with the member; None of any other."""
        without_name = f"{self.section}.{MEMBERS[self.section]}.{self.key}"
        if self.key and message.startswith(without_name):
            return message.replace(without_name, f"{self.path}.{self.key}", 1)
        value = "None" if self.value in _NULLS else self.value
        if repr(value) not in message:
            return None
        if self.path in message:
            return message
        told = message.replace(f"{self.section}.{self.key}", f"{self.path}.{self.key}") if self.key else message
        return told if self.path in told else f"{self.path}: {told.removeprefix(f'{self.section}: ')}"

    @property
    def keys(self) -> set[str]:
        """Every argument of the member that the option gives."""
        if self.key:
            return {self.key} - {"class_path"}
        content = _loaded(self.value)
        arguments = content.get("init_args", content) if isinstance(content, dict) else {}
        return set(arguments) - {"class_path"} if isinstance(arguments, dict) else set()

    @property
    def names_class(self) -> bool:
        """Whether the option says of which class the member is."""
        content = _loaded(self.value)
        return self.key == "class_path" or (not self.key and (isinstance(content, str) or "class_path" in content))


def member_options(arguments: Sequence[str]) -> Iterator[MemberOption]:
    """The options of members on a command line."""
    for _, option in _placed(arguments):
        yield option


def _placed(arguments: Sequence[str]) -> Iterator[tuple[slice, MemberOption]]:
    """Options of members, and where they are."""
    for place, argument in enumerate(arguments):
        found = _OPTION.fullmatch(argument)
        if found is None or MEMBERS[found["section"]] != found["argument"]:
            continue
        equals = found["value"]
        value = equals[1:] if equals else "".join(arguments[place + 1 : place + 2])
        end = place + (1 if equals else 2)
        yield slice(place, end), MemberOption(found["section"], found["name"], found["key"] or "", value)


def nulls_as_text(arguments: Sequence[str]) -> list[str]:
    """Options that leave a member out, such as `--model.tasks.depth null`, as configurations after those given by `-c`.

    Args:
        arguments: Of the command line, configurations first.
    """
    texts: list[str] = []
    others: list[str | None] = list(arguments)
    placed = list(_placed(arguments))
    for number, (place, option) in enumerate(placed):
        if not option.key and option.value in _NULLS:
            for earlier, other in placed[:number]:  # the last one wins
                if (other.section, other.name) == (option.section, option.name):
                    others[earlier] = [None] * (earlier.stop - earlier.start)
            left_out = {option.section: {"init_args": {MEMBERS[option.section]: {option.name: None}}}}
            texts += ["-c", yaml.safe_dump(left_out, default_flow_style=True, width=10**6).strip()]
            others[place] = [None] * (place.stop - place.start)
    kept = [one for one in others if one is not None]
    files = [place for place, one in enumerate(kept) if one in ("-c", "--config") or one.startswith("--config=")]
    end = 0 if not files else files[-1] + (1 if kept[files[-1]].startswith("--config=") else 2)
    return [*kept[:end], *texts, *kept[end:]]


def members_of_text(content: str) -> dict[str, dict[str, Any]]:
    """By section, the members in the text of a configuration, with what it says of each."""
    sections = _loaded(content)
    found = {}
    for section, argument in MEMBERS.items():
        given: Any = sections
        for key in (section, "init_args", argument):
            given = given.get(key) if isinstance(given, dict) else None
        if isinstance(given, dict):
            found[section] = given
    return found


def with_member(message: str, arguments: Sequence[str]) -> str:
    """The parser's message about an option of a member, of which it knows the class only, with the member.

    Args:
        message: Cleaned. Returned as it is if it is about anything else.
        arguments: Of the command line.
    """
    told = {one.named_in(message) for one in member_options(arguments)} - {None}
    return str(told.pop()) if len(told) == 1 else message


def unknown_member(section: str, name: str, known: Iterable[str]) -> str:
    """The message for options of a member that there is not."""
    names = list(known)
    option = f"{section}.{MEMBERS[section]}"
    if not names:
        return f"{option}.{name}: null leaves out a member, and no configuration before this names any."
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return (
        f"{option}.{name}: {name!r} is none of the members, which are {', '.join(names)}. {hint}A further one needs "
        f"its class first (--{option}.{name} CLASS)."
    )


def _loaded(text: str) -> Any:
    """The value of a text in YAML; the text itself if it is none, of which the parser says more."""
    with contextlib.suppress(yaml.YAMLError):
        content = yaml.safe_load(text)
        return content if isinstance(content, Mapping) else text
    return text
