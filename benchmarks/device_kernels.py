"""Which of torch's fused kernels is the fastest for augmented queries and keys, whose values are narrower.

`augmented_sdpa` pads the values to the width of the queries, as the flash kernel needs; cuDNN's and the
memory-efficient one take values of another width. Each kernel is forced in turn, with and without the padding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_shape import HEADS, Shape
from benchmarks.case import Case, Run
from benchmarks.checks import Check
from benchmarks.device_attention import MAPS, SENTENCES, Problem, measured, table, time_sides
from benchmarks.results import Comparison
from lightning_attn.attention.algorithms.augmented_sdpa import position_basis

BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Kernel(nn.Module):
    """One fused kernel between given queries and keys; the input are the values, `[B, M, N, d]`.

    Args:
        shape: Sizes.
        width: Of queries and keys.
        backend: Name in `BACKENDS`.
        padded: Whether the values are padded to this width.
    """

    def __init__(self, shape: Shape, width: int, backend: str, *, padded: bool) -> None:
        super().__init__()
        sizes = (shape.batch, HEADS, shape.num_queries, width)
        self.query, self.key = (nn.Parameter(torch.randn(sizes) / width**0.5) for _ in range(2))
        self.backend, self.padding = BACKENDS[backend], width - shape.channels // HEADS if padded else 0
        self.dtype = torch.bfloat16 if shape.bfloat16 else torch.float32

    def forward(self, value: Tensor) -> Tensor:
        """The weighted sums of the values."""
        width = value.shape[-1]
        query, key, value = (tensor.to(self.dtype) for tensor in (self.query, self.key, value))
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(query, key, F.pad(value, (0, self.padding)), scale=1.0)[..., :width]


def augmented_width(shape: Shape) -> int:
    """The width of the queries and keys of `augmented_sdpa` for 1111."""
    features = shape.channels // len(shape.size)
    ranks = [
        position_basis(count, shape.kv_stride, features, torch.bfloat16, torch.device("cpu")).shape[1]
        for count in shape.size
    ]
    width = shape.channels // HEADS + sum(ranks)
    return width + -width % 8


def kernel_checks(case: Case, run: Run) -> Iterator[Check]:
    """Every kernel at the sizes of the attention section."""
    for name in case.problem.shapes:
        shape = Shape.parse(name)
        head, width = shape.channels // HEADS, augmented_width(shape)
        for label, wide in ((f"{name}, width {head}", head), (f"{name}, width {width} with values of {head}", width)):
            yield Check(label, partial(_measure, case.problem, shape, wide, run), seconds=4.0)


def _measure(problem: "KernelProblem", shape: Shape, width: int, run: Run, found: Comparison) -> None:
    paddings = (False,) if width == shape.channels // HEADS else (False, True)
    builds: dict[str, Callable[[], nn.Module]] = {
        f"{backend}{', padded' if padded else ''}": partial(Kernel, shape, width, backend, padded=padded)
        for backend in BACKENDS
        for padded in paddings
    }
    torch.manual_seed(1)
    value = torch.randn(shape.batch, HEADS, shape.num_queries, shape.channels // HEADS)
    time_sides(found, builds, value, "float32", rounds=problem.rounds, run=run)


@dataclasses.dataclass(frozen=True)
class KernelProblem(Problem):
    """Fused kernels.

    Attributes:
        shapes: Names of `Shape`s, with a stride of 1.
    """

    shapes: tuple[str, ...] = (f"{MAPS[0]}-bf16", f"{MAPS[2]}-bf16", f"{SENTENCES[1]}-bf16")


_PROBLEM = KernelProblem(f"{MAPS[0]}-bf16", sets=())

CASES = (
    Case(
        "device_check.attention.kernels",
        "torch's fused kernels with augmented queries and keys",
        measured(kernel_checks),
        _PROBLEM,
        table=table,
        quick={"problem": dataclasses.replace(_PROBLEM, shapes=("1x64x5x6s1-bf16",), rounds=3)},
    ),
)
