"""Scores of a translated corpus, the same to the last digit on any number of ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index, itemgetter
from typing import TypedDict

from sacrebleu import BLEU, CHRF
from torch import Tensor

from lightning_attn.errors import InputError
from lightning_attn.metrics.gather import add_record, gather_by_id


class TranslationScores(TypedDict):
    """Corpus scores from 0 to 100, each with the settings behind it in sacreBLEU's own words."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str


@dataclass(frozen=True)
class TranslationScoring:
    """How BLEU and chrF are computed; the signatures that are logged say it too.

    Args:
        tokenize: BLEU's tokenisation: "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores101", "flores200"
            or "none". Those of mecab need `pip install sacrebleu[ja]` or `[ko]`, those of flores fetch a model.
        lowercase: whether BLEU ignores case.
        word_order: chrF counts words up to this order too; 2 is chrF++.

    Raises:
        ValueError: if a value is none of these.
    """

    tokenize: str = "13a"
    lowercase: bool = False
    word_order: int = 0

    def __post_init__(self) -> None:
        if self.tokenize not in BLEU.TOKENIZERS:
            raise InputError(f"scoring.tokenize: {self.tokenize!r} is none of {', '.join(BLEU.TOKENIZERS)}.")
        if self.word_order < 0:
            raise InputError(f"scoring.word_order: {self.word_order} is negative; 0 is chrF, 2 is chrF++.")

    def bleu(self) -> BLEU:
        """The scorer.

        Raises:
            ValueError: if what the tokenisation needs is not installed.
        """
        try:
            return BLEU(tokenize=self.tokenize, lowercase=self.lowercase)
        except (RuntimeError, ImportError, OSError) as error:
            raise InputError(
                f"scoring.tokenize: {self.tokenize!r} cannot be used: {error}. Those of flores fetch a model from the "
                "network once; 13a, intl, zh and char need nothing."
            ) from error


def one_line(text: str) -> str:
    """A text as a file of one sentence a line can hold it: a line break within becomes a space."""
    return " ".join(text.splitlines())


class CorpusTranslationMetrics:
    """Corpus BLEU and chrF of detokenised text by sacreBLEU.

    The score of a corpus is not the mean of scores of its batches, so this keeps the sentences by sample id, brings
    those of all ranks together, drops repeats, and scores once, in the order of the ids.

    Args:
        split: name of the split, for messages.
        scoring: how.

    Raises:
        ValueError: if what the tokenisation needs is not installed.
    """

    def __init__(self, split: str, scoring: TranslationScoring = TranslationScoring()) -> None:
        self.split = split
        self._bleu, self._chrf = scoring.bleu(), CHRF(word_order=scoring.word_order)
        self._pairs: dict[int, tuple[str, str]] = {}
        self._hypotheses: list[str] | None = None

    def update(self, ids: Sequence[int] | Tensor, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add translated sentences. An id that was added before is ignored.

        Args:
            ids: place of each sentence in the corpus, B integers.
            hypotheses: translations, B detokenised texts. A line break within one becomes a space, so that what
                is scored is what a file of one sentence a line can hold.
            references: what each of them is compared with, B detokenised texts.

        Raises:
            ValueError: if the three differ in length, or an id was added with another reference.
        """
        if not len(ids) == len(hypotheses) == len(references):
            raise ValueError(
                f"ids, hypotheses and references must be of equal length, got {len(ids)}, {len(hypotheses)} and "
                f"{len(references)}"
            )
        self._hypotheses = None
        for sample, hypothesis, reference in zip(ids, hypotheses, references, strict=True):
            pair = (one_line(hypothesis), reference)
            add_record(self._pairs, index(sample), pair, same=itemgetter(1))

    def compute(self) -> TranslationScores:
        """Score the corpus. A collective: every rank has to call it, and every rank gets the same.

        Without other options BLEU has the tokenisation "13a", mixed case and exponential smoothing, and chrF is chrF2:
        sacreBLEU's defaults.

        Raises:
            ValueError: on every rank, if no rank has a sentence, or ranks disagree about the reference of an id.
        """
        pairs = gather_by_id(self._pairs, same=itemgetter(1))
        if not pairs:
            raise InputError(_nothing("sentence", self.split))
        hypotheses = [hypothesis for hypothesis, _ in pairs.values()]
        references = [reference for _, reference in pairs.values()]
        bleu, chrf = self._bleu, self._chrf
        scores = TranslationScores(
            bleu=bleu.corpus_score(hypotheses, [references]).score,
            chrf=chrf.corpus_score(hypotheses, [references]).score,
            bleu_signature=str(bleu.get_signature()),  # known only after scoring
            chrf_signature=str(chrf.get_signature()),
        )
        self._hypotheses = hypotheses
        return scores

    def hypotheses(self) -> list[str]:
        """The translations that `compute` scored, of all ranks, in corpus order. No collective: one rank may call it.

        Raises:
            RuntimeError: if `compute` was not called since the last `update` or `reset`.
        """
        if self._hypotheses is None:
            raise RuntimeError("call compute() on every rank first: it brings the hypotheses of all ranks together")
        return list(self._hypotheses)

    def reset(self) -> None:
        """Forget all sentences."""
        self._pairs = {}
        self._hypotheses = None


class WeightedMean:
    """The exact mean of a quantity over a split, such as the loss per target token.

    It is the exact sum of the samples' sums divided by the sum of their counts. So it depends neither on how samples
    were batched, nor on how they were dealt to ranks, nor on repeats, as far as the samples' own sums do not.

    Args:
        split: name of the split, for messages.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self._terms: dict[int, tuple[float, int]] = {}

    def update(self, ids: Sequence[int] | Tensor, sums: Tensor, counts: Tensor) -> None:
        """Add samples. An id that was added before is ignored.

        Args:
            ids: place of each sample in the split, B integers.
            sums: each sample's quantity summed over its elements, `[B]`, floating point. Waits for the device.
            counts: number of elements of each sample, `[B]`, integer.

        Raises:
            ValueError: if shapes or types do not fit, or an id was added with another count.
        """
        if not sums.shape == counts.shape == (len(ids),) or counts.is_floating_point():
            raise ValueError(
                f"sums and counts must have one entry for each of the {len(ids)} ids, and counts must be integers; got "
                f"shapes {list(sums.shape)} and {list(counts.shape)} and counts of {counts.dtype}"
            )
        for sample, total, count in zip(ids, sums.tolist(), counts.tolist(), strict=True):
            add_record(self._terms, index(sample), (total, count), same=itemgetter(1))

    def compute(self) -> float:
        """The mean over all ranks. A collective: every rank has to call it, and every rank gets the same.

        Raises:
            ValueError: on every rank, if there is nothing to average, or ranks disagree about the count of an id.
        """
        terms = gather_by_id(self._terms, same=itemgetter(1)).values()
        count = sum(count for _, count in terms)
        if count == 0:
            raise InputError(_nothing("element", self.split))
        return math.fsum(total for total, _ in terms) / count

    def reset(self) -> None:
        """Forget all samples."""
        self._terms = {}


def _nothing(what: str, split: str) -> str:
    return (
        f"there is no {what} of the split {split!r} to score: its files are empty, everything was filtered out, or "
        f"trainer.limit_{split}_batches is 0"
    )
