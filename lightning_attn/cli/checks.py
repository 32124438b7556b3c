"""Checks before anything is built: options without a value, and options of the Trainer that a task cannot use."""

import contextlib
import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pytorch_lightning.callbacks import EarlyStopping

from lightning_attn.cli.member_options import MEMBERS
from lightning_attn.cli.parser import OPTION_ERRORS, ConfigurationError, Parser, listed
from lightning_attn.datamodules.machine import available_cores
from lightning_attn.tasks import BaseTask
from lightning_attn.tasks.multitask import joint_arguments
from lightning_attn.training.scores import best_mode
from lightning_attn.training.trust import argument_types

# Open files of a run, and of each process that makes batches for it; both are generous.
_FILES, _FILES_OF_WORKER = 64, 32

__all__ = [
    "check_members",
    "check_open_files",
    "check_trainer",
    "check_values",
    "checked_precision",
    "members_of",
    "trainer_errors",
]


def check_values(configuration: Mapping[str, Any]) -> None:
    """Refuses `null` for options of model and data that have a value by their annotation, and seeds out of range.

    The parser lets both pass.

    Raises:
        ConfigurationError: Names the first.
    """
    seed = configuration.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 1 << 32:
        raise ConfigurationError(f"seed_everything: {seed} must be from 0 to 4294967295.")
    for part in ("model", "data"):
        section = configuration.get(part)
        if section is None or not section.get("class_path"):
            continue
        module, _, name = section["class_path"].rpartition(".")
        owner = getattr(importlib.import_module(module), name)
        hints = argument_types(owner)  # the user's classes may have any annotations
        _refuse_nulls(section.get("init_args") or {}, hints, part)


def check_members(model: Mapping[str, Any], parser: Parser) -> None:
    """Refuses arguments of members that are given, and are not those that the joint training has for all members.

    The class of the joint task refuses those that are no defaults; which of the others were given, the parser knows.

    Args:
        model: The section.
        parser: What parsed it.

    Raises:
        ConfigurationError: Names the first, and what differs.
    """
    joint = model.get("init_args") or {}
    for name, task, options in members_of(model):
        for argument in parser.given("model", name).intersection(joint_arguments(task)):
            own, shared = (_fields(values.get(argument), argument) for values in (options, joint))
            differing = [key for key in shared if own.get(key) != shared[key]]
            if differing:
                described = ", ".join(f"{key} {own.get(key)!r}, there {shared[key]!r}" for key in differing)
                raise ConfigurationError(
                    f"model.tasks.{name}.{argument} is not that of the joint training, which has one for all tasks "
                    f"({described}). Leave it out, and give it once (--model.{argument})."
                )


def members_of(model: Mapping[str, Any]) -> Iterator[tuple[str, type[BaseTask], Any]]:
    """The members in a section of a joint training: name, class, and its arguments, to be changed in place."""
    members = (model.get("init_args") or {}).get(MEMBERS["model"])
    for name, one in members.items() if isinstance(members, dict) else ():
        if hasattr(one, "items") and "class_path" in one:
            module, _, class_name = one["class_path"].rpartition(".")
            task = getattr(importlib.import_module(module), class_name)
            if issubclass(task, BaseTask):
                yield name, task, one["init_args"]


def _fields(value: Any, name: str) -> dict[str, Any]:
    return dict(value.items()) if hasattr(value, "items") else {name: value}


def _refuse_nulls(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str) -> None:
    for name, value in dict(values).items():
        hint = hints.get(name)
        if hint is None:
            continue
        if value is None and not _allows_none(hint):
            raise ConfigurationError(
                f"{prefix}.{name}: null is no value for it. Give one, or leave the option out for its default."
            )
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hasattr(value, "items"):
            _refuse_nulls(value, typing.get_type_hints(hint), f"{prefix}.{name}")


def _allows_none(hint: Any) -> bool:
    if hint is None or hint is type(None) or hint is Any:
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_allows_none, typing.get_args(hint)))
    return typing.get_origin(hint) is typing.Literal and None in typing.get_args(hint)


def check_trainer(options: Mapping[str, Any], task: BaseTask, subcommand: str) -> None:
    """Refuses options of the Trainer that a task does not support, or with which nothing would be trained.

    Raises:
        ConfigurationError: Names the option, the value and the fix.
    """
    if options["barebones"]:
        raise ConfigurationError(
            "trainer.barebones: true leaves out checkpoints, scores and progress, which every run here needs. To "
            "measure speed, use python -m benchmarks.<task>; to try something quickly, --trainer.fast_dev_run true."
        )
    devices = str(options["devices"])
    most = max(16, available_cores())
    on_cpu = options["accelerator"] == "cpu" or (options["accelerator"] == "auto" and not torch.cuda.is_available())
    if on_cpu and devices.isdecimal() and int(devices) > most:
        raise ConfigurationError(
            f"trainer.devices: {devices} would start as many processes on {available_cores()} cores; give {most} or "
            "fewer."
        )
    checked_precision(options["precision"], task)
    if options["accumulate_grad_batches"] is not None and options["accumulate_grad_batches"] < 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches: {options['accumulate_grad_batches']} must be at least 1, which is one "
            "batch for each optimizer step."
        )
    for callback in listed(options["callbacks"]):
        right = best_mode(callback.monitor) if isinstance(callback, EarlyStopping) else None
        if right is not None and callback.mode != right:
            raise ConfigurationError(
                f"trainer.callbacks: EarlyStopping watches {callback.monitor}, of which the {right} is best, with mode "
                f"{callback.mode!r}: it would stop as that gets better. Give --trainer.callbacks.mode {right}."
            )
    if subcommand == "fit":
        for name in ("limit_train_batches", "max_steps", "max_epochs"):
            if options[name] is not None and options[name] == 0:
                raise ConfigurationError(
                    f"trainer.{name}: 0 trains nothing. Leave it out, or score what there is with the subcommand "
                    "validate."
                )


def checked_precision(given: str | int | None, task: BaseTask) -> str:
    """The full name of a Trainer's precision, `"32-true"` for none.

    Raises:
        ConfigurationError: If the task does not support it.
    """
    usual = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
    precision = str(given or "32-true")
    if usual.get(precision, precision) not in task.precisions:
        raise ConfigurationError(
            f"trainer.precision: {precision!r} is not supported by {type(task).__name__}; give one of "
            f"{', '.join(task.precisions)} (bf16-mixed computes in bfloat16 where that is safe)."
        )
    return usual.get(precision, precision)


def check_open_files(workers: int) -> None:
    """Raises the limit of open files as far as the system allows, and refuses one that processes would hang at.

    Args:
        workers: Processes that make batches, which hand each over as an open file.

    Raises:
        ConfigurationError: Says how many are needed.
    """
    if sys.platform == "win32":  # which has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    needed, wanted = _FILES + _FILES_OF_WORKER * workers, 4096
    if soft != unlimited and soft < wanted:
        raised = wanted if hard == unlimited else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft != unlimited and soft < needed:
        fewer = f", or take fewer workers (--data.num_workers, which is {workers})" if workers else ""
        raise ConfigurationError(
            f"this process may open {soft} files at a time, and needs {needed}: raise the limit (ulimit -n {wanted} in "
            f"the shell, or its hard limit by the administrator){fewer}."
        )


@contextlib.contextmanager
def trainer_errors(options: Mapping[str, Any]) -> Iterator[None]:
    """Turns Lightning's errors about the Trainer's options into messages."""
    try:
        yield
    except OPTION_ERRORS as error:
        given = ", ".join(f"{name} {options[name]}" for name in ("accelerator", "devices", "strategy"))
        hint = (
            ""
            if torch.cuda.is_available() or options["accelerator"] == "cpu"
            else ("\nThis machine has no GPU that torch can use: --trainer.accelerator cpu runs.")
        )
        raise ConfigurationError(f"trainer ({given}): {error}{hint}") from error
