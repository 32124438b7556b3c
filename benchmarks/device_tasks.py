"""Training steps of whole networks on the device: images and target tokens a second, beside other projects' networks.

A step is forward pass, backward pass and optimizer, in bfloat16 by autocast, on one random batch that lies on the
device. torchvision's detector has the same sizes, frozen layers and statistics (`peers/torchvision_detector.py`);
`torch.nn.Transformer` has this project's loss and one embedding (`peers/translation.py`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Run, Table
from benchmarks.checks import Check, run_checks
from benchmarks.detection_problem import PAPER as DETECTOR
from benchmarks.detection_problem import Problem as DetectorProblem
from benchmarks.detection_problem import build_detector
from benchmarks.device import autocast, device, free_memory, peak_memory, synchronize
from benchmarks.device_correctness import outcome_notes
from benchmarks.fresh_process import describe
from benchmarks.results import Comparison, Result, Side, Target, Timing, ratio
from lightning_attn.attention import AttentionSpec

NONE, CHANNELS_LAST = "none", "none, channels_last"
FASTER_RCNN = (60.0, 100.0)  # images a second at batch 16 without attention, at least
SHARES = {"1111": 0.85, "1111 stride 2": 0.95, "0010": 0.98, "0010 deformable": 0.80}  # of the speed without attention
TOKENS = (250_000.0, 500_000.0)  # target tokens a second of the base Transformer, at least

ATTENTIONS: Mapping[str, dict[str, Any]] = {
    NONE: {"mechanism": "none"},
    "0010": {"terms": "0010"},
    "0010 deformable": {"terms": "0010", "convolution": "deformable"},
    "1111": {"terms": "1111"},
    "1111 stride 2": {"terms": "1111", "kv_stride": 2},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A batch, and how often a step is timed.

    Attributes:
        batches: Numbers of images, or of sentences.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        rounds: Timed steps.
        small: Whether the networks are small ones, for a CPU.
    """

    batches: tuple[int, ...]
    height: int = 800
    width: int = 1344
    rounds: int = 8
    small: bool = False

    def __str__(self) -> str:
        size = "small networks" if self.small else "networks of the published sizes"
        return f"batches of {', '.join(map(str, self.batches))}; {size}; images of {self.height}x{self.width}"


Measured = Callable[[str, int], tuple[nn.Module, Callable[[nn.Module], Tensor], float]]
"""From a side and a size of batch: a network, its loss, and how many images or tokens a step has."""


def training_step(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    """A step forward and backward in bfloat16, and of the optimizer."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=True)

    def step() -> None:
        with autocast("bf16"):
            value = loss(network)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed_steps(network: nn.Module, loss: Callable[[nn.Module], Tensor], rounds: int, run: Run) -> tuple[Side, float]:
    """The cost of training steps after the first three, and the seconds of the first."""
    step = training_step(network, loss)

    def seconds() -> float:
        synchronize()
        start = run.clock()
        step()
        synchronize()
        return run.clock() - start

    first, _, _ = (seconds() for _ in range(3))
    times = tuple(seconds() for _ in range(rounds))
    return Side(Timing(times), peak_memory(step) if run.memory else None), first


def network_checks(case: Case, run: Run, build: Measured) -> Iterator[Check]:
    """A comparison for each size of batch."""
    for batch in case.problem.batches:
        yield Check(f"batch {batch}", partial(_measure_networks, case, run, build, batch), seconds=10.0)


def _measure_networks(case: Case, run: Run, build: Measured, batch: int, found: Comparison) -> None:
    """One side after the other, each as soon as it is measured."""
    for side in case.sides:
        run.report(f"batch {batch}, {side}")
        try:
            network, loss, count = build(side, batch)
            found.sides[side], first = timed_steps(network, loss, case.problem.rounds, run)
            found.figures[side] = {"count": count, "first step, s": round(first, 2)}
            del network, loss
        except ModuleNotFoundError:
            raise
        except Exception as error:  # a side that fails is a result
            found.sides[side] = Side(error=describe(error)[:200])
        free_memory()


def build_faster_rcnn(
    problem: Problem, side: str, batch: int
) -> tuple[nn.Module, Callable[[nn.Module], Tensor], float]:
    """This project's detector under an attention, or torchvision's."""
    detector = dataclasses.replace(DETECTOR, images=batch, height=problem.height, width=problem.width)
    if problem.small:
        from benchmarks.detection_problem import MINIATURE

        detector = dataclasses.replace(MINIATURE, images=batch, height=problem.height, width=problem.width)
    network = _torchvision(detector) if side == "torchvision" else build_detector(detector, _attention(side, "images"))
    network = network.to(device())
    if side == CHANNELS_LAST:
        network = network.to(memory_format=torch.channels_last)
    images, targets = detector.samples()
    images = [image.to(device()) for image in images]
    targets = [{name: tensor.to(device()) for name, tensor in target.items()} for target in targets]

    def loss(network: nn.Module) -> Tensor:
        inputs = [image / 255 for image in images] if side == "torchvision" else images
        return torch.stack(list(network(inputs, targets).values())).sum()

    return network, loss, batch


def _torchvision(problem: DetectorProblem) -> nn.Module:
    from benchmarks.peers.torchvision_detector import torchvision_detector, train_mode

    torch.manual_seed(0)
    network: nn.Module = torchvision_detector(problem.classes, problem.backbone, problem.detector)
    train_mode(network)
    return network


def _attention(side: str, of: str) -> AttentionSpec:
    heads = 8 if of == "images" else 4
    return AttentionSpec(num_heads=heads, **ATTENTIONS[NONE if side == CHANNELS_LAST else side])


def build_segmentation(
    problem: Problem, side: str, batch: int
) -> tuple[nn.Module, Callable[[nn.Module], Tensor], float]:
    """This project's segmentation network under an attention."""
    from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
    from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
    from lightning_attn.networks.images.network import Segmenter

    torch.manual_seed(0)
    attention, classes = _attention(side, "images"), 19
    backbone = ResNetSpec("bottleneck14", width=16, norm="batch") if problem.small else ResNetSpec("resnet50")
    spec = SegmenterSpec(head_channels=32 if problem.small else 512)
    network = Segmenter(classes, build_backbone(backbone, attention, spec.output_stride), attention, spec).to(device())
    if side == CHANNELS_LAST:
        network = network.to(memory_format=torch.channels_last)
    shape = problem.height, problem.width
    images = [torch.randint(256, (3, *shape), dtype=torch.uint8, device=device()) for _ in range(batch)]
    labels = [torch.randint(classes, shape, dtype=torch.uint8, device=device()) for _ in range(batch)]
    return network.train(), lambda network: torch.stack(list(network(images, labels).values())).sum(), batch


def build_translation(
    problem: Problem, side: str, batch: int
) -> tuple[nn.Module, Callable[[nn.Module], Tensor], float]:
    """This project's base Transformer, whose self-attention a side names, or `torch.nn.Transformer`.

    Encoder-decoder attention is 1111 everywhere, as in the paper.
    """
    from benchmarks.translation import PAD, torch_network
    from benchmarks.translation import Problem as TranslationProblem
    from lightning_attn.networks.translation.transformer import Transformer

    sizes = TranslationProblem(vocabulary=37_000, sentences=batch)
    if problem.small:
        sizes = TranslationProblem(64, 4, 64, 1, vocabulary=50, sentences=batch, shortest=4, longest=6)
    torch.manual_seed(0)
    network: nn.Module
    if side == "torch.nn.Transformer":
        network = torch_network(sizes)
    else:
        scale = (sizes.dim // sizes.heads) ** -0.5
        network = Transformer(
            sizes.vocabulary,
            PAD,
            dataclasses.replace(AttentionSpec(num_heads=sizes.heads, **ATTENTIONS[side]), scale=scale),
            AttentionSpec(num_heads=sizes.heads, scale=scale),
            dim=sizes.dim,
            hidden_dim=sizes.hidden,
            encoder_layers=sizes.layers,
            decoder_layers=sizes.layers,
            dropout=sizes.dropout,
        )
    source, target = (ids.to(device()) for ids in sizes.batch())
    tokens = int((target[:, 1:] != PAD).sum())

    def loss(network: Any) -> Tensor:
        summed, _, number = network.loss(source, target, label_smoothing=0.1)
        mean: Tensor = summed / number
        return mean

    return network.to(device()).train(), loss, tokens


def rate(comparison: Comparison, side: str) -> float | None:
    """Images or target tokens a second; None if the side was not measured."""
    cost = comparison.sides.get(side)
    if cost is None or cost.timing is None:
        return None
    count: float = comparison.figures[side]["count"]
    return count / cost.timing.median


def judge_detection(result: Result) -> None:
    """At batch 16, the speed without attention, and what share of it each attention leaves."""
    for found in result.comparisons:
        if found.name != "batch 16" or result.problem["small"] or not found.sides:
            continue
        plain, name = rate(found, NONE), "Faster R-CNN, batch 16"
        found.targets = [
            Target(f"{name}, images/s", plain, FASTER_RCNN[0], at_least=True),
            Target(f"{name}, images/s, aim", plain, FASTER_RCNN[1], at_least=True),
            Target(f"{name}: torchvision / ours", _relative(found, "torchvision", NONE), 1.0, at_least=True),
        ]
        for side, share in SHARES.items():
            value = _relative(found, NONE, side)
            found.targets.append(Target(f"{name}: share of the speed with {side}", value, share, at_least=True))


def judge_translation(result: Result) -> None:
    """Target tokens a second with 1111 everywhere, beside torch's Transformer."""
    for found in result.comparisons:
        if result.problem["small"] or not found.sides:
            continue
        name, value = f"base Transformer 1111, {found.name}", rate(found, "1111")
        found.targets = [
            Target(f"{name}, target tokens/s", value, TOKENS[0], at_least=True),
            Target(f"{name}, target tokens/s, aim", value, TOKENS[1], at_least=True),
            Target(
                f"{name}: torch.nn.Transformer / ours",
                _relative(found, "torch.nn.Transformer", "1111"),
                1.0,
                at_least=True,
            ),
        ]


def _relative(found: Comparison, one: str, other: str) -> float | None:
    return ratio(found.sides.get(one), found.sides.get(other), "time")


def table(unit: str) -> Callable[[Result], Table]:
    """The function of a case that makes a line of each batch and side."""

    def make(result: Result) -> Table:
        cells = []
        for found, (side, cost) in itertools.chain.from_iterable(
            ((found, item) for item in found.sides.items()) for found in result.comparisons
        ):
            speed = rate(found, side)
            if cost.timing is None or speed is None:
                cells.append([found.name, side, cost.error or "-", "", "", "", ""])
                continue
            base = ratio(found.sides.get(NONE), cost, "time")
            cells.append(
                [
                    found.name,
                    side,
                    f"{speed:,.{1 if speed < 1000 else 0}f}",
                    f"{1e3 * cost.timing.median:.1f}",
                    "" if base is None else f"{base:.3f}",
                    f"{found.figures[side]['first step, s']:.2f}",
                    "" if cost.memory is None else f"{cost.memory.peak / 2**30:.2f}",
                ]
            )
        header = ["", "side", unit, "ms", "speed / none", "first step, s", "GiB at the peak"]
        targets = [target for found in result.comparisons for target in found.targets]
        return Table(header, cells, [*targets, *outcome_notes(result)])

    return make


def _measure_with(
    build: Callable[[Problem, str, int], tuple[nn.Module, Callable[[nn.Module], Tensor], float]],
) -> Callable[[Case, Run], Iterator[Comparison]]:
    return lambda case, run: run_checks(network_checks(case, run, partial(build, case.problem)), run)


CASES = (
    Case(
        "device_check.tasks.detection",
        "training steps of Faster R-CNN, ResNet-50, FPN",
        _measure_with(build_faster_rcnn),
        Problem((16, 8)),
        sides=(NONE, "torchvision", "1111", "1111 stride 2", "0010", "0010 deformable", CHANNELS_LAST),
        judge=judge_detection,
        table=table("images/s"),
        quick={
            "problem": Problem((2,), 64, 96, rounds=1, small=True),
            "sides": (NONE, "torchvision", "0010 deformable"),
        },
    ),
    Case(
        "device_check.tasks.translation",
        "training steps of the base Transformer",
        _measure_with(build_translation),
        Problem((256,)),
        sides=("1111", "torch.nn.Transformer", "0010", "0010 deformable", NONE),
        judge=judge_translation,
        table=table("target tokens/s"),
        quick={"problem": Problem((2,), rounds=2, small=True)},
    ),
    Case(
        "device_check.tasks.segmentation",
        "training steps of segmentation, dilated ResNet-50",
        _measure_with(build_segmentation),
        Problem((4,), 769, 769),
        sides=(NONE, "1111", "0010", "0010 deformable", CHANNELS_LAST),
        table=table("images/s"),
        quick={"problem": Problem((2,), 65, 65, rounds=1, small=True), "sides": (NONE, "1111")},
    ),
)
