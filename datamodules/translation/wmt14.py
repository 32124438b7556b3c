"""Translation data in the layout ``root/{train,valid,test}.{en,de}``, or of any other two languages."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_attn.datamodules.sampling.planned_batches import planned_loader, rank_and_world_size, reshuffles
from lightning_attn.datamodules.sampling.token_batches import TokenBatchSampler
from lightning_attn.datamodules.translation.batches import (
    LONGER_EVALUATION,
    LongLinePolicy,
    StandardInput,
    TranslationBatch,
    TranslationDataset,
    check_lengths,
)
from lightning_attn.datamodules.translation.parallel_text import (
    Cleaning,
    find_pairs,
    find_source,
    is_blank,
    read_evaluation,
    read_lines,
    read_source,
)
from lightning_attn.datamodules.translation.token_cache import Preparation, TokenCache, default_cache_folder
from lightning_attn.datamodules.translation.vocabulary import Vocabulary, VocabularyOptions
from lightning_attn.errors import InputError, MissingFileError

__all__ = ["WMT14DataModule"]

# The splits that a stage reads.
_SPLITS = {"fit": ("valid",), "validate": ("valid",), "test": ("test",), "predict": ("predict",)}


class WMT14DataModule(pl.LightningDataModule):
    """WMT14 English-German, or any other parallel corpus in the same layout.

    ``root`` holds ``{train,valid,test}.{en,de}``, one sentence per line, or tables ``{train,valid,test}.tsv`` of
    source, tab, target; each may be compressed (``.gz``). Training text is cleaned, tokenised with a joint vocabulary,
    and cached as token ids under a hash of the files and settings. Validation and test text is not cleaned. A stage
    reads its own files only; outside of training, the command takes the vocabulary from the checkpoint and reads no
    training text.

    Train with ``Trainer(use_distributed_sampler=False)``: batches are planned here for all ranks.

    Args:
        root: folder of the corpus.
        max_tokens: most tokens on either side of a training batch on one rank, padding included.
        num_workers: processes that make batches; 0 makes them in the training process.
        source_language: ending of the source files.
        target_language: ending of the target files.
        train_files: name of the training files without the language, or a glob for several parts ("train*").
        valid_files: name of the validation files without the language; "" trains without validation.
        test_files: name of the test files without the language. Prediction needs the source alone.
        vocabulary: a sentencepiece model (``.model``) or a checkpoint of a translation whose vocabulary is used, such
            as for a training that starts from its weights; "" trains one.
        vocabulary_size: ids of the joint vocabulary, trained on the training text.
        vocabulary_options: how it is trained, beside its size.
        cleaning: which training pairs are left out.
        seed: seed, with the epoch, of the order of samples and batches.
        eval_max_tokens: the same bound for validation, test and prediction; 0 means `max_tokens`.
        cache_dir: folder of the token cache; "" means ``root/cache``, or a folder of the user's cache
            (``$XDG_CACHE_HOME`` or ``~/.cache``, then ``lightning_attn``) when ``root`` is read-only.
        download: downloads the official WMT14 files into ``root`` first.
        preparation_processes: processes that tokenise the training text; 0 means one per core.
        predict_file: text to translate in prediction, one sentence per line; "" means the source side of the test set,
            and "-" the standard input, each line as soon as it is read.
        on_long_line: how lines to translate of more than `eval_max_tokens` tokens are treated; see `LongLinePolicy`.
        predict_prefixes: text file with the forced beginning of each translation in prediction, one per line; blank
            lines force nothing. "" for none.
        skip_done: prediction reuses the translations that an interrupted prediction has left in the run directory, and
            translates the rest.

    Attributes:
        given_vocabulary: vocabulary of validation, test and prediction, which then read no training text; the command
            sets it to the checkpoint's.

    Raises:
        ValueError: if a number is out of range or both languages are the same.
    """

    def __init__(
        self,
        root: str,
        max_tokens: int = 4096,
        num_workers: int = 0,
        source_language: str = "en",
        target_language: str = "de",
        train_files: str = "train",
        valid_files: str = "valid",
        test_files: str = "test",
        vocabulary: str = "",
        vocabulary_size: int = 37000,
        vocabulary_options: VocabularyOptions = VocabularyOptions(),  # noqa: B008 (frozen)
        cleaning: Cleaning = Cleaning(),  # noqa: B008 (frozen)
        seed: int = 0,
        eval_max_tokens: int = 0,
        cache_dir: str = "",
        download: bool = False,
        preparation_processes: int = 0,
        predict_file: str = "",
        on_long_line: LongLinePolicy = "crop",
        predict_prefixes: str = "",
        skip_done: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("max_tokens", max_tokens, 1),
            ("num_workers", num_workers, 0),
            ("vocabulary_size", vocabulary_size, 5),
            ("seed", seed, 0),
            ("eval_max_tokens", eval_max_tokens, 0),
            ("preparation_processes", preparation_processes, 0),
        ):
            if value < least:
                raise InputError(f"{name}: {value} is too small; give {least} or more (--data.{name} {least}).")
        if source_language == target_language:
            raise InputError(
                f"target_language: {target_language!r} is the source language too; give two different endings, such as "
                "--data.source_language en --data.target_language de."
            )
        if on_long_line not in get_args(LongLinePolicy):
            raise InputError(
                f"on_long_line: {on_long_line!r} is none of {', '.join(get_args(LongLinePolicy))} "
                "(--data.on_long_line crop)."
            )
        self.root = Path(root)
        self.max_tokens = max_tokens
        self.num_workers = num_workers
        self.source_language = source_language
        self.target_language = target_language
        self.train_files = train_files
        self.valid_files = valid_files
        self.test_files = test_files
        self.vocabulary_file = vocabulary
        self.vocabulary_size = vocabulary_size
        self.vocabulary_options = vocabulary_options
        self.cleaning = cleaning
        self.seed = seed
        self.eval_max_tokens = eval_max_tokens or max_tokens
        self.cache_dir = cache_dir
        self.download = download
        self.preparation_processes = preparation_processes
        self.predict_file = predict_file
        self.on_long_line: LongLinePolicy = on_long_line
        self.predict_prefixes = predict_prefixes
        self.skip_done = skip_done
        self.given_vocabulary: Vocabulary | None = None
        self._vocabulary: Vocabulary | None = None
        self._cache: TokenCache | None = None
        self._splits: dict[str, TranslationDataset] = {}

    @property
    def vocabulary(self) -> Vocabulary:
        """The joint vocabulary.

        Raises:
            RuntimeError: before ``setup``.
        """
        if self._vocabulary is None:
            raise RuntimeError(
                "the vocabulary is known after prepare_data() and setup(); the Trainer calls both, or do so yourself."
            )
        return self._vocabulary

    def dataset(self, split: str) -> TranslationDataset:
        """The sentences of a split as tokens.

        Args:
            split: "train", "valid", "test" or "predict".

        Raises:
            RuntimeError: If `setup` has not read that split.
        """
        if split not in self._splits:
            raise RuntimeError(f"the sentences of {split!r} are known after prepare_data() and setup() of its stage.")
        return self._splits[split]

    @property
    def left_out(self) -> dict[str, int]:
        """How many training pairs cleaning left out, by reason; known after ``setup``."""
        return {} if self._cache is None else dict(self._cache.manifest["left_out"])

    @property
    def cache_folder(self) -> Path:
        """The folder that new token caches are written to."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_folder(self.root)

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Downloads or generates the corpus in ``root``, if asked to; runs in one process per node.

        Args:
            splits: Those that are needed, of "train", "valid" and "test"; "train" for the vocabulary.
        """
        if self.download:
            from lightning_attn.datamodules.downloads.wmt14 import download_wmt14

            download_wmt14(self.root)

    @override
    def prepare_data(self) -> None:
        """Downloads the corpus if asked to, checks it, and builds the vocabulary and the token cache.

        Raises:
            FileNotFoundError: if a file is missing.
            OSError: if the cache cannot be written.
            ValueError: on bad text; the message names file and line.
        """
        trainer = self.trainer
        stage = trainer.state.fn.value if trainer is not None and trainer.state.fn is not None else None
        evaluated = ("valid", "test") if stage is None else _SPLITS[stage]
        self.prepare_files([split for split in ("train", *evaluated) if split != "predict"])
        preparation = self._preparation(stage)
        # Errors in the small files are raised before the long work starts.
        needed = self._splits_of(stage) if stage is not None else tuple(filter(self._exists, ("valid", "test")))
        if "predict" in needed and self.reads_standard_input and trainer is not None and trainer.world_size > 1:
            raise InputError(
                f"predict_file: '-' is the standard input, which {trainer.world_size} processes cannot share; use one "
                "(--trainer.devices 1), or give a file."
            )
        for split in needed:
            self._read(split)
        if preparation is None:
            return
        folder = self._cache_entry(preparation)
        if not folder.is_dir():
            show_progress = trainer is None or trainer.is_global_zero
            folder = preparation.build(self.cache_folder, self.preparation_processes, show_progress)
        _report(TokenCache.open(folder).manifest)

    @override
    def setup(self, stage: str) -> None:
        """Opens the files that a stage needs; writes nothing.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: if a file of the stage or the token cache is missing.
            ValueError: on bad text; the message names file and line.
        """
        if self._cache is None:
            preparation = self._preparation(stage)
            if preparation is None:
                self._vocabulary = self._evaluation_vocabulary()
            else:
                self._cache = TokenCache.open(self._cache_entry(preparation))
                self._vocabulary = self._cache.vocabulary
                self._splits["train"] = TranslationDataset(self._cache.source, self._cache.target)
        for split in self._splits_of(stage):
            if split not in self._splits:
                dataset = TranslationDataset.from_text(self.vocabulary, *self._read(split))
                if split == "predict":
                    dataset = dataset.shortened(self._name_of("predict"), self.eval_max_tokens, self.on_long_line)
                    dataset.prefixes = self._read_prefixes(len(dataset))
                self._splits[split] = dataset

    @override
    def train_dataloader(self) -> DataLoader[TranslationBatch]:
        dataset = self._splits["train"]
        lengths = dataset.lengths()
        check_lengths(
            "training pair", lengths, self.max_tokens, "raise --data.max_tokens or lower --data.cleaning.max_tokens"
        )
        rank, world_size = rank_and_world_size(self)
        sampler = TokenBatchSampler(
            *lengths,
            self.max_tokens,
            shuffle=True,
            seed=self.seed,
            reshuffle=reshuffles(self),
            rank=rank,
            world_size=world_size,
        )
        return planned_loader(self, dataset, sampler, self.num_workers)

    @override
    def val_dataloader(self) -> "DataLoader[TranslationBatch] | list[TranslationBatch]":
        return self._evaluation_loader("valid") if self.valid_files else []

    @override
    def test_dataloader(self) -> DataLoader[TranslationBatch]:
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> "DataLoader[TranslationBatch] | StandardInput":
        """Batches of the text to translate, longest first, without references; single lines of the standard input."""
        if self.reads_standard_input:
            return StandardInput(self.vocabulary, self.eval_max_tokens, self.on_long_line)
        return self._evaluation_loader("predict")

    @property
    def reads_standard_input(self) -> bool:
        """Whether prediction reads lines from the standard input."""
        return self.predict_file == "-"

    def _splits_of(self, stage: str) -> tuple[str, ...]:
        """The splits that a stage reads.

        Raises:
            ValueError: If the stage needs a split that is not named.
        """
        splits = _SPLITS[stage]
        for option, split in (("valid_files", "valid"), ("test_files", "test")):
            if split in splits and not getattr(self, option) and stage != "fit":
                name = getattr(stage, "value", stage)  # Lightning's enumeration prints as its member's name
                raise InputError(f"{option}: it is empty, and {name} needs it (--data.{option} NAME).")
        return () if stage == "fit" and not self.valid_files else splits

    def _evaluation_vocabulary(self) -> Vocabulary | None:
        """The vocabulary of stages that read no training text; None if there is none."""
        if self.given_vocabulary is None and self.vocabulary_file:
            self.given_vocabulary = Vocabulary.from_file(self.vocabulary_file)
        return self.given_vocabulary

    def _preparation(self, stage: str | None) -> Preparation | None:
        """The preparation of the training text; None if a stage needs none."""
        if stage not in (None, "fit") and self._evaluation_vocabulary() is not None:
            return None
        pairs = find_pairs(self.root, self.train_files, self.source_language, self.target_language)
        return Preparation(
            tuple(pairs),
            self.source_language,
            self.target_language,
            self.vocabulary_size,
            self.cleaning,
            self.vocabulary_options,
            Vocabulary.from_file(self.vocabulary_file) if self.vocabulary_file else None,
        )

    def _cache_entry(self, preparation: Preparation) -> Path:
        """Folder of the cache entry; one in a read-only corpus folder is used as well."""
        key = preparation.key(self.cache_folder)
        inside = self.root / "cache" / key
        return inside if not self.cache_dir and inside.is_dir() else self.cache_folder / key

    def _exists(self, split: str) -> bool:
        """Whether any file of a split exists."""
        name = self._name_of(split)
        return bool(name) and any(self.root.glob(f"{glob.escape(name)}.*"))

    def _name_of(self, split: str) -> str:
        """Name of a split in messages."""
        if split == "predict" and self.predict_file:
            return self.predict_file
        return {"valid": self.valid_files, "train": self.train_files}.get(split, self.test_files)

    def _read(self, split: str) -> tuple[list[str], list[str] | None]:
        """The lines of an evaluation split: source and reference, the latter not in prediction."""
        if split == "predict" and self.reads_standard_input:
            return [], None
        if split != "predict":
            pairs = find_pairs(self.root, self._name_of(split), self.source_language, self.target_language)
            return read_evaluation(pairs[0])
        if not self.predict_file:
            return read_source(find_source(self.root, self.test_files, self.source_language)), None
        path = Path(self.predict_file)
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise MissingFileError(
                f"predict_file: {path} {problem}. Give a text file with one sentence a line "
                '(--data.predict_file FILE), or "" for the source side of the test set.'
            )
        lines = list(read_lines(path))
        if not lines:
            raise InputError(f"predict_file: {path} is empty. Give a text file with one sentence a line.")
        return lines, None

    def predicted_text(self) -> str:
        """A checksum of the text that prediction translates, with the forced beginnings."""
        dataset, digest = self._splits["predict"], hashlib.sha256()
        for lines in (dataset.source_text, dataset.prefixes):
            digest.update(f"{len(lines)}\n".encode())
            for line in lines:
                digest.update(f"{line}\n".encode("utf-8", errors="surrogateescape"))
        return digest.hexdigest()

    def _read_prefixes(self, count: int) -> list[str]:
        """The forced beginnings of the translations.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it has another number of lines than the text.
        """
        if not self.predict_prefixes:
            return []
        if self.reads_standard_input:
            raise InputError(
                "predict_prefixes: it cannot be used with the standard input; give the text as a file (predict_file)."
            )
        path = Path(self.predict_prefixes)
        if not path.is_file():
            raise MissingFileError(f"predict_prefixes: {path} does not exist (--data.predict_prefixes FILE).")
        lines = ["" if is_blank(line) else line for line in read_lines(path)]
        if len(lines) != count:
            raise InputError(
                f"predict_prefixes: {path} has {len(lines):,} lines, but the text {count:,}. Give a line for each, "
                "a blank one to force nothing."
            )
        return lines

    def _evaluation_loader(self, split: str) -> DataLoader[TranslationBatch]:
        dataset = self._splits[split]
        lengths = dataset.lengths()
        check_lengths(f"{self._name_of(split)}, line", lengths, self.eval_max_tokens, LONGER_EVALUATION)
        rank, world_size = rank_and_world_size(self)
        # By the source alone, so that a test and a prediction of the same text have the same batches.
        source = lengths[0]
        sampler = TokenBatchSampler(
            source, source, self.eval_max_tokens, shuffle=False, rank=rank, world_size=world_size
        )
        return planned_loader(self, dataset, sampler, self.num_workers)


def _report(manifest: dict[str, Any]) -> None:
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in manifest["left_out"].items()) or "none"
    rank_zero_info(
        f"Training text: {manifest['pairs_kept']:,} of {manifest['pairs_read']:,} pairs are used; left out: {left_out}."
    )
