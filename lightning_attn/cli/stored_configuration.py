"""The configuration that a checkpoint holds, as defaults of the parser: data, of which nothing is run."""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning import callbacks, strategies
from pytorch_lightning.plugins import environments
from pytorch_lightning.utilities import rank_zero_info

import lightning_attn.callbacks
from lightning_attn import datamodules, tasks
from lightning_attn.cli.front import CHECKPOINT_WORDS, option_values
from lightning_attn.cli.parser import ConfigurationError, listed
from lightning_attn.cli.run_options import RunOptions
from lightning_attn.tasks import BaseTask
from lightning_attn.training.checkpoints import CheckpointError, read_checkpoint, stored_run
from lightning_attn.training.trust import Trust, TrustError, argument_types, path_of, public_classes, texts_in

__all__ = ["TRUST_HELP", "needed_trust", "stored_configuration", "trust_of", "value_of"]

TRUST_HELP = (
    "A package of yours whose classes a checkpoint may name: task, data, mechanism, callback. Repeat it for more. "
    "Classes that this call's options or -c files name need no mention."
)

# Of Lightning's classes, those that compute or observe; none that calls its arguments, or writes to a given path.
_LIGHTNING_CLASSES = {
    callbacks: (
        *("BatchSizeFinder", "DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler"),
        *("LearningRateFinder", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "RichModelSummary"),
        *("RichProgressBar", "StochasticWeightAveraging", "Timer", "TQDMProgressBar"),
    ),
    strategies: ("DDPStrategy", "FSDPStrategy", "SingleDeviceStrategy"),
    environments: ("LightningEnvironment", "MPIEnvironment", "SLURMEnvironment", "TorchElasticEnvironment"),
}
# Where files are written is a choice of this call, never of a checkpoint.
_PLACES = {
    "trainer": ("default_root_dir", "logger", "model_registry", "profiler"),
    "run": ("root",),
    "data": ("cache_dir", "download"),
    "miniature data": ("cache_dir", "download", "root"),  # which are drawn into it
    "trainer.callbacks": ("dirpath",),
}
_MINIATURE = (
    datamodules.MiniatureDetectionDataModule,
    datamodules.MiniatureSegmentationDataModule,
    datamodules.MiniatureStreetDetectionDataModule,
    datamodules.MiniatureTranslationDataModule,
)
# Of a checkpoint callback: formats of Python could read attributes, and fill the memory.
_FILENAME = re.compile(r"(?!\.\.?$)(?:[\w .,=+@%-]|\{[\w/ @-]+(?::0?\d{0,2}(?:\.\d{1,2})?[dfeg]?)?\})*")


@dataclasses.dataclass(frozen=True)
class StoredConfiguration:
    """What a call takes from the checkpoint that it names.

    Attributes:
        checkpoint: The file.
        subcommand: Of the call.
        name: Of the run.
        defaults: For the subcommand's options, by section: `seed_everything`, `model`, `data`, `trainer`, `run`.
    """

    checkpoint: str
    subcommand: str
    name: str
    defaults: dict[str, Any]


def stored_configuration(arguments: list[str], subcommands: Collection[str]) -> StoredConfiguration | None:
    """The configuration in a checkpoint, as defaults for the options and `-c` files of a call.

    For training it is the run's complete configuration. For evaluation it is model, data and precision, as the hardware
    may be another. Places that files are written to are left out.

    Returns:
        Nothing if the call names no checkpoint, or one without a configuration but another one.

    Raises:
        ConfigurationError: If neither the arguments nor the checkpoint name a model and data.
        CheckpointError: If the checkpoint is damaged, or names a class that is not to be trusted.
    """
    subcommand = next((argument for argument in arguments if argument in subcommands), None)
    configured = value_of("-c", arguments) or value_of("--config", arguments)
    checkpoint = value_of("--ckpt_path", arguments)
    if subcommand is None or not checkpoint:
        return None
    is_word = checkpoint in CHECKPOINT_WORDS
    run = {} if is_word else stored_run(read_checkpoint(checkpoint))
    if "configuration" not in run:
        if configured or (value_of("--model", arguments) and value_of("--data", arguments)):
            return None
        found = "means the newest of a run" if is_word else "holds no configuration of a run"
        raise ConfigurationError(f"ckpt_path: {checkpoint!r} {found}. Give the configuration: -c FILE.")
    trust = trust_of(arguments)
    try:
        values = _allowed(run["configuration"], subcommand, trust, _given(arguments))
    except TrustError as error:
        raise CheckpointError(f"{checkpoint} {error}.") from error
    try:
        name = RunOptions(name=str(run.get("name", ""))).name
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}") from error
    return StoredConfiguration(checkpoint, subcommand, name, values)


def trust_of(arguments: Sequence[str]) -> Trust:
    """Which classes a checkpoint of this call may name."""
    listed = public_classes((tasks,), BaseTask) | public_classes((datamodules,), pl.LightningDataModule)
    listed |= public_classes((lightning_attn.callbacks,), pl.Callback)
    for module, names in _LIGHTNING_CLASSES.items():
        for name in names:
            one = getattr(module, name)
            listed |= dict.fromkeys((name, f"{module.__name__}.{name}", path_of(one)), one)
    return Trust(listed, tuple(option_values(arguments, "--trust")), frozenset(_words(arguments)))


def needed_trust(configuration: dict[str, Any]) -> list[str]:
    """The packages of the user's own that a checkpoint with this configuration is evaluated with."""
    packages: list[str] = []
    while True:
        try:
            _allowed(configuration, "test", trust_of([f"--trust={package}" for package in packages]), set())
        except TrustError as error:
            if not error.package or error.package in packages:
                return packages
            packages.append(error.package)
        else:
            return packages


def _words(arguments: Sequence[str]) -> Iterator[str]:
    """Every word of this call: of its options, and of its configuration files."""
    for argument in arguments:
        yield from re.split(r"[=\s]", argument)
    for content in _files(arguments):
        yield from texts_in(content)


def _files(arguments: Sequence[str]) -> Iterator[Any]:
    """The contents of this call's configuration files; the parser refuses one that cannot be read."""
    for path in option_values(arguments, "-c", "--config"):
        with contextlib.suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
            yield yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))


def _given(arguments: list[str]) -> set[str]:
    """Which of model, data and trainer.callbacks this call gives itself, by an option or in a `-c` file."""
    given = {name for name in ("model", "data") if value_of(f"--{name}", arguments)}
    if value_of("--trainer.callbacks", arguments) is not None:
        given.add("trainer.callbacks")
    for content in _files(arguments):
        if not isinstance(content, dict):
            continue
        for name in ("model", "data"):
            section = content.get(name)
            if isinstance(section, str) or (isinstance(section, dict) and "class_path" in section):
                given.add(name)
        trainer = content.get("trainer")
        if isinstance(trainer, dict) and "callbacks" in trainer:
            given.add("trainer.callbacks")
    return given


def _classes_named(values: Any, key: str) -> Iterator[tuple[str, str]]:
    """Import paths of classes in nested options, and the keys that they are under."""
    pending = [(values, key)]
    while pending:
        one, place = pending.pop()
        if isinstance(one, Mapping):
            if isinstance(one.get("class_path"), str):
                yield one["class_path"], place
            pending += [(inner, f"{place}.{name}") for name, inner in one.items()]
        elif isinstance(one, list | tuple):
            pending += [(inner, f"{place}[{number}]") for number, inner in enumerate(one)]


def _without_replaced(stored: dict[str, Any], subcommand: str, trust: Trust, given: Collection[str]) -> dict[str, Any]:
    """A stored configuration without what this call replaces, if that names classes that are not allowed.

    Raises:
        TrustError: If other parts name such classes; all are looked at before the first is imported.
    """
    kept = dict(stored)
    trainer = stored.get("trainer")
    parts = {"model": stored.get("model"), "data": stored.get("data")}
    if subcommand == "fit" and isinstance(trainer, dict):
        parts["trainer.callbacks"] = trainer.get("callbacks")
    refused: dict[str, str] = {}
    for part, values in parts.items():
        wrong = {path: key for path, key in _classes_named(values, part) if not trust.allows(path)}
        if wrong and part in given:
            if part == "trainer.callbacks":
                kept["trainer"] = {**stored["trainer"], "callbacks": None}
            else:
                kept[part] = {}
        else:
            refused |= wrong
    if refused:
        raise trust.refusal(refused)
    return kept


def _allowed(stored: dict[str, Any], subcommand: str, trust: Trust, given: Collection[str]) -> dict[str, Any]:
    """What a call takes from a stored configuration.

    Args:
        stored: The configuration.
        subcommand: For what.
        trust: Which classes it may name.
        given: Parts that the call gives itself, which are left out where they name other classes.

    Raises:
        TrustError: If a part is not what belongs there, or could become an object of a class that is not allowed.
    """
    stored = _without_replaced(stored, subcommand, trust, given)
    seed = stored.get("seed_everything", 0)
    if seed is not None and not isinstance(seed, bool | int):
        raise TrustError(f"is damaged: seed_everything is {str(seed)[:40]!r}")
    model, data, trainer, run = (_section(stored, name) for name in ("model", "data", "trainer", "run"))
    for name, section, base in (("model", model, BaseTask), ("data", data, pl.LightningDataModule)):
        if not section and name in given:
            continue
        if not isinstance(section.get("class_path"), str):
            raise TrustError(f"is damaged: its configuration names no class of {name}")
        trust.require_value(section, base, name)
    if subcommand == "fit":
        hints = argument_types(pl.Trainer)
        trainer = {name: trainer[name] for name in trainer.keys() & hints.keys()}
        _say_left_out("trainer", trainer)
        trainer["callbacks"] = _callbacks(trainer.get("callbacks"))
    else:
        hints = {"precision": str}
        trainer = {"precision": trainer.get("precision")}
    trainer = _without_places("trainer", trainer)
    for name, value in trainer.items():
        trust.require_value(value, hints[name], f"trainer.{name}")
    trust.require_value(run, str, "run")
    values = {
        "seed_everything": seed,
        "model": model,
        "data": _data(data, trust, say=subcommand == "fit"),
        "trainer": trainer,
        "run": _without_places("run", run) | {"name": ""},
    }
    return {name: value for name, value in values.items() if value != {}}


def _data(section: dict[str, Any], trust: Trust, *, say: bool) -> dict[str, Any]:
    """A DataModule, and those that it merges, without places that they would write to."""
    arguments = section.get("init_args")
    if not isinstance(arguments, dict):
        return section
    found = trust.listed.get(section.get("class_path", ""))
    part = "miniature data" if found is not None and issubclass(found, _MINIATURE) else "data"
    if say:
        _say_left_out(part, arguments)
    kept = _without_places(part, arguments)
    members = kept.get("members")
    if isinstance(members, list):
        kept["members"] = [_data(one, trust, say=say) if isinstance(one, dict) else one for one in members]
    elif isinstance(members, dict):
        kept["members"] = {
            name: _data(one, trust, say=say) if isinstance(one, dict) else one for name, one in members.items()
        }
    return section | {"init_args": kept}


def _section(stored: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = stored.get(name) or {}
    if not isinstance(section, dict):
        raise TrustError(f"is damaged: {name} of its configuration is no section of options")
    return section


def _without_places(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the places that they would write to."""
    return {
        name: value for name, value in options.items() if name not in _PLACES[part.partition("[")[0]] or value is False
    }


def _say_left_out(part: str, options: Mapping[str, Any]) -> None:
    for name in _PLACES[part.partition("[")[0]]:
        value = options.get(name)
        if value and not (name == "logger" and value is True):
            rank_zero_info(
                f"{part.split()[-1]}.{name} of the checkpoint is not taken, since this call decides where files are "
                f"written; it was {str(value)[:200]!r}. To have it again, give it as an option or by -c."
            )


def _callbacks(stored: Any) -> list[Any] | None:
    """Callbacks that write nowhere else than into the run directory."""
    kept: list[Any] = []
    for place, one in enumerate(listed(stored)):
        arguments = one.get("init_args") if isinstance(one, dict) else None
        if not isinstance(arguments, dict):
            kept.append(one)
            continue
        key = f"trainer.callbacks[{place}]"
        filename = arguments.get("filename")
        if isinstance(filename, str) and not _FILENAME.fullmatch(filename):
            raise TrustError(
                f"names {filename[:80]!r} ({key}.filename), which is no file name of the run directory: letters, and "
                "logged values such as {epoch:02d} or {val/loss:.3f}"
            )
        _say_left_out(key, arguments)
        kept.append(one | {"init_args": _without_places(key, arguments)})
    return kept or None


def value_of(option: str, arguments: list[str]) -> str | None:
    """The last value that an option is given."""
    return next(reversed([*option_values(arguments, option)]), None)
