"""Reading checkpoints safely, with errors that say what is wrong with them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code that it may contain.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is cut short, damaged, or holds more than plain values and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}. Checkpoints of a run are last.ckpt and best.ckpt.")
    if not zipfile.is_zipfile(path):
        # The directory of the archive stands at the end of the file: a file that was cut short has none.
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a whole checkpoint: it was cut short or is something else. "
            "Use another checkpoint of the same run."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects other than tensors and plain values, which could run code when loaded. "
            f"Nothing was run. Do not use it if you do not know who made it. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Use another checkpoint of the same run.") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is a PyTorch file, but not a checkpoint: it has no 'state_dict'.")
    return checkpoint
