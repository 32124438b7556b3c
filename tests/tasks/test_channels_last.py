"""The memory format of image networks: an option that changes no result."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.batching import NormalizedBatch, use_channels_last
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Segmenter
from lightning_attn.tasks import SegmentationTask

RUNS = Path("checkpoints/segmentation")
CPU = torch.device("cpu")


def network() -> Segmenter:
    spec = AttentionSpec(terms="1010", num_heads=2, convolution="deformable")
    built = Segmenter(
        3, build_backbone(ResNetSpec("bottleneck14", width=8), spec, 8), spec, SegmenterSpec(16, dropout=0.0)
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    return built.train().double()


def is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def formats(module: torch.nn.Module) -> set[bool]:
    """Whether the weights of its 3x3 convolutions are channels last."""
    return {
        is_channels_last(one.weight)
        for one in module.modules()
        if isinstance(one, torch.nn.Conv2d) and one.kernel_size == (3, 3)
    }


@pytest.mark.parametrize(
    ("choice", "on_cpu", "on_cuda"), [("auto", True, True), (True, True, True), (False, False, False)]
)
def test_the_format_of_a_batch(choice, on_cpu, on_cuda):
    batch = NormalizedBatch()
    batch.channels_last = choice
    images = [torch.zeros(3, 5, 7, dtype=torch.uint8)]
    assert is_channels_last(batch(images, 4)) is on_cpu
    with fake_cuda():
        batch = NormalizedBatch()
        batch.channels_last = choice
        assert is_channels_last(batch([torch.zeros(3, 5, 7, dtype=torch.uint8)], 4)) is on_cuda


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), (True, "cpu", True), (True, "mps", True), (False, "cuda", False)],
)
def test_the_format_of_weights(choice, device, expected):
    built = network()
    use_channels_last(built, choice, torch.device(device))
    assert formats(built) == {expected}
    assert built.backbone.batch.channels_last == choice


def test_results_are_the_same():
    images = [torch.randint(0, 256, (3, 33, 49), dtype=torch.uint8) for _ in range(2)]
    labels = [torch.randint(0, 3, (33, 49)).to(torch.uint8) for _ in range(2)]
    first = network()
    for choice in (True, False):
        other = copy.deepcopy(first)
        use_channels_last(other, choice, CPU)
        losses = [torch.stack(list(one(images, labels).values())).sum() for one in (first, other)]
        torch.testing.assert_close(*losses)
        for loss, one in zip(losses, (first, other), strict=True):
            one.zero_grad()
            loss.backward()
        for parameter, twin in zip(first.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def losses(name: str) -> list[float]:
    with (RUNS / name / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_a_run_is_resumed_in_another_format(run, segmentation_config):
    """The optimizer's state follows the weights, or fused kernels would mix up elements."""
    fit = ["fit", "-c", segmentation_config, "--trainer.limit_val_batches", 0, "--model.schedule.name", "constant"]
    run(*fit, "--run.name", "rows", "--model.channels_last", "false")
    run(*fit, "--run.name", "half", "--model.channels_last", "true", "--trainer.max_steps", 2)
    resumed = ["--ckpt_path", RUNS / "half/last.ckpt", "--model.channels_last", "false", "--trainer.max_steps", 4]
    run(*fit, "--run.name", "half", *resumed)
    assert losses("half") == pytest.approx(losses("rows"), rel=1e-2)
    checkpoint = torch.load(RUNS / "half/last.ckpt", weights_only=True)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        assert state["exp_avg"].is_contiguous()
        assert state["exp_avg_sq"].is_contiguous()
    assert formats(SegmentationTask.load(RUNS / "half/last.ckpt").network) == {False}


def test_mistakes(run, segmentation_config):
    compiled = ["--model.compile", "true", "--model.channels_last", "false"]
    printed = run("fit", "-c", segmentation_config, *compiled, status=2)
    assert "channels_last=False with compile=True: convolutions of other maps are compiled again" in printed
    with pytest.raises(ValueError, match="channels_last must be true, false or auto, got 'rows'"):
        SegmentationTask(channels_last="rows")
