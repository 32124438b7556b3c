"""LightningCLI with the run directory and the checkpoints of this project."""

import atexit
import enum
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import namespace_to_dict
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelSummary, ProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies.launchers import subprocess_script
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_attn.cli.checks import (
    check_members,
    check_open_files,
    check_trainer,
    check_values,
    members_of,
    trainer_errors,
)
from lightning_attn.cli.front import CHECKPOINT_WORDS, command_name
from lightning_attn.cli.launching import observe_ranks, settle_collectives, watch_rendezvous
from lightning_attn.cli.parser import ConfigurationError, Parser, listed
from lightning_attn.cli.run_options import RunOptions
from lightning_attn.cli.stored_configuration import TRUST_HELP, needed_trust, stored_configuration, value_of
from lightning_attn.datamodules.loaders import LOADERS, require_loader
from lightning_attn.errors import MissingFileError
from lightning_attn.tasks import BaseTask
from lightning_attn.tasks.multitask import joint_arguments
from lightning_attn.training import run_directory
from lightning_attn.training.callbacks import (
    BestCheckpoint,
    InitialWeights,
    InterruptionNote,
    MemberCheckpoint,
    SaveConfiguration,
    TopCheckpoints,
)
from lightning_attn.training.checkpoint_keys import LINES_KEY, OPTIMIZERS_KEY, STEP_KEY, WEIGHTS_KEY
from lightning_attn.training.checkpoints import (
    AtomicCheckpointIO,
    CheckpointError,
    count_numbers,
    described_differences,
    read_checkpoint,
    stored_run,
)
from lightning_attn.training.loggers import MetricsLogger, placed_loggers
from lightning_attn.training.progress import NetworkSummary, ProgressLines, TrainingBar, TrainingSummary
from lightning_attn.training.resuming import LastCheckpoint
from lightning_attn.training.scores import best_mode

# Arguments of a single call, which are no part of the experiment that a configuration file describes.
_CALL_ARGUMENTS = ("config", "ckpt_path", "weights_only", "verbose", "return_predictions", "trust")

_CHECKPOINT_HELP = (
    "Checkpoint: a path, or 'last' or 'best' of the newest run of this name; for fit also 'auto', which is 'last' or, "
    "if there is none, a new run. Its configuration is the default, which -c files and options change."
)


class CommandLine(LightningCLI):
    """LightningCLI with the run directory and the checkpoints of this project."""

    run_path: Path
    _typed: dict[str, str | None]  # what the command line itself says of the run's name and root
    _stored_name: str | None  # of the run whose configuration the checkpoint gave

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST_HELP)

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning would let "hyper_parameters" of a checkpoint overrule the command line, and make objects of them.
        pass

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Takes defaults from the checkpoint's configuration, and checks all values before anything is built."""
        for subparser in self._subcommand_parsers.values():
            for action in subparser._actions:
                if action.dest == "ckpt_path":
                    action.help = _CHECKPOINT_HELP
        typed = sys.argv[1:] if args is None else args
        self._typed, self._stored_name = {}, None
        if isinstance(typed, list):
            self._typed = {option: value_of(f"--run.{option}", typed) for option in ("name", "root")}
            given = files_first(typed)
            stored = stored_configuration(given, self.subcommands())
            if stored is None:
                self.config = parser.parse_args(given)
            else:
                self._stored_name = stored.name
                try:
                    subparser = self._subcommand_parsers[stored.subcommand]
                    assert isinstance(subparser, Parser), "made by this command"
                    subparser.set_stored_defaults(stored.defaults)
                    self.config = parser.parse_args(given)
                except (ConfigurationError, KeyError) as error:
                    raise ConfigurationError(
                        f"{error}\n(The configuration in {stored.checkpoint} is a part of it.)"
                    ) from error
        else:
            super().parse_arguments(parser, args)
        subcommand = self.config["subcommand"]
        check_values(self.config[subcommand])
        subparser = self._subcommand_parsers[subcommand]
        assert isinstance(subparser, Parser), "made by this command"
        check_members(self.config[subcommand]["model"], subparser)
        checkpoint = self._option("ckpt_path")
        named_here = value_of("--ckpt_path", typed) if isinstance(typed, list) else None
        if checkpoint and checkpoint not in CHECKPOINT_WORDS and checkpoint != named_here:
            read_checkpoint(checkpoint)  # of a configuration file; one of the command line was read for what it stores

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        assert self.subcommand is not None
        self.model.require_steps(self.subcommand)
        require_loader(self.datamodule, LOADERS[self.subcommand])
        options = self.config_init[self.subcommand]["trainer"]
        check_trainer(options, self.model, self.subcommand)
        workers = getattr(self.datamodule, "num_workers", 0)
        check_open_files(workers if isinstance(workers, int) else 0)
        run = RunOptions(**self._option("run").as_dict())
        checkpoint = self._checkpoint(run)
        stored = read_checkpoint(checkpoint) if checkpoint else {}
        if checkpoint and self.subcommand == "fit" and OPTIMIZERS_KEY not in stored:
            raise CheckpointError(
                f"{checkpoint} holds a model without the state of a training, so it cannot be resumed. Start a new one "
                f"with its weights: --run.initial_weights {checkpoint}"
            )
        if not checkpoint and self.subcommand != "fit":
            rank_zero_info(f"No --ckpt_path: {self.subcommand} takes the network as it is before any training.")
        self.config_init[self.subcommand]["ckpt_path"] = checkpoint and str(checkpoint)
        if self.subcommand in ("validate", "test") and self.model.prints_scores:
            self.config_init[self.subcommand]["verbose"] = False
        if checkpoint:
            self.model.checkpoint_path = str(checkpoint)
            self.model.stored_numbers = count_numbers(stored[WEIGHTS_KEY])
            if self.subcommand != "fit":
                self.model.configure_data_from_checkpoint(self.datamodule, stored)
        self.run_path = self._run_directory(run, checkpoint)
        kwargs["default_root_dir"] = str(self.run_path)
        weights = "averaged" if self.subcommand == "fit" else run.weights
        kwargs["plugins"] = [*listed(options["plugins"]), AtomicCheckpointIO(weights, self.run_path)]
        # Every sampler here knows its rank; a second one around it would share out the data twice.
        kwargs["use_distributed_sampler"] = False
        # Tasks log their arguments themselves, as plain values.
        kwargs["enable_autolog_hparams"] = False
        training = self.subcommand == "fit" and not options["fast_dev_run"]
        if self.subcommand != "fit":
            kwargs["enable_checkpointing"] = False
        if options["logger"] in (None, True):
            kwargs["logger"] = _loggers(self.run_path, stored) if training else False
        elif options["logger"] and training:  # metrics.csv is there in any case
            its_own = checkpoint is not None and checkpoint.parent == self.run_path
            ids = stored_run(stored).get("logger_ids", {}) if its_own else {}
            arguments = [namespace_to_dict(one).get("init_args", {}) for one in listed(self._option("trainer").logger)]
            placed = placed_loggers(listed(options["logger"]), arguments, self.run_path, ids)
            kwargs["logger"] = [_metrics_logger(self.run_path, stored), *placed]
        configuration = self._resolved_configuration()
        if self.subcommand == "fit" and (earlier := stored_run(stored).get("configuration")) is not None:
            _report_differences(earlier, configuration)
        given = listed(options["callbacks"])
        callbacks: list[Callback] = [SaveConfiguration(self.run_path, self.subcommand, configuration)]
        if self.subcommand == "fit" and run.initial_weights and not checkpoint:
            callbacks.append(InitialWeights(run.initial_weights, run.initial_weights_strict))
        if training and options["enable_checkpointing"] is not False:
            callbacks += _checkpoint_callbacks(self.run_path, self.model, run)
        if options["enable_model_summary"] is not False and not any(isinstance(one, ModelSummary) for one in given):
            kwargs["enable_model_summary"] = False  # in the place of Lightning's
            callbacks.append(NetworkSummary())
        if training and kwargs.get("logger", options["logger"]):
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if options["enable_progress_bar"] is None and not any(isinstance(one, ProgressBar) for one in given):
            # A bar would be drawn between the typed lines and their translations.
            shows_bar = sys.stdout.isatty() and not getattr(self.datamodule, "reads_standard_input", False)
            kwargs["enable_progress_bar"] = shows_bar
            callbacks.append(TrainingBar() if shows_bar else ProgressLines())
        if self.subcommand != "fit":
            callbacks.append(InterruptionNote())
        if training:
            callbacks.append(TrainingSummary(self.run_path, command_name(), needed_trust(configuration)))
        kwargs["callbacks"] = [*given, *callbacks]
        with trainer_errors(options):
            trainer = super().instantiate_trainer(**kwargs)
        run.set_matmul_precision(trainer.strategy.root_device)
        rank_zero_info(f"Run directory: {self.run_path}")
        if trainer.world_size > 1:
            if type(self.model).__module__.startswith("lightning_attn."):
                # Lightning cannot know that these scores are of all ranks already; of others' tasks it may be right.
                warnings.filterwarnings("ignore", message=r".*self\.log\('(val|test)/.*sync_dist=True.*")
            subprocess_script._launch_process_observer = observe_ranks  # type: ignore[attr-defined, assignment]
            watch_rendezvous(trainer.global_rank, trainer.world_size)
            atexit.register(settle_collectives)
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
            FileNotFoundError: If it is missing.
        """
        checkpoint = self._option("ckpt_path")
        if not checkpoint:
            return None
        if checkpoint not in CHECKPOINT_WORDS:
            return Path(checkpoint).absolute()
        file = "best.ckpt" if checkpoint == "best" else "last.ckpt"
        root, task, name = Path(run.root).absolute(), self.model.task_name, self._run_name(run)
        found = run_directory.newest(root, task, name, file)
        if found is None and (checkpoint != "auto" or self.subcommand != "fit"):
            raise MissingFileError(
                f"ckpt_path: {checkpoint!r} means the newest {file} in {root / task / name}, {name}-2 and so on, and "
                "there is none. Give the run's name (--run.name NAME, --run.root FOLDER) or the path of a checkpoint; "
                "'auto' starts a new run where there is nothing to resume."
            )
        return found

    def _run_directory(self, run: RunOptions, checkpoint: Path | None) -> Path:
        """The checkpoint's own directory, to resume or evaluate its run; a new one for other training.

        A run is resumed from its `last.ckpt`. Another name, or root on the command line, asks for a new directory.

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
        place, name = Path(run.root).absolute(), self._run_name(run)
        if owner is not None and self._typed.get("root") is None and run.root == RunOptions.root:
            # No call or file says otherwise: beside the checkpoint's run.
            place = owner.parent.parent if owner.parent.name == self.model.task_name else place
        if self.subcommand == "predict" and getattr(self.datamodule, "skip_done", False):
            begun = run_directory.newest_with(place, self.model.task_name, name, "predictions/hypotheses_so_far*")
            if begun is not None:
                return run_directory.require_writable(begun)
        return run_directory.claim(place, self.model.task_name, name)

    def _resolved_configuration(self) -> dict[str, Any]:
        """Every option with its value, as any subcommand reads it from YAML."""
        assert self.subcommand is not None
        resolved = {
            name: _plain(value)
            for name, value in namespace_to_dict(self.config[self.subcommand]).items()
            if name not in _CALL_ARGUMENTS
        }
        for _, task, options in members_of(resolved["model"]):
            for argument in joint_arguments(task):
                options.pop(argument, None)  # it is that of the joint training
        return resolved


def files_first(arguments: list[str]) -> list[str]:
    """Configuration files before options, so that options win whatever the order on the command line."""
    files: list[str] = []
    others: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument in ("-c", "--config") and pending:
            files += [argument, pending.pop(0)]
        elif argument.startswith("--config="):
            files.append(argument)
        else:
            others.append(argument)
    return [*others[:1], *files, *others[1:]] if others and not others[0].startswith("-") else arguments


def _report_differences(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Says what differs from the run so far; of `model` the task says it, and refuses what cannot be changed."""
    before, now = (
        {name: value for name, value in configuration.items() if name not in ("model", "run")}
        for configuration in (stored, current)
    )
    lines = described_differences(before, now)
    if lines:
        rank_zero_info(f"Options that differ from the checkpoint's; the current ones are used:{lines}")


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
    """Loggers for a run; those of a resumed one keep what was logged up to its checkpoint."""
    first_step = stored.get(STEP_KEY, 0)
    purge: dict[str, Any] = {"purge_step": first_step} if first_step else {}
    return [
        _metrics_logger(path, stored),
        TensorBoardLogger(path, name="", version="", default_hp_metric=False, **purge),
    ]


def _metrics_logger(path: Path, stored: dict[str, Any]) -> MetricsLogger:
    return MetricsLogger(path, stored.get(STEP_KEY, 0), stored.get(LINES_KEY, 0))


def _checkpoint_callbacks(path: Path, task: BaseTask, run: RunOptions) -> list[Callback]:
    """`best.ckpt` by the task's monitored value; `last.ckpt` after validations, at ends of epochs and every n steps."""
    monitor = run.monitor or task.monitor
    mode = run.monitor_mode or (task.monitor_mode if monitor == task.monitor else best_mode(monitor))
    if mode is None:
        raise ConfigurationError(
            f"run.monitor: whether more or less of {monitor!r} is better is not known; give --run.monitor_mode."
        )
    shared: dict[str, Any] = {
        "dirpath": path,
        "monitor": monitor,
        "mode": mode,
        "save_on_train_epoch_end": False,
        "enable_version_counter": False,
    }
    callbacks: list[Callback] = [BestCheckpoint(filename="best", save_top_k=1, **shared)]
    for name, (score, its_mode) in task.further_checkpoints().items():
        if score != monitor:
            of_score = shared | {"monitor": score, "mode": its_mode}
            callbacks.append(MemberCheckpoint(filename=name, save_top_k=1, **of_score))
    if run.save_top_k > 1:
        shared |= {"filename": "top-{step}", "auto_insert_metric_name": False, "save_top_k": run.save_top_k}
        callbacks.append(TopCheckpoints(**shared))
    return [*callbacks, LastCheckpoint(path, run.checkpoint_every_n_steps)]
