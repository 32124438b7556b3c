import re
from pathlib import Path
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_attn.callbacks import ExponentialAveraging, UniformWeightAveraging
from lightning_attn.tasks import TranslationTask
from lightning_attn.training.progress import ProgressLines, TrainingBar


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


def fit(callback, steps=8, module=None, **options) -> Line:
    module = Line() if module is None else module
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
    module = fit(UniformWeightAveraging(start_step=4, every_n_steps=2))
    assert module.weight.item() == pytest.approx((4 + 6 + 8) / 3)
    assert module.seen == pytest.approx([(4 + 6 + 8) / 3]), "validation uses the mean"


def test_training_goes_on_with_its_own_weights():
    module = fit(UniformWeightAveraging(start_step=1, every_n_steps=1), val_check_interval=4)
    assert module.seen == pytest.approx([(1 + 2 + 3 + 4) / 4, sum(range(1, 9)) / 8])


def test_before_the_first_step_that_counts_the_average_is_the_current_weights(tmp_path):
    """Lightning's own callback validates and saves the weights from before the training until then."""
    module = fit(UniformWeightAveraging(start_step=7, every_n_steps=1), val_check_interval=2)
    assert module.seen == pytest.approx([2, 4, 6, (7 + 8) / 2])
    module = fit(UniformWeightAveraging(start_step=9), val_check_interval=4)
    assert module.seen == [4, 8]
    assert module.weight.item() == 8


@pytest.mark.parametrize("warmup", [True, False])
def test_exponential_average_is_the_closed_form(warmup):
    decay, average = 0.3, 1.0
    for step in range(2, 9):
        d = min(decay, step / (step + 9)) if warmup else decay  # (1 + n) / (10 + n) with n = step - 1
        average = d * average + (1 - d) * step
    module = fit(ExponentialAveraging(decay, warmup))
    assert module.weight.item() == pytest.approx(average)
    assert module.seen == pytest.approx([average]), "validation uses the average"


class Normalised(Line):
    """With statistics that follow the data, and a frozen weight and buffer that no binary fraction is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1, momentum=1.0)
        self.frozen = torch.nn.Parameter(torch.rand(100), requires_grad=False)
        self.register_buffer("table", torch.rand(100))

    def training_step(self, batch, batch_idx):
        self.norm(torch.tensor([[0.0], [2.0 * batch_idx]]))  # mean: the index of the batch
        return -self.weight


def test_statistics_are_averaged_integers_copied_and_what_is_frozen_stays():
    module = Normalised()
    frozen, table = module.frozen.clone(), module.table.clone()
    fit(ExponentialAveraging(0.5, warmup=False), steps=4, module=module)
    assert module.norm.running_mean.item() == pytest.approx(0 / 8 + 1 / 8 + 2 / 4 + 3 / 2)
    assert module.norm.num_batches_tracked.item() == 4
    assert torch.equal(module.frozen, frozen)
    assert torch.equal(module.table, table)


def test_the_average_is_kept_on_the_device_of_the_module():
    """Lightning makes it before the module is moved."""
    callback, module = ExponentialAveraging(), Line()
    callback.setup(pl.Trainer(logger=False, accelerator="cpu"), module, "fit")
    callback.on_fit_start(pl.Trainer(logger=False, accelerator="cpu"), module.to("meta"))
    assert callback._average_model.module.weight.device.type == "meta"
    assert callback._average_model.n_averaged.device.type == "cpu", "read at every step: a GPU would have to finish it"


def test_averaging_asks_for_no_number_of_a_tensor():
    """A GPU would have to finish its work first; on the meta device there are no numbers."""
    callback, module, trainer = ExponentialAveraging(), Normalised(), pl.Trainer(logger=False, accelerator="cpu")
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module.to("meta"))
    for step in (1, 2, 3):
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert callback.state_dict() == {"latest_update_step": 3}


def test_averaging_mistakes():
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 5"):
        UniformWeightAveraging(0, 5)
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"decay must be at least 0 and below 1, got {decay}; usual are"):
            ExponentialAveraging(decay)


class Recorder(pl.Callback):
    """Keeps the weights after every optimizer step."""

    weights: ClassVar[list[dict[str, torch.Tensor]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def test_average_through_the_command_and_a_checkpoint(run, tiny_config, in_folder):
    """From YAML; the closed form of the weights that a run went through, whether or not it was broken off."""
    Path("average.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_attn.callbacks.ExponentialAveraging\n"
        f"      init_args: {{decay: 0.25}}\n    - class_path: {__name__}.Recorder\n"
    )
    Recorder.weights.clear()
    command = ["fit", "-c", tiny_config, "-c", "average.yaml"]
    run(*command, "--run.name", "whole")
    assert len(Recorder.weights) == 4
    expected = Recorder.weights[0]
    for weights, d in zip(Recorder.weights[1:], (2 / 11, 0.25, 0.25), strict=True):
        expected = {name: d * expected[name] + (1 - d) * weights[name] for name in weights}

    runs = in_folder / "checkpoints" / "translation"
    run(*command, "--run.name", "half", "--trainer.max_steps", 2)
    run(*command, "--run.name", "rest", "--ckpt_path", runs / "half" / "last.ckpt")
    for name in ("whole", "rest"):
        checkpoint = torch.load(runs / name / "last.ckpt", weights_only=True)
        assert int(checkpoint["averaging_state"]["n_averaged"]) == 4
        torch.testing.assert_close(checkpoint["state_dict"], expected)
        torch.testing.assert_close(checkpoint["current_model_state"], Recorder.weights[3])
        loaded = TranslationTask.load(runs / name / "last.ckpt").state_dict()
        torch.testing.assert_close(loaded, checkpoint["state_dict"], rtol=0, atol=0)
    assert any(not torch.allclose(expected[name], current) for name, current in Recorder.weights[3].items())


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


def test_the_bar_reads_what_is_logged_now_and_then(monkeypatch):
    """Each reading makes the host wait for a GPU."""
    readings = []
    original = pl.Trainer.progress_bar_metrics.fget

    def read(trainer):
        readings.append(trainer.global_step)
        return original(trainer)

    monkeypatch.setattr(pl.Trainer, "progress_bar_metrics", property(read))
    monkeypatch.setattr("lightning_attn.training.progress.time.perf_counter", lambda: 1.0)
    fit(TrainingBar(), steps=6, enable_progress_bar=True, limit_val_batches=0)
    assert set(readings) == {1, 6}, "at the first step and at the end of the epoch, half a second not having passed"
