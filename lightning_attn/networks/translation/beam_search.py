"""Batched beam search over any decoder that predicts one token at a time.

A sentence `Y` of `|Y|` tokens, its end-of-sentence token included, has the score

    log P(Y) / ((5 + |Y|) / 6) ** length_penalty

(Wu et al. 2016, arXiv:1609.08144, Eq. 14, without the coverage term). Every returned score is that of a complete
sentence: a hypothesis at its length limit is closed by end-of-sentence, whose probability counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_attn.errors import InputError

Stopping = Literal["exact", "beam_size"]

# Tokens per block of the vocabulary in `top_values`; the fastest size of those from 32 to 256.
BLOCK = 96


class DecoderState(Protocol):
    """The interface of decoders for beam search: scores of the next token for the current prefixes.

    A state has R prefixes, its rows. It starts with one row per sentence and empty prefixes. Afterwards the rows of a
    sentence are always neighbours, each sentence has the same number of them, and sentences keep their order. State
    that depends on the sentence alone (the encoder's keys and values) therefore moves only when the number of rows
    changes.
    """

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every prefix and score the next tokens.

        Args:
            tokens: the last token of each prefix, `[R]`, int64; begin-of-sentence everywhere in the first call.

        Returns:
            Unnormalised log-probabilities (logits) of the next token, `[R, V]`, floating point; -inf for forbidden
            tokens. The search normalises in fp32.
        """
        ...

    def reorder(self, index: Tensor) -> None:
        """Make row r the former row `index[r]`, for every r of `index`, `[R']`, int64.

        R' > R: each sentence gets more rows, none is dropped. R' = R: rows move only within their sentence.
        R' < R: finished sentences are dropped, and the rows of the others move within their sentence.
        """
        ...


@dataclass(frozen=True)
class BeamSearchOptions:
    """Options of beam search, as plain values for YAML.

    Args:
        beam_size: number of prefixes of each sentence. 1 is greedy decoding: the most probable token each time.
        length_penalty: exponent of the length penalty; 0 ranks by probability, larger values favour longer sentences.
            Vaswani et al. 2017 use 0.6.
        max_length_ratio: a translation has at most `max_length_ratio * source length + max_length_offset` tokens,
            end-of-sentence not counted.
        max_length_offset: see `max_length_ratio`; Vaswani et al. 2017 use 1 and 50.
        min_length: fewest tokens of a translation, end-of-sentence not counted; it takes precedence over the maximum.
        no_repeat_ngram: no sequence of this many tokens occurs twice in a translation, unless a given prefix contains
            it or no other token is possible; 0 allows repetitions.
        nbest: hypotheses returned for each sentence, at most `beam_size`.
        stopping: when a sentence is finished. `"exact"`: when no prefix in the beam can still become better than the
            `nbest` best finished hypotheses, so that further search would change nothing. `"beam_size"`: as soon as
            `beam_size` hypotheses are finished, which is faster and may miss a better one.

    Raises:
        ValueError: if a value is out of its range.
    """

    beam_size: int = 4
    length_penalty: float = 0.6
    max_length_ratio: float = 1.0
    max_length_offset: int = 50
    min_length: int = 0
    no_repeat_ngram: int = 0
    nbest: int = 1
    stopping: Stopping = "exact"

    def __post_init__(self) -> None:
        least = {"beam_size": 1, "nbest": 1, "max_length_offset": 0, "min_length": 0, "no_repeat_ngram": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise InputError(f"{name} must be an integer of at least {smallest}, got {value!r}.")
        for name in ("length_penalty", "max_length_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InputError(f"{name} must be a finite number of at least 0, got {value!r}.")
        if self.max_length_ratio == 0 and self.max_length_offset == 0:
            raise InputError(
                "max_length_ratio and max_length_offset are both 0, which allows no token: raise one of them."
            )
        if self.nbest > self.beam_size:
            raise InputError(
                f"nbest={self.nbest} is more than beam_size={self.beam_size}: raise beam_size or lower nbest."
            )
        if self.stopping not in get_args(Stopping):
            raise InputError(f"stopping must be one of {', '.join(get_args(Stopping))}, got {self.stopping!r}.")

    def max_lengths(self, source_lengths: Tensor) -> Tensor:
        """Maximum number of tokens of each translation: ratio * source length + offset, at least `min_length` and 1.

        Args:
            source_lengths: `[B]`, integer, in tokens.

        Returns:
            `[B]`, int64, on the same device.
        """
        limits = (source_lengths * self.max_length_ratio + self.max_length_offset).floor().long()
        return limits.clamp_min(max(1, self.min_length))

    def penalty(self, length: int) -> float:
        """The divisor of a sentence's log-probability; `length` counts end-of-sentence."""
        return float(((5 + length) / 6) ** self.length_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """A finished sentence.

    Args:
        tokens: token ids without begin- and end-of-sentence.
        score: `log_probability` divided by the length penalty.
        log_probability: natural logarithm of the probability of the tokens and end-of-sentence under the decoder.
    """

    tokens: list[int]
    score: float
    log_probability: float


class _Finished:
    """The n best finished hypotheses of every sentence, best first; empty rows have score -inf."""

    def __init__(self, batch_size: int, nbest: int, longest: int, device: torch.device) -> None:
        self.scores = torch.full((batch_size, nbest), -math.inf, device=device)
        self.log_probabilities = torch.full((batch_size, nbest), -math.inf, device=device)
        self.lengths = torch.zeros(batch_size, nbest, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch_size, nbest, longest, dtype=torch.long, device=device)
        self.count = torch.zeros(batch_size, dtype=torch.long, device=device)

    def add(self, sentences: Tensor, log_probabilities: Tensor, tokens: Tensor, length: int, penalty: float) -> None:
        """Merge W hypotheses of the same length into the best of each of S sentences.

        Args:
            sentences: indices of the sentences, `[S]`.
            log_probabilities: `[S, W]`; -inf for none.
            tokens: `[S, W, T]`.
            length: tokens of each, end-of-sentence not counted.
            penalty: length penalty of each.
        """
        scores = torch.cat([self.scores[sentences], log_probabilities / penalty], dim=1)
        # Stable: of equal scores the first to finish wins, so that stopping early does not change the result.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        nbest = self.scores.shape[1]
        scores, order = scores[:, :nbest], order[:, :nbest]
        self.scores[sentences] = scores
        pool = torch.cat([self.log_probabilities[sentences], log_probabilities], dim=1)
        self.log_probabilities[sentences] = pool.gather(1, order)
        lengths = torch.cat([self.lengths[sentences], torch.full_like(tokens[:, :, 0], length)], dim=1)
        self.lengths[sentences] = lengths.gather(1, order)
        candidates = torch.cat([self.tokens[sentences], tokens], dim=1)
        self.tokens[sentences] = candidates.gather(1, order.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        self.count[sentences] += (log_probabilities > -math.inf).sum(dim=1)

    def hypotheses(self) -> list[list[Hypothesis]]:
        """All hypotheses as plain values."""
        columns = (self.scores, self.log_probabilities, self.lengths, self.tokens)
        return [
            [
                Hypothesis(tokens[:length], score, log_probability)
                for score, log_probability, length, tokens in zip(*sentence, strict=True)
                if score > -math.inf
            ]
            for sentence in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _checked_limits(max_lengths: Tensor, batch_size: int, min_length: int) -> list[int]:
    if max_lengths.shape != (batch_size,) or max_lengths.is_floating_point():
        raise InputError(
            f"max_lengths must hold one integer for each of the {batch_size} sentences, "
            f"got shape {list(max_lengths.shape)} and dtype {max_lengths.dtype}."
        )
    limits: list[int] = max_lengths.tolist()
    for sentence, limit in enumerate(limits):
        if limit < max(1, min_length):
            raise InputError(
                f"max_lengths[{sentence}] is {limit}, less than max(1, min_length) = {max(1, min_length)}: "
                "raise it or lower min_length."
            )
    return limits


def _ban_repetitions(log_probs: Tensor, prefixes: Tensor, size: int, free: Tensor) -> None:
    """Bans, in place, tokens that would repeat a sequence of `size` tokens: `[R, V]`, after prefixes `[R, length]`.

    Only in rows of `free`, `[R]`, whose next token is not forced. Where no other token is possible, end-of-sentence and
    repetitions stay allowed.
    """
    length = prefixes.shape[1]
    if size == 0 or length < size:
        return
    windows = prefixes.unfold(1, size, 1)  # [R, length - size + 1, size]
    repeats = (windows[:, :, : size - 1] == prefixes[:, None, length - size + 1 :]).all(dim=2)
    rows, positions = (repeats & free.unsqueeze(1)).nonzero(as_tuple=True)
    banned = log_probs.clone()
    banned[rows, windows[rows, positions, size - 1]] = -math.inf
    possible = (banned > -math.inf).any(dim=1, keepdim=True)
    torch.where(possible, banned, log_probs, out=log_probs)


def _force(log_probs: Tensor, tokens: list[int | None]) -> None:
    """Bans, in place, all but the forced token in the rows of each sentence, `[S * W, V]`; None forces no token."""
    width = log_probs.shape[0] // max(1, len(tokens))
    for sentence, token in enumerate(tokens):
        if token is not None:
            rows = log_probs[sentence * width : (sentence + 1) * width]
            forced = rows[:, token].clone()
            rows.fill_(-math.inf)
            rows[:, token] = forced


def _log_probabilities(
    logits: Tensor, *, banned: list[int], eos_id: int, may_end: bool, must_end: list[bool]
) -> Tensor:
    """Log-probabilities in fp32, `[S * W, V]`, -inf for forbidden tokens. `must_end` is for each of S sentences."""
    log_probs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    for token in banned:
        log_probs[:, token] = -math.inf
    if not may_end:
        log_probs[:, eos_id] = -math.inf
    if any(must_end):
        rows = torch.tensor(must_end, device=logits.device).repeat_interleave(logits.shape[0] // len(must_end))
        eos_log_probs = log_probs[:, eos_id].clone()
        log_probs.masked_fill_(rows.unsqueeze(1), -math.inf)
        log_probs[:, eos_id] = eos_log_probs
    return log_probs


def top_values(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest values of each row of `[R, V]`, best first, and their indices.

    They can only be in the `count` blocks of a row that have the highest maxima, or after the last full block. Maxima
    are far cheaper than `topk` over a whole vocabulary, which takes 1.3 to 3.8 times as long as this.
    """
    rows, size = values.shape
    blocks = size // BLOCK
    if blocks <= 4 * count:
        return _top(values, count)
    maxima = torch.unflatten(values[:, : blocks * BLOCK], 1, (blocks, BLOCK)).amax(dim=2)
    within = torch.arange(BLOCK, device=values.device)
    candidates = (_top(maxima, count)[1].unsqueeze(2) * BLOCK + within).flatten(1)
    if blocks * BLOCK < size:
        rest = torch.arange(blocks * BLOCK, size, device=values.device)
        candidates = torch.cat((candidates, rest.expand(rows, -1)), dim=1)
    best, index = _top(values.gather(1, candidates), count)
    return best, candidates.gather(1, index)


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # Of equal values `max` returns the first, whatever the shape.
    best, index = values.max(dim=1, keepdim=True) if count == 1 else values.topk(count, dim=1)
    return best, index


@torch.no_grad()
def beam_search(
    state: DecoderState,
    batch_size: int,
    options: BeamSearchOptions,
    *,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    max_lengths: Tensor,
    prefixes: Sequence[Sequence[int]] = (),
) -> list[list[Hypothesis]]:
    """Find the best sentences under a decoder, for a batch at once.

    Each step keeps the `beam_size` best unfinished prefixes of a sentence. A prefix followed by end-of-sentence becomes
    a finished hypothesis if it is among the `beam_size` best continuations of that step; it does not count towards the
    beam, except with `beam_size=1`, which stops at its first end-of-sentence and so is greedy decoding.

    A prefix of log-probability s can at best be continued by tokens of probability one up to its sentence's length
    limit, because s <= 0 and the penalty grows with the length. So with `stopping="exact"` a sentence is finished once
    its `nbest`-th finished score is not below s / penalty(limit + 1) for the best s in its beam. Finished sentences
    leave the batch. No sentence's result depends on the others.

    Begin-of-sentence and padding are never generated (unless one of them is also end-of-sentence), but the other
    probabilities are not renormalised without them: log-probabilities are those of the decoder.

    Args:
        state: the decoder, holding one row for each sentence and no token yet. `step` is called at most
            `max(max_lengths) + 1` times.
        batch_size: number of sentences B.
        options: beam size, penalty and the rest. Its length limits are not used here, see `max_lengths`.
        bos_id: begin-of-sentence, the first token given to `state`.
        eos_id: end-of-sentence.
        pad_id: padding.
        max_lengths: most tokens of each hypothesis, end-of-sentence not counted: `[B]`, integer, on the device of
            the decoder. Usually `options.max_lengths(source_lengths)`.
        prefixes: forced first tokens of each sentence, B lists, which may be empty; none for no constraint. They count
            in scores and lengths, and a limit below the length of a prefix is raised to it.

    Returns:
        For each sentence its `options.nbest` best hypotheses, best first, all different: fewer if fewer exist, but at
        least one.

    Raises:
        ValueError: if `max_lengths` does not fit, if scores have a wrong shape or are NaN, if an id is outside the
            vocabulary, or if some sentence cannot be ended because end-of-sentence has probability zero.
    """
    limits = _checked_limits(max_lengths, batch_size, options.min_length)
    if prefixes and len(prefixes) != batch_size:
        raise InputError(f"prefixes must be one for each of the {batch_size} sentences, got {len(prefixes)}.")
    if batch_size == 0:
        return []
    forced = [list(prefix) for prefix in prefixes] or [[] for _ in limits]
    limits = [max(limit, len(prefix)) for limit, prefix in zip(limits, forced, strict=True)]
    device = max_lengths.device
    beam_size = options.beam_size
    longest = max(limits)
    finished = _Finished(batch_size, options.nbest, longest, device)
    some_finished = False
    banned = [token for token in (pad_id, bos_id) if token != eos_id]

    # Of the S unfinished sentences with W prefixes each (W = 1 at first, then beam_size):
    sentences = torch.arange(batch_size, device=device)  # [S], their indices in the batch
    max_penalties = torch.tensor([options.penalty(limit + 1) for limit in limits], device=device)  # [S]
    scores = torch.zeros(batch_size, 1, device=device)  # [S, W], log-probabilities, -inf for no prefix
    tokens = torch.zeros(batch_size, 1, longest, dtype=torch.long, device=device)  # [S, W, T], the prefixes
    last = torch.full((batch_size,), bos_id, dtype=torch.long, device=device)  # [S * W]

    for length in range(longest + 1):  # of the prefixes
        size, width = scores.shape
        logits = state.step(last)
        if logits.ndim != 2 or logits.shape[0] != size * width:
            raise InputError(
                f"state.step must return scores [{size * width}, vocabulary] for as many tokens, "
                f"got shape {list(logits.shape)}."
            )
        vocabulary = logits.shape[1]
        if length == 0 and not all(0 <= token < vocabulary for token in (bos_id, eos_id, pad_id)):
            raise InputError(
                f"bos_id={bos_id}, eos_id={eos_id} and pad_id={pad_id} must be less than the vocabulary of "
                f"{vocabulary} tokens that state.step scores, and not negative."
            )
        closing = [limit == length for limit in limits]
        may_end = length >= options.min_length
        log_probs = _log_probabilities(logits, banned=banned, eos_id=eos_id, may_end=may_end, must_end=closing)
        next_forced = [prefix[length] if len(prefix) > length else None for prefix in forced]
        if options.no_repeat_ngram:
            free = torch.tensor([token is None for token in next_forced], device=device).repeat_interleave(width)
            before = tokens.view(size * width, -1)[:, :length]
            _ban_repetitions(log_probs, before, options.no_repeat_ngram, free)
        if any(token is not None for token in next_forced):
            _force(log_probs, next_forced)

        # Of the continuations of one prefix only end-of-sentence and the beam_size best other tokens can matter; of
        # a sentence's candidates only 2 * beam_size, since each of at most beam_size prefixes can end in one way only.
        choices = 1 if beam_size == 1 else min(beam_size + 1, vocabulary)
        best, token = top_values(log_probs, choices)
        candidates = scores.unsqueeze(2) + best.view(size, width, choices)
        candidates.masked_fill_(scores.unsqueeze(2) == -math.inf, -math.inf)  # empty rows, even if the decoder has NaN
        scores, order = candidates.view(size, -1).topk(min(2 * beam_size, width * choices), dim=1)
        parent = order // choices + torch.arange(0, size * width, width, device=device).unsqueeze(1)
        token = token.view(size, -1).gather(1, order)
        ends = token == eos_id

        # The host waits for the device here, and below once a hypothesis is finished. NaN sorts before every number.
        has_nan, any_ends = torch.stack([scores[:, 0].isnan().any(), ends.any()]).tolist()
        if has_nan:
            row = int(scores[:, 0].isnan().nonzero()[0])
            raise InputError(
                f"the decoder's scores for token {length + 1} of sentence {int(sentences[row])} are NaN: a logit is "
                "NaN or +inf, or all are -inf. Check the weights; if the precision is fp16, try bf16 or fp32."
            )
        if any_ends:
            ended = scores.masked_fill(~ends, -math.inf)[:, :beam_size]
            found = tokens.view(size * width, -1)[parent[:, :beam_size]]
            finished.add(sentences, ended, found, length, options.penalty(length + 1))
            some_finished = True
            scores, order = scores.masked_fill(ends, -math.inf).topk(min(beam_size, scores.shape[1]), dim=1)
            parent, token = parent.gather(1, order), token.gather(1, order)
        scores, parent, token = scores[:, :beam_size], parent[:, :beam_size], token[:, :beam_size]

        done = closing
        if some_finished:
            if options.stopping == "exact":
                stop = finished.scores[sentences, -1] >= scores[:, 0] / max_penalties
            else:
                stop = (finished.count[sentences] >= beam_size) | (scores[:, 0] == -math.inf)
            done = [a or b for a, b in zip(closing, stop.tolist(), strict=True)]
        if all(done):
            break

        tokens = tokens.view(size * width, -1)[parent]
        tokens[:, :, length] = token
        grown = scores.shape[1] > width
        if grown:
            state.reorder(parent.flatten())
            parent = torch.arange(parent.numel(), device=device).view_as(parent)
        if any(done):
            limits = [limit for limit, stopped in zip(limits, done, strict=True) if not stopped]
            forced = [prefix for prefix, stopped in zip(forced, done, strict=True) if not stopped]
            remaining = torch.tensor([row for row, stopped in enumerate(done) if not stopped], device=device)
            sentences, max_penalties = sentences[remaining], max_penalties[remaining]
            scores, tokens, parent, token = scores[remaining], tokens[remaining], parent[remaining], token[remaining]
        if any(done) or (width > 1 and not grown):
            state.reorder(parent.flatten())
        last = token.flatten()

    results = finished.hypotheses()
    for sentence, hypotheses in enumerate(results):
        if not hypotheses:
            raise InputError(
                f"sentence {sentence} cannot be ended: the decoder gives end-of-sentence (eos_id={eos_id}) probability "
                f"zero after every prefix of {options.min_length} to {int(max_lengths[sentence])} tokens in the beam. "
                "Raise max_lengths or beam_size."
            )
    return results
