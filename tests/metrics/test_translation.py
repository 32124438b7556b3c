import random

import pytest
import sacrebleu
import torch
from scoring import scores_of
from test_weighted_mean import loss_terms

from lightning_attn.metrics import CorpusTranslationMetrics, WeightedMean

WORDS = [
    "Der",
    "Hund",
    "läuft",
    "über",
    "die",
    "Straße,",
    "und",
    "ein",
    "Mann",
    "(alt)",
    "ruft:",
    "„Schön!“",
    "3.5",
    "%",
]


def corpus(size: int) -> tuple[list[str], list[str]]:
    """References and noisy copies of them, the fifth of them empty."""
    rng = random.Random(0)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(size)]
    hypotheses = [
        " ".join(word if rng.random() < 0.7 else rng.choice(WORDS) for word in reference.split())
        for reference in references
    ]
    hypotheses[4] = ""
    return hypotheses, references


def test_scores_are_those_of_sacrebleu_on_the_corpus():
    hypotheses, references = corpus(25)
    metric = CorpusTranslationMetrics("test")
    for batch in ([20, 24, 3], list(range(4, 20)), [0, 2, 1, 21, 22, 23]):
        metric.update(batch, [hypotheses[i] for i in batch], [references[i] for i in batch])
    scores = scores_of(metric)
    bleu, chrf = sacrebleu.corpus_bleu(hypotheses, [references]), sacrebleu.corpus_chrf(hypotheses, [references])
    assert scores["bleu"] == bleu.score
    assert 20 < scores["bleu"] < 80
    assert scores["chrf"] == chrf.score
    assert scores["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert scores["chrf_signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}"
    assert metric.hypotheses() == hypotheses


def test_repeats_and_the_order_of_batches_change_nothing():
    hypotheses, references = corpus(9)
    plain, repeated = CorpusTranslationMetrics("test"), CorpusTranslationMetrics("test")
    plain.update(range(9), hypotheses, references)
    order = [8, 3, 5, 1, 0, 2, 4, 7, 6]
    repeated.update(order, [hypotheses[i] for i in order], [references[i] for i in order])
    repeated.update(torch.tensor([3, 3]), ["something else"] * 2, [references[3]] * 2)
    assert scores_of(repeated) == scores_of(plain)
    assert repeated.hypotheses() == hypotheses


def test_one_line_a_sentence():
    metric = CorpusTranslationMetrics("test")
    metric.update([0, 1], ["one\ntwo\r\nthree", ""], ["one two three", "four"])
    metric.compute()
    assert metric.hypotheses() == ["one two three", ""]


def test_hypotheses_are_those_that_were_scored():
    metric = CorpusTranslationMetrics("test")
    metric.update([0], ["a"], ["a"])
    with pytest.raises(RuntimeError, match=r"call compute\(\) on every rank first"):
        metric.hypotheses()
    metric.compute()
    metric.update([1], ["b"], ["b"])
    with pytest.raises(RuntimeError, match=r"call compute\(\) on every rank first"):
        metric.hypotheses()


def test_reset_forgets():
    metric = CorpusTranslationMetrics("val")
    metric.update([0], ["a b c d"], ["a b c d"])
    metric.compute()
    metric.reset()
    with pytest.raises(RuntimeError, match="call compute"):
        metric.hypotheses()
    metric.update([0], ["x b c d"], ["a different reference"])
    assert scores_of(metric)["bleu"] < 50


def test_nothing_to_score_is_refused_with_the_name_of_the_split():
    with pytest.raises(ValueError, match=r"no sentence of the split 'val' to score.*limit_val_batches is 0"):
        CorpusTranslationMetrics("val").compute()
    with pytest.raises(ValueError, match=r"no sentence of the split 'valid' to score.*limit_val_batches is 0"):
        CorpusTranslationMetrics("valid").compute()


def test_columns_of_different_length_are_refused():
    metric = CorpusTranslationMetrics("test")
    with pytest.raises(ValueError, match=r"equal length, got 2, 2 and 1"):
        metric.update([0, 1], ["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"equal length, got 3, 2 and 2"):
        metric.update([0, 1, 2], ["a", "b"], ["a", "b"])


def test_an_id_of_two_sentences_is_refused():
    metric = CorpusTranslationMetrics("test")
    metric.update([4], ["a"], ["first"])
    with pytest.raises(ValueError, match="sample id 4 belongs to two different samples, 'first' and 'second'"):
        metric.update([4], ["a"], ["second"])


SIZE = 11
# What two ranks score: an odd number of samples, unequally dealt, some on both ranks; then all of them on one rank.
DEALT = [([0, 2, 4, 6, 8, 10, 1], [1, 3, 5, 7, 9, 0, 4]), (list(range(SIZE)), [])]


def _score(ids: list[int]) -> list[object]:
    hypotheses, references = corpus(SIZE)
    sums, counts = loss_terms(SIZE)
    metric, mean = CorpusTranslationMetrics("test"), WeightedMean("test")
    for i in ids:
        metric.update([i], [hypotheses[i]], [references[i]])
        mean.update([i], sums[i : i + 1], counts[i : i + 1])
    return [scores_of(metric), metric.hypotheses(), mean.compute().item()]


def _score_on_rank(rank: int) -> list[object]:
    results: list[object] = [_score(ids[rank]) for ids in DEALT]
    try:
        CorpusTranslationMetrics("test").compute()
    except ValueError as error:
        results += [str(error)]
    return results


@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_two_ranks_give_the_scores_of_one_to_the_last_digit(on_two_ranks):
    expected = _score(list(range(SIZE)))
    for *scores, error in on_two_ranks(_score_on_rank):
        assert scores == [expected, expected]
        assert "no sentence of the split 'test'" in error
