"""The evaluator of translation: loss per token, BLEU and chrF, and the files of a test."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from lightning_attn.datamodules.translation.batches import TranslationBatch, TranslationDataset
from lightning_attn.io import unused_path, write_json, write_text
from lightning_attn.metrics.bootstrap import ResampledScores
from lightning_attn.metrics.gather import gather_by_id
from lightning_attn.metrics.translation import CorpusTranslationMetrics
from lightning_attn.metrics.weighted_mean import WeightedMean
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.visualization import draw_translation_attention, translation_attention

if TYPE_CHECKING:
    from lightning_attn.tasks.translation import TranslationTask


class ScoredBatch(TypedDict):
    """The return value of a validation or test step.

    `losses` are the losses of sentences, summed over their tokens, `[B]`; `counts` the numbers of tokens, `[B]`;
    `hypotheses` the best translations, empty if only the loss is scored.
    """

    losses: Tensor
    counts: Tensor
    hypotheses: list[str]


class TranslationEvaluator(Evaluator):
    """Loss per target token and, with translations, corpus BLEU and chrF.

    Args:
        task: The task, whose steps return a `ScoredBatch`.
    """

    prints_scores: ClassVar[bool] = True

    def __init__(self, task: "TranslationTask") -> None:
        self._task = task

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        name = "valid" if split == "val" else split
        self._metrics = CorpusTranslationMetrics(name, self._task.scoring)
        self._loss = WeightedMean(name)
        self._has_translations = split == "test" or self._task.validation_beam_size > 0
        self._examples: dict[int, tuple[str, str, str]] = {}

    @override
    def update(self, batch: TranslationBatch, outputs: Mapping[str, Any]) -> None:
        ids = batch.ids.tolist()
        self._loss.update(ids, outputs["losses"], outputs["counts"])
        if self._has_translations:
            self._metrics.update(ids, outputs["hypotheses"], batch.target_text)
        if self.split == "test":
            texts = zip(batch.source_text, batch.target_text, outputs["hypotheses"], strict=True)
            self._examples |= dict(zip(ids, texts, strict=True))
            self._examples = dict(sorted(self._examples.items())[: self._task.num_examples])

    @override
    def compute(self) -> dict[str, Any]:
        scores: dict[str, Any] = {"loss": self._loss.compute().item()}
        if self._has_translations:
            self._metrics.compute()
            scores |= self._metrics.scores()
        self._examples = dict(list(gather_by_id(self._examples).items())[: self._task.num_examples])
        return scores

    @override
    def resampled_scores(self) -> ResampledScores:
        return self._metrics.resampled_scores()

    @override
    def write(self, scores: dict[str, Any]) -> None:
        if self.split != "test":
            return
        task = self._task
        lines = "".join(f"{hypothesis}\n" for hypothesis in self._metrics.hypotheses())
        write_text(task.output_directory / "predictions" / "test_hypotheses.txt", lines)
        rank_zero_info(
            f"BLEU {scores['bleu']:.2f} ({scores['bleu_signature']}), chrF {scores['chrf']:.2f}, loss "
            f"{scores['loss']:.4f} nats per token"
        )
        examples = list(self._examples.values())
        if examples:
            _print_examples(examples)
            names = ("source", "reference", "hypothesis")
            shown = [{"id": one} | dict(zip(names, texts, strict=True)) for one, texts in self._examples.items()]
            write_json(task.output_directory / "predictions" / "test_examples.json", {"examples": shown})
            self._draw_attention(*examples[0][:2])

    @override
    def clear(self) -> None:
        self._metrics.reset()
        self._loss.reset()
        self._examples = {}

    def _draw_attention(self, source: str, target: str) -> None:
        task = self._task
        assert task.vocabulary is not None
        batch = TranslationDataset.from_text(task.vocabulary, [source], [target])[0].to(task.device)
        path = unused_path(task.output_directory / "attention.png")
        draw_translation_attention(task.built_network, task.vocabulary, batch.source, batch.target, path)
        rank_zero_info(f"Attention of the first sentence drawn to {path}")
        maps = translation_attention(task.built_network, task.vocabulary, batch.source, batch.target)
        write_json(task.output_directory / "predictions" / "test_attention.json", {"maps": maps})


def _print_examples(texts: list[tuple[str, str, str]]) -> None:
    table = Table("source", "reference", "translation", title="First sentences of the test set", show_lines=True)
    for row in texts:
        table.add_row(*map(escape, row))
    Console().print(table)
