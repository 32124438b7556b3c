import re

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_attn.callbacks import CheckpointAveraging, ProgressLines, TrainingBar


class Line(pl.LightningModule):
    """Its single weight after optimizer step n is n."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 0.125, prog_bar=True)
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(callback, steps=8, **options) -> Line:
    module = Line()
    options.setdefault("enable_progress_bar", False)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[callback],
        **options,
    )
    data = DataLoader(torch.zeros(steps, 1))
    trainer.fit(module, data, DataLoader(torch.zeros(1, 1)))
    return module


def test_average_is_the_equal_mean_of_the_chosen_steps():
    module = fit(CheckpointAveraging(start_step=4, every_n_steps=2))
    assert module.weight.item() == pytest.approx((4 + 6 + 8) / 3)
    assert module.seen == pytest.approx([(4 + 6 + 8) / 3]), "validation uses the mean"


def test_training_goes_on_with_its_own_weights():
    module = fit(CheckpointAveraging(start_step=1, every_n_steps=1), val_check_interval=4)
    assert module.seen == pytest.approx([(1 + 2 + 3 + 4) / 4, sum(range(1, 9)) / 8])


def test_averaging_mistakes():
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 5"):
        CheckpointAveraging(0, 5)


def test_progress_lines_say_step_loss_and_time_left(capsys):
    fit(ProgressLines(every_seconds=0.0), steps=3)
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"epoch 0 step 1/3 ETA [\d.]+ min train/loss 0\.125", lines[0])
    assert "step 3/3" in lines[2]
    assert any(line.startswith("validated at step 3") for line in lines)


def test_progress_lines_are_rare(capsys):
    fit(ProgressLines(every_seconds=1000.0), steps=3)
    assert "step 1/3" not in capsys.readouterr().err


def test_bar_shows_step_and_time_left(monkeypatch):
    """Without Lightning's "Epoch 0/-2", which it shows where only the number of steps is given."""
    shown = []
    original = TrainingBar.get_metrics

    def record(self, trainer, module):
        shown.append(original(self, trainer, module))
        return shown[-1]

    monkeypatch.setattr(TrainingBar, "get_metrics", record)
    bar = TrainingBar()
    fit(bar, steps=3, enable_progress_bar=True)
    training = [items for items in shown if "step" in items]
    assert training[-1]["step"] == "3/3"
    assert re.fullmatch(r"[\d.]+ min", training[-1]["ETA"])
    assert training[-1]["train/loss"] == 0.125
    assert bar._get_train_description(0) == "Epoch 0"
