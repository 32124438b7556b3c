"""The command: `train.py`, `python -m lightning_attn` and `lightning-attn` are this."""

import argparse
import contextlib
import dataclasses
import difflib
import enum
import errno
import inspect
import linecache
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytorch_lightning as pl
import yaml
from jsonargparse import namespace_to_dict
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info

from lightning_attn import run_directory
from lightning_attn.averaging import average_checkpoints
from lightning_attn.callbacks import (
    RUN_KEY,
    BestCheckpoint,
    InitialWeights,
    ProgressLines,
    SaveConfiguration,
    TrainingBar,
)
from lightning_attn.export import ExportFormat, export_checkpoint
from lightning_attn.loggers import MetricsLogger
from lightning_attn.resuming import LINES_KEY, LastCheckpoint, TrainingStopped
from lightning_attn.tasks import BaseTask
from lightning_attn.tasks.checkpoints import (
    CheckpointError,
    Weights,
    WholeCheckpoints,
    described_differences,
    read_checkpoint,
)

# Arguments of a single call, which are no part of the experiment that a configuration file describes.
_CALL_ARGUMENTS = ("config", "ckpt_path", "weights_only", "verbose", "return_predictions")
_CHECKPOINT_WORDS = ("auto", "last", "best")  # of the newest run of that name


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run keeps its files.

    Attributes:
        name: Folder of the run, `<root>/<task>/<name>/`; empty for the name of the first configuration file. A name
            that is taken gets a number: nothing is ever overwritten.
        root: Folder of all runs.
        checkpoint_every_n_steps: Write `last.ckpt` also at every so many optimizer steps; it is always written after
            a validation and at the end of an epoch.
        initial_weights: A checkpoint whose weights a new training begins with, perhaps of a run with another attention;
            for detection also torchvision's detector: "COCO_V1", or a .pth file of one; empty for none. A training that
            goes on has its own.
        initial_weights_strict: Whether all of them must fit; otherwise what fits is taken, and the log lists the rest.
        weights: Which weights of a run with averaging are validated, tested and predicted with: `"averaged"` or
            `"current"`.
    """

    name: str = ""
    root: str = "checkpoints"
    checkpoint_every_n_steps: int = 0
    initial_weights: str = ""
    initial_weights_strict: bool = True
    weights: Weights = "averaged"

    def __post_init__(self) -> None:
        if self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"run.name must be the name of a folder, not a path, got {self.name!r}.")
        if self.checkpoint_every_n_steps < 0:
            raise ValueError(f"run.checkpoint_every_n_steps must be at least 0, got {self.checkpoint_every_n_steps}.")


class CommandLine(LightningCLI):
    """LightningCLI with the run directory and the checkpoints of this project."""

    run_path: Path
    _typed: dict[str, str | None]  # what the command line itself says of the run's name and root
    _stored_name: str | None  # of the run whose configuration the checkpoint gave

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of the run directory."""
        parser.add_class_arguments(RunOptions, "run")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Also takes what no configuration says from the checkpoint, and checks that before anything is built."""
        typed = sys.argv[1:] if args is None else args
        self._typed, self._stored_name = {}, None
        if isinstance(typed, list):
            self._typed = {option: _value_of(f"--run.{option}", typed) for option in ("name", "root")}
            with _with_stored_configuration(typed) as (arguments, self._stored_name):
                self.config = parser.parse_args(arguments)
        else:
            super().parse_arguments(parser, args)
        checkpoint = self._option("ckpt_path")
        if checkpoint and checkpoint not in _CHECKPOINT_WORDS:
            read_checkpoint(checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer whose files all lie in the run directory."""
        assert self.subcommand is not None
        self.model.require_steps(self.subcommand)
        options = self.config_init[self.subcommand]["trainer"]
        run = RunOptions(**self._option("run").as_dict())
        checkpoint = self._checkpoint(run)
        stored = read_checkpoint(checkpoint) if checkpoint else {}
        if checkpoint and self.subcommand == "fit" and "optimizer_states" not in stored:
            raise CheckpointError(
                f"{checkpoint} holds a model, and not what a training goes on with. Begin a new one with its weights: "
                f"--run.initial_weights {checkpoint}"
            )
        if not checkpoint and self.subcommand != "fit":
            rank_zero_info(f"No --ckpt_path: {self.subcommand} takes the network as it is before any training.")
        self.config_init[self.subcommand]["ckpt_path"] = checkpoint and str(checkpoint)
        if checkpoint:
            self.model.checkpoint_path = str(checkpoint)
            if self.subcommand != "fit":
                self.model.use_checkpoint_for_data(self.datamodule, stored)
        self.run_path = self._run_directory(run, checkpoint)
        kwargs["default_root_dir"] = str(self.run_path)
        weights = "averaged" if self.subcommand == "fit" else run.weights
        kwargs["plugins"] = [*_listed(options["plugins"]), WholeCheckpoints(weights)]
        # Every sampler here knows its rank; a second one around it would share out the data twice.
        kwargs["use_distributed_sampler"] = False
        # Tasks log their arguments themselves, as plain values.
        kwargs["enable_autolog_hparams"] = False
        training = self.subcommand == "fit" and not options["fast_dev_run"]
        if self.subcommand != "fit":
            kwargs["enable_checkpointing"] = False
        if options["logger"] is None:
            kwargs["logger"] = _loggers(self.run_path, stored) if training else False
        configuration = self._resolved_configuration()
        if self.subcommand == "fit" and RUN_KEY in stored:
            _report_differences(stored[RUN_KEY]["configuration"], configuration)
        callbacks: list[Callback] = [SaveConfiguration(self.run_path, self.subcommand, configuration)]
        if self.subcommand == "fit" and run.initial_weights and not checkpoint:
            callbacks.append(InitialWeights(run.initial_weights, run.initial_weights_strict))
        if training and options["enable_checkpointing"] is not False:
            callbacks += _checkpoint_callbacks(self.run_path, self.model, run)
        if training and kwargs.get("logger", options["logger"]):
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        given = _listed(options["callbacks"])
        if options["enable_progress_bar"] is None and not any(isinstance(one, ProgressBar) for one in given):
            # Between what is typed and its answers no bar has a place.
            shows_bar = sys.stdout.isatty() and not getattr(self.datamodule, "reads_standard_input", False)
            kwargs["enable_progress_bar"] = shows_bar
            callbacks.append(TrainingBar() if shows_bar else ProgressLines())
        kwargs["callbacks"] = [*given, *callbacks]
        trainer = super().instantiate_trainer(**kwargs)
        rank_zero_info(f"Run directory: {self.run_path}")
        return trainer

    def _option(self, name: str) -> Any:
        return self.config[self.config["subcommand"]].get(name)

    def _run_name(self, run: RunOptions) -> str:
        if run.name or self._stored_name:
            return run.name or str(self._stored_name)
        configurations = self._option("config") or []
        return Path(str(configurations[0])).stem if configurations else type(self.model).__name__

    def _checkpoint(self, run: RunOptions) -> Path | None:
        """The checkpoint that is meant, if any.

        Raises:
            FileNotFoundError: If there is none to go on from.
        """
        checkpoint = self._option("ckpt_path")
        if not checkpoint:
            return None
        if checkpoint not in _CHECKPOINT_WORDS:
            return Path(checkpoint).absolute()
        file = "best.ckpt" if checkpoint == "best" else "last.ckpt"
        root, task, name = Path(run.root).absolute(), self.model.task_name, self._run_name(run)
        found = run_directory.newest(root, task, name, file)
        if found is None and (checkpoint != "auto" or self.subcommand != "fit"):
            raise FileNotFoundError(
                f"ckpt_path: {checkpoint!r} means the newest {file} in {root / task / name}, {name}-2 and so on, and "
                "there is none. Give the run's name (--run.name NAME, --run.root FOLDER) or the path of a checkpoint; "
                "'auto' begins a new run where there is nothing to go on from."
            )
        return found

    def _run_directory(self, run: RunOptions, checkpoint: Path | None) -> Path:
        """The checkpoint's own directory for going on with its run or evaluating it; a new one for other training.

        A run goes on from its `last.ckpt`. Another name, or another root on the command line, asks for a new directory.

        Raises:
            OSError: If it cannot be written to.
        """
        owner = run_directory.owner(checkpoint) if checkpoint else None
        if owner is not None and checkpoint is not None:
            # A configuration file that is given for an evaluation may name any run.
            name = run.name if self.subcommand == "fit" else self._typed.get("name")
            root = self._typed.get("root")
            its_own = (not name or run_directory.is_named(owner, name)) and (
                root is None or Path(root).absolute() / self.model.task_name == owner.parent
            )
            if its_own and self.subcommand != "fit":
                return run_directory.require_writable(owner)
            if its_own and checkpoint.name == "last.ckpt":
                return run_directory.reopen(owner)
        return run_directory.claim(Path(run.root).absolute(), self.model.task_name, self._run_name(run))

    def _resolved_configuration(self) -> dict[str, Any]:
        """Every option with its value, as any subcommand reads it from YAML."""
        assert self.subcommand is not None
        return {
            name: _plain(value)
            for name, value in namespace_to_dict(self.config[self.subcommand]).items()
            if name not in _CALL_ARGUMENTS
        }


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _report_differences(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Says what differs from the run so far; of `model` the task says it, and refuses what cannot be changed."""
    before, now = (
        {name: value for name, value in configuration.items() if name not in ("model", "run")}
        for configuration in (stored, current)
    )
    lines = described_differences(before, now)
    if lines:
        rank_zero_info(f"Options that differ from the checkpoint's; the current ones are used:{lines}")


@contextlib.contextmanager
def _with_stored_configuration(arguments: list[str]) -> Iterator[tuple[list[str], str | None]]:
    """Puts the configuration in a checkpoint before other arguments, if they name that and no configuration.

    For training it is the run's whole configuration. For evaluation it is model, data and precision, as the hardware
    may be another.

    Yields:
        The arguments, and the name of the run that the configuration is from.

    Raises:
        ConfigurationError: If neither the arguments nor the checkpoint say what is to be run.
    """
    subcommand = next((argument for argument in arguments if argument in CommandLine.subcommands()), None)
    configured = any(re.match(r"-c|--config($|=)", argument) for argument in arguments)
    checkpoint = _value_of("--ckpt_path", arguments)
    if subcommand is None or configured or not checkpoint:
        yield arguments, None
        return
    is_word = checkpoint in _CHECKPOINT_WORDS
    run = None if is_word else read_checkpoint(checkpoint).get(RUN_KEY)
    if not (isinstance(run, dict) and isinstance(run.get("configuration"), dict)):
        if _value_of("--model", arguments) and _value_of("--data", arguments):
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


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The last value that an option is given."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _plain(value: Any) -> Any:
    """An option as YAML can hold it."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _loggers(path: Path, stored: dict[str, Any]) -> list[Any]:
    """Loggers for a run; those of one that goes on keep what was logged up to its stored checkpoint."""
    first_step = stored.get("global_step", 0)
    purge: dict[str, Any] = {"purge_step": first_step} if first_step else {}
    return [
        MetricsLogger(path, first_step, stored.get(LINES_KEY, 0)),
        TensorBoardLogger(path, name="", version="", default_hp_metric=False, **purge),
    ]


def _checkpoint_callbacks(path: Path, task: BaseTask, run: RunOptions) -> list[Callback]:
    """`best.ckpt` by the task's monitored value; `last.ckpt` after validations, at ends of epochs and every n steps."""
    best = BestCheckpoint(
        dirpath=path,
        filename="best",
        monitor=task.monitor,
        mode=task.monitor_mode,
        save_top_k=1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [best, LastCheckpoint(path, run.checkpoint_every_n_steps)]


class ConfigurationError(ValueError):
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


def _essence(message: str) -> str:
    """Drops from a parser's message what says nothing about the mistake, and adds a way out for the usual ones."""
    dull = re.compile(
        r"^\s*(-\s*)?(Does not validate against any of the Union subtypes|Subtypes: |Errors:|Given value type: "
        r"|Given value: |Expected a <class 'NoneType'>)"
    )
    lines = [line.rstrip() for line in message.splitlines() if line.strip() and not dull.match(line)]
    text = re.sub(r"^\s*-\s*", "", "\n".join(lines))
    if re.search(r"Expected a <class 'str'>. Got value: -?[0-9.]+$", text, re.MULTILINE):
        text += (
            '\nA text is expected. Quote it in YAML, as in terms: "0010": '
            "unquoted, 0010 is the number 8 and 1111 an integer."
        )
    if re.search(r"Expected a <class 'tuple'>", text):
        text += '\nA list is expected, such as "[0.8, 1.0]"; "[]" is an empty one.'
    literal = re.search(r"Expected a typing.Literal\[(.*?)\]", text)
    if literal:
        text += f"\nOne of {literal.group(1)} is expected."
    if re.search(r"arguments are required: \w+\.model", text):
        text += (
            "\nGive a complete configuration first, such as -c configs/detection/own_images.yaml, and yours after it."
        )
    unknown = re.search(r"(?:not accept(?:ed)? option|Option|unrecognized arguments:) '?-*([\w.]+)", text)
    if unknown:
        wrong = unknown.group(1).split(".")
        close = [name for part in wrong for name in difflib.get_close_matches(part, _known_options(), n=1, cutoff=0.75)]
        close = [name for name in close if name not in wrong]
        if close:
            text += f"\nDid you mean {close[-1]!r}?"
    return text


def _known_options() -> set[str]:
    """Names of the arguments of everything that can be configured."""
    names = {"model", "data", "trainer", "run", "seed_everything", "ckpt_path", "class_path", "init_args"}
    pending: list[type] = [pl.Trainer, BaseTask, pl.LightningDataModule, RunOptions]
    while pending:
        configurable = pending.pop()
        pending += configurable.__subclasses__()
        for parameter in inspect.signature(configurable).parameters.values():
            names.add(parameter.name)
            if dataclasses.is_dataclass(parameter.default):
                names |= {field.name for field in dataclasses.fields(parameter.default)}
    return names


def main(args: ArgsType = None) -> None:
    """Runs the command.

    Args:
        args: Command-line arguments; None for those of the process.

    Raises:
        SystemExit: With status 2 and a message on the standard error if an option or the data is wrong, or some images
            of a prediction, which is complete without them; with 128 and the signal's number if a signal stopped a
            training, whose state is saved.
    """
    _configure_messages()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for classes of the user's own, whichever way the command was called
    try:
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list) and arguments and arguments[0] in _FURTHER_COMMANDS:
            _FURTHER_COMMANDS[arguments[0]](arguments[1:])
            return
        command = CommandLine(
            BaseTask,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            # Tasks store their arguments themselves; see BaseTask.
            load_from_checkpoint_support=False,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                "description": "Train, validate, test and run the paper's attention. Further commands: "
                "`average A.ckpt B.ckpt ...` makes one checkpoint of the mean of several, `export --ckpt_path A.ckpt` "
                "writes a model as safetensors and JSON.",
            },
            args=args,
        )
        if command.subcommand == "predict" and getattr(command.model, "bad_images", None):
            raise SystemExit(2)  # everything else was predicted; the log says what was not
    except TrainingStopped as stopped:
        if run_directory.is_rank_zero():
            print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from None
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError, MisconfigurationException) as error:
        message = _message(error)
        if message is None:
            raise
        if run_directory.is_rank_zero() or _has_lost_rank(str(error)):
            print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        run_directory.discard_if_unused()


def _average(arguments: list[str]) -> None:
    """Averages checkpoints."""
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} average", description="The equal mean of the weights of several checkpoints."
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--output", help="the file to write (average.ckpt beside the first)")
    options = parser.parse_args(arguments)
    path = average_checkpoints(options.checkpoints, options.output)
    rank_zero_info(f"The mean of {len(options.checkpoints)} checkpoints was written to {path}")


def _export(arguments: list[str]) -> None:
    """Writes a model for others."""
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} export",
        description="A trained model as safetensors, and what it is as JSON; and programs of its inference.",
    )
    parser.add_argument("--ckpt_path", required=True, help="the checkpoint")
    parser.add_argument("--output", help="the folder to write into (export beside the checkpoint)")
    parser.add_argument("--weights", choices=get_args(Weights), default="averaged", help="of a run that averages")
    parser.add_argument(
        "--format",
        choices=get_args(ExportFormat),
        default="safetensors",
        help="program: also what torch.export.load reads; onnx: also ONNX (safetensors)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images that a program is for (those that the data was resized to)",
    )
    options = parser.parse_args(arguments)
    size = None if options.size is None else (options.size[0], options.size[1])
    weights, *programs = export_checkpoint(
        options.ckpt_path, options.output, options.weights, format=options.format, size=size
    )
    rank_zero_info(f"The model was written to {weights} and {weights.with_suffix('.json').name}")
    for path in programs:
        rank_zero_info(f"A program that gives what the network gives was written to {path}; see programs.json")


_FURTHER_COMMANDS = {"average": _average, "export": _export}


def _message(error: Exception) -> str | None:
    """What a user reads of an error; None if it is a fault somewhere below, which needs its traceback."""
    if os.environ.get("LIGHTNING_ATTN_TRACEBACK"):
        return None
    text = str(error)
    if _is_full(error):
        return f"{text}. Nothing older was lost. Make room, then go on from the last checkpoint with --ckpt_path."
    if isinstance(error, MisconfigurationException):
        return text
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        return (
            f"{text}. If results cannot be written there, give another place: --run.root FOLDER, or --output for "
            "export and average."
        )
    if re.match(r"DataLoader worker \(pid.*(is killed by signal|exited unexpectedly)", text):
        return (
            f"{text.splitlines()[0]} A process that makes batches has died, often for want of memory: see what the "
            "system's log says of it, and use fewer (--data.num_workers). What was saved is whole; go on with "
            "--ckpt_path last."
        )
    if _has_lost_rank(text):
        return (
            "Another process of this training has died; what it said may stand above. What was saved is whole; go on "
            "with --ckpt_path last."
        )
    return _essence(text) if _is_ours(error) else None


def _has_lost_rank(text: str) -> bool:
    """Whether an error says that another rank has closed its connection."""
    return "gloo" in text and re.search(r"Connection (closed|reset) by peer|Broken pipe", text) is not None


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this project, for the user to read."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    if frame.f_globals.get("__name__", "").split(".")[0] not in ("lightning_attn", "datamodules", "jsonargparse"):
        return False
    # An operator of torch has no frame of its own: what it complains about is a fault of the caller.
    source = linecache.getline(frame.f_code.co_filename, line)
    return not isinstance(error, RuntimeError) or source.lstrip().startswith("raise")


def _configure_messages() -> None:
    """Shows what our packages report, and silences messages that a user can do nothing about, each with its reason."""
    for name in ("datamodules", "lightning_attn"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if run_directory.is_rank_zero() else logging.WARNING)
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())
    # jsonargparse renamed methods that Lightning calls (Lightning issue 21900).
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in (
        ".*does not have many workers.*",  # a memory-mapped cache needs none
        ".*WeightAveraging callback with a model that overrides.*",  # nothing is sharded here
        ".*(Checkpoint|Experiment logs) directory .* exists and is not empty.*",  # made before training starts
        ".*callbacks used to create the checkpoint need to be provided.*",  # a test needs no checkpoint callbacks
        ".*treespec, LeafSpec.*is deprecated.*",  # Lightning's own call
        ".*predict returned None if it was on purpose.*",  # predictions are gathered and written at the end
        ".*Total length of list across ranks is zero.*",  # training without validation, which the log says
        ".*The dirpath has changed from.*",  # a resumed run has a directory of its own
        ".*is not supported by the model summary.*",  # only the estimated size in the summary is meant
        ".*WeightAveraging state cannot be restored.*",  # a checkpoint's weights are the averaged ones
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises other products at every start.
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: " not in record.getMessage())
