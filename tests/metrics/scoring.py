"""What a metric has found, for the tests of all of them."""

import math
from typing import Any

import torch


def scores_of(metric: Any) -> Any:
    """All scores of a metric; what `compute` returns to be logged must be the same numbers."""
    logged = metric.compute()
    scores = metric.scores()
    assert tuple(logged) == metric.score_names
    for name, value in logged.items():
        assert (value.dtype, value.shape) == (torch.float64, ()), name
        assert value.item() == scores[name] or (math.isnan(value.item()) and math.isnan(scores[name])), name
    return scores
