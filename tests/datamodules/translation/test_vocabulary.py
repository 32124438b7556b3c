import io
import pickle
import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_corpus import WORDS

from datamodules.translation.vocabulary import Vocabulary, VocabularyOptions, train_vocabulary

SENTENCES = [
    "A man is walking down the street.",
    "Ein Mann geht die Straße entlang.",
    "“Fünf” – 5½ … Straßenbahnen, nicht?",
    "Ｆｕｌｌ ﬁ ² \tTab\u00a0and\u2028line separator",
    "U\u0308bung macht den Meister.",
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(SENTENCES, 120)


def test_special_ids_and_size(vocabulary):
    assert vocabulary.size == len(vocabulary) == 120
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id) == (0, 1, 2, 3)
    assert vocabulary.pieces([0, 1, 2, 3]) == ["<pad>", "<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("text", SENTENCES)
def test_text_comes_back_unaltered(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text


@settings(deadline=None)
@given(st.lists(st.text(sorted(set("".join(SENTENCES)) - {" "}), min_size=1), max_size=8).map(" ".join))
def test_any_text_of_known_characters_comes_back(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.unk_id not in ids
    assert not set(ids) & {0, 2, 3}


def test_blanks_are_collapsed_and_unknown_characters_shown(vocabulary):
    assert vocabulary.decode(vocabulary.encode("  Ein   Mann ")) == "Ein Mann"
    assert vocabulary.unk_id in vocabulary.encode("日")
    assert "⁇" in vocabulary.decode(vocabulary.encode("日"))


def test_decode_ends_at_eos_and_drops_pad_and_bos(vocabulary):
    ids = vocabulary.encode("Ein Mann")
    other = vocabulary.encode("street")
    assert vocabulary.decode([2, 0, *ids, 3, *other, 3]) == "Ein Mann"
    assert vocabulary.decode([]) == vocabulary.decode([2, 3]) == ""


def test_encode_batch_equals_encode(vocabulary):
    assert vocabulary.encode_batch(SENTENCES) == [vocabulary.encode(text) for text in SENTENCES]
    assert vocabulary.encode_batch([]) == []


def test_pieces_spell_the_text(vocabulary):
    assert "".join(vocabulary.pieces(vocabulary.encode("Ein Mann"))).replace("▁", " ").strip() == "Ein Mann"


def test_training_is_deterministic_and_equality_is_by_model(vocabulary):
    again = train_vocabulary(iter(SENTENCES), 120)
    assert again.model == vocabulary.model
    assert again == vocabulary
    assert hash(again) == hash(vocabulary)
    assert vocabulary != train_vocabulary(SENTENCES, 110)
    assert vocabulary != "something else"


def test_pickle(vocabulary):
    copy = pickle.loads(pickle.dumps(vocabulary))  # noqa: S301
    assert copy == vocabulary
    assert copy.encode(SENTENCES[0]) == vocabulary.encode(SENTENCES[0])


def test_too_large_names_the_largest_size_and_the_flag():
    with pytest.raises(
        ValueError, match=r"100000 is more than this text allows; the largest possible is (\d+)"
    ) as error:
        train_vocabulary(SENTENCES, 100_000)
    assert "--data.vocabulary_size" in str(error.value)
    largest = int(re.search(r"possible is (\d+)", str(error.value))[1])
    assert train_vocabulary(SENTENCES, largest).size == largest
    with pytest.raises(ValueError, match="more than this text allows"):
        train_vocabulary(SENTENCES, largest + 1)


def test_too_small_names_the_smallest_size_and_the_flag():
    with pytest.raises(ValueError, match=r"10 is less than the \d+ ids .* Raise it with --size \d+") as error:
        train_vocabulary(SENTENCES, 10, flag="--size")
    smallest = int(re.search(r"the (\d+) ids", str(error.value))[1])
    assert train_vocabulary(SENTENCES, smallest).size == smallest


@pytest.mark.parametrize("sentences", [[], ["", "  "]])
def test_no_text(sentences):
    with pytest.raises(ValueError, match="no text to learn a vocabulary from"):
        train_vocabulary(sentences, 20)


def test_long_sentences_are_not_left_out():
    sentence = " ".join(WORDS * 200) + " q!"
    assert len(sentence) > 10_000  # sentencepiece's own bound is 4,192 bytes
    assert train_vocabulary([sentence], 60).encode("q!").count(1) == 0


def test_byte_fallback_spells_unknown_characters():
    vocabulary = train_vocabulary(SENTENCES, 400, options=VocabularyOptions(byte_fallback=True))
    assert vocabulary.decode(vocabulary.encode("日本")) == "日本"


def test_an_error_in_the_text_comes_through():
    def sentences():
        yield "good"
        raise ValueError("line 7 is bad")

    with pytest.raises(ValueError, match="line 7 is bad"):
        train_vocabulary(sentences(), 20)


def test_bytes_that_are_no_model():
    with pytest.raises(ValueError, match="these 3 bytes are not a sentencepiece model"):
        Vocabulary(b"abc")


def test_model_with_other_ids():
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=buffer, vocab_size=100, model_type="bpe", minloglevel=3
    )
    with pytest.raises(ValueError, match=r"ids of pad, unk, bos, eos are \(-1, 0, 1, 2\)"):
        Vocabulary(buffer.getvalue())
