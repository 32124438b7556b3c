"""What a user reads of errors, and which messages of other packages are not shown.

A `UserError` is shown as its message alone, and so is what the parser, Lightning and the system say about options and
files. Any other error is a bug, of this project or of a class of the user's, and keeps its traceback.
"""

import errno
import inspect
import itertools
import logging
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from lightning_attn.cli.launching import dead_rank
from lightning_attn.cli.member_options import with_member
from lightning_attn.cli.parser_messages import clean_parser_message
from lightning_attn.errors import UserError
from lightning_attn.training import run_directory

TRACEBACK_VARIABLE = "LIGHTNING_ATTN_TRACEBACK"  # set to anything: errors keep their traceback

_LONGEST_PATH = 200  # characters of a path that a message shows
_RESUME = "What was saved is complete: resume with --ckpt_path auto."
# What torch's allocators and NVIDIA's libraries say where they raise no error of a class of their own.
_NO_MEMORY = re.compile(
    "CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    "|DefaultCPUAllocator: (can't allocate|not enough) memory"
)

__all__ = ["TRACEBACK_VARIABLE", "configure_messages", "message_of"]


def message_of(error: Exception, arguments: Sequence[str] = ()) -> str | None:
    """What a user reads of an error.

    Args:
        error: What was raised.
        arguments: Of the command line, the subcommand first: which options the message may name.

    Returns:
        The message; None if the error is a bug, which needs its traceback, or the user asks for one.
    """
    if os.environ.get(TRACEBACK_VARIABLE):
        return None
    text = _without_worker(error)
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if out_of_memory or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return _of_memory(text, arguments)
    if _is_full(error):
        return _of_full(error, arguments)
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        what = f"{_place(error)}: {error.strerror}"
        return f"{what}. If results cannot be written there, give another place: {_option(arguments)}."
    if re.match(r"DataLoader worker \(pid.*(is killed by signal|exited unexpectedly)", text):
        return (
            f"{text.splitlines()[0].rstrip('.')}. A process that makes batches has died, often for lack of memory: see "
            f"the system's log, and use fewer (--data.num_workers). {_RESUME}"
        )
    if _has_lost_rank(text):
        which = dead_rank() or "another process of this training has died; its own message may be above"
        return f"{which}. {_RESUME}"
    if isinstance(error, OSError) and error.errno and error.filename:
        return _of_file(error, arguments)
    if isinstance(error, OSError) and str(error).startswith("Caught ") and text.startswith("[Errno"):
        return f"{text}."  # of a DataLoader's worker, where torch keeps neither number nor file name
    if isinstance(error, UserError):
        return with_member(clean_parser_message(text), arguments)
    if isinstance(error, MisconfigurationException) or _quotes_option(error):
        return text
    if _is_of_restoring(error):
        return (
            f"The checkpoint cannot be restored: a part of it is damaged, or was written by other classes than the "
            f"current ones ({type(error).__name__}: {text}). Use another checkpoint of the same run."
        )
    return None


def _without_worker(error: Exception) -> str:
    """The message of an error; torch puts the traceback of a DataLoader's worker before it."""
    text = str(error)
    module = "" if type(error).__module__ == "builtins" else f"{type(error).__module__}."
    name = f"\n{module}{type(error).__qualname__}: "
    return text.rpartition(name)[2].rstrip() if text.startswith("Caught ") and name in text else text


def _quotes_option(error: Exception) -> bool:
    """Whether an error is Lightning's about options that it sees while it runs: those it names in backquotes."""
    text = str(error)
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    if not raised_in.startswith(("pytorch_lightning.", "lightning_fabric.")):
        return False
    quoted = set(re.findall(r"`(?:Trainer\()?(\w+)", text))
    return text.startswith("Early stopping conditioned on") or not quoted.isdisjoint(
        inspect.signature(pl.Trainer).parameters
    )


def _of_full(error: OSError, arguments: Sequence[str]) -> str:
    """What to do when a file cannot grow."""
    subject = f"{_place(error)}: {error.strerror}" if error.filename else str(error)
    limit = " (a limit of the shell: ulimit -f)" if error.errno == errno.EFBIG else ""
    kept = f"{subject}{limit}. Nothing older was lost. Make room"
    if error.filename and Path(_path(error)).parent == Path(tempfile.gettempdir()):
        return f"{kept}, or name another folder for temporary files in the variable TMPDIR, and run again."
    if "fit" in arguments[:1]:
        return f"{kept}, then resume with --ckpt_path auto."
    return f"{kept}, or give another place ({_option(arguments)}), and run again."


def _of_memory(text: str, arguments: Sequence[str]) -> str:
    """What saves memory, and how to resume."""
    said = (text.splitlines() or [""])[0].rstrip(".")
    subject = f"Out of memory{f' ({said})' if said else ''}."
    if "fit" not in arguments[:1]:
        return (
            f"{subject} These options save memory: smaller batches (--data.eval_batch_size for images, "
            "--data.eval_max_tokens for text), --trainer.precision bf16-mixed, tiles for large images "
            "(--model.inference.mode sliding) and fewer beams for text (--model.decoding.beam_size)."
        )
    return (
        f"{subject} These options save memory, and train the same network: smaller batches (--data.batch_size for "
        "images, --data.max_tokens for text), with --trainer.accumulate_grad_batches for as large a step as before; "
        "--trainer.precision bf16-mixed; --model.activation_checkpointing true, which computes layers with attention "
        "once more instead of storing them. Fewer keys (--model.attention.kv_stride 2) save it too, in another "
        "network. last.ckpt is as it was: resume with --ckpt_path auto and such options, those of the data only from "
        "the end of an epoch on."
    )


def _option(arguments: Sequence[str]) -> str:
    """The option that says where this subcommand writes."""
    subcommand = arguments[0] if arguments else ""
    return (
        "--output"
        if subcommand in ("export", "average", "compare", "profile", "attention-map")
        else "--run.root FOLDER"
    )


def _path(error: OSError) -> str:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)


def _place(error: OSError) -> str:
    """The file of an error, at a length that can be read."""
    path = _path(error)
    return path if len(path) <= _LONGEST_PATH else f"{path[:_LONGEST_PATH]}... ({len(path)} characters)"


def _of_file(error: OSError, arguments: Sequence[str]) -> str:
    """What the system says of a file, and the option that named it, if one did."""
    path, place = _path(error), _place(error)
    if error.errno == errno.ENOENT and not Path(path).parent.exists():
        return f"{place}: its folder does not exist; if it did, something has removed it meanwhile."
    if error.errno == errno.EMFILE:
        return f"{place}: {error.strerror}. Raise the limit in the shell: ulimit -n 4096."
    absolute = str(Path(path).absolute())
    for option, value in itertools.pairwise([*arguments, ""]):
        name, equals, own = option.partition("=")
        value = own if equals else value
        if name.startswith("-") and value and (path == value or _is_within(absolute, str(Path(value).absolute()))):
            return f"{place}: {error.strerror}. {name} names it: give another."
    return f"{place}: {error.strerror}."


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _is_of_restoring(error: BaseException) -> bool:
    """Whether Lightning was putting a checkpoint's states into its objects."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").endswith(".checkpoint_connector") for frame, _ in frames)


def _has_lost_rank(text: str) -> bool:
    """Whether an error says that another rank has closed its connection."""
    return "gloo" in text and re.search(r"Connection (closed|reset) by peer|Broken pipe", text) is not None


def _is_full(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def configure_messages() -> None:
    """Shows what our packages report, and silences messages that a user can do nothing about, each with its reason."""
    logger = logging.getLogger("lightning_attn")
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
        ".*You have overridden `on_before_batch_transfer`.*",  # no DataModule here has one of its own
        ".*treespec, LeafSpec.*is deprecated.*",  # Lightning's own call
        ".*predict returned None if it was on purpose.*",  # predictions are gathered and written at the end
        ".*Total length of `?list`? across ranks is zero.*",  # training without validation, which the log says
        ".*The dirpath has changed from.*",  # a resumed run has a directory of its own
        ".*is not supported by the model summary.*",  # only the estimated size in the summary is meant
        ".*WeightAveraging state cannot be restored.*",  # a checkpoint's weights are the averaged ones
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises other products at every start.
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: " not in record.getMessage())
    # It is not what happens: every checkpoint is read with weights_only=True.
    name = "pytorch_lightning.trainer.connectors.checkpoint_connector"
    logging.getLogger(name).addFilter(lambda record: "`weights_only` was not set" not in record.getMessage())
