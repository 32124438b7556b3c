"""The parser of the command, whose error messages are short."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jsonargparse import Namespace, set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from lightning_attn import datamodules
from lightning_attn.cli.member_options import (
    MEMBERS,
    MemberOption,
    member_options,
    members_of_text,
    nulls_as_text,
    unknown_member,
)
from lightning_attn.errors import InputError
from lightning_attn.tasks import BaseTask
from lightning_attn.tasks.base import argument_default

# A field that takes any value, such as `options` of an attention, takes data: no object is made of a class_path in it.
set_parsing_settings(instantiate_subclass_spec_in_any=False)
datamodules.import_all()

OPTION_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException)
"""What Lightning raises about options."""


class ConfigurationError(InputError):
    """Options that cannot be parsed."""


class Parser(LightningArgumentParser):
    """A parser that raises a short message instead of printing its whole usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Without this a misspelt --trainer.max_step would be taken for max_steps, in nested options too.
        super().__init__(*arguments, **options | {"allow_abbrev": False})
        self._members: dict[str, dict[str, Any]] = {}  # by section, of the configurations so far
        self._given: dict[tuple[str, str], set[str]] = {}

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigurationError(message) from ex

    def set_stored_defaults(self, sections: dict[str, Any]) -> None:
        """Takes defaults from a stored configuration, which overlays then change.

        Args:
            sections: Its options by section, such as `model`.
        """
        options: dict[str, Any] = {}
        for name, section in sections.items():  # model and data each as one, others singly
            if name in ("trainer", "run"):
                options |= {f"{name}.{option}": value for option, value in section.items()}
            else:
                options[name] = section
        self.set_defaults(options)
        for section, argument in MEMBERS.items():
            given = (sections.get(section) or {}).get("init_args")
            if isinstance(given, dict) and isinstance(given.get(argument), dict):
                self._members[section] = given[argument]

    @override
    def parse_string(self, content: str, *arguments: Any, **options: Any) -> Any:
        """Reads a configuration, of a file too; it may change some of the members of those before it."""
        texts = members_of_text(content)
        for section, given in texts.items():
            before = self._members.get(section, {})
            for name, value in given.items():
                has_class = value is not None and not (isinstance(value, dict) and "class_path" not in value)
                if name not in before and not has_class and (before or value is None):
                    self.error(unknown_member(section, str(name), before))
        parsed = super().parse_string(content, *arguments, **options)
        for section, given in texts.items():
            option = f"{section}.init_args.{MEMBERS[section]}"
            read = parsed.get(option)
            if isinstance(read, dict):
                before = self._members.get(section, {})
                parsed[option] = self._members[section] = before | {
                    name: _completed(value, before.get(name)) for name, value in read.items()
                }
                self._note(section, {name: _arguments(value) for name, value in given.items()})
        return parsed

    def _note(self, section: str, given: Mapping[str, set[str]]) -> None:
        for name, keys in given.items():
            self._given.setdefault((section, name), set()).update(keys)

    @override
    def parse_args(self, args: Any = None, *arguments: Any, **options: Any) -> Any:
        """Parses a call; what is wrong with the name of a member is said before what follows from it."""
        members = list(member_options(args)) if isinstance(args, list) and args and args[0].startswith("-") else []
        if not members:
            return super().parse_args(args, *arguments, **options)
        try:
            parsed = super().parse_args(nulls_as_text(args), *arguments, **options)
        except ConfigurationError:
            self._require_members(members)
            raise
        self._require_members(members)
        for one in members:
            self._note(one.section, {one.name: one.keys})
        return parsed

    def _require_members(self, options: Iterable[MemberOption]) -> None:
        """Refuses options of members that there are not.

        Raises:
            ConfigurationError: Names the members.
        """
        names = {section: list(members) for section, members in self._members.items()}
        for one in options:
            known = names.setdefault(one.section, [])
            if one.names_class and one.name not in known:
                known.append(one.name)
            elif known and one.name not in known:
                self.error(unknown_member(one.section, one.name, known))

    def given(self, section: str, name: str) -> set[str]:
        """Which arguments of a member this call gives; the others are defaults, or of a checkpoint."""
        return self._given.get((section, name), set())

    @override
    def instantiate_classes(self, *arguments: Any, **options: Any) -> Any:
        """Also raises what a constructor raised.

        jsonargparse itself, where an option may be of several classes, tries each, and then raises one ValueError about
        all of them.

        Raises:
            ConfigurationError: If one of Lightning's classes refuses its arguments.
        """
        errors: list[Exception] = []

        def instantiate(owner: type, *arguments: Any, **options: Any) -> Any:
            if issubclass(owner, BaseTask):  # a value like the default is it: a joint task tells others by that
                defaults = {name: argument_default(owner, name) for name in options}
                options |= {name: one for name, one in defaults.items() if one is not None and one == options[name]}
            try:
                return owner(*arguments, **options)
            except OPTION_ERRORS as error:
                of_lightning = owner.__module__.startswith(("pytorch_lightning.", "lightning_fabric."))
                errors.append(ConfigurationError(f"{owner.__name__}: {error}") if of_lightning else error)
                raise

        self.add_instantiator(instantiate, object)
        try:
            return super().instantiate_classes(*arguments, **options)
        except OPTION_ERRORS:
            if not errors:
                raise
        raise errors[0]


def _completed(value: Any, before: Any) -> Any:
    """An object's options with the class that an earlier file gave, where this one gives `init_args` alone."""
    if isinstance(value, Namespace) and isinstance(before, Namespace | dict) and "class_path" not in value:
        value["class_path"] = before.get("class_path")
    return value


def _arguments(value: Any) -> set[str]:
    """The arguments that the description of an object gives."""
    given = value.get("init_args") if isinstance(value, dict) else None
    return set(given) if isinstance(given, dict) else set()


def listed(value: Any) -> list[Any]:
    """An option that may be one, several or none, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
