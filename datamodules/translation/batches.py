"""Sentences as batches of tokens, from arrays, lines or the standard input."""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import LongTensor
from torch.utils.data import Dataset

from lightning_attn.datamodules.sampling.token_batches import Lengths
from lightning_attn.datamodules.translation.parallel_text import decode_line, is_blank
from lightning_attn.datamodules.translation.token_cache import TokenArray
from lightning_attn.datamodules.translation.vocabulary import BOS_ID, EOS_ID, PAD_ID, Vocabulary
from lightning_attn.errors import InputError

__all__ = [
    "LONGER_EVALUATION",
    "LongLinePolicy",
    "StandardInput",
    "TranslationBatch",
    "TranslationDataset",
    "check_lengths",
]

logger = logging.getLogger(__name__)

LongLinePolicy = Literal["crop", "skip", "stop"]
"""How a line to translate that is longer than a batch is treated.

`crop` translates its beginning, `skip` gives it an empty translation, both with a warning in the log; `stop` ends with
an error.
"""

LONGER_EVALUATION = "raise --data.eval_max_tokens"

# Random reads map about 64 KB of the cache for each sentence, some 20 MB for a batch.
_FETCHES_BEFORE_RELEASE = 8


@dataclass
class TranslationBatch:
    """Sentences padded to a common length.

    Not frozen only because Lightning refuses frozen dataclasses when it converts the precision of inputs.

    Args:
        ids: index of each sentence in its split (line number minus one; for training, among the pairs that cleaning
            kept), `[B]`.
        source: source tokens, each row ends with eos and is padded, `[B, S]`.
        target: target tokens, each row starts with bos, ends with eos and is padded, `[B, T]`; `[B, 0]` in prediction.
        source_text: the source lines in evaluation and prediction; empty in training.
        target_text: the reference lines in evaluation; empty in training and prediction.
        prefixes: forced beginnings of the translations, in prediction; usually empty.
    """

    ids: LongTensor
    source: LongTensor
    target: LongTensor
    source_text: list[str] = field(default_factory=list)
    target_text: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "TranslationBatch":
        """A copy on another device, except for the ids, which are read on the CPU."""
        asynchronous = torch.device(device).type == "cuda"
        source, target = (tensor.to(device, non_blocking=asynchronous) for tensor in (self.source, self.target))
        return replace(self, source=source, target=target)  # type: ignore[arg-type]

    def pin_memory(self) -> "TranslationBatch":
        """A copy in page-locked memory, except for the ids."""
        source, target = (tensor.pin_memory() for tensor in (self.source, self.target))
        return replace(self, source=source, target=target)  # type: ignore[arg-type]


class TranslationDataset(Dataset[TranslationBatch]):
    """Sentences as tokens, fetched a batch at a time.

    Args:
        source: source sentences.
        target: target sentences, or none.
        source_text: their lines, if batches are to hold them.
        target_text: the lines of the targets.
        prefixes: forced beginnings of the translations.
    """

    def __init__(
        self,
        source: TokenArray,
        target: TokenArray | None = None,
        source_text: Sequence[str] = (),
        target_text: Sequence[str] = (),
        prefixes: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.target = target
        self.source_text = source_text
        self.target_text = target_text
        self.prefixes = prefixes
        self._fetched = 0

    @classmethod
    def from_text(
        cls, vocabulary: Vocabulary, source: list[str], target: list[str] | None = None
    ) -> "TranslationDataset":
        """Tokenises lines and keeps the lines; a blank one, of any white space, has no tokens."""
        return cls(
            TokenArray.from_lists(vocabulary.encode_batch(["" if is_blank(line) else line for line in source])),
            None if target is None else TokenArray.from_lists(vocabulary.encode_batch(target)),
            source,
            target or (),
        )

    def shortened(self, what: str, max_tokens: int, policy: LongLinePolicy, first: int = 1) -> "TranslationDataset":
        """A copy in which source lines that are too long are cropped or emptied.

        Args:
            what: Name of the text, for messages.
            max_tokens: Most tokens of a line, end of sentence included.
            policy: How longer ones are treated.
            first: Number of the first line.

        Raises:
            ValueError: If there is a longer line and `policy` is "stop".
        """
        lengths = self.lengths()[0]
        longer = np.flatnonzero(lengths > max_tokens)
        if not len(longer):
            return self
        if policy == "stop":
            check_lengths(f"{what}, line", self.lengths(), max_tokens, LONGER_EVALUATION, first)
        for index in longer.tolist():
            result = "only its beginning is translated" if policy == "crop" else "it has no translation"
            logger.warning(
                f"{what}, line {index + first} has {lengths[index]:,} tokens, more than {max_tokens:,}: {result} "
                f"(--data.on_long_line; {LONGER_EVALUATION} to translate all of it)."
            )
        most = max_tokens - 1 if policy == "crop" else 0
        too_long = set(longer.tolist())
        rows = [self.source[index][: most if index in too_long else None].tolist() for index in range(len(self))]
        tokens = TokenArray.from_lists(rows)
        return TranslationDataset(tokens, self.target, self.source_text, self.target_text, self.prefixes)

    def __len__(self) -> int:
        return len(self.source)

    def lengths(self) -> tuple[Lengths, Lengths]:
        """Tokens of each source and target sentence with their eos, `[sentences]` each; 0 without a target."""
        source = self.source.lengths + 1
        target = np.zeros_like(source) if self.target is None else self.target.lengths + 1
        self._release()
        return source, target

    def __getitem__(self, index: int) -> TranslationBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> TranslationBatch:
        """One batch; the DataLoader's fetcher calls this for the whole list at once."""
        source = _pad([self.source[index] for index in indices], begin=False)
        if self.target is None:
            target = np.empty((len(indices), 0), dtype=np.int64)
        else:
            target = _pad([self.target[index] for index in indices], begin=True)
        self._fetched += 1
        if self._fetched % _FETCHES_BEFORE_RELEASE == 0:
            self._release()
        return TranslationBatch(
            torch.tensor(indices, dtype=torch.long),  # type: ignore[arg-type]
            torch.from_numpy(source),  # type: ignore[arg-type]
            torch.from_numpy(target),  # type: ignore[arg-type]
            [self.source_text[index] for index in indices] if self.source_text else [],
            [self.target_text[index] for index in indices] if self.target_text else [],
            [self.prefixes[index] for index in indices] if self.prefixes else [],
        )

    def _release(self) -> None:
        self.source.release()
        if self.target is not None:
            self.target.release()


class StandardInput:
    """The lines of the standard input, each a batch of its own as soon as it is read.

    Args:
        vocabulary: tokenises them.
        max_tokens: most tokens of a line.
        on_long_line: how longer ones are treated.

    Raises:
        ValueError: during iteration, if a line is longer and `on_long_line` is "stop".
    """

    def __init__(self, vocabulary: Vocabulary, max_tokens: int, on_long_line: LongLinePolicy = "crop") -> None:
        self.vocabulary = vocabulary
        self.max_tokens = max_tokens
        self.on_long_line: LongLinePolicy = on_long_line

    def __len__(self) -> int:
        # Lightning fetches a batch in advance from a loader without a length: nothing would be translated until the
        # next line is typed. The loop stops where the lines end.
        return sys.maxsize

    def __iter__(self) -> Iterator[TranslationBatch]:
        for index, line in enumerate(sys.stdin.buffer):
            text = decode_line(line, Path("/dev/stdin"), index + 1)
            dataset = TranslationDataset.from_text(self.vocabulary, [text])
            dataset = dataset.shortened("standard input", self.max_tokens, self.on_long_line, index + 1)
            batch = dataset[0]
            batch.ids.add_(index)
            yield batch


def _pad(sentences: list[Any], begin: bool) -> Any:
    """Rows of [bos] + ids + [eos], padded, `[B, L]` int64."""
    first = int(begin)
    rows = np.full((len(sentences), first + max(map(len, sentences)) + 1), PAD_ID, dtype=np.int64)
    if begin:
        rows[:, 0] = BOS_ID
    for row, ids in zip(rows, sentences, strict=True):
        row[first : first + len(ids)] = ids
        row[first + len(ids)] = EOS_ID
    return rows


def check_lengths(what: str, lengths: tuple[Lengths, Lengths], bound: int, fix: str, first: int = 1) -> None:
    """Refuses a sentence that is longer than a batch may be.

    Args:
        what: What the sentences are, for the message.
        lengths: Tokens of each source and target sentence, `[sentences]` each.
        bound: Most tokens of one.
        fix: What the message advises.
        first: Number of the first sentence.

    Raises:
        ValueError: If one is longer; the message names the longest.
    """
    longest = np.maximum(*lengths)
    if len(longest) and longest.max() > bound:
        index = int(longest.argmax())
        raise InputError(
            f"{what} {index + first} has {longest[index]:,} tokens with its end of sentence, more than a batch may "
            f"hold ({bound:,}): {fix}."
        )
