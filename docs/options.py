"""A Markdown extension of the site: tables of options, made from the classes that the command line takes them from.

A line `[options: lightning_attn.tasks.DetectionTask model]` becomes a table of every option that the class can be given
below `model` in YAML, as jsonargparse sees them, with a section for each dataclass among them.
"""

import html
import importlib
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import SUPPRESS, ArgumentParser
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from typing_extensions import override

_DIRECTIVE = re.compile(r"^\[options: (?P<path>[\w.]+) (?P<key>\w+)\]$")


def _load(path: str) -> type:
    module, name = path.rsplit(".", 1)
    loaded: type = getattr(importlib.import_module(module), name)
    return loaded


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(part) for part in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return ", ".join(_value(value) for value in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        parts = [part for part in get_args(annotation) if part is not Ellipsis]
        if Ellipsis in get_args(annotation) or len(parts) == 1:
            return f"list of {_type_name(parts[0])}"
        return "[" + ", ".join(_type_name(part) for part in parts) + "]"
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        return f"mapping of {_type_name(key)} to {_type_name(value)}"
    names = {str: "string", int: "integer", float: "number", bool: "true or false", Any: "any"}
    if annotation in names:
        return names[annotation]
    return f"`{getattr(annotation, '__name__', annotation)}`"


def _value(value: Any) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        # An unquoted 0010 would be the number 8.
        return f'`"{value}"`' if not value or value.isdigit() else f"`{value}`"
    if isinstance(value, float):
        return f"`{value:.4g}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(_value(part).strip('`') for part in value)}]`"
    return f"`{value}`"


def _row(name: str, action: Any) -> str:
    default = "required" if action.required else _value(action.default)
    help_text = " ".join((action.help or "").replace("%%", "%").split())
    annotation = getattr(action, "_typehint", None) or action.type or (bool if "Bool" in type(action).__name__ else str)
    # What is code in the docstring stays code; elsewhere a `<` is no tag.
    parts = help_text.split("`")
    text = "`".join(part if index % 2 else html.escape(part, quote=False) for index, part in enumerate(parts))
    text = re.sub(
        r"\bdocs/(\w+\.md)", r"[\1](../../\1)", text
    )  # as docstrings name pages; seen from reference/options/
    cells = [f"`{name}`", _type_name(annotation), default, text]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def options_of(path: str, key: str) -> list[str]:
    """Lines of Markdown: the options of the class at an import path, below `key` in YAML.

    Args:
        path: Import path of the class.
        key: Where its arguments lie in YAML, such as "model".
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_load(path), key, fail_untyped=False)
    groups: dict[str, list[Any]] = {key: []}
    for action in parser._actions:
        group, _, name = action.dest.rpartition(".")
        if name and action.default != SUPPRESS:  # the rest shows help and reads files
            groups.setdefault(group, []).append(action)
    lines: list[str] = []
    for group, actions in groups.items():
        if group != key:
            lines += ["", f"#### `{group}`"]
        lines += ["", "| option | type | default | |", "| --- | --- | --- | --- |"]
        lines += [_row(action.dest.rpartition(".")[2], action) for action in actions]
    return [*lines, ""]


class _Options(Preprocessor):
    @override
    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        for line in lines:
            found = _DIRECTIVE.match(line)
            result += options_of(found["path"], found["key"]) if found else [line]
        return result


class OptionsExtension(Extension):
    """Replaces the lines of the module's docstring."""

    @override
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Options(md), "options", priority=100)  # before fenced code and tables are found


def makeExtension(**options: object) -> OptionsExtension:  # noqa: N802 (the name that Markdown calls)
    """The extension, as Python-Markdown asks for it."""
    return OptionsExtension(**options)
