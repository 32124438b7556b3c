"""`model.activation_checkpointing` through the command: the same losses and weights, bitwise."""

import csv
from pathlib import Path

import pytest
import torch

from lightning_attn.networks.recomputation import RecomputableLayer
from lightning_attn.tasks import SegmentationTask, TranslationTask


def results(task: str, name: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    folder = Path("checkpoints") / task / name
    with (folder / "metrics.csv").open() as file:
        losses = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    return losses, torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("task", [TranslationTask, SegmentationTask])
def test_a_run_with_it_is_bitwise_the_same(run, tiny_config, segmentation_config, task):
    kind, config = task.task_name, tiny_config if task is TranslationTask else segmentation_config
    options = ["--model.dropout", 0.1] if task is TranslationTask else ["--model.backbone.norm", "batch"]
    fit = ["fit", "-c", config, "--trainer.limit_val_batches", 0, *options]
    run(*fit, "--run.name", "stored")
    run(*fit, "--run.name", "computed", "--model.activation_checkpointing", "true")
    (losses, weights), (other_losses, other_weights) = results(kind, "stored"), results(kind, "computed")
    assert len(losses) == 4
    assert other_losses == losses
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=0)
    loaded = task.load(Path("checkpoints") / kind / "computed/last.ckpt")
    assert any(isinstance(one, RecomputableLayer) and one.recomputes for one in loaded.modules())
