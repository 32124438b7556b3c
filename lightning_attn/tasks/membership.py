"""A task's place in a joint training: whose Trainer, data, names and files it uses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_attn.training.checkpoints import member_checkpoint

__all__ = ["Membership"]


@dataclasses.dataclass(frozen=True, eq=False)
class Membership:
    """A task that is one of several of a training.

    The data is asked for and not kept: copies of the network, such as averages of its weights, copy this too.

    Attributes:
        host: The task of the whole training, a root of the Trainer.
        name: The member's name, in logs, files and checkpoints.
    """

    host: pl.LightningModule
    name: str

    @property
    def datamodule(self) -> pl.LightningDataModule:
        """The member's own data."""
        datamodule: pl.LightningDataModule = self.host.trainer.datamodule.members[self.name]  # type: ignore[attr-defined]
        return datamodule

    @property
    def directory(self) -> Path:
        """The member's folder in the run directory."""
        return Path(self.host.trainer.default_root_dir) / self.name

    def named(self, name: str) -> str:
        """The name under which a value of the member is logged: `train/<member>/loss` for `train/loss`."""
        stage, slash, rest = name.partition("/")
        return f"{stage}/{self.name}/{rest}" if slash else f"{self.name}/{name}"

    def option(self, name: str) -> str:
        """An option of the member on the command line: `--model.tasks.<member>.init_args.num_pictures`."""
        return f"--model.tasks.{self.name}.init_args.{name}"

    def checkpoint(self, checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
        """The member's part of a checkpoint, as a training of it alone would have written it."""
        return member_checkpoint(checkpoint, self.name, path)
