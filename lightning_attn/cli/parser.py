"""The parser of the command, whose complaints are short."""

from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from pytorch_lightning.cli import LightningArgumentParser

import datamodules
from lightning_attn.errors import InputError

# A field that takes any value, such as `options` of an attention, takes data: no object is made of a class_path in it.
set_parsing_settings(instantiate_subclass_spec_in_any=False)
datamodules.import_all()


class ConfigurationError(InputError):
    """Options that cannot be parsed; the message is fit to be shown."""


class Parser(LightningArgumentParser):
    """A parser that raises a short message instead of printing its whole usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Without this a misspelt --trainer.max_step would be taken for max_steps, in nested options too.
        super().__init__(*arguments, **options | {"allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises a parser's complaint.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(message) from ex


def listed(value: Any) -> list[Any]:
    """An option that may be one, several or none, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
