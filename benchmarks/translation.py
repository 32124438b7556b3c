"""The translation Transformer beside torch's and Hugging Face's, on this machine.

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

A side of ours is a term set, and any can be given with ``--sides``. Sides run in turn in one process. Memory is that of
a fresh process for each side.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.case import Benchmark, Case, Steps, interleaved, no_targets
from benchmarks.peers.translation import TorchTransformer, marian_decoding
from benchmarks.report import settings
from benchmarks.results import Result, Target, ratio
from benchmarks.runner import run_as_command
from lightning_attn.attention import AttentionSpec
from lightning_attn.attention.spec import TERM_SETS
from lightning_attn.networks.translation.beam_search import BeamSearchOptions, beam_search
from lightning_attn.networks.translation.dropout import Dropout
from lightning_attn.networks.translation.transformer import Transformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAD, BOS, EOS = 0, 2, 3


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

    def __str__(self) -> str:
        return settings(dataclasses.asdict(self))

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


def torch_network(problem: Problem, *, our_dropout: bool = False) -> TorchTransformer:
    """The network of torch, with this project's dropout modules or its own."""
    network = TorchTransformer(
        problem.vocabulary,
        PAD,
        dim=problem.dim,
        heads=problem.heads,
        hidden=problem.hidden,
        layers=problem.layers,
        dropout=problem.dropout,
        longest=problem.longest + 1,
    )
    for module in list(network.modules()) if our_dropout else ():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, Dropout(child.p))
    return network


def training_step(network: Transformer | TorchTransformer, problem: Problem) -> Callable[[], object]:
    """One optimizer step."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    source, target = problem.batch()

    def step() -> None:
        loss, _, number = network.loss(source, target, label_smoothing=0.1)
        (loss / number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_steps(problem: Problem, sides: Sequence[str]) -> Steps:
    """Steps of `torch`, `torch+dropout` and term sets of ours."""
    steps = {}
    for side in sides:
        torch.manual_seed(0)
        network = (
            torch_network(problem, our_dropout=side == "torch+dropout")
            if side.startswith("torch")
            else our_network(problem, side)
        )
        steps[side] = training_step(network, problem)
    return steps


def decoding_steps(problem: Problem, sides: Sequence[str]) -> Steps:
    """Translation of all sentences by `marian` and term sets of ours; each returns the tokens, `[B, tokens]`."""
    steps = {}
    for side in sides:
        torch.manual_seed(0)
        steps[side] = _marian(problem) if side == "marian" else _our_decoding(our_network(problem, side), problem)
    return steps


def _our_decoding(network: Transformer, problem: Problem) -> Callable[[], Tensor]:
    network.eval()
    sources, words = problem.sources(), problem.tokens - 1
    options = BeamSearchOptions(beam_size=problem.beam, min_length=words)
    limits = torch.full((len(sources),), words)

    def decode() -> Tensor:
        with torch.inference_mode():
            state = network.start_decoding(sources)
            found = beam_search(state, len(sources), options, max_lengths=limits, bos_id=BOS, eos_id=EOS, pad_id=PAD)
        return torch.tensor([[*best.tokens, EOS] for best, *_ in found])

    return decode


def _marian(problem: Problem) -> Callable[[], Tensor]:
    config = {
        "vocab_size": problem.vocabulary,
        "d_model": problem.dim,
        "encoder_layers": problem.layers,
        "decoder_layers": problem.layers,
        "encoder_attention_heads": problem.heads,
        "decoder_attention_heads": problem.heads,
        "encoder_ffn_dim": problem.hidden,
        "decoder_ffn_dim": problem.hidden,
        "activation_function": "relu",
        "scale_embedding": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": BOS,
        "forced_eos_token_id": EOS,
    }
    return marian_decoding(problem.sources(), config, beam=problem.beam, tokens=problem.tokens)


def judge_decoding(result: Result) -> None:
    """Marian's time divided by ours is at least 1.5."""
    for comparison in result.comparisons:
        sides = comparison.sides
        comparison.targets = [
            Target("marian / 1111", ratio(sides.get("marian"), sides["1111"], "time"), 1.5, at_least=True)
            for side in sides
            if side == "1111"
        ]


def draw(results: Sequence[Result]) -> "Figure":
    """A bar for each side: median time, with the quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(results), 3.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        [comparison] = result.comparisons
        timings = {name: side.timing for name, side in comparison.sides.items() if side.timing is not None}
        medians = [timing.median for timing in timings.values()]
        quartiles = [timing.quartiles for timing in timings.values()]
        spread = [[abs(median - pair[end]) for median, pair in zip(medians, quartiles, strict=True)] for end in (0, 1)]
        colors = ["#0072b2" if set(name) <= set("01") else "#d55e00" for name in timings]
        axes.barh(list(timings), medians, xerr=spread, color=colors, ecolor="#555555", capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.set_title(result.case)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


_QUICK = {"problem": Problem(layers=2, sentences=16, decoded_sentences=8), "repetitions": 3, "judge": no_targets}
BENCHMARK = Benchmark(
    name="translation",
    title="Translation: time and memory",
    description=__doc__,
    method="Median of interleaved repetitions, float32; memory is that of a fresh process.",
    cases=(
        Case(
            "translation.training",
            "a training step beside torch.nn.Transformer",
            interleaved,
            Problem(),
            build=training_steps,
            sides=("torch+dropout", "1111", "1000", "0010", "0111"),
            base="torch",
            further_sides=TERM_SETS,
            rates={"sentences/s": lambda problem, seconds: problem["sentences"] / seconds},
            bounds={"1111": 1.25, "1000": 1.0},
            memory=True,
            quick=_QUICK,
        ),
        Case(
            "translation.decoding",
            "beam search beside Hugging Face's Marian",
            interleaved,
            Problem(),
            build=decoding_steps,
            sides=("1111", "0010"),
            base="marian",
            further_sides=TERM_SETS,
            rates={
                "ms a token": lambda problem, seconds: 1e3 * seconds / problem["tokens"],
                "sentences/s": lambda problem, seconds: problem["decoded_sentences"] / seconds,
            },
            judge=judge_decoding,
            memory=True,
            needs=("transformers",),
            quick=_QUICK,
        ),
    ),
    packages=("transformers",),
    draw=draw,
)

if __name__ == "__main__":
    run_as_command("translation")
