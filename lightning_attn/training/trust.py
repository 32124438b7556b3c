"""Whose classes a checkpoint may name: those that are listed, and what the user of this call names or trusts.

A stored configuration may come from anyone. Nothing else in it is imported or instantiated.
"""

import collections.abc
import contextlib
import dataclasses
import datetime
import importlib
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from lightning_attn.errors import InputError

__all__ = ["Trust", "TrustError", "argument_types", "path_of", "public_classes", "texts_in"]

_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_WORD = re.compile(r"[\w/ :+#-]*")  # nothing that could be the path of an object to import
_PLAIN_TYPES = (
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
    Path,
    os.PathLike,
    datetime.timedelta,
    dict,
    list,
    tuple,
    set,
    Enum,
)
_LARGE = ("builtins", "lightning_fabric", "pytorch_lightning", "torch", "torchvision", *sys.stdlib_module_names)
_UNKNOWN = object()  # the type of an argument without an annotation
_MECHANISM = "mechanism"  # of an AttentionSpec: a word, or the import path of a class


class TrustError(InputError):
    """A checkpoint names a class that is not allowed; the message continues after the file's name.

    Attributes:
        package: What would have to be trusted, if that would help.
    """

    def __init__(self, message: str, package: str = "") -> None:
        super().__init__(message)
        self.package = package


@dataclasses.dataclass(frozen=True)
class Trust:
    """Which classes a checkpoint may name.

    Attributes:
        listed: Classes that may always be named, by every path and short name that means them.
        packages: Packages, modules or classes that the user trusts.
        named: Import paths that the user's own words of this call hold.
    """

    listed: Mapping[str, type] = dataclasses.field(default_factory=dict)
    packages: Collection[str] = ()
    named: Collection[str] = ()

    def __post_init__(self) -> None:
        for package in self.packages:
            if not isinstance(package, str) or not _CLASS_PATH.fullmatch(package):
                raise InputError(f"trust: {package!r} is no name of a package, such as 'mypackage' or 'my_module'.")

    def allows(self, path: str, *, short: bool = True) -> bool:
        """Whether a class of this path may be imported; nothing is imported to say so.

        Args:
            path: Its import path.
            short: Whether this call may name it by its last part, where its module has been imported already.
        """
        if path in self.listed or path in self.named:
            return True
        if any(path == package or path.startswith(f"{package}.") for package in self.packages):
            return True
        module, _, name = path.rpartition(".")
        return short and name in self.named and module in sys.modules

    def resolve(self, path: Any, base: type, key: str) -> type:
        """The class that a checkpoint names.

        Args:
            path: Its import path, or a listed short name.
            base: What it must be a subclass of.
            key: Where the checkpoint names it.

        Raises:
            TrustError: If it is not allowed, or is no such class.
        """
        if not isinstance(path, str) or not _CLASS_PATH.fullmatch(path):
            raise TrustError(f"is damaged: {key} is {str(path)[:80]!r}, which is no class")
        if not self.allows(path):
            raise self.refusal({path: key})
        found = self.listed.get(path)
        if found is None:
            module, _, name = path.rpartition(".")
            try:
                found = getattr(importlib.import_module(module or "builtins"), name)
            except (ImportError, AttributeError) as error:
                raise TrustError(
                    f"holds a {path} ({key}), which cannot be imported ({error}). Install its package, or start Python "
                    "in the folder that has the file, or with that folder in PYTHONPATH"
                ) from error
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise TrustError(f"names {path} ({key}), which is no {base.__name__}")
        return found

    def refusal(self, refused: Mapping[str, str]) -> TrustError:
        """What is raised for classes that are not allowed.

        Args:
            refused: Where the checkpoint names them, by import path.
        """
        packages = list(dict.fromkeys(p if p.split(".")[0] in _LARGE else p.split(".")[0] for p in refused))
        classes = " and ".join(f"{path} ({key})" for path, key in refused.items())
        options = " ".join(f"--trust {package}" for package in packages)
        in_vain = f" ({', '.join(self.packages)}, which this call trusts, has none of them)" if self.packages else ""
        if len(refused) == 1:
            said = (
                f"names the class {classes}, which is none of lightning_attn's{in_vain}: using it would run its code. "
            )
            said += f"Nothing was run. If you trust both, allow it: {options}"
        else:
            said = (
                f"names the classes {classes}, which are none of lightning_attn's{in_vain}: using them would run their "
            )
            said += f"code. Nothing was run. If you trust all, allow them: {options}"
        return TrustError(
            f"{said} on the command line, or trust={tuple(packages)!r} in Python; classes that options or -c files of "
            "this call name are allowed too",
            packages[0],
        )

    def require_values(self, values: Any, owner: type, key: str) -> None:
        """Refuses arguments of a class if an object that is not allowed could be made of them.

        Args:
            values: Plain values by argument.
            owner: The class.
            key: Where the checkpoint has them.

        Raises:
            TrustError: Names the class and the key.
        """
        if values is None:
            return
        if not isinstance(values, Mapping):
            raise TrustError(f"is damaged: {key} is no mapping of arguments")
        hints = argument_types(owner)
        # Of listed classes every argument is known; what others do with theirs is their own affair.
        otherwise = _UNKNOWN if owner in self.listed.values() else Any
        for name, value in values.items():
            self.require_value(value, hints.get(name, otherwise), f"{key}.{name}")

    def require_value(self, value: Any, hint: Any, key: str) -> None:
        """Refuses a value for an argument of some type if an object that is not allowed could be made of it."""
        named = _named_objects(hint)
        if named is not None and isinstance(value, Mapping):
            for name, one in value.items():
                self.require_value(one, named, f"{key}.{name}")
            return
        bases = [one for one in _classes_in(hint) if not issubclass(one, _PLAIN_TYPES) and one is not object]
        made = [one for one in bases if not dataclasses.is_dataclass(one)]
        if made:
            self._require_objects(value, made, key, words=str in _parts(hint))
            return
        described = next((one for one in bases if dataclasses.is_dataclass(one)), None)
        if described is not None and isinstance(value, Mapping) and "class_path" not in value:
            self._require_described(value, described, key)
            return
        if described is not None and isinstance(value, list | tuple):
            for place, one in enumerate(value):
                self.require_value(one, described, f"{key}[{place}]")
            return
        if described is not None and isinstance(value, str):
            # The parser would read a file of that name.
            raise TrustError(f"is damaged: {key} is {value[:80]!r}, and no section of options")
        self._require_no_class(value, key)
        if hint is _UNKNOWN or _is_imported(hint):
            for word in texts_in(value):
                if not (_WORD.fullmatch(word) or self.allows(word, short=False)):
                    raise TrustError(f"names {word[:80]!r} ({key}), which could be an object to import: it is refused")

    def _require_objects(self, value: Any, bases: list[type], key: str, *, words: bool) -> None:
        for place, one in enumerate(value if isinstance(value, list | tuple) else [value]):
            where = f"{key}[{place}]" if isinstance(value, list | tuple) else key
            if isinstance(one, list | tuple):
                self._require_objects(one, bases, where, words=words)
            elif isinstance(one, str):
                # Not the name of a file, which the parser would read.
                if not (words and _WORD.fullmatch(one) and not (one and Path(one).exists())):
                    self._resolve_any(one, bases, where)
            elif isinstance(one, Mapping) and "class_path" in one:
                found = self._resolve_any(one["class_path"], bases, where)
                if one.keys() - {"class_path", "init_args", "dict_kwargs"}:
                    raise TrustError(f"is damaged: {where} is no class_path with init_args")
                if one.get("dict_kwargs") and found in self.listed.values():
                    raise TrustError(f"is damaged: {where}.dict_kwargs holds arguments that {path_of(found)} has not")
                self.require_values(one.get("init_args"), found, f"{where}.init_args")
                self.require_values(one.get("dict_kwargs"), found, f"{where}.dict_kwargs")
            else:
                self._require_no_class(one, where)

    def _resolve_any(self, path: Any, bases: list[type], key: str) -> type:
        found = self.resolve(path, object, key)
        if not issubclass(found, tuple(bases)):
            raise TrustError(f"names {path} ({key}), which is no {' or '.join(base.__name__ for base in bases)}")
        return found

    def _require_described(self, values: Mapping[Any, Any], owner: type, key: str) -> None:
        hints = typing.get_type_hints(owner)
        for name, value in values.items():
            if name == _MECHANISM and isinstance(value, str) and "." in value:
                self.resolve(value, nn.Module, f"{key}.{name}")
            else:
                self.require_value(value, hints.get(str(name), Any), f"{key}.{name}")

    def _require_no_class(self, value: Any, key: str) -> None:
        """Where values are of any kind, none of them may ask for an object."""
        if isinstance(value, Mapping):
            if "class_path" in value and not self.allows(str(value["class_path"]), short=False):
                self.resolve(value["class_path"], object, key)
            for name, inner in value.items():
                self._require_no_class(inner, f"{key}.{name}")
        elif isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                self._require_no_class(inner, f"{key}[{place}]")


def path_of(owner: type) -> str:
    """The import path of a class."""
    return f"{owner.__module__}.{owner.__qualname__}"


def public_classes(modules: Collection[types.ModuleType], base: type) -> dict[str, type]:
    """The public classes of some modules that have a base, by short name and by all of their import paths."""
    found: dict[str, type] = {}
    for module in modules:
        for name in module.__all__:
            one = getattr(module, name)
            if inspect.isclass(one) and issubclass(one, base):
                paths = [f"{module.__name__}.{name}", path_of(one)]
                paths += [path.removeprefix("lightning_attn.") for path in paths if ".datamodules." in path]
                found |= dict.fromkeys((name, *paths), one)
    return found


def argument_types(owner: type, *, tolerant: bool = True) -> dict[str, Any]:
    """The annotated types of a constructor's arguments; a subclass may pass arguments on as **arguments.

    Args:
        owner: The class.
        tolerant: Whether annotations that cannot be resolved are passed over.
    """
    hints: dict[str, Any] = {}
    for ancestor in reversed(owner.__mro__):
        if "__init__" in vars(ancestor):
            with contextlib.suppress(*((NameError, TypeError) if tolerant else ())):
                hints |= typing.get_type_hints(vars(ancestor)["__init__"])
    return hints


def _parts(hint: Any) -> Iterator[Any]:
    """A type and the types in it."""
    yield hint
    if typing.get_origin(hint) is not typing.Literal:
        for one in typing.get_args(hint):
            if not isinstance(one, list):  # of the arguments of a callable
                yield from _parts(one)


def _classes_in(hint: Any) -> list[type]:
    return [
        one
        for one in _parts(hint)
        if inspect.isclass(one) and typing.get_origin(one) is None and not _is_protocol_of_containers(one)
    ]


def _named_objects(hint: Any) -> Any:
    """The class of the values of a dictionary of objects by name, such as `dict[str, BaseTask | None]`; else None."""
    if typing.get_origin(hint) is not dict:
        return None
    _, values = typing.get_args(hint)
    if typing.get_origin(values) in (typing.Union, types.UnionType):
        classes = [one for one in typing.get_args(values) if one is not type(None)]
        values = classes[0] if len(classes) == 1 else values
    is_object = inspect.isclass(values) and typing.get_origin(values) is None and not issubclass(values, _PLAIN_TYPES)
    return values if is_object and values is not object and not dataclasses.is_dataclass(values) else None


def _is_protocol_of_containers(one: type) -> bool:
    return one.__module__ in ("typing", "collections.abc")


def _is_imported(hint: Any) -> bool:
    """Whether the parser makes an object of a text, by importing it."""
    origins = [typing.get_origin(one) or one for one in _parts(hint)]
    return collections.abc.Callable in origins or type in origins


def texts_in(value: Any) -> Iterator[str]:
    """All texts in nested containers, names in mappings among them."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            pending += one
