"""What a beam search does to a cache, against the full pass over each row's own prefix."""

import copy
import itertools

import pytest
import torch

from lightning_attn.attention import TransformerAttention
from lightning_attn.attention import decoding as cache_module
from lightning_attn.attention.decoding import AttentionCache
from lightning_attn.attention.spec import TERM_SETS

DIM = 8


def make(terms="1111", **arguments):
    torch.manual_seed(1)
    attention = TransformerAttention(DIM, 2, terms, ndim=1, scale=0.7, **arguments).double().eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention


class Search:
    """Rows with a history each, moved as a beam search moves them."""

    def __init__(self, attention, cache, sentences, memory=None, mask=None):
        self.attention, self.cache, self.memory, self.mask = attention, cache, memory, mask
        self.prefixes = torch.zeros(sentences, 0, DIM, dtype=torch.float64)
        self.sentence = torch.arange(sentences)
        self.generator = torch.Generator().manual_seed(2)

    def step(self, tokens=1):
        token = torch.randn(len(self.prefixes), tokens, DIM, dtype=torch.float64, generator=self.generator)
        self.prefixes = torch.cat((self.prefixes, token), dim=1)
        with torch.no_grad():
            found = self.cache.decode_step(token)
            if self.memory is None:
                expected = self.attention(self.prefixes)
            else:
                mask = None if self.mask is None else self.mask[self.sentence]
                expected = self.attention(self.prefixes, self.memory[self.sentence], key_padding_mask=mask)
        torch.testing.assert_close(found, expected[:, -tokens:])

    def reorder(self, index, beams):
        index = torch.tensor(index)
        self.prefixes, self.sentence = self.prefixes[index], self.sentence[index]
        self.cache.reorder(index, beams)
        assert self.cache.rows in (len(index), None)


def search(attention, memory=None, mask=None):
    cache = AttentionCache(attention, memory, mask)
    return Search(attention, cache, 3, memory, mask)


def run_beams(rows):
    """Three sentences: two beams, then three, one sentence dropped, rows that move freely, beams again."""
    rows.step()
    rows.reorder([0, 0, 1, 1, 2, 2], 2)
    rows.step()
    rows.step()
    rows.reorder([1, 0, 2, 2, 5, 5], 2)
    rows.step()
    rows.reorder([0, 1, 1, 3, 2, 2, 4, 5, 5], 3)
    rows.step()
    rows.reorder([2, 2, 0, 6, 8, 7], 3)  # the second sentence is finished
    rows.step(tokens=2)
    rows.reorder([1, 0, 0, 3, 4, 4], 3)
    rows.step()
    rows.reorder([4, 0, 0, 5], 1)
    rows.step()
    rows.reorder([3, 1, 2, 0], 1)
    rows.step()
    rows.reorder([3, 3, 1, 1], 2)
    rows.step()
    rows.reorder([1, 1, 0, 2, 2, 3], 3)
    rows.step()
    rows.step()


@pytest.mark.parametrize("terms", TERM_SETS)
def test_rows_of_a_beam_search_see_their_own_prefix(terms, monkeypatch):
    for room, stride, window in itertools.product([2, 32], [1, 2], [None, 5]):
        monkeypatch.setattr(cache_module, "INITIAL_CAPACITY", room)
        run_beams(search(make(terms, causal=True, kv_stride=stride, window=window)))


@pytest.mark.parametrize("terms", TERM_SETS)
def test_rows_of_a_beam_search_see_the_memory_of_their_sentence(terms):
    memory = torch.randn(3, 7, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 5:] = mask[2] = True  # of the last sentence nothing is left
    for stride, window, pad in itertools.product([1, 2], [None, 5], [False, True]):
        run_beams(search(make(terms, kv_stride=stride, window=window), memory, mask if pad else None))


def test_beams_before_the_first_token():
    rows = search(make(causal=True))
    rows.reorder([0, 0, 1, 1, 2, 2], 2)
    rows.step()
    rows.step()
    rows.reorder([1, 1, 2, 3, 5, 4], 2)
    rows.step()


def test_slots_that_no_row_has_written_do_no_harm(monkeypatch):
    # Memory that is not initialised may hold anything; here it holds NaN.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: self.new_full(size, torch.nan))
    run_beams(search(make(causal=True)))


def test_keys_of_a_sentence_do_not_move_with_its_rows():
    attention, memory = make(causal=True), torch.randn(2, 5, DIM).double()
    own, other = AttentionCache(attention), AttentionCache(attention, memory)
    for cache in (own, other):
        cache.decode_step(torch.randn(2, 1, DIM).double())
        cache.reorder(torch.tensor([0, 0, 0, 1, 1, 1]), 3)
        cache.decode_step(torch.randn(6, 1, DIM).double())
        before = [x.data_ptr() for x in cache.stored]
        for index in ([2, 0, 0, 3, 5, 4], [1, 1, 1, 4, 4, 4]):
            cache.reorder(torch.tensor(index), 3)
            cache.decode_step(torch.randn(6, 1, DIM).double())
        assert [x.data_ptr() for x in cache.stored] == before
    assert other.stored[0].shape == (2, 2, 5, 1, DIM // 2), "one copy of the memory for all rows of a sentence"


def test_a_row_that_is_not_a_number_stays_in_its_sentence():
    cache = AttentionCache(make(causal=True))
    cache.decode_step(torch.zeros(2, 1, DIM).double())
    cache.reorder(torch.tensor([0, 0, 1, 1]), 2)
    token = torch.zeros(4, 1, DIM).double()
    token[0] = torch.nan
    assert cache.decode_step(token)[2:].isfinite().all()
    assert cache.decode_step(torch.zeros(4, 1, DIM).double())[2:].isfinite().all()


def test_no_gradients_and_no_parameter_is_touched():
    attention = make(causal=True)
    before = copy.deepcopy(attention.state_dict())
    cache = AttentionCache(attention)
    assert not cache.decode_step(torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)).requires_grad
    for name, value in attention.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_to_attend_from():
    cache = AttentionCache(make(causal=True))
    assert cache.rows is None
    assert cache.decode_step(torch.zeros(2, 0, DIM).double()).shape == (2, 0, DIM)
    assert cache.length == 0


def test_another_number_of_rows_is_refused():
    attention, x = make(causal=True), torch.zeros(2, 1, DIM).double()
    cache = AttentionCache(attention)
    cache.decode_step(x)
    cache.reorder(torch.tensor([0, 0, 1, 1]), 2)
    for wrong in (AttentionCache(attention, x), cache):
        with pytest.raises(ValueError, match=r"query has batch size 3, the cache has (2|4): they must be equal"):
            wrong.decode_step(torch.zeros(3, 1, DIM).double())
