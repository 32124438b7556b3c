"""The parser of the command, whose error messages are short."""

from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

import datamodules
from lightning_attn.errors import InputError

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

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigurationError(message) from ex

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


def listed(value: Any) -> list[Any]:
    """An option that may be one, several or none, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
