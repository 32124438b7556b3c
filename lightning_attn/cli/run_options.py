"""Options of a run itself: where its files are, what it begins with, and how precisely it computes."""

import dataclasses
import re
from typing import Literal

import torch

from lightning_attn.errors import InputError
from lightning_attn.training.checkpoints import Weights

_LONGEST_NAME = 200  # bytes; a number may come behind it


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run keeps its files, what it begins with, and how precisely it computes.

    Attributes:
        name: Folder of the run, `<root>/<task>/<name>/`; empty for the name of the first configuration file. A name
            that is taken gets a number: nothing is ever overwritten.
        root: Folder of all runs.
        checkpoint_every_n_steps: Write `last.ckpt` also at every so many optimizer steps; it is always written after
            a validation and at the end of an epoch.
        save_top_k: Keep this many of the best networks as `top-<step>.ckpt`; the best of them is `best.ckpt` too.
        monitor: The logged score that `best.ckpt` is chosen by, such as val/bleu; empty for the task's own.
        monitor_mode: Whether the "max" or the "min" of `monitor` is best; empty for what is known of the score.
        initial_weights: A checkpoint whose weights a new training begins with, perhaps of a run with another attention;
            for detection also torchvision's detector: "COCO_V1", or a .pth file of one; empty for none. A resumed
            training has its own.
        initial_weights_strict: Whether all of them must fit, and mean the same classes or pieces of words; otherwise
            what fits is taken, classes and pieces by name, and the log lists the rest.
        weights: Which weights of a run with averaging are validated, tested and predicted with: `"averaged"` or
            `"current"`.
        float32_matmul_precision: How float32 matrices are multiplied on a GPU that has TF32: `"high"` rounds them to
            10 bits of mantissa first (TF32, as cuDNN's convolutions do anyway), `"medium"` to 7 (bfloat16), and
            `"highest"` not at all. bf16-mixed has few such products, and a CPU is left as it is. It is
            `torch.set_float32_matmul_precision`; do not set torch.backends.cuda.matmul in the same process.
    """

    name: str = ""
    root: str = "checkpoints"
    checkpoint_every_n_steps: int = 0
    save_top_k: int = 1
    monitor: str = ""
    monitor_mode: Literal["", "min", "max"] = ""
    initial_weights: str = ""
    initial_weights_strict: bool = True
    weights: Weights = "averaged"
    float32_matmul_precision: Literal["highest", "high", "medium"] = "high"

    def __post_init__(self) -> None:
        if self.name in (".", "..") or re.search(r"[/\\\0\ud800-\udfff]", self.name):
            raise InputError(f"run.name must be the name of a folder, not a path, got {self.name!a}.")
        size = len(self.name.encode())
        if size > _LONGEST_NAME:
            raise InputError(f"run.name has {size} bytes, and {_LONGEST_NAME} are possible: give a shorter one.")
        if self.save_top_k < 1:
            raise InputError(f"run.save_top_k must be at least 1, got {self.save_top_k}.")
        if self.checkpoint_every_n_steps < 0:
            raise InputError(f"run.checkpoint_every_n_steps must be at least 0, got {self.checkpoint_every_n_steps}.")

    def set_matmul_precision(self, device: torch.device) -> None:
        """Sets the precision of float32 matrix products for a run on this device."""
        if device.type == "cuda":
            torch.set_float32_matmul_precision(self.float32_matmul_precision)
