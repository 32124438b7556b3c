"""How fast and how large the WMT14 data path is, on generated text of WMT14's size.

``python -m benchmarks.wmt14_data --pairs 4500000 --output FILE`` writes ``FILE.json`` and ``FILE.md``.
Preparing and training-style reading run in a fresh process each, as they do in life: one run prepares, later ones find
the cache.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.measure import markdown_table, positive_int

MAX_TOKENS = 4096
_CHUNK = 25_000
# After so many distinct pairs the text repeats, which no step of the data path can profit from.
_DISTINCT = 250_000
_TYPES = 200_000


def _words(generator: np.random.Generator, letters: str, mean_length: float) -> list[str]:
    """Distinct made-up words; frequent ones are short, as in language."""
    rank = np.arange(_TYPES)
    lengths = np.clip(generator.poisson(mean_length * (0.35 + 0.65 * rank / _TYPES)) + 1, 1, 24)
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
    ids = np.minimum(generator.zipf(1.25, size=int(lengths.sum())) - 1, generator.integers(_TYPES, size=lengths.sum()))
    drawn = words[ids]
    end = 0
    for length in lengths:
        start, end = end, end + int(length)
        yield " ".join(drawn[start:end]) + "\n"


def write_corpus(root: Path, pairs: int, seed: int = 0) -> None:
    """Writes generated text in the official layout; sentence lengths are log-normal with a mean of about 26 words."""
    generator = np.random.default_rng(seed)
    english = np.array(_words(generator, "etaoinshrdlucmfwypvbgk", 7), dtype=object)
    german = np.array(_words(generator, "enisratdhulcgmobwfkzvpüäöß", 9), dtype=object)
    for split, count in (("train", pairs), ("valid", 3000), ("test", 3003)):
        with (
            (root / f"{split}.en").open("w", encoding="utf-8", newline="\n") as source,
            (root / f"{split}.de").open("w", encoding="utf-8", newline="\n") as target,
        ):
            chunks: list[tuple[list[str], list[str]]] = []
            for start in range(0, count, _CHUNK):
                if start < _DISTINCT:
                    lengths = np.clip(generator.lognormal(3.1, 0.6, _CHUNK), 1, 240).astype(np.int64)
                    other = np.clip(lengths * generator.normal(0.95, 0.15, _CHUNK), 1, 240).astype(np.int64)
                    chunks.append(([*_sentences(generator, english, lengths)], [*_sentences(generator, german, other)]))
                size = min(_CHUNK, count - start)
                for file, lines in zip((source, target), chunks[start // _CHUNK % len(chunks)], strict=True):
                    file.writelines(lines[:size])


def prepare(root: str) -> dict[str, float]:
    """Makes vocabulary and cache with all cores; seconds, and resident memory of this process in GB."""
    from datamodules import WMT14DataModule

    module = WMT14DataModule(root, max_tokens=MAX_TOKENS)
    start = time.perf_counter()
    module.prepare_data()
    return {
        "seconds": time.perf_counter() - start,
        "process_gb": _resident_gb(resource.RUSAGE_SELF),
    }


def read(root: str, num_workers: int) -> dict[str, float]:
    """One epoch of training batches from a ready cache; a stand-in for training that only looks at the batches."""
    from datamodules import WMT14DataModule

    start = time.perf_counter()
    module = WMT14DataModule(root, max_tokens=MAX_TOKENS, num_workers=num_workers)
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


def _in_new_process(*arguments: str) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.wmt14_data", *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def measure(root: Path, pairs: int) -> dict[str, object]:
    """Generates, prepares and reads."""
    start = time.perf_counter()
    write_corpus(root, pairs)
    print(f"generated {pairs:,} pairs in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {
        "pairs": pairs,
        "text_gb": sum((root / f"train.{language}").stat().st_size for language in ("en", "de")) / 1e9,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "max_tokens": MAX_TOKENS,
        "prepare": _in_new_process("--step", "prepare", "--root", str(root)),
        "cache_gb": sum(file.stat().st_size for file in (root / "cache").rglob("*") if file.is_file()) / 1e9,
        "read": _in_new_process("--step", "read", "--root", str(root)),
        "read_2_workers": _in_new_process("--step", "read", "--root", str(root), "--num-workers", "2"),
    }


def report(figures: dict[str, object]) -> str:
    """The figures as Markdown."""
    prepare_figures, inline, workers = (figures[name] for name in ("prepare", "read", "read_2_workers"))
    assert isinstance(prepare_figures, dict)
    assert isinstance(inline, dict)
    assert isinstance(workers, dict)
    pairs = figures["pairs"]
    assert isinstance(pairs, int)
    rows = [
        ("pairs", f"{pairs:,}"),
        ("text", f"{figures['text_gb']:.2f} GB"),
        ("cores", str(figures["cores"])),
        ("preparing (hashes, vocabulary of 37,000, token ids)", f"{prepare_figures['seconds']:.0f} s"),
        ("preparing, sentences a second", f"{2 * pairs / prepare_figures['seconds']:,.0f}"),
        (
            "preparing, resident memory of the process that learns the vocabulary",
            f"{prepare_figures['process_gb']:.2f} GB",
        ),
        ("cache on disk", f"{figures['cache_gb']:.2f} GB"),
        ("from construction to the first batch", f"{inline['first_batch_seconds']:.1f} s"),
        ("one epoch in-process, pairs a second", f"{inline['pairs_per_second']:,.0f}"),
        ("resident memory after an epoch, in-process", f"{inline['process_gb']:.2f} GB"),
        ("one epoch with 2 workers, pairs a second", f"{workers['pairs_per_second']:,.0f}"),
        ("resident memory after an epoch, training process", f"{workers['process_gb']:.2f} GB"),
        ("resident memory after an epoch, each worker", f"{workers['worker_gb']:.2f} GB"),
        ("padding", f"{100 * inline['padding']:.1f} %"),
    ]
    lines = ["# WMT14 data path on generated text", "", *markdown_table(("measured", "value"), rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive_int, default=4_500_000, help="training pairs to generate")
    parser.add_argument("--output", type=Path, default=Path("wmt14_data"), help="path of the results without ending")
    parser.add_argument(
        "--folder", type=Path, help="folder for the scratch files (3 GB for 4.5 M pairs); a new one in it"
    )
    parser.add_argument("--step", choices=("prepare", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--num-workers", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        print(json.dumps(prepare(arguments.root)))
    elif arguments.step == "read":
        print(json.dumps(read(arguments.root, arguments.num_workers)))
    else:
        with tempfile.TemporaryDirectory(prefix="wmt14_data-", dir=arguments.folder) as folder:
            figures = measure(Path(folder), arguments.pairs)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{arguments.output}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        Path(f"{arguments.output}.md").write_text(report(figures), encoding="utf-8")
        print(report(figures))


if __name__ == "__main__":
    main()
