"""Runs the subcommands."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info

from lightning_attn.archives import reading_once
from lightning_attn.cli.attention_map_command import attention_map_command
from lightning_attn.cli.command_line import CommandLine
from lightning_attn.cli.comparison import compare_runs
from lightning_attn.cli.front import SUBCOMMANDS, command_name
from lightning_attn.cli.messages import configure_messages, message_of
from lightning_attn.cli.parser import Parser
from lightning_attn.cli.profile_command import profile_command
from lightning_attn.cli.stored_configuration import TRUST_HELP
from lightning_attn.export.checkpoint import export_checkpoint
from lightning_attn.processes import STOP_SIGNALS
from lightning_attn.tasks import BaseTask
from lightning_attn.training import run_directory
from lightning_attn.training.checkpoint_averaging import average_checkpoints
from lightning_attn.training.resuming import TrainingStopped


def run(arguments: list[str]) -> None:
    """Runs the command.

    Args:
        arguments: Of the command line, a subcommand first.

    Raises:
        SystemExit: With status 2 and a message on the standard error if an option or the data is wrong, or some images
            of a prediction, which is complete without them; with 128 and the signal's number if a signal stopped a
            training, whose state is saved.
    """
    configure_messages()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending_on_signals())
        _run(arguments)


def _run(arguments: list[str]) -> None:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for classes of the user's own, whichever way the command was called
    try:
        if arguments[0] in _FURTHER_COMMANDS:
            _FURTHER_COMMANDS[arguments[0]](arguments[1:])
            return
        with reading_once():
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
                parser_kwargs={"prog": command_name()},
                args=arguments,
            )
        if command.subcommand == "predict" and getattr(command.model, "bad_images", None):
            raise SystemExit(2)  # everything else was predicted; the log says what was not
    except SystemExit as stop:
        if stop.code == 1 and isinstance(stop.__context__, KeyboardInterrupt):  # of Lightning, which swallows it
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    except TrainingStopped as stopped:
        if run_directory.is_rank_zero():
            print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from None
    except Exception as error:
        message = message_of(error, arguments)
        if message is None:
            raise
        if not run_directory.is_rank_zero():
            # Rank 0 says what all ranks meet, and takes this one with it.
            time.sleep(3)
            message = f"on rank {os.environ.get('RANK') or os.environ.get('LOCAL_RANK', '?')}: {message}"
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    finally:
        run_directory.discard_if_unused()


def _parse(command: str, add_arguments: Callable[[Parser], object], arguments: list[str]) -> dict[str, Any]:
    parser = Parser(prog=f"{command_name()} {command}", description=f"{command}: {SUBCOMMANDS[command]}.")
    add_arguments(parser)
    options: dict[str, Any] = parser.parse_args(arguments).as_dict()
    return options


def _average(arguments: list[str]) -> None:
    """Averages checkpoints."""

    def add_arguments(parser: Parser) -> None:
        parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="two or more of one network")
        parser.add_function_arguments(average_checkpoints, skip={"paths"})

    options = _parse("average", add_arguments, arguments)
    checkpoints = options.pop("checkpoints")
    path = average_checkpoints(checkpoints, **options)
    rank_zero_info(f"The mean of {len(checkpoints)} checkpoints was written to {path}")


def _export(arguments: list[str]) -> None:
    """Writes a model for others."""

    def add_arguments(parser: Parser) -> None:
        parser.add_argument("--ckpt_path", required=True, help="the checkpoint")
        parser.add_argument(
            "--size",
            type=int,
            nargs=2,
            metavar=("HEIGHT", "WIDTH"),
            help="of the images that a program is for (those that the data was resized to)",
        )
        parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST_HELP)
        parser.add_function_arguments(export_checkpoint, skip={"path", "size", "trust"})

    options = _parse("export", add_arguments, arguments)
    size = options.pop("size")
    weights, *programs = export_checkpoint(options.pop("ckpt_path"), size=size and (size[0], size[1]), **options)
    rank_zero_info(f"The model was written to {weights} and {weights.with_suffix('.json').name}")
    for path in programs:
        rank_zero_info(f"A program that gives what the network gives was written to {path}; see programs.json")


def _compare(arguments: list[str]) -> None:
    """Compares runs."""

    def add_arguments(parser: Parser) -> None:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, checkpoints/<task>/<name>")
        parser.add_argument("--output", help="a figure of the curves (.png, .pdf, .svg) or the table (.csv)")

    options = _parse("compare", add_arguments, arguments)
    comparison = compare_runs(options["runs"])
    comparison.print()
    if options["output"] is not None:
        rank_zero_info(f"Written to {comparison.write(Path(options['output']))}")


_FURTHER_COMMANDS = {
    "average": _average,
    "export": _export,
    "profile": profile_command,
    "attention-map": attention_map_command,
    "compare": _compare,
}


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Ends by an exception on SIGTERM and SIGHUP, so that what is half done is cleared away; training saves first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [one for one in STOP_SIGNALS if signal.getsignal(one) == signal.SIG_DFL]  # Ctrl-C is Python's own
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
