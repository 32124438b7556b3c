"""BLEU and chrF of a translated corpus, bitwise identical on any number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import numpy as np
from sacrebleu import BLEU, CHRF
from torch import Tensor
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.metrics.base import ScoresMetric, nothing_to_score, sample_ids
from lightning_attn.metrics.bootstrap import Counts, Replicates

Pair = tuple[str, str]
"""A hypothesis and its reference."""


class TranslationScores(TypedDict):
    """Corpus scores from 0 to 100, each with sacreBLEU's signature of its settings."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str


@dataclass(frozen=True)
class TranslationScoring:
    """Options of BLEU and chrF; the logged signatures contain them.

    Args:
        tokenize: BLEU's tokenisation: "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores101", "flores200"
            or "none". The mecab ones need `pip install sacrebleu[ja]` or `[ko]`, the flores ones download a model.
        lowercase: whether BLEU ignores case.
        word_order: chrF includes word n-grams up to this order; 2 is chrF++.

    Raises:
        ValueError: if a value is invalid.
    """

    tokenize: str = "13a"
    lowercase: bool = False
    word_order: int = 0

    def __post_init__(self) -> None:
        if self.tokenize not in BLEU.TOKENIZERS:
            raise InputError(f"scoring.tokenize must be one of {', '.join(BLEU.TOKENIZERS)}, got {self.tokenize!r}.")
        if self.word_order < 0:
            raise InputError(f"scoring.word_order must be at least 0, got {self.word_order}; 0 is chrF, 2 is chrF++.")

    def bleu(self) -> BLEU:
        """The scorer of BLEU.

        Raises:
            ValueError: if a package of the tokenisation is not installed.
        """
        try:
            return BLEU(tokenize=self.tokenize, lowercase=self.lowercase)
        except (RuntimeError, ImportError, OSError) as error:
            raise InputError(
                f"scoring.tokenize: {self.tokenize!r} cannot be used: {error}. The flores ones download a model once; "
                "13a, intl, zh and char need nothing."
            ) from error


def one_line(text: str) -> str:
    """A text as one line of a file: line breaks become spaces."""
    return " ".join(text.splitlines())


class CorpusTranslationMetrics(ScoresMetric[Pair, TranslationScores]):
    """Corpus BLEU and chrF of detokenised text by sacreBLEU.

    The score of a corpus is not the mean of scores of its batches, so this stores the sentences by sample id, gathers
    those of all ranks, drops repeats, and scores once, in the order of the ids. `compute` returns `bleu` and `chrf`,
    `scores()` also their signatures, and `hypotheses()` the translations that were scored.

    By default BLEU has the tokenisation "13a", mixed case and exponential smoothing, and chrF is chrF2: sacreBLEU's
    defaults.

    Args:
        split: name of the split, for messages.
        scoring: options of BLEU and chrF.

    Raises:
        ValueError: if a package of the tokenisation is not installed.
    """

    higher_is_better = True
    score_names: ClassVar[tuple[str, ...]] = ("bleu", "chrf")

    def __init__(self, split: str, scoring: TranslationScoring = TranslationScoring()) -> None:
        super().__init__(nothing_to_score("sentence", split))
        self.split = split
        self._bleu, self._chrf = scoring.bleu(), CHRF(word_order=scoring.word_order)

    @override
    def update(self, ids: Sequence[int] | Tensor, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add translated sentences. An id that was added before is ignored.

        Args:
            ids: index of each sentence in the corpus, B integers.
            hypotheses: translations, B detokenised texts. Line breaks become spaces, as in a file of one sentence per
                line.
            references: their references, B detokenised texts.

        Raises:
            ValueError: if the three differ in length, or an id was added with another reference.
        """
        if not len(ids) == len(hypotheses) == len(references):
            raise ValueError(
                f"ids, hypotheses and references must be of equal length, got {len(ids)}, {len(hypotheses)} and "
                f"{len(references)}."
            )
        for sample, hypothesis, reference in zip(sample_ids(ids), hypotheses, references, strict=True):
            self._add(sample, (one_line(hypothesis), reference))

    def hypotheses(self) -> list[str]:
        """The scored translations of all ranks, in corpus order. Not a collective: one rank may call it.

        Raises:
            RuntimeError: if `compute` was not called since the last `update` or `reset`.
        """
        return [hypothesis for hypothesis, _ in self.gathered().values()]

    @staticmethod
    @override
    def _truth(record: Pair) -> object:
        return record[1]

    @override
    def _score(self, records: Mapping[int, Pair]) -> TranslationScores | None:
        if not records:
            return None
        hypotheses = [hypothesis for hypothesis, _ in records.values()]
        references = [reference for _, reference in records.values()]
        bleu, chrf = self._bleu, self._chrf
        return TranslationScores(
            bleu=bleu.corpus_score(hypotheses, [references]).score,
            chrf=chrf.corpus_score(hypotheses, [references]).score,
            bleu_signature=str(bleu.get_signature()),  # known only after scoring
            chrf_signature=str(chrf.get_signature()),
        )

    @override
    def _score_resampled(self, records: Mapping[int, Pair], counts: Counts) -> Mapping[str, Replicates]:
        """`bleu`; sacreBLEU does not give the numbers of a sentence that chrF is made of."""
        parts = [self._bleu.corpus_score([hypothesis], [[reference]]) for hypothesis, reference in records.values()]
        correct, total = (counts @ np.array([getattr(part, name) for part in parts]) for name in ("counts", "totals"))
        lengths = counts @ np.array([(part.sys_len, part.ref_len) for part in parts])
        smooth, scores = self._bleu.smooth_method, np.empty(len(counts))
        for number, (sys_len, ref_len) in enumerate(lengths.tolist()):
            n_grams = correct[number].tolist(), total[number].tolist()
            scores[number] = BLEU.compute_bleu(*n_grams, sys_len, ref_len, smooth_method=smooth).score
        return {"bleu": scores}
