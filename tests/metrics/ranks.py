"""Runs a function on several processes that talk to each other; see the fixture `on_two_ranks`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def _run(rank: int, function: Callable[[int], Any], folder: Path, world_size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    (folder / f"{rank}.json").write_text(json.dumps(function(rank)))
    dist.destroy_process_group()


def run_on_ranks(function: Callable[[int], Any], folder: Path, world_size: int) -> list[Any]:
    """What the function returns on each rank, as JSON gives it back; it has to be one that a module defines."""
    mp.spawn(_run, args=(function, folder, world_size), nprocs=world_size)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
