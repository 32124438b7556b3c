"""Notes what a process holds while it works: memory, open files, threads."""

import gc
import json
import os
from pathlib import Path

import pytorch_lightning as pl

_PAGE = os.sysconf("SC_PAGE_SIZE")


def footprint() -> dict[str, int]:
    """Of this process: bytes of resident memory, open files and threads."""
    gc.collect()
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return {
        "memory": memory,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


class Footprint(pl.Callback):
    """Writes the footprint into a file after every so many batches.

    Args:
        path: Gets lines of JSON.
        every: Batches from one line to the next.
    """

    def __init__(self, path: str, every: int) -> None:
        self.path, self.every, self.batches = Path(path), every, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
        self.batches += 1
        if self.batches % self.every == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"batches": self.batches, **footprint()}) + "\n")

    on_predict_batch_end = on_train_batch_end
