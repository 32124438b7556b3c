"""The parser of the command, whose error messages are short."""

from typing import Any, NoReturn

from jsonargparse import Namespace, set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from lightning_attn import datamodules
from lightning_attn.errors import InputError

# A field that takes any value, such as `options` of an attention, takes data: no object is made of a class_path in it.
set_parsing_settings(instantiate_subclass_spec_in_any=False)
datamodules.import_all()


_NAMED = ("model.init_args.tasks", "data.init_args.members")
"""Options whose values are objects by names of the user."""

OPTION_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException)
"""What Lightning raises about options."""


class ConfigurationError(InputError):
    """Options that cannot be parsed."""


class Parser(LightningArgumentParser):
    """A parser that raises a short message instead of printing its whole usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Without this a misspelt --trainer.max_step would be taken for max_steps, in nested options too.
        super().__init__(*arguments, **options | {"allow_abbrev": False})
        self._named: dict[str, dict[str, Any]] = {}

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
        for option in _NAMED:
            section, *rest = option.split(".")
            found: Any = sections.get(section)
            for key in rest:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, dict):
                self._named[option] = found

    @override
    def parse_path(self, *arguments: Any, **options: Any) -> Any:
        """Reads a configuration file; an overlay may change some of the tasks or members of those before it."""
        parsed = super().parse_path(*arguments, **options)
        for option in _NAMED:
            given = parsed.get(option)
            if isinstance(given, dict):
                before = self._named.get(option, {})
                for name, value in given.items():
                    if value is None and name not in before:
                        known = ", ".join(before) or "none before it"
                        self.error(f"{option}.{name}: null leaves out what an earlier file names, which is {known}.")
                parsed[option] = self._named[option] = before | {
                    name: _completed(value, before.get(name)) for name, value in given.items()
                }
        return parsed

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


def listed(value: Any) -> list[Any]:
    """An option that may be one, several or none, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
