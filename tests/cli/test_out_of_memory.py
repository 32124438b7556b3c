"""Running out of memory ends in one message that says what saves memory, and leaves last.ckpt."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

import datamodules
from lightning_attn.cli.messages import message_of
from lightning_attn.tasks import DetectionTask, SegmentationTask, TranslationTask

TEXT = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 78.04 GiB memory in use.\n"
    "See documentation for Memory Management"
)
LAST = Path("checkpoints/translation/tiny/last.ckpt")


def options(*owners: type) -> set[str]:
    """The arguments of classes and their bases, and the fields of their arguments."""
    found = set()
    for owner in {base for one in owners for base in one.__mro__ if base is not object}:
        for parameter in inspect.signature(owner).parameters.values():
            found.add(parameter.name)
            if dataclasses.is_dataclass(parameter.default):
                found |= {f"{parameter.name}.{field.name}" for field in dataclasses.fields(parameter.default)}
    return found


def known(option: str) -> bool:
    part, _, name = option.partition(".")
    owners = {
        "model": (DetectionTask, SegmentationTask, TranslationTask),
        "data": (datamodules.COCODataModule, datamodules.WMT14DataModule),
        "trainer": (pl.Trainer,),
    }
    return name in options(*owners[part])


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_every_option_that_is_named_exists(subcommand):
    message = message_of(torch.OutOfMemoryError(TEXT), [subcommand])
    assert message.startswith("Out of memory (CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    assert "documentation" not in message
    named = re.findall(r"--([a-z_]+\.[\w.]+\w)", message)
    assert len(named) >= 5
    assert [option for option in named if not known(option)] == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_other_ways_of_saying_it(error):
    assert message_of(error, ["fit"]).startswith("Out of memory")
    assert message_of(RuntimeError("a bug"), ["fit"]) is None


def test_a_run_ends_with_it_and_is_resumed_with_such_options(run, tiny_config, monkeypatch):
    original = TranslationTask.training_step
    is_full = True

    def training_step(self, batch, batch_idx):
        if self.global_step == 3 and is_full:
            raise torch.OutOfMemoryError(TEXT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TranslationTask, "training_step", training_step)
    fit = ["fit", "-c", tiny_config, "--run.checkpoint_every_n_steps", 1]
    printed = run(*fit, status=2)
    assert printed.count("error: Out of memory (CUDA out of memory. Tried to allocate 2.50 GiB") == 1
    assert "Traceback" not in printed
    assert "last.ckpt is as it was: resume with --ckpt_path auto" in printed
    assert torch.load(LAST, weights_only=True)["global_step"] == 3
    is_full = False
    run(*fit, "--ckpt_path", "auto", "--trainer.precision", "bf16-mixed")
    assert torch.load(LAST, weights_only=True)["global_step"] == 4
