"""Processes that talk to each other, forked from one that has imported everything.

Imports take seconds a process, which is most of the time of a small training.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from pytorch_lightning.utilities import rank_zero_only

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lightning_attn.cli.subcommands", "lightning_attn.datamodules", "lightning_attn.tasks"]
)
_GRACE = 60.0  # seconds in which the others end by themselves when a rank has failed
_LONGEST = 1500.0


def run_on_ranks(function: Callable[[int], Any], folder: Path, world_size: int) -> list[Any]:
    """What the function returns on each rank, as JSON gives it back; it has to be one that a module defines."""
    torch.multiprocessing.start_processes(
        _call, args=(function, folder, world_size), nprocs=world_size, start_method="forkserver"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _call(rank: int, function: Callable[[int], Any], folder: Path, world_size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    (folder / f"{rank}.json").write_text(json.dumps(function(rank)))
    dist.destroy_process_group()


def run_ranks(command: Callable[..., None], arguments: Sequence[str], ranks: int, port: int, output: Path) -> str:
    """Calls the command in several processes, as torchrun does.

    Args:
        command: What is called, with the arguments.
        arguments: Of the command, in every rank.
        ranks: How many.
        port: Where they meet.
        output: A file for what they print.

    Returns:
        What they printed.
    """
    variables = dict(os.environ) | {
        **{"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "tests"},
    }
    output.write_text("")
    processes = [
        _CONTEXT.Process(target=_rank, args=(command, list(arguments), rank, variables, Path.cwd(), output))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + _LONGEST
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    printed = output.read_text()
    assert [process.exitcode for process in processes] == [0] * ranks, printed
    return printed


def _rank(
    command: Callable[..., None],
    arguments: list[str],
    rank: int,
    variables: dict[str, str],
    folder: Path,
    output: Path,
) -> None:
    os.environ.clear()
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.argv = ["train.py", *arguments]
    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # which Lightning reads from the environment when it is imported
    command(arguments)
