"""The sizes at which `benchmarks.attention` compares, and their names."""

import dataclasses
import math
import re
from typing import Literal

import torch
from torch import Tensor

HEADS = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of the problem.

    Attributes:
        batch: Number of maps or sentences.
        channels: Features of a place.
        size: Height and width of a map, or the length of a sentence.
        kv_stride: Every which row and column has keys and values.
        bfloat16: Whether the step runs under autocast to bfloat16, not in float32.
    """

    batch: int
    channels: int
    size: tuple[int, ...]
    kv_stride: int = 1
    bfloat16: bool = False

    @classmethod
    def parse(cls, name: str) -> "Shape":
        """The shape of a name: `CxHxW` or `BxCxHxW` of maps or `sentences:BxLxC`, then `sS` for a stride, then `-bf16`.

        Raises:
            ValueError: If the name does not read so.
        """
        match = re.fullmatch(r"(sentences:)?(\d+(?:x\d+)+)(?:s(\d+))?(-bf16)?", name)
        numbers = [int(number) for number in match[2].split("x")] if match else []
        if match is None or len(numbers) not in ((3,) if match[1] else (3, 4)) or 0 in (*numbers, int(match[3] or 1)):
            raise ValueError(
                f"case {name!r} is neither channels x height x width s stride, such as 256x50x84s2 (with a batch size "
                "in front: 8x256x50x84s2), nor sentences:batch x length x channels, such as sentences:64x25x512, each "
                "with -bf16 for autocast to bfloat16, nor growth, deformable, small or large."
            )
        if match[1]:
            batch, length, channels = numbers
            size: tuple[int, ...] = (length,)
        else:
            batch, channels, *size_of_map = (1, *numbers) if len(numbers) == 3 else numbers
            size = tuple(size_of_map)
        return cls(batch, channels, size, int(match[3] or 1), match[4] is not None)

    def __str__(self) -> str:
        if self.ndim == 1:
            text = f"sentences:{self.batch}x{self.size[0]}x{self.channels}"
        else:
            text = "x".join(map(str, (self.channels, *self.size) if self.batch == 1 else self.tensor_size))
        stride = f"s{self.kv_stride}" if self.ndim == 2 or self.kv_stride > 1 else ""
        return text + stride + ("-bf16" if self.bfloat16 else "")

    def describe(self) -> str:
        """In words."""
        if self.ndim == 1:
            text = f"{self.batch} sentences of {self.size[0]}, {self.channels} channels"
        else:
            text = f"{self.channels} channels, {'x'.join(map(str, self.size))}"
            text += f", batch {self.batch}" if self.batch > 1 else ""
        if self.ndim == 2 or self.kv_stride > 1:
            text += f", kv stride {self.kv_stride}"
        return text + (", bfloat16" if self.bfloat16 else "")

    @property
    def ndim(self) -> Literal[1, 2]:
        """2 for maps, 1 for sentences."""
        return 2 if len(self.size) == 2 else 1

    @property
    def num_queries(self) -> int:
        """Of one map or sentence."""
        return math.prod(self.size)

    @property
    def tensor_size(self) -> tuple[int, ...]:
        """`[B, C, H, W]` or `[B, L, C]`."""
        return (self.batch, self.channels, *self.size) if self.ndim == 2 else (self.batch, *self.size, self.channels)

    @property
    def energy_bytes(self) -> int:
        """Size of the energies of all queries and keys in float32, for all heads."""
        keys = math.prod(-(-n // self.kv_stride) for n in self.size)
        return 4 * HEADS * self.batch * self.num_queries * keys

    def scaled(self, factor: float) -> "Shape":
        """The same with so many times the rows and columns."""
        return dataclasses.replace(self, size=tuple(round(factor * n) for n in self.size))

    def smallest(self) -> "Shape":
        """The same channels and stride with two keys along each axis."""
        return dataclasses.replace(self, size=(2 * self.kv_stride,) * self.ndim)

    def tensor(self) -> Tensor:
        """Values of this shape, `[B, C, H, W]` or `[B, L, C]`."""
        return torch.randn(self.tensor_size)


def terms_and_size(name: str) -> tuple[str, str]:
    """The term set of a comparison's name, and its size, if the case has several."""
    terms, _, size = name.partition(" at ")
    return terms, size
