"""Reading checkpoints safely, with errors that say what is wrong with them, and writing them whole or not at all."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO

from lightning_attn.files import write_file

FORMAT_KEY, FORMAT = "format", 1
"""What a checkpoint of this version is marked with; a later number says that this version may misunderstand it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code that it may contain.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is cut short, damaged, holds more than plain values and tensors, or was written by
            a later version.
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
    found = checkpoint.get(FORMAT_KEY, FORMAT)
    if found != FORMAT:
        raise CheckpointError(
            f"{path} was written by another version of lightning_attn: its format is {found!r}, and this version reads "
            f"{FORMAT}. Use the version that the checkpoint's run directory names, or a later one."
        )
    return checkpoint


def _of_file(error: OSError, path: str | Path) -> OSError:
    """An error that names the file."""
    return OSError(error.errno, error.strerror, str(path))


class WholeCheckpoints(CheckpointIO):
    """How Lightning's Trainer writes and reads checkpoints here.

    A checkpoint replaces the one of the same name when it is complete and on the disk: whatever happens while it is
    written, one of the two is there. (Lightning's own way moves it from the system's temporary folder, which is a copy
    if that is another disk.) It is read by `read_checkpoint`, whatever Lightning is asked for.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: If it cannot be written; the older one is still there.
        """
        try:
            write_file(Path(path), lambda file: torch.save(checkpoint, file), replace=True)
        except RuntimeError as error:
            # torch's writer complains about its position in the file when the file has already said why.
            if isinstance(error.__context__, OSError):
                raise _of_file(error.__context__, path) from error
            raise
        except OSError as error:
            raise _of_file(error, path) from error

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU; see `read_checkpoint`."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file."""
        Path(path).unlink(missing_ok=True)
