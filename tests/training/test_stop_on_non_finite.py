"""A loss or gradient that is not finite ends a training before it gets into the weights."""

import functools
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fake_cuda import fake_cuda
from torch.utils.data import DataLoader

from lightning_attn.tasks import DetectionTask, TranslationTask
from lightning_attn.training.stop_on_non_finite import NonFiniteError, StopOnNonFinite

SAVED_EVERY_STEP = ["--run.checkpoint_every_n_steps", 1, "--trainer.val_check_interval", 100]


@pytest.fixture
def spoilt(monkeypatch):
    """Makes the loss of one batch of a task what a function makes of it; returns the sample ids of all batches."""

    def spoil(task, number, change):
        seen = []
        original = task.training_step

        def training_step(self, batch, batch_idx):
            loss = original(self, batch, batch_idx)
            seen.append(batch.ids.tolist())
            return change(self, loss) if len(seen) == number else loss

        monkeypatch.setattr(task, "training_step", training_step)
        return seen

    return spoil


def shown_ids(printed: str) -> list[int]:
    return [int(number) for number in re.search(r"\(sample ids ([^)]*)\)", printed).group(1).split(", ")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_loss_of_a_batch(run, tiny_config, in_folder, spoilt, value):
    """The second of the batches that the third step accumulates."""
    seen = spoilt(TranslationTask, 6, lambda task, loss: loss * value)
    accumulated = [*SAVED_EVERY_STEP, "--trainer.accumulate_grad_batches", 2, "--trainer.max_steps", 8]
    printed = run("fit", "-c", tiny_config, *accumulated, status=2)
    assert "error: Stopped at step 3: the loss of batch 6 of epoch 0 is " in printed
    assert f"is {value}" in printed
    assert shown_ids(printed) == seen[5]
    path = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    assert f"The last good checkpoint is {path}." in printed
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert len(seen) == 6, "no step follows"
    run("fit", "-c", tiny_config, *accumulated, "--ckpt_path", "last")
    assert torch.load(path, weights_only=True)["global_step"] == 8


def test_a_gradient_behind_a_finite_loss(run, tiny_config, in_folder, spoilt):
    def change(task, loss):
        next(task.built_network.parameters()).register_hook(lambda gradient: gradient / 0)
        return loss

    seen = spoilt(TranslationTask, 1, change)
    printed = run("fit", "-c", tiny_config, *SAVED_EVERY_STEP, status=2)
    assert "Stopped at step 1: the loss is finite, but the gradient of network." in printed
    assert shown_ids(printed) == seen[0]
    assert "No good checkpoint has been written yet." in printed


def test_images_are_named(run, detection_config, spoilt):
    seen = spoilt(DetectionTask, 1, lambda task, loss: loss * float("nan"))
    printed = run("fit", "-c", detection_config, *SAVED_EVERY_STEP, status=2)
    first = seen[0][0]
    assert re.search(rf"\(sample ids {first} \([^)]+\.(png|jpg)\), ", printed)


def test_a_broken_last_checkpoint_is_not_called_good(run, tiny_config, in_folder, spoilt):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    folder = in_folder / "checkpoints" / "translation" / "tiny"
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = float("nan")
    torch.save(checkpoint, folder / "last.ckpt")
    printed = run("fit", "-c", tiny_config, "--ckpt_path", "last", "--trainer.max_steps", 4, status=2)
    assert f"The last good checkpoint is {folder / 'best.ckpt'}." in printed


class Line(pl.LightningModule):
    """Two weights; the gradient of the second is not finite in one batch. Keeps them as they are after every batch."""

    def __init__(self, optimizer, broken_batch):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
        self.optimizer, self.broken_batch, self.seen = optimizer, broken_batch, []

    def training_step(self, batch, batch_idx):
        factor = self.second.sum()
        if batch_idx == self.broken_batch:
            factor.register_hook(lambda gradient: gradient / 0)
        return (self.first.sum() * factor) ** 2

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(torch.cat((self.first, self.second)).detach().clone())

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_looking_now_and_then_ends_with_the_same_weights_and_message(optimizer, fused):
    """As on a GPU: a fused optimizer skips the broken step and all after it until it is looked at."""
    module = Line(functools.partial(OPTIMIZERS[optimizer], fused=fused), broken_batch=4)
    trainer = pl.Trainer(
        max_steps=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StopOnNonFinite(every_n_steps=4)],
    )
    with pytest.raises(NonFiniteError, match=r"at step 5: .* gradient of second is not, after batch 5 of epoch 0\."):
        trainer.fit(module, DataLoader(torch.zeros(20, 1)))
    assert len(module.seen) == (7 if fused else 4), "looked at in step 8, or in each step"
    assert not torch.equal(module.seen[2], module.seen[3])
    assert all(torch.equal(one, module.seen[3]) for one in module.seen[4:])
    assert torch.equal(torch.cat((module.first, module.second)), module.seen[3])


def test_a_checkpoint_is_not_written_after_a_broken_step(run, tiny_config, in_folder, spoilt, monkeypatch):
    monkeypatch.setattr("lightning_attn.tasks.base.StopOnNonFinite", functools.partial(StopOnNonFinite, 100))
    seen = spoilt(TranslationTask, 3, lambda task, loss: loss * float("nan"))
    printed = run("fit", "-c", tiny_config, *SAVED_EVERY_STEP, "--trainer.max_steps", 6, status=2)
    assert "error: Stopped at step 3: the loss of batch 3 of epoch 0 is nan" in printed
    assert shown_ids(printed) == seen[2]
    checkpoint = torch.load(in_folder / "checkpoints/translation/tiny/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


class StubTrainer:
    log_every_n_steps = 50
    global_step = 0
    current_epoch = 0
    precision_plugin = None


def test_a_step_on_a_gpu_is_not_waited_for():
    """Neither the look nor the optimizer that skips steps asks for a number."""
    with fake_cuda():
        module = torch.nn.Linear(3, 2)
        made = OPTIMIZERS["adamw"](module.parameters(), fused=True)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        callback, trainer = StopOnNonFinite(), StubTrainer()
        for _ in range(2):
            callback.on_before_backward(trainer, module, torch.zeros(()))
            callback.on_before_optimizer_step(trainer, module, made)
            made.step()
            trainer.global_step += 1


@pytest.mark.ddp
def test_both_ranks_end_and_name_the_sample(run_process, tiny_config, in_folder):
    """Rank 1 has the sample that breaks the loss."""
    Path("task.py").write_text(
        """
from lightning_attn.tasks import TranslationTask

class Spoilt(TranslationTask):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and batch_idx == 1:
            print("spoilt", batch.ids.tolist(), flush=True)
            loss = loss * float("nan")
        return loss
""",
        encoding="utf-8",
    )
    config = Path("spoilt.yaml")
    config.write_text(tiny_config.read_text().replace("class_path: TranslationTask", "class_path: task.Spoilt"))
    two = ["--trainer.devices", 2, "--trainer.strategy", "ddp", *SAVED_EVERY_STEP]
    done = run_process("fit", "-c", config, *two, status=2, PYTHONPATH=str(in_folder))
    spoilt = [int(number) for number in re.search(r"spoilt \[(.*)\]", done.stdout).group(1).split(", ")]
    assert "Stopped at step 2: on rank 1, the loss of batch 2 of epoch 0 is nan" in done.stderr
    assert shown_ids(done.stderr) == spoilt
