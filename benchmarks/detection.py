"""What detection costs here, and a detector of torchvision alone trained on the same data with the same budget.

``overhead`` is a training step through Lightning's Trainer beside the same step in a bare loop: see
``trainer_overhead.py``.

``attention`` is the forward and backward pass of the whole detector, ResNet-50 with frozen statistics, on one image of
800x1344, under several attentions. All sides have the weights of the one without attention, and what attention adds
starts, as in training, without an effect: losses, proposals and sampled regions are the same everywhere. Two more rows
are the 3x3 convolutions of the attended blocks by themselves, deformable and regular, forward and backward.

``memory`` is the peak of a fresh process that makes one training step with two such images under 1111 with all keys.

``torchvision`` trains a peer, which needs data and a configuration:

    python -m benchmarks.detection --cases torchvision --config FILE --root DATA --steps 3000

``--minutes`` bounds the time of training, which scoring is no part of, with or without ``--steps``. Ctrl-C ends the
training, and what was trained is scored; a second one leaves that out. See ``peers/torchvision_training.py``.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks import trainer_overhead
from benchmarks.case import Benchmark, Case, Steps, in_processes, interleaved, no_targets
from benchmarks.detection_problem import (
    ATTENTIONS,
    PAPER,
    Problem,
    build_backbone,
    build_detector,
    detector_loss,
    normalized,
)
from benchmarks.peers import torchvision_training
from benchmarks.results import Result, ratio
from benchmarks.runner import run_as_command
from lightning_attn.attention import DeformableConv
from lightning_attn.datamodules.detection.datamodule import DetectionBatch

DEFORMABLE_ALONE, REGULAR_ALONE = "deformable 3x3 alone", "regular 3x3 alone"


def detectors(problem: Problem, sides: Sequence[str]) -> dict[str, nn.Module]:
    """A detector for each side; all have the weights of the one without attention, as far as that has them."""
    weights = build_detector(problem, problem.attention("none")).state_dict()
    networks: dict[str, nn.Module] = {}
    for side in sides:
        networks[side] = build_detector(problem, problem.attention(side))
        unknown = networks[side].load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, "attention only adds to a network"
    return networks


def attention_steps(problem: Problem, sides: Sequence[str]) -> Steps:
    """One pass in each direction of each side's detector, always with the same random draws; each returns its losses.

    Where a side has deformable convolutions, two more steps are these alone.
    """
    batch = problem.batch()
    networks = detectors(problem, sides)

    def passes(network: nn.Module) -> Callable[[], dict[str, float]]:
        def step() -> dict[str, float]:
            torch.manual_seed(0)
            network.zero_grad()
            total, losses = detector_loss(network, batch)
            total.backward()  # type: ignore[no-untyped-call]
            return losses

        return step

    steps: dict[str, Callable[[], object]] = {side: passes(network) for side, network in networks.items()}
    deformable = next((side for side in sides if side.endswith("deformable")), None)
    if deformable is not None:
        steps |= convolutions_alone(networks[deformable], networks["none"], batch)
    return steps


def difference_of_losses(base: Mapping[str, float], losses: Mapping[str, float]) -> float:
    """Relative to the largest loss."""
    return max(abs(losses[name] - value) for name, value in base.items()) / max(map(abs, base.values()))


def convolutions_alone(
    deformable: nn.Module, regular: nn.Module, batch: DetectionBatch
) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of all 3x3 convolutions that are deformable in one network, and of those in the other.

    Each runs by itself, on the input that it has in its network.
    """
    names = [name for name, module in deformable.named_modules() if isinstance(module, DeformableConv)]

    def passes(network: nn.Module) -> Callable[[], object]:
        found: list[tuple[nn.Module, Tensor]] = []
        hooks = [
            network.get_submodule(name).register_forward_pre_hook(
                lambda module, inputs: found.append((module, inputs[0].detach().clone().requires_grad_()))
            )
            for name in names
        ]
        torch.manual_seed(0)
        with torch.no_grad():
            network(batch.images, batch.targets)
        for hook in hooks:
            hook.remove()

        def run() -> None:
            for module, x in found:
                x.grad = None
                module.zero_grad()
                out = module(x)
                out.backward(torch.ones_like(out))

        return run

    return {DEFORMABLE_ALONE: passes(deformable), REGULAR_ALONE: passes(regular)}


def deformable_share(result: Result) -> list[str]:
    """How much of a side its deformable convolutions are."""
    [comparison] = result.comparisons
    replaced = comparison.sides.get(REGULAR_ALONE)
    regular = "-" if replaced is None or replaced.timing is None else f"{1e3 * replaced.timing.median:.0f} ms"
    shares = {
        side: ratio(comparison.sides.get(DEFORMABLE_ALONE), cost, "time")
        for side, cost in comparison.sides.items()
        if side.endswith("deformable")
    }
    return [
        f"{side}: its deformable convolutions are {100 * share:.0f} % of it; regular ones in their place take {regular}"
        for side, share in shares.items()
        if share is not None
    ]


def memory_steps(problem: Problem, sides: Sequence[str]) -> Steps:
    """One training step of the `backbone` or the `detector` under 1111 with all keys."""
    return {side: _memory_step(side, problem) for side in sides}


def _memory_step(side: str, problem: Problem) -> Callable[[], object]:
    attention, batch = problem.attention("1111"), problem.batch()
    images = normalized(batch) if side == "backbone" else None
    network = (build_detector if images is None else build_backbone)(problem, attention)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        total: Tensor
        if images is None:
            total, _ = detector_loss(network, batch)
        else:
            total = torch.stack([level.square().mean() for level in network(images).values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


BENCHMARK = Benchmark(
    name="detection",
    title="Detection: time, memory and a peer",
    description=__doc__,
    method="Medians of interleaved repetitions, float32; memory is that of a fresh process.",
    cases=(
        trainer_overhead.CASE,
        Case(
            "detection.attention",
            "forward and backward pass of the detector under several attentions",
            interleaved,
            PAPER,
            build=attention_steps,
            sides=tuple(ATTENTIONS),
            base="none",
            difference=difference_of_losses,
            tolerance=1e-2,
            bounds={"0010": 1.1, "1111 stride 2": 1.5},
            notes=deformable_share,
            repetitions=3,
            quick={
                "problem": dataclasses.replace(PAPER, height=256, width=320),
                "sides": ("0010", "1111 stride 2"),
                "repetitions": 2,
                "judge": no_targets,
            },
        ),
        Case(
            "detection.memory",
            "memory of a training step under 1111 with all keys",
            in_processes,
            dataclasses.replace(PAPER, images=2),
            build=memory_steps,
            sides=("backbone", "detector"),
            peaks={"backbone": 24.0, "detector": 24.0},
            repetitions=1,
            only_memory=True,
            quick={"problem": dataclasses.replace(PAPER, height=256, width=320), "judge": no_targets},
        ),
        torchvision_training.CASE,
    ),
)

if __name__ == "__main__":
    run_as_command("detection")
