"""The translation Transformer beside torch's and Hugging Face's, on this machine.

``python -m benchmarks.translation`` prints tables and writes JSON, Markdown and a figure. Two parts:

``training`` is one step: forward pass, label-smoothed loss, backward pass, Adam. The peer is ``torch.nn.Transformer``.
The same on both sides: sizes, batch, padding masks, dropout probabilities, one embedding shared by source, target and
output, the loss (this project's, which is the faster one) and the optimizer. Different: ours has relative positions
where ``E2`` or ``E4`` is on, and V^R for them; torch's has sinusoidal positions added to the embedding, which cost
nothing, biases in all projections and two more normalisations. torch is given its causal hint, and its dropout of
attention weights is off as ours is, since with it the fused attention is not used on a CPU. ``torch+dropout`` is
torch's network with this project's dropout modules, to show their share.

``decoding`` is beam search over a batch of sentences, encoder included, all hypotheses of the same length: the
end-of-sentence token is forbidden before the last and forced there. The peer is ``transformers.MarianMTModel`` of the
same size with random weights and its own ``generate``.

Sides run in turn in one process. Memory is that of a fresh process for each side.
"""

import argparse
import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measure import (
    Memory,
    Side,
    Target,
    Timing,
    add_arguments,
    answer_parent,
    comma_separated,
    machine,
    markdown_settings,
    markdown_table,
    output_console,
    peak_memory,
    positive_int,
    print_target,
    ratio,
    require,
    run_child,
    timed_in_turn,
)
from lightning_attn.attention import AttentionSpec
from lightning_attn.attention.spec import parse_terms
from lightning_attn.io import unused_path, write_file, write_json, write_text
from lightning_attn.networks.translation.beam_search import BeamSearchOptions, beam_search
from lightning_attn.networks.translation.cross_entropy import summed_cross_entropy
from lightning_attn.networks.translation.dropout import Dropout
from lightning_attn.networks.translation.transformer import Transformer

PAD, BOS, EOS = 0, 2, 3
PEERS = {"training": "torch", "decoding": "marian"}
SETS = {"training": ("1111", "1000", "0010", "0111"), "decoding": ("1111", "0010")}
# The bounds that are asked for: our time divided by torch's at most, Marian's time divided by ours at least.
STEP_BOUNDS, DECODING_BOUNDS = {"1111": 1.25, "1000": 1.0}, {"1111": 1.5}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of the networks, of the training batch and of what is decoded; the defaults are the paper's base model.

    Attributes:
        dim: Width C.
        heads: Attention heads.
        hidden: Width of the feed-forward networks.
        layers: Layers of the encoder, and of the decoder.
        dropout: In training, of embeddings, sublayer outputs and hidden layers.
        vocabulary: Tokens, shared by both languages.
        sentences: Pairs in a training batch.
        shortest: Tokens of the shortest of its sentences.
        longest: Tokens of the longest, to which the others are padded.
        decoded_sentences: Sentences that are decoded at once.
        tokens: Tokens of each of them, and of its translation with end-of-sentence.
        beam: Width of the beam.
    """

    dim: int = 512
    heads: int = 8
    hidden: int = 2048
    layers: int = 6
    dropout: float = 0.1
    vocabulary: int = 10_000
    sentences: int = 64
    shortest: int = 20
    longest: int = 30
    decoded_sentences: int = 32
    tokens: int = 25
    beam: int = 5

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random ids of a training batch, source `[B, S]` and target `[B, T + 1]` (with begin-of-sentence)."""
        generator = torch.Generator().manual_seed(0)

        def side(first: int) -> Tensor:
            lengths = torch.randint(self.shortest, self.longest + 1, (self.sentences, 1), generator=generator)
            lengths[0] = self.longest
            shape = self.sentences, self.longest + first
            ids = torch.randint(EOS + 1, self.vocabulary, shape, generator=generator)
            return ids.masked_fill(torch.arange(shape[1]) >= lengths + first, PAD)

        source, target = side(0), side(1)
        target[:, 0] = BOS
        return source, target

    def sources(self) -> Tensor:
        """Random ids to decode, `[B, tokens]`, without padding."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(EOS + 1, self.vocabulary, (self.decoded_sentences, self.tokens), generator=generator)


class TorchTransformer(nn.Module):
    """`torch.nn.Transformer` with embeddings, output and loss as this project's network has them."""

    positions: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        dim = problem.dim
        self.embedding = nn.Embedding(problem.vocabulary, dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.transformer = nn.Transformer(
            dim, problem.heads, problem.layers, problem.layers, problem.hidden, problem.dropout, batch_first=True
        )
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        self.dropout = nn.Dropout(problem.dropout)
        angles = torch.arange(problem.longest + 1).unsqueeze(1) * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("positions", torch.cat((angles.sin(), angles.cos()), dim=1))

    def _embed(self, ids: Tensor) -> Tensor:
        scaled = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)
        embedded: Tensor = self.dropout(scaled + self.positions[: ids.shape[1]])
        return embedded

    def loss(self, source: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """As `lightning_attn.networks.translation.transformer.Transformer.loss`."""
        padding, inputs, labels = source == PAD, target[:, :-1], target[:, 1:]
        states = self.transformer(
            self._embed(source),
            self._embed(inputs),
            tgt_mask=torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).triu(1),
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        real = labels != PAD
        loss, likelihood = summed_cross_entropy(states[real], self.embedding.weight, labels[real], label_smoothing)
        return loss, likelihood, real.sum()


def our_network(problem: Problem, terms: str) -> Transformer:
    """This project's Transformer with one term set everywhere."""
    spec = AttentionSpec(terms=terms, num_heads=problem.heads, scale=(problem.dim // problem.heads) ** -0.5)
    return Transformer(
        problem.vocabulary,
        PAD,
        self_attention=spec,
        cross_attention=spec,
        dim=problem.dim,
        hidden_dim=problem.hidden,
        encoder_layers=problem.layers,
        decoder_layers=problem.layers,
        dropout=problem.dropout,
    )


def training_step(side: str, problem: Problem) -> Callable[[], object]:
    """One optimizer step of a side: `torch`, `torch+dropout` or a term set of ours."""
    torch.manual_seed(0)
    network = TorchTransformer(problem) if side.startswith("torch") else our_network(problem, side)
    if side == "torch+dropout":
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(module, name, Dropout(child.p))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    source, target = problem.batch()

    def step() -> None:
        loss, _, number = network.loss(source, target, label_smoothing=0.1)
        (loss / number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(side: str, problem: Problem) -> Callable[[], object]:
    """Translation of all sentences by a side: `marian` or a term set of ours."""
    torch.manual_seed(0)
    sources, words = problem.sources(), problem.tokens - 1
    if side == "marian":
        return _marian(sources, problem)
    network = our_network(problem, side).eval()
    options = BeamSearchOptions(beam_size=problem.beam, min_length=words)
    limits = torch.full((len(sources),), words)

    def decode() -> Tensor:
        with torch.inference_mode():
            state = network.start_decoding(sources)
            found = beam_search(state, len(sources), options, max_lengths=limits, bos_id=BOS, eos_id=EOS, pad_id=PAD)
        return torch.tensor([[*best.tokens, EOS] for best, *_ in found])

    return decode


def _marian(sources: Tensor, problem: Problem) -> Callable[[], object]:
    transformers = importlib.import_module("transformers")  # not an import statement: it need not be installed
    config = transformers.MarianConfig(
        vocab_size=problem.vocabulary,
        d_model=problem.dim,
        encoder_layers=problem.layers,
        decoder_layers=problem.layers,
        encoder_attention_heads=problem.heads,
        decoder_attention_heads=problem.heads,
        encoder_ffn_dim=problem.hidden,
        decoder_ffn_dim=problem.hidden,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=EOS,
    )
    model = transformers.MarianMTModel(config).eval()
    mask = torch.ones_like(sources)

    def decode() -> Tensor:
        with torch.inference_mode():
            found: Tensor = model.generate(
                sources,
                attention_mask=mask,
                num_beams=problem.beam,
                min_new_tokens=problem.tokens - 1,
                max_new_tokens=problem.tokens,
                do_sample=False,
            )
        return found[:, 1:]

    return decode


BUILDERS: dict[str, Callable[[str, Problem], Callable[[], object]]] = {"training": training_step, "decoding": decoding}


@dataclasses.dataclass
class Part:
    """What a part of the benchmark measured.

    Attributes:
        name: `training` or `decoding`.
        sides: What each side cost.
        targets: Figures beside their bounds.
    """

    name: str
    sides: dict[str, Side]
    targets: list[Target] = dataclasses.field(default_factory=list)

    def judge(self) -> None:
        """Sets the targets from the sides."""
        peer = self.sides.get(PEERS[self.name])
        self.targets = [
            Target(f"{terms} / torch", ratio(self.sides[terms], peer, "time"), bound, at_least=False)
            for terms, bound in STEP_BOUNDS.items()
            if self.name == "training" and terms in self.sides
        ] + [
            Target(f"marian / {terms}", ratio(peer, self.sides[terms], "time"), bound, at_least=True)
            for terms, bound in DECODING_BOUNDS.items()
            if self.name == "decoding" and terms in self.sides
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the verdict on each target is added."""
        return dataclasses.asdict(self) | {"targets": [target.as_dict() for target in self.targets]}


def run_part(
    name: str,
    sets: Sequence[str],
    problem: Problem,
    *,
    repetitions: int,
    threads: int,
    memory: bool,
    report: Callable[[str], object] = lambda text: None,
) -> Part:
    """Measures all sides of a part."""
    extra = ["torch+dropout"] if name == "training" else []
    names = [PEERS[name], *extra, *sets]
    report(f"{name}: time")
    steps = {side: BUILDERS[name](side, problem) for side in names}
    timings = timed_in_turn(steps, repetitions=repetitions, budget=float("inf"))
    del steps
    part = Part(name, {})
    for side, timing in timings.items():
        part.sides[side] = Side(timing=timing) if isinstance(timing, Timing) else Side(error=timing)
        if memory and isinstance(timing, Timing):
            report(f"{name}: memory of {side}")
            figures = memory_of(name, side, problem, threads)
            if isinstance(figures, str):
                part.sides[side].error = figures
            else:
                part.sides[side].memory = figures
    part.judge()
    return part


def memory_of(part: str, side: str, problem: Problem, threads: int) -> Memory | str:
    """Peak memory of a side in a fresh process, or the error that it ended with."""
    request = {"part": part, "side": side, "problem": dataclasses.asdict(problem)}
    figures = run_child("benchmarks.translation", ["--child", json.dumps(request)], threads=threads)
    return figures if isinstance(figures, str) else Memory(**figures)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What `memory_of` asks of its fresh process."""
    memory, _ = peak_memory(BUILDERS[request["part"]](request["side"], Problem(**request["problem"])))
    return dataclasses.asdict(memory)


def table(part: Part, problem: Problem) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    peer = part.sides[PEERS[part.name]]
    sentences = problem.sentences if part.name == "training" else problem.decoded_sentences
    header = ["side", "ms", "quartiles", "sentences/s", f"time / {PEERS[part.name]}", "MB at the peak"]
    if part.name == "decoding":
        header.insert(3, "ms a token")
    cells = []
    for name, side in part.sides.items():
        if side.timing is None:
            cells.append([name, side.error or "-", *[""] * (len(header) - 2)])
            continue
        relative = ratio(side, peer, "time")
        line = [
            name,
            f"{1e3 * side.timing.median:.0f}",
            "-".join(f"{1e3 * quartile:.0f}" for quartile in side.timing.quartiles),
            f"{sentences / side.timing.median:.1f}",
            "" if relative is None else f"{relative:.2f}",
            f"{side.memory.increase / 1e6:.0f}" if side.memory is not None else side.error or "",
        ]
        if part.name == "decoding":
            line.insert(3, f"{1e3 * side.timing.median / problem.tokens:.1f}")
        cells.append(line)
    return header, cells


def markdown(run: dict[str, Any], parts: Sequence[Part], problem: Problem) -> str:
    """All tables, the machine, and how it was measured."""
    lines = ["# Translation: time and memory", ""]
    lines += [markdown_settings(run[name]) for name in ("machine", "options", "problem")]
    lines += ["", "Median of interleaved repetitions, float32; memory is what the steps add at their peak.", ""]
    for part in parts:
        header, cells = table(part, problem)
        lines += [f"## {part.name.capitalize()}", "", *markdown_table(header, cells)]
        lines += ["", *(f"- {target}" for target in part.targets), ""]
    return "\n".join(lines)


def draw(parts: Sequence[Part], path: Path) -> None:
    """A bar for each side: median time, with the quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(parts), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        timings = {name: side.timing for name, side in part.sides.items() if side.timing is not None}
        medians = [timing.median for timing in timings.values()]
        quartiles = [timing.quartiles for timing in timings.values()]
        spread = [[abs(median - pair[end]) for median, pair in zip(medians, quartiles, strict=True)] for end in (0, 1)]
        colors = ["#0072b2" if set(name) <= set("01") else "#d55e00" for name in timings]
        axes.barh(list(timings), medians, xerr=spread, color=colors, ecolor="#555555", capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel("seconds a step" if part.name == "training" else "seconds a batch")
        axes.set_title(part.name)
        axes.spines[["top", "right"]].set_visible(False)
    write_file(path, lambda file: figure.savefig(file, dpi=150, format="png"), replace=True)


def main(arguments: Sequence[str] | None = None, problem: Problem | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=comma_separated, default=tuple(BUILDERS), help="training,decoding")
    parser.add_argument(
        "--sets", type=comma_separated, help="term sets with commas between, instead of each part's own"
    )
    parser.add_argument("--repetitions", type=positive_int, default=9, help="measured rounds (9)")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if chosen.child is not None:
        answer_parent(lambda: answer(chosen.child))
        return
    unknown = set(chosen.parts) - set(BUILDERS)
    if unknown:
        parser.error(f"--parts {','.join(sorted(unknown))}: there are {','.join(BUILDERS)}")
    for terms in chosen.sets or ():
        try:
            parse_terms(terms)
        except ValueError as error:
            parser.error(f"--sets: {error}")
    require(*(["transformers"] if "decoding" in chosen.parts else []), *([] if chosen.no_memory else ["psutil"]))
    problem = Problem() if problem is None else problem
    torch.set_num_threads(chosen.threads)
    run: dict[str, Any] = {
        "machine": machine("torch", "transformers"),
        "options": {"repetitions": chosen.repetitions},
        "problem": dataclasses.asdict(problem),
    }
    console = output_console(width=120)
    errors = Console(stderr=True)
    parts: list[Part] = []
    for name in chosen.parts:
        with errors.status(name) as status:
            part = run_part(
                name,
                chosen.sets or SETS[name],
                problem,
                repetitions=chosen.repetitions,
                threads=chosen.threads,
                memory=not chosen.no_memory,
                report=status.update,
            )
        parts.append(part)
        header, cells = table(part, problem)
        styled = Table(*header, title=name, title_justify="left")
        for line in cells:
            styled.add_row(*line)
        console.print(styled)
        for target in part.targets:
            print_target(console, target)
    file = unused_path(chosen.output / "translation.json")
    write_json(file, run | {"parts": [part.as_dict() for part in parts]})
    write_text(file.with_suffix(".md"), markdown(run, parts, problem))
    draw(parts, file.with_suffix(".png"))
    print(f"Results: {file.parent / file.stem}.*")


if __name__ == "__main__":
    main()
