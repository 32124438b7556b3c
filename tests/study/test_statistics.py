import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lightning_attn.study.grid import Finding
from lightning_attn.study.statistics import holm, judge, summarize


def finding(expected="greater", margin=0.0, cells=("a", "b"), beyond=None):
    pair = beyond and ((beyond[0],), (beyond[1],))
    return Finding("a claim", (cells[0],), (cells[1],), pair, expected, margin)


def scores(**values):
    return {(name,): dict(enumerate(numbers)) for name, numbers in values.items()}


def test_summary_is_the_t_interval_of_scipy():
    values = [27.1, 27.9, 26.4, 28.3]
    summary = summarize(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (summary.n, summary.mean, summary.spread) == pytest.approx((4, np.mean(values), np.std(values, ddof=1)))
    assert (summary.low, summary.high) == pytest.approx((low, high))


def test_one_number_has_no_spread_and_no_interval():
    summary = summarize([3.0])
    assert (summary.n, summary.mean, summary.low, summary.high) == (1, 3.0, -math.inf, math.inf)
    assert math.isnan(summary.spread)
    assert summarize([]).n == 0


def test_holm_is_the_closed_test_of_bonferroni():
    """An independent definition: a hypothesis is rejected if every intersection that holds it is, by Bonferroni."""
    p_values = [0.011, 0.6, 0.02, 0.013, 0.049]
    closed = [
        max(
            min(1.0, len(subset) * min(p_values[one] for one in subset))
            for size in range(1, 6)
            for subset in itertools.combinations(range(5), size)
            if place in subset
        )
        for place in range(5)
    ]
    assert holm(p_values) == pytest.approx(closed)
    assert holm([]) == []


def test_a_difference_is_paired_by_seed():
    """Seeds differ far more than cells: without pairing nothing could be seen."""
    first, second = [20.0, 25.0, 30.0, 35.0], [19.0, 24.1, 28.9, 34.0]
    (judgement,) = judge([finding()], scores(a=first, b=second))
    assert judgement.p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert stats.ttest_ind(first, second).pvalue > 0.5
    assert judgement.verdict == "supported"
    assert judge([finding("less")], scores(a=first, b=second))[0].verdict == "contradicted"


def test_only_shared_seeds_count():
    given = {("a",): {0: 1.0, 1: 2.0, 5: 9.0}, ("b",): {1: 1.5, 5: 8.0, 7: 3.0}}
    (judgement,) = judge([finding()], given)
    assert judgement.difference.n == 2
    assert judgement.difference.mean == pytest.approx(0.75)


def test_the_difference_of_differences():
    given = scores(a=[5.0, 6.0, 7.5], b=[1.0, 2.0, 3.0], c=[6.0, 7.1, 8.5], d=[5.0, 6.0, 7.5])
    (judgement,) = judge([finding(cells=("a", "b"), beyond=("c", "d"))], given)
    expected = [(5 - 1) - (6 - 5), (6 - 2) - (7.1 - 6), (7.5 - 3) - (8.5 - 7.5)]
    assert judgement.difference.mean == pytest.approx(np.mean(expected))
    assert judgement.p == pytest.approx(stats.ttest_1samp(expected, 0).pvalue)


@pytest.mark.parametrize("margin", [0.3, 1.0, 3.0])
def test_equal_within_a_margin_is_two_one_sided_tests(margin):
    difference = np.array([0.4, -0.2, 0.3, 0.1, -0.3])
    (judgement,) = judge([finding("equal", margin)], scores(a=difference, b=np.zeros(5)))
    above = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(difference, margin, alternative="less").pvalue
    assert judgement.p == pytest.approx(min(1.0, 2 * max(above, below)))
    inside = -margin < judgement.difference.low and judgement.difference.high < margin
    assert judgement.verdict == ("supported" if inside else "undecided")


def test_a_large_difference_contradicts_equality():
    (judgement,) = judge([finding("equal", 0.5)], scores(a=[5.0, 5.3, 4.9, 5.1], b=[0.0, 0.1, 0.0, 0.2]))
    assert judgement.verdict == "contradicted"


def test_no_significant_difference_is_not_equality():
    (judgement,) = judge([finding("equal", 0.5)], scores(a=[1.0, -1.5, 0.7], b=[0.0, 0.0, 0.0]))
    assert judgement.verdict == "undecided"


@pytest.mark.parametrize(("expected", "verdict"), [("greater", "contradicted"), ("less", "undecided")])
def test_a_margin_must_be_exceeded(expected, verdict):
    difference = [0.9, 1.1, 1.0, 1.05]
    if expected == "less":
        difference = [-2.4, -2.0, -1.7, -2.2]
    (judgement,) = judge([finding(expected, 2.0)], scores(a=difference, b=[0.0] * 4))
    assert judgement.verdict == verdict
    assert judgement.p == pytest.approx(stats.ttest_1samp(difference, 2.0 if expected == "greater" else -2.0).pvalue)


def test_what_cannot_be_judged_says_why_and_does_not_count():
    given = scores(a=[1.0, 1.2, 1.1], b=[0.0, 0.1, 0.05], c=[1.0], d=[2.0, 2.2, 2.1])
    findings = [finding(), finding(cells=("a", "c")), finding(cells=("a", "e")), finding(cells=("d", "a"))]
    judged = judge(findings, given)
    assert [one.verdict for one in judged] == ["supported", "undecided", "not run", "undecided"]
    assert judged[1].note == "one run"
    assert "no seed" in judged[2].note
    assert "no spread" in judged[3].note  # d - a is 1.0 every time
    assert judged[0].p == judge(findings[:1], given)[0].p


def test_more_findings_make_each_harder_to_show():
    given = scores(a=[1.0, 2.0, 1.5, 1.2], b=[0.8, 1.3, 0.9, 1.0], c=[0.0, 3.0, 1.0, -1.0])
    alone = judge([finding()], given)[0]
    among = judge([finding(), finding(cells=("a", "c")), finding(cells=("b", "c"))], given)[0]
    assert among.p == pytest.approx(3 * alone.p)
    assert (alone.verdict, among.verdict) == ("supported", "undecided")


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_and_wrong_verdicts_are_rare(seeds):
    """Simulated: 95 % coverage, and of three findings at the edge of their claims 5 % with a wrong verdict."""
    rng = np.random.default_rng(0)
    trials, covered, wrong = 2000, 0, 0
    for _ in range(trials):
        runs = rng.normal(size=(4, seeds)) + 3 * rng.normal(size=seeds)
        given = scores(a=runs[0], b=runs[1], c=runs[2] + 5, d=runs[3])
        findings = [finding(), finding("equal", 5.0, ("c", "d")), finding("less", cells=("b", "d"))]
        judged = judge(findings, given)
        covered += judged[0].difference.low <= 0 <= judged[0].difference.high
        wrong += any(one.verdict in ("supported", "contradicted") for one in judged)
    assert covered / trials == pytest.approx(0.95, abs=0.015)
    assert wrong / trials < 0.055
