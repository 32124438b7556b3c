"""The LightningModule of translation, with an encoder-decoder Transformer (paper, section 3)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention import AttentionSpec
from lightning_attn.datamodules.translation.batches import TranslationBatch, TranslationDataset
from lightning_attn.datamodules.translation.vocabulary import PAD_ID, VOCABULARY_KEY, Vocabulary
from lightning_attn.errors import InputError
from lightning_attn.io import unused_path, write_file
from lightning_attn.metrics.translation import TranslationScoring, one_line
from lightning_attn.networks.compilation import CompileBackend
from lightning_attn.networks.recomputation import recompute_activations
from lightning_attn.networks.translation.beam_search import BeamSearchOptions, Hypothesis, beam_search
from lightning_attn.networks.translation.transformer import NormPosition, Transformer
from lightning_attn.tasks.base import TokenMeanTask, check_checkpointing, evaluating, require_network
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.prediction_files import PartialResults, differing_origin
from lightning_attn.tasks.translation_evaluation import ScoredBatch, TranslationEvaluator
from lightning_attn.tasks.workload import Workload, WorkloadOptions, build_network
from lightning_attn.training.checkpoints import CheckpointError, OutputRows, crc32_of
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec


class TranslationTask(TokenMeanTask):
    """Trains, evaluates and runs a translation Transformer; the defaults are the paper's base model.

    The vocabulary comes from the DataModule, or from the checkpoint if it has none, and is stored in checkpoints.

    Args:
        self_attention: Attention of the encoder and, causal, of the decoder; `mechanism: none` for none ("w/o").
        cross_attention: Encoder-decoder attention.
        dim: Width C.
        hidden_dim: Width inside the feed-forward networks.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        dropout: Dropout of embeddings, sublayer outputs and hidden layers; that of weights is in the specs.
        norm_position: `"post"` or `"pre"`.
        tie_embeddings: One matrix for source, target and output.
        label_smoothing: Probability mass spread over the vocabulary in the training loss.
        optimizer: The optimizer.
        schedule: The learning rate schedule.
        decoding: Beam search of test and prediction.
        validation_beam_size: Beam size of the translations in validation; 0 for the loss only.
        num_examples: Number of translations that a test prints; if above 0, it also draws the attention of the first.
        scoring: Options of BLEU and chrF.
        compile: Whether training compiles the layers around attentions by `torch.compile`. See docs/gpu.md.
        activation_checkpointing: Whether layers store their inputs only, and compute the rest again in the backward
            pass: less memory for more time, with the same results.
    """

    task_name: ClassVar[str] = "translation"
    monitor: ClassVar[str] = "val/loss"
    monitor_mode: ClassVar[str] = "min"
    output_rows: ClassVar[Mapping[str, OutputRows]] = {"embedding.weight": OutputRows()}
    outputs_word: ClassVar[str] = "pieces"
    precisions: ClassVar[tuple[str, ...]] = (*TokenMeanTask.precisions, "64-true")

    def __init__(
        self,
        self_attention: AttentionSpec = AttentionSpec(scale=0.125),  # noqa: B008 - a frozen value
        cross_attention: AttentionSpec = AttentionSpec(scale=0.125),  # noqa: B008 - a frozen value
        dim: int = 512,
        hidden_dim: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dropout: float = 0.1,
        norm_position: NormPosition = "post",
        tie_embeddings: bool = True,
        label_smoothing: float = 0.1,
        optimizer: OptimizerSpec = OptimizerSpec(),  # noqa: B008 - a frozen value
        schedule: ScheduleSpec = ScheduleSpec(),  # noqa: B008 - a frozen value
        decoding: BeamSearchOptions = BeamSearchOptions(),  # noqa: B008 - a frozen value
        validation_beam_size: int = 1,
        num_examples: int = 5,
        scoring: TranslationScoring = TranslationScoring(),  # noqa: B008 - a frozen value
        compile: bool | CompileBackend = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile=compile)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}.")
        if validation_beam_size < 0 or num_examples < 0:
            raise InputError("validation_beam_size and num_examples must be at least 0.")
        self.network_arguments: dict[str, Any] = {
            "self_attention": self_attention,
            "cross_attention": cross_attention,
            "dim": dim,
            "hidden_dim": hidden_dim,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "dropout": dropout,
            "norm_position": norm_position,
            "tie_embeddings": tie_embeddings,
        }
        # The actual network is built when the vocabulary is known; invalid sizes are reported before that.
        with torch.device("meta"):
            Transformer(vocabulary_size=1, pad_id=0, **self.network_arguments)
        self.label_smoothing = label_smoothing
        self.decoding = decoding
        self.validation_beam_size = validation_beam_size
        self.num_examples = num_examples
        self.scoring = scoring
        check_checkpointing(activation_checkpointing, compile)
        self._recomputes_activations = activation_checkpointing
        self.vocabulary: Vocabulary | None = None
        self.network: Transformer | None = None
        self._results: PartialResults | None = None
        self._done: set[int] = set()  # ids of sentences that an interrupted prediction has translated

    # Network and vocabulary

    @override
    def configure_model(self) -> None:
        if self.network is None:
            self._build(self.from_data("vocabulary"))

    def _build(self, vocabulary: Vocabulary) -> None:
        def build() -> Transformer:
            return Transformer(vocabulary_size=vocabulary.size, pad_id=vocabulary.pad_id, **self.network_arguments)

        self.vocabulary = vocabulary
        self.require_size(build)
        self.network = build()
        if self._recomputes_activations:
            recompute_activations(self.network)

    @override
    def modules_to_compile(self) -> Sequence[nn.Module]:
        return self.built_network.modules_to_compile()

    @property
    def built_network(self) -> Transformer:
        """The network.

        Raises:
            RuntimeError: If `configure_model` or `load` has not built it yet.
        """
        return require_network(self.network)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also stores the vocabulary."""
        super().on_save_checkpoint(checkpoint)
        assert self.vocabulary is not None
        # As a tensor, because weights_only loading does not allow bytes.
        checkpoint[VOCABULARY_KEY] = torch.frombuffer(bytearray(self.vocabulary.model), dtype=torch.uint8)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses a checkpoint of another vocabulary."""
        super().on_load_checkpoint(checkpoint)
        if _stored_vocabulary(checkpoint) != self.vocabulary:
            raise CheckpointError(
                "The checkpoint was trained with another vocabulary than that of the DataModule "
                "(another training text, cleaning, or data.vocabulary_size). Use the data settings it was trained "
                f"with, or its vocabulary (--data.vocabulary {self.checkpoint_path or 'CHECKPOINT'})."
            )

    @override
    def output_names(self) -> tuple[str, ...]:
        assert self.vocabulary is not None
        return tuple(self.vocabulary.pieces(range(self.vocabulary.size)))

    @override
    def stored_output_names(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        vocabulary = _stored_vocabulary(checkpoint)
        return tuple(vocabulary.pieces(range(vocabulary.size)))

    @override
    def same_outputs_hint(self, path: str | Path) -> str:
        return f"For fine-tuning, train with its vocabulary: --data.vocabulary {path}. "

    @override
    def configure_data_from_checkpoint(self, datamodule: pl.LightningDataModule, checkpoint: dict[str, Any]) -> None:
        """Sets the vocabulary, which the DataModule would otherwise learn from the training text."""
        if hasattr(datamodule, "given_vocabulary") and VOCABULARY_KEY in checkpoint:
            datamodule.given_vocabulary = _stored_vocabulary(checkpoint)

    @override
    def build_from_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._build(_stored_vocabulary(checkpoint))

    @override
    def workload(self, datamodule: pl.LightningDataModule, options: WorkloadOptions) -> Workload:
        """The defaults are pairs of 50 and 50 tokens, with which the paper's count is given."""
        device, (source_length, target_length) = options.device, options.size or (50, 50)
        vocabulary_size = options.num_classes or int(getattr(datamodule, "vocabulary_size", 0))
        if not vocabulary_size:
            raise InputError("num_classes: the data has no vocabulary_size. Give the number of pieces of words.")
        network, notes = build_network(
            lambda: Transformer(vocabulary_size=vocabulary_size, pad_id=PAD_ID, **self.network_arguments), device
        )
        tokens = int(getattr(datamodule, "max_tokens", 0))
        batch_size = options.batch_size or max(1, tokens // max(source_length, target_length))
        generator = torch.Generator().manual_seed(0)
        source, target = (
            torch.empty(batch_size, length, dtype=torch.int64, device=device)
            if device.type == "meta"
            else torch.randint(PAD_ID + 1, vocabulary_size, (batch_size, length), generator=generator).to(device)
            for length in (source_length, target_length + 1)
        )

        def loss() -> Tensor:
            if device.type == "meta":  # the loss looks for padding
                logits: Tensor = network(source, target[:, :-1])
                return logits.sum()
            smoothed: Tensor = network.loss(source, target, self.label_smoothing)[0]
            return smoothed / target[:, 1:].numel()

        return Workload(
            network,
            lambda: network(source, target[:, :-1]),
            loss,
            batch_size,
            "tokens",
            batch_size * target_length,
            f"{batch_size} pairs of {source_length} and {target_length} tokens, {vocabulary_size:,} pieces",
            (*notes, "the forward pass sees the whole target; decoding step by step costs more"),
            paper_omits_own=True,  # the output projection
        )

    # Training

    @override
    def training_step(self, batch: TranslationBatch, batch_idx: int) -> Tensor:
        """The summed loss of a batch, as `TokenMeanTask` requires."""
        loss, likelihood, number = self.built_network.loss(batch.source, batch.target, self.label_smoothing)
        self.count_tokens(number, likelihood)
        return loss

    # Validation and test

    @override
    def configure_evaluators(self) -> list[Evaluator]:
        return [TranslationEvaluator(self)]

    @override
    def validation_step(self, batch: TranslationBatch, batch_idx: int) -> ScoredBatch:
        return self._score(batch, self.validation_beam_size)

    @override
    def test_step(self, batch: TranslationBatch, batch_idx: int) -> ScoredBatch:
        return self._score(batch, self.decoding.beam_size)

    def _score(self, batch: TranslationBatch, beam_size: int) -> ScoredBatch:
        likelihoods, counts = self.built_network.sentence_losses(batch.source, batch.target)
        found = self._search(batch.source, beam_size) if beam_size else []
        texts = [self._text(best[0]) for best in found]
        return ScoredBatch(losses=likelihoods, counts=counts, hypotheses=texts)

    def _search(self, source: Tensor, beam_size: int, prefixes: Sequence[Sequence[int]] = ()) -> list[list[Hypothesis]]:
        network, vocabulary = self.built_network, self.vocabulary
        assert vocabulary is not None
        options = self.decoding
        if beam_size != options.beam_size:
            options = dataclasses.replace(options, beam_size=beam_size, nbest=1)
        lengths = (source != vocabulary.pad_id).sum(dim=1)
        return beam_search(
            network.start_decoding(source),
            source.shape[0],
            options,
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
            max_lengths=options.max_lengths(lengths),
            prefixes=prefixes,
        )

    def _translations(self, source: Tensor, prefixes: Sequence[str] = ()) -> list[list[dict[str, Any]]]:
        """The n best translations of each sentence, with `text` and `score`; an empty text for a blank sentence."""
        assert self.vocabulary is not None
        lengths = (source != self.vocabulary.pad_id).sum(dim=1).tolist()
        forced = self.vocabulary.encode_batch(list(prefixes)) if any(prefixes) else []
        found = self._search(source, self.decoding.beam_size, forced)
        return [
            [{"text": self._text(one), "score": one.score} for one in best]
            if length > 1
            else [{"text": "", "score": 0.0}]
            for best, length in zip(found, lengths, strict=True)
        ]

    def _text(self, hypothesis: Hypothesis) -> str:
        assert self.vocabulary is not None
        return one_line(self.vocabulary.decode(hypothesis.tokens))

    # Prediction

    @override
    def on_predict_epoch_start(self) -> None:
        """Chooses the folder of partial results; with `skip_done` reads those of an interrupted prediction."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        self._done = set()
        if getattr(datamodule, "reads_standard_input", False):
            return
        folder = self.output_directory / "predictions"
        weights = crc32_of(self.built_network.parameters())
        text = datamodule.predicted_text() if hasattr(datamodule, "predicted_text") else None
        origin = {"text": text, "network": weights, "decoding": dataclasses.asdict(self.decoding)}
        skip_done = getattr(datamodule, "skip_done", False)
        interrupted = sorted(folder.glob("hypotheses_so_far*"), key=lambda path: path.stat().st_mtime)
        resumable = [path for path in interrupted if not differing_origin(path, origin)]
        resume = skip_done and bool(resumable)
        if skip_done and interrupted and not resumable:
            differing = " and ".join(differing_origin(interrupted[-1], origin))
            raise InputError(
                f"skip_done: {interrupted[-1]} contains an interrupted prediction of another {differing}. Use the same "
                "text, checkpoint and decoding to resume it, or remove --data.skip_done to translate all."
            )
        chosen = resumable[-1] if resume else unused_path(folder / "hypotheses_so_far")
        # Rank 0 decides: it may already have written files when another rank checks.
        chosen = Path(self.trainer.strategy.broadcast(str(chosen)))
        self._results = PartialResults(chosen, self.global_rank, origin)
        self._done = {one["id"] for one in self._results.results()} if resume else set()
        self.trainer.strategy.barrier()
        if self._done:
            rank_zero_info(f"{len(self._done):,} sentences were translated before ({chosen})")
        elif skip_done:
            rank_zero_info(f"skip_done: {folder} contains no interrupted prediction; all sentences are translated.")
        elif resumable:
            rank_zero_info(
                f"{resumable[-1]} contains an interrupted prediction of the same text. To resume it, set "
                "--data.skip_done true."
            )

    @override
    def interrupted_note(self) -> str:
        if self._results is None:
            return ""
        self._results.flush()
        done = len(self._results.results())
        return (
            f"{done:,} sentences are translated, in {self._results.folder}. To resume, repeat the command with "
            "--data.skip_done true."
        )

    @override
    def predict_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Translates a batch and writes it, or prints it if the text comes from standard input."""
        if getattr(self.trainer.datamodule, "reads_standard_input", False):  # type: ignore[attr-defined]
            for best in self._translations(batch.source, batch.prefixes):
                text = best[0]["text"] if self.decoding.nbest == 1 else json.dumps(best, ensure_ascii=False)
                print(text, flush=True)
            return
        assert self._results is not None
        ids = batch.ids.tolist()
        texts = batch.source_text or [""] * len(ids)
        remaining = [row for row, index in enumerate(ids) if index not in self._done]
        if not remaining:
            return
        prefixes = [batch.prefixes[row] for row in remaining] if batch.prefixes else []
        for row, best in zip(remaining, self._translations(batch.source[remaining], prefixes), strict=True):
            self._results.add({"id": ids[row], "source": texts[row], "hypotheses": best})
        self._results.flush()

    @override
    def on_predict_epoch_end(self) -> None:
        """Writes `predictions/hypotheses.txt`, one sentence per line in corpus order, and all n best with scores."""
        if self._results is None:
            return
        self._results.close()
        self.trainer.strategy.barrier()
        results = self._results.results()
        if not self.trainer.is_global_zero or not len(results):
            return
        folder = self.output_directory / "predictions"
        path = write_file(
            folder / "hypotheses.txt",
            lambda file: file.writelines(f"{one['hypotheses'][0]['text']}\n".encode() for one in results),
        )
        scores = write_file(
            folder / "hypotheses.jsonl",
            lambda file: file.writelines(f"{json.dumps(one, ensure_ascii=False)}\n".encode() for one in results),
        )
        self._results.remove()
        rank_zero_info(f"{len(results)} translations written to {path}, with scores to {scores.name}")

    def predict(self, inputs: Sequence[str], batch_size: int = 32, prefixes: Sequence[str] = ()) -> list[str]:
        """Translates sentences, without a Trainer.

        Args:
            inputs: Source sentences, as plain text.
            batch_size: Number of sentences per batch; batches have sentences of similar length.
            prefixes: Forced beginnings of the translations; none for no constraint.

        Returns:
            The best translation of each, in the same order; an empty text for a blank sentence.

        Raises:
            RuntimeError: If the network is not built; `load` builds it.
            TypeError: If `inputs` is one text instead of several.
        """
        require_network(self.network)
        assert self.vocabulary is not None
        if isinstance(inputs, str):
            raise TypeError("predict takes several sentences: give a list, [text] for one.")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        invalid = [one for one in [*inputs, *prefixes] if not isinstance(one, str)]
        if invalid:
            raise TypeError(f"predict takes sentences as text, got {type(invalid[0]).__name__} ({invalid[0]!r}).")
        if prefixes and len(prefixes) != len(inputs):
            raise InputError(f"prefixes must be one for each of the {len(inputs)} sentences, got {len(prefixes)}.")
        if not inputs:
            return []
        dataset = TranslationDataset.from_text(self.vocabulary, list(inputs))
        order = dataset.lengths()[0].argsort(kind="stable").tolist()
        translations = dict.fromkeys(range(len(inputs)), "")
        with evaluating(self):
            for begin in range(0, len(order), batch_size):
                indices = order[begin : begin + batch_size]
                forced = [prefixes[index] for index in indices] if prefixes else []
                found = self._translations(dataset.__getitems__(indices).source.to(self.device), forced)
                translations.update(zip(indices, (best[0]["text"] for best in found), strict=True))
        return list(translations.values())


def _stored_vocabulary(checkpoint: dict[str, Any]) -> Vocabulary:
    if VOCABULARY_KEY not in checkpoint:
        raise CheckpointError("The checkpoint has no vocabulary: it was not written by a TranslationTask. Use another.")
    stored = checkpoint[VOCABULARY_KEY]
    if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.ndim != 1:
        raise CheckpointError(
            "The checkpoint is damaged: its vocabulary is not a tensor of bytes. Use another one of the same run."
        )
    try:
        return Vocabulary(stored.numpy().tobytes())
    except ValueError as error:
        raise CheckpointError(f"The checkpoint's vocabulary is damaged: {error}") from error
