"""What was measured when this project first ran on a GPU, again, beside the figures of then.

Modules, sizes and clock are the same. The earlier figures are those of `benchmarks/results/first_look_*.json`, of the
same card if there are any.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Run, Table
from benchmarks.checks import Check, run_checks
from benchmarks.device import autocast, card_slug, device, no_synchronisation, on_gpu, peak_memory, synchronize
from benchmarks.device_correctness import outcome_notes
from benchmarks.fresh_process import REPOSITORY
from benchmarks.results import Comparison, Result
from lightning_attn.attention import AttentionSpec, DeformableConv, DynamicConv, TransformerAttention

UNITS = {"ms": False, "syncs": False, "target_tokens_per_s": True, "images_per_s": True}
"""Figures that are compared, and whether more is better."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of the first look.

    Attributes:
        maps: Batch, channels, height, width and stride.
        sentences: Batch, length and width.
        changing: Widths of the maps that follow one another.
        tokens: Sentences, their length, and the vocabulary of the base Transformer.
        images: Number, height and width.
        dim: Width of the Transformer.
        folder: Of the earlier figures.
    """

    maps: tuple[tuple[int, int, int, int, int], ...] = (
        (2, 256, 50, 84, 1),
        (2, 256, 50, 84, 2),
        (2, 512, 25, 42, 1),
    )
    sentences: tuple[int, int, int] = (128, 30, 512)
    changing: tuple[int, ...] = tuple(range(60, 84, 2))
    tokens: tuple[int, int, int] = (256, 30, 32000)
    images: tuple[int, int, int] = (8, 800, 1344)
    dim: int = 512
    folder: str = str(REPOSITORY / "benchmarks" / "results")

    def __str__(self) -> str:
        return "the sizes of the first look"


class Row(NamedTuple):
    """A row of the first look.

    Attributes:
        section: `synchronisations`, `speed`, `networks` or `changing_sizes`.
        case: What it is measured on.
        what: Which module; empty where the case says it.
        measure: Gives its figures.
        seconds: Roughly how long it takes.
    """

    section: str
    case: str
    what: str
    measure: Callable[[], dict[str, float]]
    seconds: float = 1.0


class ContentOnly(nn.Module):
    """The floor of the first look: E1 alone by torch's fused attention, with four projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, stride: int = 1, causal: bool = False) -> Tensor:
        """`[B, C, H, W]` or `[B, L, C]` to the same."""
        z, keys = _tokens(x, 1), _tokens(x, stride)
        query, key, value = (
            torch.unflatten(layer(content), -1, (self.heads, -1)).transpose(1, 2)
            for layer, content in ((self.query, z), (self.key, keys), (self.value, keys))
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out if x.dim() == 3 else out.transpose(1, 2).reshape(x.shape)


def _tokens(x: Tensor, stride: int) -> Tensor:
    return x[:, ::stride] if x.dim() == 3 else x[:, :, ::stride, ::stride].flatten(2).transpose(1, 2)


def step_figures(module: nn.Module, x: Tensor, repeats: int = 12, **keywords: Any) -> dict[str, float]:
    """Median milliseconds of forward and backward in bf16, seconds of the first step, and MB at the peak."""
    module, x = module.to(device()), x.to(device())
    gradient = torch.randn_like(x)

    def once() -> None:
        leaf = x.detach().requires_grad_()
        with autocast("bf16"):
            y = module(leaf, **keywords)
        y.backward(gradient.to(y.dtype))

    start = time.perf_counter()
    once()
    synchronize()
    first = time.perf_counter() - start
    once()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        once()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    memory = peak_memory(once)
    megabytes = 0 if memory is None else round(memory.increase / 2**20)
    return {"ms": round(statistics.median(times), 3), "first_s": round(first, 2), "MB": megabytes}


def speed_rows(problem: Problem) -> Iterator[Row]:
    """Attention, deformable and dynamic convolution."""
    for batch, channels, height, width, stride in problem.maps:
        case = f"{batch}x{channels}x{height}x{width} stride {stride}"
        make = partial(torch.randn, batch, channels, height, width)
        floor = partial(ContentOnly, channels, 8)
        yield Row("speed", case, "floor: E1 by SDPA", partial(_figures, floor, make, stride=stride))
        for terms in ("1111", "0111", "0110", "0100", "0011", "0010"):
            attention = partial(TransformerAttention, channels, 8, terms, 2, kv_stride=stride)
            yield Row("speed", case, f"ours {terms}", partial(_figures, attention, make), 3.0)
        deformable, dynamic = partial(DeformableConv, channels, channels, 3), partial(DynamicConv, channels, 13, ndim=2)
        yield Row("speed", case, "deformable 3x3", partial(_figures, deformable, make, repeats=5))
        yield Row("speed", case, "dynamic 13x13", partial(_figures, dynamic, make, repeats=5))
    make = partial(torch.randn, *problem.sentences)
    width = problem.sentences[2]
    for causal in (False, True):
        case = "x".join(map(str, problem.sentences)) + (" causal" if causal else "")
        floor = partial(ContentOnly, width, 8)
        yield Row("speed", case, "floor: E1 by SDPA", partial(_figures, floor, make, causal=causal))
        for terms in ("1111", "0111", "0011", "0010"):
            for dropout in (0.0, 0.1):
                attention = partial(TransformerAttention, width, 8, terms, 1, causal=causal, dropout=dropout)
                yield Row("speed", case, f"ours {terms}, dropout {dropout}", partial(_figures, attention, make))


def _figures(build: Callable[[], nn.Module], make: Callable[[], Tensor], **keywords: Any) -> dict[str, float]:
    return step_figures(build(), make(), **keywords)


def changing_rows(problem: Problem) -> Iterator[Row]:
    """Maps of one size after the other, as a detector meets them."""
    _, channels, height, _, _ = problem.maps[0]
    module = TransformerAttention(channels, 8, "1111", 2, kv_stride=2)
    for width in problem.changing:
        make = partial(torch.randn, 2, channels, height, width)
        measure = partial(_figures, lambda: module, make, repeats=3)
        yield Row("changing_sizes", f"{height}x{width}", "ours 1111 stride 2", measure)


def synchronisation_rows() -> Iterator[Row]:
    """Whether forward or backward pass ask the GPU for a number."""
    maps, sentences = partial(torch.randn, 2, 64, 12, 20), partial(torch.randn, 4, 30, 64)
    modules: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
        f"map {terms}": (partial(TransformerAttention, 64, 4, terms, 2), maps)
        for terms in ("1111", "0110", "0011", "0010", "0001")
    }
    for terms in ("1111", "0011"):
        modules[f"causal {terms}"] = (partial(TransformerAttention, 64, 4, terms, 1, causal=True), sentences)
    modules["deformable"] = partial(DeformableConv, 64, 64, 3), maps
    modules["dynamic"] = partial(DynamicConv, 64, 5, ndim=2), maps
    for case, (build, make) in modules.items():
        yield Row("synchronisations", case, "", partial(_waits, build, make))


def _waits(build: Callable[[], nn.Module], make: Callable[[], Tensor]) -> dict[str, float]:
    module, x = build().to(device()), make().to(device())
    module(x).sum().backward()
    with no_synchronisation():
        module(x).sum().backward()
    return {"syncs": 0}


def network_rows(problem: Problem) -> Iterator[Row]:
    """Training passes of whole networks, beside torchvision's detector."""
    count, length, _ = problem.tokens
    for terms in ("1111", "0111"):
        case = f"base Transformer {terms}, {count} sentences of {length}"
        yield Row("networks", case, "", partial(_translate, problem, terms), 5.0)
    number, height, width = problem.images
    sides: dict[str, dict[str, Any] | None] = {
        "torchvision": None,
        "ours none": {"mechanism": "none"},
        "ours 0010": {"terms": "0010"},
        "ours 1111 stride 2": {"terms": "1111", "kv_stride": 2},
        "ours 0010 deformable": {"terms": "0010", "convolution": "deformable"},
    }
    for what, settings in sides.items():
        measure = partial(_detect, problem, settings)
        yield Row("networks", f"Faster R-CNN R50 FPN, {number} of {height}x{width}", what, measure, 8.0)


def _translate(problem: Problem, terms: str) -> dict[str, float]:
    from lightning_attn.networks.translation.transformer import Transformer

    count, length, vocabulary = problem.tokens
    spec = AttentionSpec(terms=terms, num_heads=8)
    network = Transformer(vocabulary, 0, spec, spec, dim=problem.dim, hidden_dim=4 * problem.dim).to(device())
    source = torch.randint(4, vocabulary, (count, length), device=device())

    def step() -> Tensor:
        with autocast("bf16"):
            loss: Tensor = network(source, source).float().logsumexp(-1).mean()
        return loss

    times = _times_of_passes(step, 8)
    return {
        "target_tokens_per_s": round(count * length / statistics.median(times[3:])),
        "first_s": round(times[0], 2),
    }


def _detect(problem: Problem, settings: dict[str, Any] | None) -> dict[str, float]:
    number, height, width = problem.images
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    shape = 3, height, width
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device()) for _ in range(number)]
    boxes = torch.tensor([[10.0, 10, 50, 50], [20.0, 8, 60, 60]], device=device())
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2], device=device())} for _ in range(number)]
    if settings is None:
        from torchvision.models.detection import fasterrcnn_resnet50_fpn

        network = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=81, min_size=height, max_size=width
        )
        inputs: Callable[[], list[Tensor]] = lambda: [image.float() / 255 for image in images]  # noqa: E731
    else:
        from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
        from lightning_attn.networks.images.heads.detection import DetectorSpec
        from lightning_attn.networks.images.network import Detector

        network = Detector(80, build_backbone(ResNetSpec(), AttentionSpec(**settings)), DetectorSpec())
        inputs = lambda: images  # noqa: E731
    network.to(device()).train()

    def step() -> Tensor:
        with autocast("bf16"):
            losses = network(inputs(), targets)
        return torch.stack(list(losses.values())).sum()

    times = _times_of_passes(step, 7)
    megabytes = round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu() else 0
    rate = number / statistics.median(times[2:])
    return {"images_per_s": round(rate, 2), "first_s": round(times[0], 2), "MB": megabytes}


def _times_of_passes(loss: Callable[[], Tensor], count: int) -> list[float]:
    """Seconds of forward and backward pass, the first ones included."""
    times = []
    for _ in range(count if on_gpu() else 4):
        synchronize()
        start = time.perf_counter()
        loss().backward()  # type: ignore[no-untyped-call]
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def rows(problem: Problem) -> Iterator[Row]:
    """All rows, in the order of worth."""
    if on_gpu():
        yield from synchronisation_rows()
    yield from speed_rows(problem)
    yield from network_rows(problem)
    yield from changing_rows(problem)


class Earlier(NamedTuple):
    """The first look that is compared with: its card, date, and figures by (section, case, what)."""

    card: str
    date: str
    figures: Mapping[tuple[str, str, str], Mapping[str, Any]]


def read_earlier(folder: Path) -> Earlier | None:
    """The newest first look of this card, else of any; None if there is none."""
    files = sorted(folder.glob("first_look_*.json"), key=lambda path: (f"_{card_slug()}_" in path.name, path.name))
    if not files:
        return None
    stored = json.loads(files[-1].read_text(encoding="utf-8"))
    figures = {
        (section, row["case"], row.get("what", "")): row
        for section, found in stored["sections"].items()
        for row in found
        if section != "correctness"
    }
    return Earlier(stored["device"], stored["date"], figures)


def checks(problem: Problem) -> Iterator[Check]:
    """A check for each row."""
    earlier = read_earlier(Path(problem.folder))
    for row in rows(problem):
        yield Check(" | ".join(filter(None, row[:3])), partial(_fill, row, earlier), row.seconds)


def _fill(row: Row, earlier: Earlier | None, found: Comparison) -> None:
    found.figures.update(section=row.section, case=row.case, what=row.what)
    before = {} if earlier is None else earlier.figures.get(row[:3], {})
    if earlier is not None and before:
        found.figures["earlier"] = {name: before[name] for name in (*UNITS, "MB", "failed") if name in before}
        found.figures["earlier card"] = f"{earlier.card}, {earlier.date}"
    found.figures.update(row.measure())


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """All rows."""
    yield from run_checks(checks(case.problem), run)


def table(result: Result) -> Table:
    """A line for each row, with the earlier figure beside it."""
    cells = []
    for comparison in result.comparisons:
        figures = comparison.figures
        unit = next((name for name in UNITS if name in figures), None)
        earlier = figures.get("earlier", {})
        name = unit or next((name for name in UNITS if name in earlier), "")
        before = earlier.get(name, "failed" if "failed" in earlier else None)
        now = figures.get(name)
        cells.append(
            [
                *(str(figures.get(one, "")) for one in ("section", "case", "what")),
                name.replace("_", " ").replace(" per s", "/s"),
                comparison.outcome if now is None else f"{now:g}",
                "" if before is None else f"{before}",
                _faster(now, before, more_is_better=UNITS.get(name, False)),
                *(f"{figures[one]:g}" if one in figures else "" for one in ("first_s", "MB")),
            ]
        )
    header = ["section", "case", "what", "unit", "now", "earlier", "times as fast", "first step, s", "MB"]
    cards = {
        comparison.figures["earlier card"] for comparison in result.comparisons if "earlier card" in comparison.figures
    }
    notes = [f"earlier: {card}" for card in sorted(cards)]
    return Table(header, cells, [*notes, *outcome_notes(result)])


def _faster(now: object, before: object, *, more_is_better: bool) -> str:
    if not (isinstance(now, int | float) and isinstance(before, int | float) and now and before):
        return ""
    ratio: float = now / before if more_is_better else before / now
    return f"{ratio:.2f}" if math.isfinite(ratio) else ""


_SMALL = Problem(
    maps=((1, 64, 6, 10, 1), (1, 64, 7, 10, 2)),
    sentences=(2, 8, 64),
    changing=(5, 6),
    tokens=(2, 6, 50),
    images=(1, 64, 64),
    dim=64,
)
CASES = (
    Case(
        "device_check.first_look.all",
        "the first look on a GPU again, beside its figures",
        measure,
        Problem(),
        table=table,
        quick={"problem": _SMALL},
    ),
)
