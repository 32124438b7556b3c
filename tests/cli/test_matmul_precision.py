"""`run.float32_matmul_precision`: for GPUs only."""

import pytest
import torch

from lightning_attn.cli.run_options import RunOptions


@pytest.fixture
def chosen(monkeypatch) -> list[str]:
    """The precisions that torch is told."""
    told: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    return told


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_gpu_gets_it_and_a_cpu_does_not(chosen, precision):
    options = RunOptions(float32_matmul_precision=precision)
    options.set_matmul_precision(torch.device("cpu"))
    assert chosen == []
    options.set_matmul_precision(torch.device("cuda", 0))
    assert chosen == [precision]


def test_a_run_on_a_cpu_leaves_torch_as_it_is(run, tiny_config, chosen):
    run("fit", "-c", tiny_config, "--trainer.max_steps", 1, "--run.float32_matmul_precision", "medium")
    assert chosen == []
    printed = run("fit", "-c", tiny_config, "--run.float32_matmul_precision", "tf32", status=2)
    assert "One of 'highest', 'high', 'medium' is expected." in printed
