"""Callbacks for tests of joint trainings."""

import pytorch_lightning as pl
import torch


class SameRandomness(pl.Callback):
    """Seeds the random numbers of the training, whatever was drawn for the networks before it."""

    def on_train_start(self, trainer: pl.Trainer, *arguments: object) -> None:
        torch.manual_seed(trainer.global_step)


class NoteGradients(pl.Callback):
    """Notes, for each optimizer step, which parameters have a gradient."""

    found: list[set[str]] = []  # noqa: RUF012 - of the last training

    def on_train_start(self, trainer: pl.Trainer, *arguments: object) -> None:
        type(self).found = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: object) -> None:
        named = pl_module.named_parameters()
        self.found.append({name for name, parameter in named if parameter.grad is not None})
