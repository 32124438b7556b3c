"""Parses the `data` section of a configuration, for commands that need no model."""

import sys
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from jsonargparse import SUPPRESS, ArgumentParser

from lightning_attn import datamodules
from lightning_attn.configurations import with_located_files

__all__ = ["data_parser", "parse_data"]

# Sections of a configuration that are ignored.
_OTHER_SECTIONS = ("seed_everything", "trainer", "model", "run")


def data_parser(program: str, description: str) -> ArgumentParser:
    """A parser of training configurations that uses their section `data` alone; options can be added.

    Args:
        program: Name of the command, for its help.
        description: What the command does.
    """
    datamodules.import_all()
    parser = ArgumentParser(prog=program, description=description)
    parser.add_argument("-c", "--config", action="config", help="configuration file; its data section is used")
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=True)
    for section in _OTHER_SECTIONS:
        parser.add_argument(f"--{section}", type=Any, help=SUPPRESS)
    return parser


def parse_data(parser: ArgumentParser, args: Sequence[str] | None) -> tuple[Any, pl.LightningDataModule]:
    """The options, and the DataModule that they describe.

    Args:
        parser: From `data_parser`.
        args: Command-line arguments; None for those of the process.

    Raises:
        ValueError: If an argument of the DataModule is wrong.
    """
    options = parser.parse_args(with_located_files(sys.argv[1:] if args is None else args))
    for section in _OTHER_SECTIONS:
        options.pop(section)  # or its classes would be instantiated
    return options, parser.instantiate(options).data
