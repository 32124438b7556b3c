"""How fast and how large the WMT14 data path is, on generated text of WMT14's size.

Preparing and training-style reading run in a fresh process each, as they do in life: one run prepares, later ones find
the cache. ``--pairs`` makes it smaller.
"""

import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.case import Benchmark, Case, Run, Table
from benchmarks.report import settings
from benchmarks.results import Comparison, Result
from benchmarks.runner import positive_int, run_as_command
from lightning_attn.datamodules import WMT14DataModule

_CHUNK = 25_000
# After so many distinct pairs the text repeats, which no step of the data path can profit from.
_DISTINCT = 250_000


def _words(generator: np.random.Generator, letters: str, mean_length: float, types: int) -> list[str]:
    """Distinct made-up words; frequent ones are short, as in language."""
    rank = np.arange(types)
    lengths = np.clip(generator.poisson(mean_length * (0.35 + 0.65 * rank / types)) + 1, 1, 24)
    # Words of a few syllables drawn from a fixed stock, so that byte pair encoding has something to find.
    stock = ["".join(generator.choice(list(letters), size=size)) for size in generator.integers(1, 4, size=600)]
    found: list[str] = []
    for length in lengths:
        word = ""
        while len(word) < length:
            word += stock[int(generator.integers(len(stock)))]
        found.append(word)
    return found


def _sentences(
    generator: np.random.Generator, words: npt.NDArray[np.object_], lengths: npt.NDArray[np.int64]
) -> Iterator[str]:
    ids = np.minimum(
        generator.zipf(1.25, size=int(lengths.sum())) - 1, generator.integers(len(words), size=lengths.sum())
    )
    drawn = words[ids]
    end = 0
    for length in lengths:
        start, end = end, end + int(length)
        yield " ".join(drawn[start:end]) + "\n"


def write_corpus(root: Path, pairs: int, types: int, seed: int = 0) -> None:
    """Writes generated text in the official layout; sentence lengths are log-normal with a mean of about 26 words."""
    generator = np.random.default_rng(seed)
    english = np.array(_words(generator, "etaoinshrdlucmfwypvbgk", 7, types), dtype=object)
    german = np.array(_words(generator, "enisratdhulcgmobwfkzvpüäöß", 9, types), dtype=object)
    for split, count in (("train", pairs), ("valid", 3000), ("test", 3003)):
        with (
            (root / f"{split}.en").open("w", encoding="utf-8", newline="\n") as source,
            (root / f"{split}.de").open("w", encoding="utf-8", newline="\n") as target,
        ):
            chunks: list[tuple[list[str], list[str]]] = []
            for start in range(0, count, _CHUNK):
                if start < _DISTINCT:
                    size = min(_CHUNK, count)
                    lengths = np.clip(generator.lognormal(3.1, 0.6, size), 1, 240).astype(np.int64)
                    other = np.clip(lengths * generator.normal(0.95, 0.15, size), 1, 240).astype(np.int64)
                    chunks.append(([*_sentences(generator, english, lengths)], [*_sentences(generator, german, other)]))
                size = min(_CHUNK, count - start)
                for file, lines in zip((source, target), chunks[start // _CHUNK % len(chunks)], strict=True):
                    file.writelines(lines[:size])


def prepare(root: Path, max_tokens: int) -> dict[str, float]:
    """Makes vocabulary and cache with all cores; seconds, and resident memory of this process in GB."""
    module = WMT14DataModule(str(root), max_tokens=max_tokens)
    start = time.perf_counter()
    module.prepare_data()
    return {
        "seconds": time.perf_counter() - start,
        "process_gb": _resident_gb(resource.RUSAGE_SELF),
    }


def read(root: Path, max_tokens: int, num_workers: int) -> dict[str, float]:
    """One epoch of training batches from a ready cache; a stand-in for training that only looks at the batches."""
    start = time.perf_counter()
    module = WMT14DataModule(str(root), max_tokens=max_tokens, num_workers=num_workers)
    module.prepare_data()
    module.setup("fit")
    batches = iter(module.train_dataloader())
    first = next(batches)
    to_first = time.perf_counter() - start
    pairs, tokens, cells, count = 0, 0, 0, 0
    start = time.perf_counter()
    for batch in (batch for part in ([first], batches) for batch in part):
        pairs += len(batch)
        count += 1
        for side in (batch.source, batch.target):
            tokens += int((side != module.vocabulary.pad_id).sum())
            cells += side.numel()
    seconds = time.perf_counter() - start
    del batches  # ends the workers, whose memory is known only then
    return {
        "first_batch_seconds": to_first,
        "batches": count,
        "pairs": pairs,
        "pairs_per_second": pairs / seconds,
        "padding": 1 - tokens / cells,
        "process_gb": _resident_gb(resource.RUSAGE_SELF),
        "worker_gb": _resident_gb(resource.RUSAGE_CHILDREN),
    }


def _resident_gb(who: int) -> float:
    peak = resource.getrusage(who).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclasses.dataclass(frozen=True)
class Problem:
    """Size of the text.

    Attributes:
        pairs: Training pairs to generate.
        max_tokens: In a batch.
        types: Distinct words of each language.
        folder: Where the scratch files lie, 3 GB for 4.5 million pairs, in a new folder; None for the system's place.
    """

    pairs: int = dataclasses.field(
        default=4_500_000, metadata={"type": positive_int, "help": "training pairs to generate"}
    )
    max_tokens: int = 4096
    types: int = 200_000
    folder: str | None = dataclasses.field(default=None, metadata={"help": "folder of the scratch files, 3 GB"})

    def __str__(self) -> str:
        return settings({"pairs": f"{self.pairs:,}", "max tokens": self.max_tokens})


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """Generates, prepares and reads."""
    problem: Problem = case.problem
    with tempfile.TemporaryDirectory(prefix="wmt14_data-", dir=problem.folder) as folder:
        root = Path(folder)
        run.report(f"generates {problem.pairs:,} pairs")
        write_corpus(root, problem.pairs, problem.types)
        run.report("prepares")
        figures = {
            "text_gb": sum((root / f"train.{language}").stat().st_size for language in ("en", "de")) / 1e9,
            "prepare": run.isolate(prepare, root, problem.max_tokens, timeout=36_000.0),
            "cache_gb": sum(file.stat().st_size for file in (root / "cache").rglob("*") if file.is_file()) / 1e9,
        }
        run.report("reads")
        figures |= {
            "read": run.isolate(read, root, problem.max_tokens, 0, timeout=36_000.0),
            "read_2_workers": run.isolate(read, root, problem.max_tokens, 2, timeout=36_000.0),
        }
    yield Comparison(figures=figures)


def table(result: Result) -> Table:
    """What was measured, line by line."""
    [comparison] = result.comparisons
    figures = comparison.figures
    preparing, inline, workers = (figures[name] for name in ("prepare", "read", "read_2_workers"))
    rows = [
        ("text", f"{figures['text_gb']:.2f} GB"),
        ("preparing (hashes, vocabulary of 37,000, token ids)", f"{preparing['seconds']:.0f} s"),
        ("preparing, sentences a second", f"{2 * result.problem['pairs'] / preparing['seconds']:,.0f}"),
        ("preparing, resident memory of the process that learns the vocabulary", f"{preparing['process_gb']:.2f} GB"),
        ("cache on disk", f"{figures['cache_gb']:.2f} GB"),
        ("from construction to the first batch", f"{inline['first_batch_seconds']:.1f} s"),
        ("one epoch in-process, pairs a second", f"{inline['pairs_per_second']:,.0f}"),
        ("resident memory after an epoch, in-process", f"{inline['process_gb']:.2f} GB"),
        ("one epoch with 2 workers, pairs a second", f"{workers['pairs_per_second']:,.0f}"),
        ("resident memory after an epoch, training process", f"{workers['process_gb']:.2f} GB"),
        ("resident memory after an epoch, each worker", f"{workers['worker_gb']:.2f} GB"),
        ("padding", f"{100 * inline['padding']:.1f} %"),
    ]
    return Table(("measured", "value"), rows)


BENCHMARK = Benchmark(
    name="wmt14_data",
    title="WMT14 data path on generated text",
    description=__doc__,
    method="Preparing and reading in a fresh process each, with all cores.",
    cases=(
        Case(
            "wmt14_data.epoch",
            "preparing and reading generated text of WMT14's size",
            measure,
            Problem(),
            table=table,
            quick={"problem": Problem(pairs=20_000)},
        ),
    ),
)

if __name__ == "__main__":
    run_as_command("wmt14_data")
