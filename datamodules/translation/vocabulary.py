"""The joint subword vocabulary of a language pair."""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import sentencepiece

from lightning_attn.errors import InputError, MissingFileError

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3

Pieces = Literal["bpe", "unigram", "char"]
"""How words are split: byte pair encoding, the unigram language model, or single characters."""

VOCABULARY_KEY = "vocabulary"
"""Where checkpoints of a translation hold the model; see lightning_attn.training.checkpoint_keys."""


@dataclass(frozen=True)
class VocabularyOptions:
    """How a vocabulary is trained, beside its size.

    Args:
        pieces: how words are split; see `Pieces`.
        character_coverage: share of the characters of the text that get a piece of their own; below 1 the rarest become
            unknown, which is usual for Chinese and Japanese (0.9995).
        byte_fallback: writes characters without a piece as UTF-8 bytes (256 more pieces), so that nothing is unknown.
        split_digits: splits numbers into digits.
        symbols: texts that are always one piece, such as "<doc>".

    Raises:
        ValueError: if a value is out of range.
    """

    pieces: Pieces = "bpe"
    character_coverage: float = 1.0
    byte_fallback: bool = False
    split_digits: bool = False
    symbols: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pieces not in get_args(Pieces):
            raise InputError(f"vocabulary_options.pieces: {self.pieces!r} is none of {', '.join(get_args(Pieces))}.")
        if not 0 < self.character_coverage <= 1:
            raise InputError(
                f"vocabulary_options.character_coverage: {self.character_coverage} must be above 0 and at most 1."
            )


class Vocabulary:
    """A sentencepiece model with the special ids of this project: pad 0, unk 1, bos 2, eos 3.

    Text is neither normalised nor lower-cased: ``decode(encode(text)) == text`` for every text whose characters the
    vocabulary knows and whose words are separated by single blanks. Runs of blanks become one, blanks at the ends are
    dropped, U+2581 (the sign sentencepiece writes for a blank) comes back as a blank, and an unknown character comes
    back as " ⁇ ".

    Two vocabularies are equal if the bytes of their models are. Instances can be pickled.

    Args:
        model: the bytes of a sentencepiece model file.

    Raises:
        ValueError: if the bytes are not a sentencepiece model with these special ids.
    """

    pad_id = PAD_ID
    unk_id = UNK_ID
    bos_id = BOS_ID
    eos_id = EOS_ID

    def __init__(self, model: bytes) -> None:
        self._model = bytes(model)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise InputError(
                f"model: these {len(self._model)} bytes are not a sentencepiece model ({error}). Give the content of a "
                "file made by lightning_attn.datamodules.translation.vocabulary.train_vocabulary."
            ) from error
        found = (
            self._processor.pad_id(),
            self._processor.unk_id(),
            self._processor.bos_id(),
            self._processor.eos_id(),
        )
        if found != (PAD_ID, UNK_ID, BOS_ID, EOS_ID):
            raise InputError(
                f"model: its ids of pad, unk, bos, eos are {found}, but {(PAD_ID, UNK_ID, BOS_ID, EOS_ID)} are needed. "
                "Train it with --pad_id=0 --unk_id=1 --bos_id=2 --eos_id=3."
            )

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The vocabulary in a sentencepiece model file, or in a checkpoint of a translation.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds none.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(
                f"vocabulary: {path} is not there. Give a sentencepiece model (*.model) or a checkpoint (*.ckpt)."
            )
        try:
            if path.suffix == ".model":
                return cls(path.read_bytes())
            import torch  # not before, since it takes seconds

            from lightning_attn.archives import read_archive

            contents = read_archive(path)
            if not isinstance(contents, dict) or VOCABULARY_KEY not in contents:
                raise InputError(f"it has no {VOCABULARY_KEY!r}")
            stored = contents[VOCABULARY_KEY]
            if not isinstance(stored, torch.Tensor) or stored.dtype != torch.uint8 or not stored.is_contiguous():
                raise InputError(f"its {VOCABULARY_KEY} is not bytes")
            return cls(stored.numpy().tobytes())
        except InputError as error:
            raise InputError(
                f"vocabulary: {path} holds none ({str(error).rstrip('.')}). Give a sentencepiece model (*.model) whose "
                "special ids are pad 0, unk 1, bos 2, eos 3, or a checkpoint of a translation (*.ckpt)."
            ) from error

    @property
    def model(self) -> bytes:
        """The bytes of the sentencepiece model."""
        return self._model

    @property
    def size(self) -> int:
        """Number of ids, the four special ones included."""
        return int(self._processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of one sentence, without bos and eos."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each sentence, without bos and eos; in the calling thread only."""
        return list(self._processor.encode(texts, num_threads=1)) if texts else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; pad and bos are dropped, and so is everything from the first eos on."""
        return str(self._processor.decode(self._until_eos(ids)))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of every id, special ones too, with "▁" where a word starts."""
        return [str(self._processor.id_to_piece(int(index))) for index in ids]

    @staticmethod
    def _until_eos(ids: Iterable[int]) -> list[int]:
        found: list[int] = []
        for index in ids:
            if index == EOS_ID:
                break
            if index not in (PAD_ID, BOS_ID):
                found.append(int(index))
        return found

    def __len__(self) -> int:
        return self.size

    def __eq__(self, other: object) -> bool:
        return self._model == other._model if isinstance(other, Vocabulary) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._model)

    def __reduce__(self) -> tuple[type["Vocabulary"], tuple[bytes]]:
        return Vocabulary, (self._model,)

    def __repr__(self) -> str:
        return f"Vocabulary(size={self.size})"


def train_vocabulary(
    sentences: Iterable[str],
    size: int,
    *,
    options: VocabularyOptions = VocabularyOptions(),
    flag: str = "--data.vocabulary_size",
) -> Vocabulary:
    """Trains a vocabulary; the same sentences, size and options always give the same bytes.

    With the default options every character of the sentences gets a piece of its own (character coverage 1), so no
    training text has unknown characters. No sentence is skipped for its length: the limit that sentencepiece applies
    silently is lifted, so remove extreme lines by cleaning.

    Args:
        sentences: text of both languages; read once, held in memory by sentencepiece.
        size: number of ids, the four special ones included.
        options: how it is trained.
        flag: option that sets the size, for messages.

    Raises:
        ValueError: if the sentences cannot give a vocabulary of exactly that size; the message has the possible sizes.
    """
    buffer = io.BytesIO()
    failures: list[BaseException] = []

    def watched() -> Iterator[str]:
        # sentencepiece turns any exception, also KeyboardInterrupt, into a RuntimeError of its own.
        try:
            yield from sentences
        except (Exception, KeyboardInterrupt) as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=buffer,
            model_type=options.pieces,
            vocab_size=size,
            character_coverage=options.character_coverage,
            byte_fallback=options.byte_fallback,
            split_digits=options.split_digits,
            user_defined_symbols=list(options.symbols),
            normalization_rule_name="identity",
            max_sentence_length=1 << 30,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            minloglevel=3,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        message = str(error)
        if match := re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message):
            raise InputError(
                f"vocabulary_size: {size} is more than this text allows; the largest possible is {match[1]}. "
                f"Lower it with {flag} {match[1]} or less, or give more training text."
            ) from error
        if match := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", message):
            raise InputError(
                f"vocabulary_size: {size} is less than the {match[1]} ids that the single characters of this text "
                f"need. Raise it with {flag} {match[1]} or more."
            ) from error
        if "sentences_.empty()" in message or "all_chars_count" in message:
            raise InputError("sentences: there is no text to learn a vocabulary from; every line was empty.") from error
        raise
    return Vocabulary(buffer.getvalue())
