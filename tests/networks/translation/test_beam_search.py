"""Beam search against exhaustive search, against a slow search with lists, and against greedy decoding."""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attn.networks.translation.beam_search import (
    BLOCK,
    BeamSearchOptions,
    Hypothesis,
    beam_search,
    top_values,
)

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 6
WORDS = range(3, VOCABULARY)
IDS = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}

seeds = st.integers(0, 2**32 - 1)
alphas = st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.5, 2.0])


@cache
def logits_of(seed: int, prefix: tuple[int, ...], sharpness: float, vocabulary: int) -> np.ndarray:
    """The conditional distribution after `prefix`, different for every prefix and sentence."""
    rng = np.random.default_rng([seed, len(prefix), *prefix])
    return (sharpness * rng.standard_normal(vocabulary)).astype(np.float32)


@dataclass
class TableState:
    """A decoder that remembers whole prefixes; rows that were not moved as `reorder` says give wrong numbers."""

    seeds: list[int]
    sharpness: float = 2.0
    vocabulary: int = VOCABULARY

    def __post_init__(self) -> None:
        self.sentence = list(range(len(self.seeds)))
        self.prefixes: list[tuple[int, ...]] = [()] * len(self.seeds)
        self.rows_of_step: list[int] = []

    def logits(self, row: int) -> np.ndarray:
        return logits_of(self.seeds[self.sentence[row]], self.prefixes[row][1:], self.sharpness, self.vocabulary)

    def step(self, tokens: Tensor) -> Tensor:
        assert tokens.shape == (len(self.prefixes),)
        self.rows_of_step.append(len(tokens))
        self.prefixes = [(*p, t) for p, t in zip(self.prefixes, tokens.tolist(), strict=True)]
        return torch.from_numpy(np.stack([self.logits(row) for row in range(len(tokens))]))

    def reorder(self, index: Tensor) -> None:
        before = self.sentence
        self.prefixes = [self.prefixes[i] for i in index.tolist()]
        self.sentence = [before[i] for i in index.tolist()]
        # What the protocol promises about the order of rows.
        groups = [list(rows) for _, rows in itertools.groupby(self.sentence)]
        assert len({len(group) for group in groups}) == 1
        assert [group[0] for group in groups] == sorted(set(self.sentence))
        if len(index) == len(before):
            assert self.sentence == before
        elif len(index) > len(before):
            assert set(self.sentence) == set(before)
        else:
            assert set(self.sentence) < set(before)


def near(value: object) -> object:
    """Equal within the rounding of a few fp32 log-softmaxes."""
    return pytest.approx(value, rel=1e-5, abs=1e-6)


def search(state: TableState, options: BeamSearchOptions, max_lengths: list[int]) -> list[list[Hypothesis]]:
    return beam_search(state, len(max_lengths), options, max_lengths=torch.tensor(max_lengths), **IDS)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def log_probability(seed: int, tokens: list[int], sharpness: float = 2.0) -> float:
    sentence = [*tokens, EOS]
    return sum(
        log_softmax(logits_of(seed, tuple(sentence[:i]), sharpness, VOCABULARY))[token]
        for i, token in enumerate(sentence)
    )


def penalised(value: float, tokens: list[int], alpha: float) -> float:
    return value / ((5 + len(tokens) + 1) / 6) ** alpha


def every_sentence(max_length: int, min_length: int = 0) -> list[list[int]]:
    return [list(w) for n in range(min_length, max_length + 1) for w in itertools.product(WORDS, repeat=n)]


def slow_beam_search(seed: int, options: BeamSearchOptions, max_length: int) -> list[tuple[float, list[int]]]:
    """The same search for one sentence, with lists, in float64, and never stopping early in exact mode."""
    beam: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(max_length + 1):
        candidates = []
        for value, prefix in beam:
            log_probs = log_softmax(logits_of(seed, tuple(prefix), 2.0, VOCABULARY))
            if length >= options.min_length:
                candidates.append((value + log_probs[EOS], [*prefix, EOS]))
            if length < max_length:
                candidates += [(value + log_probs[word], [*prefix, word]) for word in WORDS]
        candidates.sort(reverse=True)
        for value, tokens in candidates[: options.beam_size]:
            if tokens[-1] == EOS:
                finished.append((penalised(value, tokens[:-1], options.length_penalty), tokens[:-1]))
        if options.beam_size == 1 and finished:
            break
        if options.stopping == "beam_size" and len(finished) >= options.beam_size:
            break
        beam = [candidate for candidate in candidates if candidate[1][-1] != EOS][: options.beam_size]
    return sorted(finished, reverse=True)[: options.nbest]


def assert_is(found: list[Hypothesis], expected: list[tuple[float, list[int]]]) -> None:
    """Equal tokens and scores; where two scores are equal in fp32 either order will do."""
    assert [h.score for h in found] == near([score for score, _ in expected])
    for hypothesis, (score, tokens) in zip(found, expected, strict=True):
        ties = [other for s, other in expected if s == near(score)]
        assert hypothesis.tokens == tokens or (len(ties) > 1 and hypothesis.tokens in ties)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, alpha=alphas, max_length=st.integers(1, 4), min_length=st.integers(0, 2), nbest=st.integers(1, 12))
def test_a_beam_as_wide_as_all_prefixes_finds_what_exhaustive_search_finds(seed, alpha, max_length, min_length, nbest):
    max_length = max(max_length, min_length)
    sentences = every_sentence(max_length, min_length)
    expected = sorted(((penalised(log_probability(seed, t), t, alpha), t) for t in sentences), reverse=True)
    options = BeamSearchOptions(
        beam_size=max(nbest, len(every_sentence(max_length)) + 1),
        length_penalty=alpha,
        nbest=nbest,
        min_length=min_length,
    )
    [found] = search(TableState([seed]), options, [max_length])
    assert len(found) == min(nbest, len(sentences))
    assert_is(found, expected[:nbest])
    for hypothesis in found:
        assert hypothesis.log_probability == near(log_probability(seed, hypothesis.tokens))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.tuples(seeds, st.integers(1, 7)), min_size=1, max_size=5),
    beam_size=st.integers(1, 5),
    alpha=alphas,
    min_length=st.integers(0, 1),
    stopping=st.sampled_from(["exact", "beam_size"]),
    data=st.data(),
)
def test_search_equals_a_slow_search_that_does_not_stop_early(batch, beam_size, alpha, min_length, stopping, data):
    nbest = data.draw(st.integers(1, beam_size))
    options = BeamSearchOptions(
        beam_size=beam_size, length_penalty=alpha, min_length=min_length, nbest=nbest, stopping=stopping
    )
    state = TableState([seed for seed, _ in batch])
    found = search(state, options, [limit for _, limit in batch])
    for (seed, limit), hypotheses in zip(batch, found, strict=True):
        assert_is(hypotheses, slow_beam_search(seed, options, limit))
        assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
        assert hypotheses == sorted(hypotheses, key=lambda h: h.score, reverse=True)
        for h in hypotheses:
            assert set(h.tokens) <= set(WORDS)
            assert min_length <= len(h.tokens) <= limit
            assert h.score == near(penalised(h.log_probability, h.tokens, alpha))
            assert h.log_probability == near(log_probability(seed, h.tokens))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.tuples(seeds, st.integers(1, 8)), min_size=2, max_size=6),
    beam_size=st.integers(1, 4),
    alpha=alphas,
    stopping=st.sampled_from(["exact", "beam_size"]),
    data=st.data(),
)
def test_a_sentence_is_decoded_the_same_alone_and_in_any_batch(batch, beam_size, alpha, stopping, data):
    options = BeamSearchOptions(beam_size=beam_size, length_penalty=alpha, nbest=beam_size, stopping=stopping)
    alone = [search(TableState([seed]), options, [limit])[0] for seed, limit in batch]
    order = data.draw(st.permutations(range(len(batch))))
    together = search(TableState([batch[i][0] for i in order]), options, [batch[i][1] for i in order])
    assert together == [alone[i] for i in order]


@settings(max_examples=30, deadline=None)
@given(seed=seeds, limit=st.integers(1, 10), alpha=alphas)
def test_beam_of_one_is_the_argmax_loop(seed, limit, alpha):
    tokens: list[int] = []
    while len(tokens) < limit:
        logits = logits_of(seed, tuple(tokens), 2.0, VOCABULARY)
        best = max([EOS, *WORDS], key=lambda token: logits[token])
        if best == EOS:
            break
        tokens.append(best)
    state = TableState([seed])
    [[found]] = search(state, BeamSearchOptions(beam_size=1, length_penalty=alpha), [limit])
    assert found.tokens == tokens
    assert found.log_probability == near(log_probability(seed, tokens))
    assert len(state.rows_of_step) == len(tokens) + 1


def test_finished_sentences_leave_the_batch_and_the_search_ends_early():
    # Sharp distributions: most of the sentences end long before their limit of 60.
    state = TableState(list(range(20)), sharpness=8.0)
    search(state, BeamSearchOptions(beam_size=3, length_penalty=0.0), [60] * 20)
    assert state.rows_of_step[0] == 20
    assert 20 < state.rows_of_step[1] <= 60
    assert all(b <= a for a, b in itertools.pairwise(state.rows_of_step[1:]))
    assert len(set(state.rows_of_step[1:])) > 3
    assert len(state.rows_of_step) < 61


class ScriptedState:
    """The same logits at every step, one row of them for each length; the last one is repeated."""

    def __init__(self, logits: list[list[float]], dtype: torch.dtype = torch.float32) -> None:
        self.table = torch.tensor(logits, dtype=dtype)
        self.length = 0

    def step(self, tokens: Tensor) -> Tensor:
        row = self.table[min(self.length, len(self.table) - 1)]
        self.length += 1
        return row.expand(len(tokens), -1).clone()

    def reorder(self, index: Tensor) -> None:
        pass


@pytest.mark.parametrize(("alpha", "words", "steps"), [(0.0, 0, 1), (2.0, 5, 6)])
def test_the_bound_looks_as_far_as_the_length_limit(alpha, words, steps):
    # The empty sentence and the first word are equally probable, the second word costs 1.4 nats, the rest is certain.
    # The longer prefix looks worse than the empty sentence at every length but that of the limit.
    logits = np.full((6, 4), -200.0)
    logits[0, [EOS, 3]] = 0.0
    logits[1, [3, EOS]] = -1.4, math.log(1 - math.exp(-1.4))
    logits[2:5, 3] = 0.0
    logits[5, EOS] = 0.0
    state = ScriptedState(logits.tolist())
    options = BeamSearchOptions(beam_size=2, length_penalty=alpha)
    [[best]] = beam_search(state, 1, options, max_lengths=torch.tensor([5]), **IDS)
    assert len(best.tokens) == words
    assert state.length == steps
    if words:
        assert (math.log(0.5) - 1.4) / (10 / 6) ** alpha < math.log(0.5) < best.score
        assert best.score == pytest.approx((math.log(0.5) - 1.4) / (11 / 6) ** alpha)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_padding_and_begin_are_never_generated_but_keep_their_probability(beam_size):
    state = ScriptedState([[5.0, 5.0, -2.0, 1.0, 0.0], [5.0, 5.0, 2.0, 0.0, 0.0]])
    [[best]] = beam_search(state, 1, BeamSearchOptions(beam_size=beam_size), max_lengths=torch.tensor([4]), **IDS)
    expected = log_softmax(np.array([5, 5, -2, 1, 0.0]))[3] + log_softmax(np.array([5, 5, 2, 0, 0.0]))[2]
    assert best.tokens == [3]
    assert best.log_probability == near(expected)


def test_a_sentence_at_its_limit_is_closed_and_pays_for_it():
    logits = np.array([-9.0, -9.0, -3.0, 2.0, 1.0])
    state = ScriptedState([logits.tolist()])
    [[best]] = beam_search(state, 1, BeamSearchOptions(beam_size=1), max_lengths=torch.tensor([3]), **IDS)
    log_probs = log_softmax(logits)
    assert best.tokens == [3, 3, 3]
    assert best.log_probability == near(3 * log_probs[3] + log_probs[EOS])


def test_prefixes_of_probability_zero_do_no_harm():
    class OneWord(ScriptedState):
        """Only word 3 and then the end are possible; says nothing but -inf of any other prefix."""

        def step(self, tokens):
            return super().step(tokens).masked_fill((tokens != BOS).logical_and(tokens != 3).unsqueeze(1), -math.inf)

    state = OneWord([[-200.0, -200.0, -math.inf, 0.0, -math.inf], [-math.inf, -math.inf, 0.0, 0.0, -math.inf]])
    options = BeamSearchOptions(beam_size=3, nbest=3)
    [found] = beam_search(state, 1, options, max_lengths=torch.tensor([2]), **IDS)
    assert [h.tokens for h in found] == [[3], [3, 3]]


def test_a_neighbour_with_a_higher_limit_does_not_prolong_a_sentence():
    options = BeamSearchOptions(beam_size=3)
    alone, together = TableState([1]), TableState([1, 2])
    search(alone, options, [6])
    search(together, options, [6, 40])
    assert alone.rows_of_step == [1, 3, 3, 3]
    assert together.rows_of_step[:5] == [2, 6, 6, 6, 3]


def test_end_may_also_be_begin():
    state = ScriptedState([[-5.0, -1.0, 0.0, 1.0], [-5.0, 3.0, 0.0, 0.0]])
    [[best]] = beam_search(
        state, 1, BeamSearchOptions(beam_size=1), bos_id=1, eos_id=1, pad_id=0, max_lengths=torch.tensor([5])
    )
    assert best.tokens == [3]


def test_scores_are_computed_in_fp32_whatever_the_decoder_returns():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = ScriptedState(logits.tolist(), torch.bfloat16)
    [[best]] = beam_search(state, 1, BeamSearchOptions(min_length=4), max_lengths=torch.tensor([4]), **IDS)
    log_probs = log_softmax(logits.float().numpy()[0])
    assert best.log_probability == near(4 * log_probs[3:].max() + log_probs[EOS])


@pytest.mark.parametrize("size", [6, 4 * BLOCK, 24 * BLOCK, 24 * BLOCK + 1, 25 * BLOCK + BLOCK // 2])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_highest_values_are_those_of_topk(size, count):
    count = min(count, size)
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(50, size, generator=generator)
    values[0] = -math.inf
    values[1, : size - count] = -math.inf  # what counts stands at the end
    values[2, size // 3] = math.nan
    values[3] = torch.arange(size).flip(0)  # and at the beginning
    best, index = top_values(values, count)
    torch.testing.assert_close(best, values.topk(count, dim=1).values, equal_nan=True)
    torch.testing.assert_close(values.gather(1, index), best, equal_nan=True)
    assert all(len(set(row)) == count for row in index[1:].tolist())


def test_of_equal_values_the_first_is_the_highest():
    values = torch.zeros(2, 30 * BLOCK)
    values[1, [2 * BLOCK + 5, 2 * BLOCK + 9, 20 * BLOCK]] = 1.0
    assert top_values(values, 1)[1].flatten().tolist() == [0, 2 * BLOCK + 5]


def test_a_large_vocabulary_is_searched_like_a_small_one():
    # The same words, spread over a vocabulary of many blocks with nothing between them.
    ids = torch.tensor([PAD, BOS, EOS, 300, 1500, 3499])

    class Spread(TableState):
        def step(self, tokens):
            small = super().step(torch.searchsorted(ids, tokens))
            return torch.full((len(tokens), 3500), -math.inf).index_copy_(1, ids, small)

    options = BeamSearchOptions(beam_size=4, nbest=4)
    expected = search(TableState([1, 2, 3]), options, [5, 3, 6])
    found = search(Spread([1, 2, 3]), options, [5, 3, 6])
    assert [[h.tokens for h in best] for best in found] == [
        [ids[torch.tensor(h.tokens, dtype=torch.long)].tolist() for h in best] for best in expected
    ]
    assert [[h.score for h in best] for best in found] == [near([h.score for h in best]) for best in expected]


def test_no_sentences():
    assert beam_search(ScriptedState([[0.0]]), 0, BeamSearchOptions(), max_lengths=torch.zeros(0).long(), **IDS) == []


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_numbers_are_refused(bad, beam_size):
    class BreaksLater(TableState):
        def step(self, tokens):
            logits = super().step(tokens)
            if len(self.rows_of_step) == 3:
                logits[self.sentence.index(1), 4] = bad
            return logits

    options = BeamSearchOptions(beam_size=beam_size, min_length=3)
    with pytest.raises(ValueError, match=r"token 3 of sentence 1 are NaN: a logit is NaN or \+inf"):
        search(BreaksLater([1, 2, 3]), options, [5, 5, 5])


def test_a_sentence_that_cannot_end_is_refused():
    state = ScriptedState([[0.0, 0.0, -math.inf, 0.0]])
    with pytest.raises(ValueError, match=r"sentence 0 cannot be ended: .*\(eos_id=2\) probability zero"):
        beam_search(state, 1, BeamSearchOptions(), max_lengths=torch.tensor([3]), **IDS)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"eos_id=9.* less than the vocabulary of 4 tokens"):
        beam_search(
            ScriptedState([[0.0] * 4]),
            1,
            BeamSearchOptions(),
            bos_id=1,
            eos_id=9,
            pad_id=0,
            max_lengths=torch.tensor([3]),
        )


def test_scores_of_a_wrong_shape_are_refused():
    class Sequence(ScriptedState):
        def step(self, tokens):
            return super().step(tokens).unsqueeze(1)

    with pytest.raises(ValueError, match=r"must return scores \[1, vocabulary\].*got shape \[1, 1, 4\]"):
        beam_search(Sequence([[0.0] * 4]), 1, BeamSearchOptions(), max_lengths=torch.tensor([3]), **IDS)


@pytest.mark.parametrize(
    ("max_lengths", "message"),
    [
        (torch.tensor([3]), r"each of the 2 sentences, got shape \[1\]"),
        (torch.tensor([3.0, 4.0]), "dtype torch.float32"),
        (torch.tensor([3, 0]), r"max_lengths\[1\] is 0, less than max\(1, min_length\) = 1"),
    ],
)
def test_max_lengths_that_do_not_fit_are_refused(max_lengths, message):
    with pytest.raises(ValueError, match=message):
        beam_search(TableState([0, 1]), 2, BeamSearchOptions(), max_lengths=max_lengths, **IDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam_size": 0}, "beam_size must be an integer of at least 1, got 0"),
        ({"beam_size": True}, "beam_size must be an integer of at least 1, got True"),
        ({"nbest": 5}, "nbest=5 is more than beam_size=4: raise beam_size or lower nbest"),
        ({"nbest": 1.0}, "nbest must be an integer of at least 1, got 1.0"),
        ({"length_penalty": -0.1}, "length_penalty must be a finite number of at least 0, got -0.1"),
        ({"length_penalty": math.nan}, "length_penalty must be a finite number"),
        ({"max_length_ratio": math.inf}, "max_length_ratio must be a finite number"),
        ({"max_length_offset": -1}, "max_length_offset must be an integer of at least 0, got -1"),
        ({"max_length_ratio": 0.0, "max_length_offset": 0}, "both 0, which allows no token"),
        ({"min_length": -1}, "min_length must be an integer of at least 0, got -1"),
        ({"stopping": "early"}, "stopping must be one of exact, beam_size, got 'early'"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BeamSearchOptions(), **change)


def test_length_limits_follow_the_source():
    lengths = torch.tensor([0, 1, 10])
    assert BeamSearchOptions(max_length_ratio=1.5, max_length_offset=2).max_lengths(lengths).tolist() == [2, 3, 17]
    assert BeamSearchOptions(max_length_ratio=0.5, max_length_offset=0).max_lengths(lengths).tolist() == [1, 1, 5]
    options = BeamSearchOptions(max_length_ratio=1.0, max_length_offset=0, min_length=4)
    assert options.max_lengths(lengths).tolist() == [4, 4, 10]
