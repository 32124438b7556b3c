"""Which attention weights are dropped: a function of the seed and of the weight's place, not of how work is cut.

Each (head, sample, query) has a stream of random numbers of its own (SplitMix64, Steele, Lea and Flood 2014), whose
start is itself drawn by the seed; four keys share a number of 64 bits. So each weight is dropped independently of all
others, and tiles of any size, in both passes, find the same mask.
"""

import torch
from torch import Tensor

_LEVELS = 1 << 16  # the probability is rounded to a multiple of its inverse
_LANES = 4  # numbers of 16 bits in one of 64


def new_seed() -> Tensor:
    """A seed from torch's own generator: `torch.manual_seed` and restored generator states decide what is dropped."""
    return torch.randint(2**62, (), device="cpu")


def dropout_factors(
    seed: Tensor,
    probability: float,
    dtype: torch.dtype,
    rows: Tensor,
    num_keys: int,
    keys: Tensor | None = None,
) -> Tensor:
    """What weights are multiplied with: 0 where dropped, 1 / (1 - p) elsewhere.

    p is the probability rounded to 1 / 65536, so that the expectation is exact.

    Args:
        seed: An integer tensor without dimensions; see `new_seed`.
        probability: Of dropping a weight, at least 0 and below 1.
        dtype: Of the factors.
        rows: A number for each row of weights, int64 of any shape `[...]`, unique among the heads, samples and queries.
        num_keys: The factors are for the keys numbered 0 to this.
        keys: Other numbers of keys, int64 `[keys]`; for these alone, and more slowly.

    Returns:
        `[..., keys]`.
    """
    if torch.compiler.is_compiling():  # one node: what the compiler makes of such integers crashes (torch 2.14, CPU)
        factors: Tensor = _factors_operator(seed, probability, dtype, rows, num_keys, keys)
        return factors
    return _factors(seed, probability, dtype, rows, num_keys, keys)


def _factors(
    seed: Tensor, probability: float, dtype: torch.dtype, rows: Tensor, num_keys: int, keys: Tensor | None
) -> Tensor:
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    start = _mixed(rows * _INCREMENT + seed.to(rows.device)).unsqueeze(-1)
    if keys is None:
        words = torch.arange(1, -(-num_keys // _LANES) + 1, device=rows.device)
        numbers = _mixed(start + words * _INCREMENT).view(torch.int16)[..., :num_keys]
    else:
        words = _mixed(start + (keys // _LANES + 1) * _INCREMENT)
        numbers = (words >> keys % _LANES * 16).to(torch.int16)
    kept = numbers >= dropped - _LEVELS // 2
    return kept.to(dtype).mul_(_LEVELS / (_LEVELS - dropped))


_factors_operator = torch.library.custom_op("lightning_attn::dropout_factors", _factors, mutates_args=())


@_factors_operator.register_fake
def _(seed: Tensor, probability: float, dtype: torch.dtype, rows: Tensor, num_keys: int, keys: Tensor | None) -> Tensor:
    return rows.new_empty((*rows.shape, num_keys if keys is None else keys.shape[0]), dtype=dtype)


def _signed(number: int) -> int:
    """An unsigned integer of 64 bits as torch has it."""
    return number - (1 << 64) if number >= 1 << 63 else number


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_STEPS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _mixed(numbers: Tensor) -> Tensor:
    """The output function of SplitMix64, in place."""
    for shift, factor in _STEPS:
        numbers.bitwise_xor_(_shifted(numbers, shift)).mul_(factor)
    return numbers.bitwise_xor_(_shifted(numbers, 31))


def _shifted(numbers: Tensor, places: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    return (numbers >> places).bitwise_and_((1 << 64 - places) - 1)
