"""What segmentation costs here: time and memory of a training step, and of inference on a whole image.

``python -m benchmarks.segmentation`` prints tables and writes JSON and Markdown. Two parts, chosen with ``--parts``:

``training`` is the training step of the paper's network at its crop, one image of 769x769, under several attentions:
forward, backward and SGD. Sides are too large to take turns within one process, so they take turns as processes of
their own, whose peaks of memory are counted; time is the median of the steps after the first of each.

``inference`` is a whole image of 1024x2048 under 1111 with all keys. It takes minutes.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lightning_attn.networks.images.segmentation import Segmenter, SegmenterSpec
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import (
    Memory,
    Side,
    Target,
    Timing,
    answer_parent,
    comma_separated,
    machine,
    markdown_settings,
    markdown_table,
    output_console,
    peak_memory,
    positive_int,
    print_target,
    run_child,
)
from lightning_attn.attention import AttentionSpec
from lightning_attn.io import unused_path, write_json, write_text
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.segmentation_inference import InferenceSpec, segment

ATTENTIONS: Mapping[str, dict[str, Any]] = {
    "none": {"mechanism": "none"},
    "0010": {"terms": "0010"},
    "0011": {"terms": "0011"},
    "1111": {"terms": "1111"},
    "1111 stride 2": {"terms": "1111", "kv_stride": 2},
    "0010 deformable": {"terms": "0010", "convolution": "deformable"},
}
PARTS: Mapping[str, tuple[str, ...]] = {"training": tuple(ATTENTIONS), "inference": ("1111",)}
"""The sides of each part."""

PEAK_GB = {"training": {"1111": 24.0}, "inference": {"1111": 12.0}}
_CLASSES = 19


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and the size of its random input.

    Attributes:
        backbone: Which ResNet.
        segmenter: What stands on it.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        heads: Attention heads.
    """

    backbone: ResNetSpec
    segmenter: SegmenterSpec
    height: int
    width: int
    heads: int = 8

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` made of one."""
        parts = {"backbone": ResNetSpec(**values["backbone"]), "segmenter": SegmenterSpec(**values["segmenter"])}
        return cls(**{**values, **parts})

    def network(self, side: str) -> Segmenter:
        """The network under one of `ATTENTIONS`, its gates open, as training opens them."""
        torch.manual_seed(0)
        spec = AttentionSpec(num_heads=self.heads, **ATTENTIONS[side])
        network = Segmenter(_CLASSES, self.backbone, spec, self.segmenter)
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                torch.nn.init.constant_(parameter, 0.1)
        return network

    def images(self) -> list[Tensor]:
        """A random image."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(256, (3, self.height, self.width), generator=generator, dtype=torch.uint8)]

    def labels(self) -> list[Tensor]:
        """Random labels for it."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(_CLASSES, (self.height, self.width), generator=generator, dtype=torch.uint8)]


# Statistics of a batch of one image are no less work than those over GPUs.
_PAPER = {"backbone": ResNetSpec("resnet50", norm="batch"), "segmenter": SegmenterSpec(norm="batch")}
PROBLEMS: Mapping[str, Problem] = {
    "training": Problem(**_PAPER, height=769, width=769),  # type: ignore[arg-type]
    "inference": Problem(**_PAPER, height=1024, width=2048),  # type: ignore[arg-type]
}


def training_step(problem: Problem, side: str) -> Callable[[], object]:
    """Forward, backward and SGD."""
    network, images, labels = problem.network(side).train(), problem.images(), problem.labels()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        losses = network(images, labels)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def inference_step(problem: Problem, side: str) -> Callable[[], object]:
    """A label for every pixel of the whole image."""
    network, images = problem.network(side).eval(), problem.images()
    return lambda: segment(network, images, InferenceSpec())


STEPS = {"training": training_step, "inference": inference_step}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What `measure` asks of a fresh process; an optimizer has its state before the step that counts."""
    step = STEPS[request["part"]](Problem.from_dict(request["problem"]), request["side"])
    memory, timing = peak_memory(step, steps=request["steps"])
    return dataclasses.asdict(Side(timing, memory))


def measure(
    part: str, problem: Problem, sides: Sequence[str], rounds: int, threads: int, report: Callable[[str], object]
) -> dict[str, Side]:
    """Runs every side in processes of its own, in turn, as many rounds as are asked for.

    The time of a side is that of its steps in all rounds but the first step of each process; its memory is the largest
    peak. Inference, which takes minutes, runs once in each.
    """
    found: dict[str, Side] = {}
    for turn in range(rounds):
        for side in sides:
            report(f"{part}: {side}, round {turn + 1} of {rounds}")
            request = {
                "part": part,
                "side": side,
                "problem": dataclasses.asdict(problem),
                "steps": 1 if part == "inference" else 3,
            }
            figures = run_child(
                "benchmarks.segmentation", ["--child", json.dumps(request)], threads=threads, timeout=1800.0
            )
            if isinstance(figures, str):
                found[side] = Side(error=figures)
                continue
            found[side] = _together(found.get(side, Side()), Side.from_dict(figures))
    return found


def _together(earlier: Side, new: Side) -> Side:
    assert new.timing is not None
    assert new.memory is not None
    before = () if earlier.timing is None else earlier.timing.seconds
    peaks = [memory for memory in (earlier.memory, new.memory) if memory is not None]
    memory: Memory = max(peaks, key=lambda memory: memory.peak)
    return Side(Timing(before + (new.timing.seconds[1:] or new.timing.seconds)), memory)


def table(sides: Mapping[str, Side]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = ["side", "seconds", "GB at the peak", "GB more than before the step", "time / none"]
    base = sides.get("none", Side()).timing
    cells = []
    for name, side in sides.items():
        if side.timing is None or side.memory is None:
            cells.append([name, side.error or "-", "", "", ""])
            continue
        relative = "" if base is None else f"{side.timing.median / base.median:.2f}"
        peak, increase = side.memory.peak / 1e9, side.memory.increase / 1e9
        cells.append([name, f"{side.timing.median:.1f}", f"{peak:.2f}", f"{increase:.2f}", relative])
    return header, cells


def targets(part: str, sides: Mapping[str, Side]) -> list[Target]:
    """The peaks that have a bound."""
    return [
        Target(f"{part}, {name}, GB", side.memory.peak / 1e9 if side.memory else None, PEAK_GB[part][name], False)
        for name, side in sides.items()
        if name in PEAK_GB[part]
    ]


def markdown(run: Mapping[str, Any], parts: Mapping[str, Mapping[str, Side]]) -> str:
    """All tables, the machine, and how it was measured."""
    lines = ["# Segmentation: time and memory", "", markdown_settings(run["machine"]), ""]
    lines += ["Each side in processes of its own, float32; medians of the steps after the first.", ""]
    for name, sides in parts.items():
        problem = run["problems"][name]
        lines += [
            f"## {name.capitalize()}",
            "",
            f"{problem['backbone']['name']}, one image of {problem['height']}x{problem['width']}",
            "",
            *markdown_table(*table(sides)),
            "",
            *(f"- {target}" for target in targets(name, sides)),
            "",
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=comma_separated, default=tuple(PARTS), help=",".join(PARTS))
    parser.add_argument("--sides", type=comma_separated, help="of training; names with commas between")
    parser.add_argument("--rounds", type=positive_int, default=2, help="processes of each side of training (2)")
    parser.add_argument("--threads", type=positive_int, default=2, help="threads of the tensor operations (2)")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None, problems: Mapping[str, Problem] = PROBLEMS) -> None:
    """Measures, prints and writes."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.child is not None:
        answer_parent(lambda: answer(chosen.child))
        return
    sides = chosen.sides or PARTS["training"]
    for name, values, known in (("parts", chosen.parts, PARTS), ("sides", sides, ATTENTIONS)):
        unknown = [value for value in values if value not in known]
        if unknown:
            parser.error(f"--{name} {','.join(unknown)}: there are {','.join(known)}")
    run: dict[str, Any] = {
        "machine": machine("torch", "torchvision") | {"threads": chosen.threads},
        "problems": {name: dataclasses.asdict(problem) for name, problem in problems.items()},
    }
    console, errors = output_console(width=120), Console(stderr=True)
    done: dict[str, dict[str, Side]] = {}
    for name in chosen.parts:
        found = measure(
            name,
            problems[name],
            sides if name == "training" else PARTS[name],
            chosen.rounds if name == "training" else 1,
            chosen.threads,
            lambda text: errors.print(text, highlight=False),
        )
        done[name] = found
        header, cells = table(found)
        styled = Table(*header, title=name, title_justify="left")
        for line in cells:
            styled.add_row(*line)
        console.print(styled)
        for target in targets(name, found):
            print_target(console, target)
    file = unused_path(chosen.output / "segmentation.json")
    parts = {name: {side: dataclasses.asdict(cost) for side, cost in found.items()} for name, found in done.items()}
    write_json(file, run | {"parts": parts})
    write_text(file.with_suffix(".md"), markdown(run, done))
    print(f"Results: {file.parent / file.stem}.*")


if __name__ == "__main__":
    main()
