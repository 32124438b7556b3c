"""`model.compile` through the command."""

import copy
import csv
from pathlib import Path

import pytest
import torch

from lightning_attn.tasks import BaseTask, DetectionTask, OptimizerSpec, ScheduleSpec, TranslationTask
from lightning_attn.training.checkpoint_keys import TASK_KEY

RUNS = Path("checkpoints/translation")


def losses(name: str) -> list[float]:
    with (RUNS / name / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.slow
def test_checkpoints_of_compiled_and_other_runs_are_interchangeable(run, tiny_config):
    fit = ["fit", "-c", tiny_config, "--trainer.limit_val_batches", 0]
    run(*fit, "--run.name", "plain")
    printed = run(*fit, "--run.name", "compiled", "--model.compile", "aot_eager")
    assert printed.count("Compiled 2 modules (aot_eager): the first step took") == 1
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-5)
    states = [torch.load(RUNS / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("plain", "compiled")]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    assert not any("_orig_mod" in name for name in states[1])
    for name, option in (("plain", "aot_eager"), ("compiled", "false")):
        further = ["--ckpt_path", RUNS / name / "last.ckpt", "--trainer.max_steps", 6, "--model.compile", option]
        printed = run(*fit, "--run.name", name, *further)
        assert "Settings that differ from the checkpoint's" in printed
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-5)
    assert TranslationTask.load(RUNS / "compiled" / "last.ckpt").predict(["The woman reads a book."])


class Bare(BaseTask):
    def __init__(self, compile: bool = True) -> None:
        super().__init__(OptimizerSpec(), ScheduleSpec(), compile=compile)
        self.network = torch.nn.Linear(2, 2)


class Compiled(BaseTask):
    """Decides for itself."""

    def __init__(self, width: int = 2) -> None:
        super().__init__(OptimizerSpec(), ScheduleSpec(), compile="aot_eager")
        self.network = torch.nn.Linear(width, width)

    def modules_to_compile(self):
        return [self.network]


def test_a_task_of_ones_own():
    """A checkpoint holds what the class takes, and no argument of its bases."""
    task, checkpoint = Compiled(3), {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint[TASK_KEY]["arguments"] == {"width": 3}
    names = list(task.state_dict())
    task.configure_callbacks()[-1].on_fit_start(None, task)
    assert list(task.state_dict()) == names
    torch.testing.assert_close(task.network(torch.ones(1, 3)), copy.deepcopy(task).network(torch.ones(1, 3)))


def test_what_cannot_be_compiled(run, tiny_config):
    printed = run("fit", "-c", tiny_config, "--model.compile", "cuda", status=2)
    assert "One of 'inductor', 'aot_eager' is expected" in printed
    callback = Bare().configure_callbacks()[-1]
    with pytest.raises(ValueError, match=r"compile: Bare does not say .*: define modules_to_compile\(self\)"):
        callback.on_fit_start(None, Bare())
    with pytest.raises(
        ValueError, match=r"compile must be true, false or one of \['inductor', 'aot_eager'\], got 'eager'"
    ):
        Bare(compile="eager")
    for task in (DetectionTask, TranslationTask):
        with pytest.raises(ValueError, match=r"activation_checkpointing=True with compile=True: .* Set one of them"):
            task(compile=True, activation_checkpointing=True)
