"""Counter-based dropout of attention weights: the mask depends on the seed and the weight's index, not on the tiling.

Each (head, sample, query) has a separate stream of random numbers (SplitMix64, Steele, Lea and Flood 2014), whose start
is derived from the seed; four keys use the 16-bit parts of one 64-bit number. So each weight is dropped independently
of all others, and tiles of any size, in both passes, compute the same mask.
"""

import torch
from torch import Tensor

_LEVELS = 1 << 16  # the probability is rounded to a multiple of its inverse
_LANES = 4  # 16-bit numbers in a 64-bit number


def new_seed() -> Tensor:
    """Draws a seed from torch's generator, so that `torch.manual_seed` and restored states determine the mask."""
    return torch.randint(2**62, (), device="cpu")


def dropout_factors(
    seed: Tensor,
    probability: float,
    dtype: torch.dtype,
    rows: Tensor,
    num_keys: int,
    keys: Tensor | None = None,
) -> Tensor:
    """The dropout factors of attention weights: 0 where dropped, 1 / (1 - p) elsewhere.

    p is the probability rounded to 1 / 65536, so that the expectation is exact.

    Args:
        seed: An integer tensor without dimensions; see `new_seed`.
        probability: Of dropping a weight, at least 0 and below 1.
        dtype: Of the factors.
        rows: An id for each row of weights, int64 of any shape `[...]`, unique among the heads, samples and queries.
        num_keys: Number of keys; the factors are for the keys 0 to `num_keys - 1`.
        keys: Instead, the indices of the keys, int64 `[keys]`, which is slower.

    Returns:
        `[..., keys]`.
    """
    if torch.compiler.is_compiling():  # one graph node: compiled, this integer arithmetic crashes (torch 2.14, CPU)
        factors: Tensor = _factors_operator(seed, probability, dtype, rows, num_keys, keys)
        return factors
    return _factors(seed, probability, dtype, rows, num_keys, keys)


def _factors(
    seed: Tensor, probability: float, dtype: torch.dtype, rows: Tensor, num_keys: int, keys: Tensor | None
) -> Tensor:
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    # A seed on the CPU becomes an argument of the kernel; moving it to a GPU would make the host wait.
    start = _splitmix64_(rows * _INCREMENT + seed).unsqueeze(-1)
    if keys is None:
        words = torch.arange(1, -(-num_keys // _LANES) + 1, device=rows.device)
        numbers = _splitmix64_(start + words * _INCREMENT).view(torch.int16)[..., :num_keys]
    else:
        words = _splitmix64_(start + (keys // _LANES + 1) * _INCREMENT)
        numbers = (words >> keys % _LANES * 16).to(torch.int16)
    dropout_mask = numbers >= dropped - _LEVELS // 2
    return dropout_mask.to(dtype).mul_(_LEVELS / (_LEVELS - dropped))


_factors_operator = torch.library.custom_op("lightning_attn::dropout_factors", _factors, mutates_args=())


@_factors_operator.register_fake
def _(seed: Tensor, probability: float, dtype: torch.dtype, rows: Tensor, num_keys: int, keys: Tensor | None) -> Tensor:
    return rows.new_empty((*rows.shape, num_keys if keys is None else keys.shape[0]), dtype=dtype)


def _signed(number: int) -> int:
    """An unsigned 64-bit integer as torch's signed one of the same bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_STEPS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _splitmix64_(numbers: Tensor) -> Tensor:
    """The output function of SplitMix64, in place."""
    for shift, factor in _STEPS:
        numbers.bitwise_xor_(_logical_right_shift(numbers, shift)).mul_(factor)
    return numbers.bitwise_xor_(_logical_right_shift(numbers, 31))


def _logical_right_shift(numbers: Tensor, bits: int) -> Tensor:
    """Shifts zeros in from the left; torch's `>>` repeats the sign bit."""
    return (numbers >> bits).bitwise_and_((1 << 64 - bits) - 1)
