"""The uncertainty of a score that comes from its test set: scores of resampled sets (Efron 1979)."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_RESAMPLES", "SEED", "Counts", "Replicates", "ResampledScores", "resampled_counts", "samples_digest"]

Counts = npt.NDArray[np.int64]
"""How often each sample occurs in each resampled set, `[R, N]`."""
Replicates = npt.NDArray[np.float64]
"""A score of each resampled set, `[R]`."""

NUM_RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class ResampledScores:
    """Scores of resampled test sets.

    Set r of two runs holds the same samples if `samples` is equal, so the difference of two runs' replicates is that of
    a paired bootstrap.

    Attributes:
        samples: See `samples_digest`.
        num_samples: Number of samples.
        scores: The replicates of each score by its name.
    """

    samples: str
    num_samples: int
    scores: Mapping[str, Replicates]


def resampled_counts(num_samples: int, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> Counts:
    """Draws sets of the same size from samples, with replacement.

    Depends on its arguments alone: any runs with as many samples get the same sets.

    Args:
        num_samples: N.
        num_resamples: R.
        seed: Of the drawing.

    Returns:
        Each sample's occurrences, `[R, N]`; each row sums to N.
    """
    generator = np.random.default_rng(seed)
    counts = np.empty((num_resamples, num_samples), dtype=np.int64)
    for row in counts:
        row[:] = np.bincount(generator.integers(num_samples, size=num_samples), minlength=num_samples)
    return counts


def samples_digest(ids: Iterable[int]) -> str:
    """Eight hexadecimal digits of sample ids in their order: equal for runs that scored the same samples."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:8]
