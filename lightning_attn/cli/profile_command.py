"""The subcommand `profile`: what the network of a configuration costs, without its data."""

import contextlib
import datetime
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from lightning_attn.cli.checks import check_members, check_values, checked_precision
from lightning_attn.cli.command_line import files_first
from lightning_attn.cli.front import SUBCOMMANDS, command_name
from lightning_attn.cli.parser import Parser
from lightning_attn.cli.run_options import RunOptions
from lightning_attn.datamodules.machine import processor_name
from lightning_attn.errors import InputError
from lightning_attn.study.network_profile import profile_network
from lightning_attn.study.profile_report import ProfileReport, check_output
from lightning_attn.tasks import BaseTask
from lightning_attn.tasks.workload import WorkloadOptions
from lightning_attn.training import run_directory

__all__ = ["profile_command"]

_DEVICES = ("auto", "cpu", "cuda", "meta")
_SAMPLES = {"images": "image", "tokens": "pair"}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def profile_command(arguments: list[str]) -> None:
    """Runs the subcommand.

    Args:
        arguments: Those after its name.

    Raises:
        ValueError: If an option is wrong, or something is not known without the data.
    """
    parser = _parser()
    options = parser.parse_args(files_first(["profile", *arguments])[1:])
    check_values(options.as_dict())
    device = _device(options.device)
    for name, least in (("repetitions", 1), ("depth", 0), ("batch_size", 1), ("num_classes", 1)):
        value = options[name]
        if value is not None and value < least:
            raise InputError(f"{name}: {value} is too small; give {least} or more (--{name} {least}).")
    if options.size is not None and min(options.size) < 1:
        raise InputError(f"size: {options.size[0]} {options.size[1]} must both be at least 1.")
    output = None if options.output is None else Path(options.output)
    if output is not None:
        check_output(output)
    if options.model is None or options.data is None:
        missing = "model" if options.model is None else "data"
        raise InputError(f"{missing}: none is given. Give a configuration: -c configs/miniature/detection.yaml.")
    check_members(options.model, parser)
    given = jsonargparse.Namespace()  # type: ignore[no-untyped-call]
    given.model, given.data = options.model, options.data
    built = _builder().instantiate_classes(given)
    task: BaseTask = built.model
    size = None if options.size is None else (options.size[0], options.size[1])
    precision = checked_precision(options.trainer.precision, task)
    workload = task.workload(built.data, WorkloadOptions(device, size, options.batch_size, options.num_classes))
    if precision == "64-true":
        workload.network.double()
    with _progress() as progress:
        profile = profile_network(
            workload,
            lambda network: _optimizer(task, network, device),
            repetitions=options.repetitions,
            autocast=_AUTOCAST.get(precision),
            progress=progress,
        )
    facts = {
        "task": type(task).__name__,
        "network": type(workload.network).__name__,
        "inputs": workload.inputs,
        "device": _described(device),
        "threads": torch.get_num_threads(),
        "precision": precision if device.type != "meta" else "no values (meta)",
        "command": f"{command_name()} profile {shlex.join(arguments)}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: value for name, value in run_directory.origin().items() if name != "git"},
        "commit": run_directory.origin()["git"],
        "configuration": task.arguments,
    }
    report = ProfileReport(
        profile, facts, workload.batch_size, _SAMPLES.get(workload.unit, "sample"), workload.unit, workload.notes
    )
    report.print(options.depth)
    if output is not None:
        print(f"\nWritten to {report.write(output)}")


def _parser() -> Parser:
    parser = Parser(prog=f"{command_name()} profile", description=f"profile: {SUBCOMMANDS['profile']}.")
    parser.add_argument(
        "-c",
        "--config",
        action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]  # documented, but not marked as exported
        help="a configuration file; repeat it for overlays",
    )
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="of the configuration; not used here")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of images in pixels (default: that which the data is resized or cropped to); in translation the numbers "
        "of source and target tokens (default: 50 50)",
    )
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="images or pairs of a batch (default: the data's)"
    )
    parser.add_argument(
        "--num_classes",
        type=int | None,
        default=None,
        help="of classes, categories or pieces of words, where the data is not there to tell (default: the data's)",
    )
    parser.add_argument("--repetitions", type=int, default=10, help="measured runs of each pass")
    parser.add_argument(
        "--device", default="auto", help=f"one of {', '.join(_DEVICES)}: meta counts without computing or memory"
    )
    parser.add_argument("--depth", type=int, default=3, help="levels of the tree that are printed")
    parser.add_argument(
        "--output", type=str | None, default=None, help="also write all of it (.json) or the parts (.csv)"
    )
    parser.add_lightning_class_args(BaseTask, "model", subclass_mode=True, required=False)
    parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True, required=False)
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    parser.add_class_arguments(RunOptions, "run")
    return parser


def _builder() -> Parser:
    """Makes task and data, and none of the callbacks and loggers of a configuration."""
    parser = Parser()
    parser.add_lightning_class_args(BaseTask, "model", subclass_mode=True)
    parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True)
    return parser


def _device(name: str) -> torch.device:
    if name not in _DEVICES:
        raise InputError(f"device: {name!r} is none of {', '.join(_DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: torch sees no GPU on this machine. Give --device cpu, or --device meta to count only."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _optimizer(task: BaseTask, network: nn.Module, device: torch.device) -> Optimizer:
    return task.optimizer.build(task.optimizer.parameter_groups(network), fused=device.type in ("cpu", "cuda"))


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "meta":
        return "meta device (shapes only: no time, no memory)"
    threads = torch.get_num_threads()
    return f"CPU {processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Shows on a terminal what is being measured."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    with console.status("profile") as status:
        yield lambda what: status.update(f"profile: {what}")
