"""The configuration that a checkpoint holds, put before what the command line says."""

import contextlib
import tempfile
from collections.abc import Collection, Iterator

import yaml

from lightning_attn.callbacks import RUN_KEY
from lightning_attn.cli.front import CHECKPOINT_WORDS, option_values
from lightning_attn.cli.parser import ConfigurationError
from lightning_attn.tasks.checkpoints import read_checkpoint

__all__ = ["value_of", "with_stored_configuration"]


@contextlib.contextmanager
def with_stored_configuration(
    arguments: list[str], subcommands: Collection[str]
) -> Iterator[tuple[list[str], str | None]]:
    """Puts the configuration in a checkpoint before other arguments, which change it: options and `-c` files alike.

    For training it is the run's whole configuration. For evaluation it is model, data and precision, as the hardware
    may be another.

    Yields:
        The arguments, and the name of the run that the configuration is from.

    Raises:
        ConfigurationError: If neither the arguments nor the checkpoint say what is to be run.
    """
    subcommand = next((argument for argument in arguments if argument in subcommands), None)
    configured = value_of("-c", arguments) or value_of("--config", arguments)
    checkpoint = value_of("--ckpt_path", arguments)
    if subcommand is None or not checkpoint:
        yield arguments, None
        return
    is_word = checkpoint in CHECKPOINT_WORDS
    run = None if is_word else read_checkpoint(checkpoint).get(RUN_KEY)
    if not (isinstance(run, dict) and isinstance(run.get("configuration"), dict)):
        if configured or (value_of("--model", arguments) and value_of("--data", arguments)):
            yield arguments, None
            return
        found = "means the newest of a run" if is_word else "holds no configuration of a run"
        raise ConfigurationError(f"ckpt_path: {checkpoint!r} {found}. Give the configuration: -c FILE.")
    values = run["configuration"]
    if subcommand != "fit":
        values = {name: values[name] for name in ("seed_everything", "model", "data")} | {
            "trainer": {"precision": values["trainer"]["precision"]}
        }
    values = values | {"run": values.get("run", {}) | {"name": ""}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
        file.flush()
        begin = arguments.index(subcommand) + 1
        yield [*arguments[:begin], "--config", file.name, *arguments[begin:]], str(run.get("name", ""))


def value_of(option: str, arguments: list[str]) -> str | None:
    """The last value that an option is given."""
    return next(reversed([*option_values(arguments, option)]), None)
