"""What is known of scores by their names: whether more or less of one is better."""

from typing import Literal

__all__ = ["best_mode"]

_LESS_IS_BETTER = ("loss", "perplexity", "error", "ter", "wer")
_MORE_IS_BETTER = ("accuracy", "ap", "ap50", "ap75", "bleu", "chrf", "f1", "iou", "map", "miou", "precision", "recall")


def best_mode(name: str) -> Literal["min", "max"] | None:
    """Whether the least or the most of a score such as "val/loss" is best; None where its name does not say."""
    last = name.rpartition("/")[2]
    if any(last == one or last.startswith(f"{one}_") or last.endswith(f"_{one}") for one in _LESS_IS_BETTER):
        return "min"
    if any(last == one or last.startswith(f"{one}_") or last.endswith(f"_{one}") for one in _MORE_IS_BETTER):
        return "max"
    return None
