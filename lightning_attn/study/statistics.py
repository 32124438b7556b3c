"""Judging differences between cells by their seeds.

With two to nine seeds a percentile bootstrap is far too narrow (75 % instead of 95 % at three), so intervals and tests
are Student's t, on differences of runs with the same seed. Several findings are judged together by Holm's method (Holm
1979), and "equal within a margin" by two one-sided tests (Schuirmann 1987): the lack of a significant difference shows
nothing.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from scipy import special

from lightning_attn.study.grid import Finding, Group

__all__ = ["Judgement", "Summary", "Verdict", "holm", "judge", "summarize"]

Verdict: TypeAlias = Literal["supported", "contradicted", "undecided", "not run"]
Scores: TypeAlias = Mapping[Group, Mapping[int, float]]  # of each group, by seed

_ROUNDING = 1e-12  # relative: differences this close are equal


@dataclasses.dataclass(frozen=True)
class Summary:
    """Several numbers of one kind, such as scores over seeds.

    Attributes:
        n: How many.
        mean: Of them; NaN for none.
        spread: Sample standard deviation (n - 1); NaN below two.
        low: Lower end of the t interval of the mean; -inf below two.
        high: Upper end; inf below two.
    """

    n: int
    mean: float
    spread: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the runs say of a finding.

    Attributes:
        finding: The finding.
        verdict: Of all findings together.
        difference: Over shared seeds, with its own 95 % interval (not widened for the number of findings).
        p: Holm's adjusted p-value; 1 where nothing can be tested.
        note: Why nothing can be said, such as "one run"; empty otherwise.
    """

    finding: Finding
    verdict: Verdict
    difference: Summary
    p: float
    note: str


def summarize(values: Sequence[float], level: float = 0.95) -> Summary:
    """Mean, spread and t interval.

    Args:
        values: Numbers.
        level: Of the interval.
    """
    n = len(values)
    if n < 2:
        return Summary(n, values[0] if n else math.nan, math.nan, -math.inf, math.inf)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(special.stdtrit(n - 1, 0.5 + level / 2)) * spread / math.sqrt(n)
    return Summary(n, mean, spread, mean - half, mean + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: those below alpha are rejected with a family-wise error rate of at most alpha."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def judge(findings: Sequence[Finding], scores: Scores, alpha: float = 0.05) -> list[Judgement]:
    """Judges findings by the scores of groups over the seeds that they share.

    A finding that more (or less) is expected of is tested two-sidedly against its margin: supported if the difference
    is significantly beyond it on the expected side, contradicted if significantly on the other. Equality within a
    margin is supported by two one-sided tests, and contradicted if the difference is significantly beyond the margin.
    A one-sided test takes half of alpha, so that a single finding is judged as its 95 % interval shows.

    Args:
        findings: All that were planned: each one that can be tested makes the others a little harder to show.
        scores: Test scores by group and seed.
        alpha: Probability of any wrong verdict among all.
    """
    differences = [_differences(finding, scores) for finding in findings]
    summaries = [summarize(values) for values in differences]
    notes = [_why_not(*one) for one in zip(differences, summaries, strict=True)]
    tests = [
        (1.0, 1.0) if note else _p_values(finding, summary)
        for finding, summary, note in zip(findings, summaries, notes, strict=True)
    ]
    tested = [place for place, note in enumerate(notes) if not note]
    adjusted = dict(zip(tested, holm([min(tests[place]) for place in tested]), strict=True))
    judgements = []
    for place, finding in enumerate(findings):
        p = adjusted.get(place, 1.0)
        verdict: Verdict = "undecided"
        if summaries[place].n == 0:
            verdict = "not run"
        elif p < alpha:
            support, contradiction = tests[place]
            verdict = "supported" if support < contradiction else "contradicted"
        judgements.append(Judgement(finding, verdict, summaries[place], p, notes[place]))
    return judgements


def _differences(finding: Finding, scores: Scores) -> list[float]:
    """The finding's difference for every seed that all of its groups have been run with."""
    terms = [(scores.get(group, {}), weight) for group, weight in finding.weights]
    shared = sorted(set.intersection(*(set(one) for one, _ in terms)))
    return [math.fsum(weight * one[seed] for one, weight in terms) for seed in shared]


def _why_not(values: Sequence[float], summary: Summary) -> str:
    if summary.n == 0:
        return "no seed that all of its cells were run with"
    if summary.n == 1:
        return "one run"
    if summary.spread <= _ROUNDING * max(map(abs, values)):
        return "the same difference with every seed: no spread to judge by"
    return ""


def _p_values(finding: Finding, summary: Summary) -> tuple[float, float]:
    """Of the hypotheses that must be rejected to support, and to contradict, the finding."""
    error = summary.spread / math.sqrt(summary.n)

    def above(bound: float) -> float:
        """P-value of the one-sided test that the mean is more than a bound."""
        return float(special.stdtr(summary.n - 1, (bound - summary.mean) / error))

    def below(bound: float) -> float:
        return float(special.stdtr(summary.n - 1, (summary.mean - bound) / error))

    margin = finding.margin
    if finding.expected == "equal":
        # Doubled as a test with two outcomes: together they err with a probability of at most alpha.
        return min(1.0, 2 * max(above(-margin), below(margin))), min(1.0, 2 * min(above(margin), below(-margin)))
    if finding.expected == "greater":
        return min(1.0, 2 * above(margin)), min(1.0, 2 * below(margin))
    return min(1.0, 2 * below(-margin)), min(1.0, 2 * above(-margin))
