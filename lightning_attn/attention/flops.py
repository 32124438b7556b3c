"""The FLOPs of an attention as the paper counts them: multiply-adds by arithmetic, without running anything.

The paper gives GFLOPs (Tables 2 and 3, Fig. 3) without the counting rules. These rules are the ones that its figures
imply: added to the "w/o" row of the table, they give every difference to "w/o" of COCO and Cityscapes within 1 %, and
nearly all of them within the rounding of the tables. Our algorithms need far fewer operations for most term sets;
`lightning_attn.study.profile` measures these.

The rules:

- One multiply-add is one FLOP. Softmax, encoding, biases, gates and residuals are free.
- The projections of query and key exist only if a term needs them, those of value and output always. The paper's
  networks do not subsample the keys (`kv_stride` 1).
- The position projection V^R applies to each distinct offset once, and costs C^2 for each.
- E2 in two dimensions is computed along x and along y and added, N_q (H + W) C. With E1 it is free: with the query
  factored out, z^T U^T (V^C x + V^R R), both terms share E1's product.
- A window is counted in full at the borders too, even where it is larger than the map.
- A deformable convolution that replaces a regular one (images) costs nothing more: the branch that predicts the
  offsets is not counted. The deformable unit that is added in translation counts as a convolution of three taps.
"""

import dataclasses
import math
from collections.abc import Sequence

from lightning_attn.attention.factory import CONVOLUTION_SIZE
from lightning_attn.attention.spec import AttentionSpec, parse_terms


@dataclasses.dataclass(frozen=True)
class PaperCount:
    """Multiply-adds of one attention module for one input, part by part (Table 1 and Eq. 2 to 7).

    Attributes:
        query_projection: U z_q, for E1 and E2.
        key_projection: V^C x_k, for E1 and E3.
        value_projection: W' x_k.
        position_projection: V^R R, for E2 and E4.
        e1: Query content with key content.
        e2: Query content with relative position.
        e3: Key content with u.
        e4: Relative position with v.
        weighted_sum: Sum of the values, weighted by the attention.
        gated_linear_unit: The linear map to 2 C before a dynamic convolution.
        kernel_prediction: The softmax kernel of a dynamic convolution from its query (Eq. 7).
        kernel_sum: Sum of the neighbours, weighted by that kernel (Eq. 6).
        output_projection: W of Eq. 2; the point-wise convolution W_c of Eq. 5.
        deformable_unit: The deformable unit of translation.
    """

    query_projection: int = 0
    key_projection: int = 0
    value_projection: int = 0
    position_projection: int = 0
    e1: int = 0
    e2: int = 0
    e3: int = 0
    e4: int = 0
    weighted_sum: int = 0
    gated_linear_unit: int = 0
    kernel_prediction: int = 0
    kernel_sum: int = 0
    output_projection: int = 0
    deformable_unit: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


def paper_count(
    spec: AttentionSpec, dim: int, size: Sequence[int], key_size: Sequence[int] | None = None
) -> PaperCount:
    """Multiply-adds of one attention layer for one input, as the paper counts them (Tables 1 to 3).

    Causal attention costs the same as any other.

    Args:
        spec: The attention.
        dim: Number of channels C.
        size: Extent of the queries: `(L,)` for a sequence, `(H, W)` for a map.
        key_size: Extent of another set of keys, for encoder-decoder attention, before subsampling by `kv_stride`;
            None for self-attention.

    Raises:
        ValueError: If a size is not that of a sequence or map, or the mechanism does not exist for a second set.
    """
    _check_size("size", size)
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}: it is the number of channels.")
    if key_size is not None:
        _check_size("key_size", key_size)
        if len(key_size) != len(size):
            raise ValueError(
                f"key_size={tuple(key_size)} must have as many axes as size={tuple(size)}; None takes the queries."
            )
        if spec.mechanism == "dynamic" or spec.convolution != "regular":
            raise ValueError(
                f"key_size={tuple(key_size)}: mechanism={spec.mechanism!r} with convolution={spec.convolution!r} is "
                "for self-attention only (Fig. 2); leave key_size out, or use a regular convolution with mechanism: "
                "transformer."
            )
    if spec.is_custom:
        raise ValueError(f"mechanism={spec.mechanism!r} is not one of the paper's, so there is no formula for it.")
    deformable_unit = 0
    if spec.convolution != "regular" and len(size) == 1:
        deformable_unit = math.prod(size) * CONVOLUTION_SIZE * dim**2
    if spec.mechanism == "none":
        return PaperCount(deformable_unit=deformable_unit)
    count = (
        _dynamic(spec, dim, size) if spec.mechanism == "dynamic" else _transformer(spec, dim, size, key_size or size)
    )
    return dataclasses.replace(count, deformable_unit=deformable_unit)


def _transformer(spec: AttentionSpec, dim: int, size: Sequence[int], key_size: Sequence[int]) -> PaperCount:
    e1, e2, e3, e4 = parse_terms(spec.terms)
    strided = [math.ceil(extent / spec.kv_stride) for extent in key_size]
    queries, keys = math.prod(size), math.prod(strided)
    if spec.window is None:
        region = strided  # keys that a query sees, along each axis
        # k - q for k = 0, s, 2 s, ...: one range of integers, or one for each key if the stride leaves gaps.
        offsets = sum(min(q + (k - 1) * spec.kv_stride, q * k) for q, k in zip(size, strided, strict=True))
    else:
        window = spec.window if isinstance(spec.window, tuple) else (spec.window,) * len(size)
        if len(window) != len(size):
            raise ValueError(f"window={spec.window} is for maps, but size={tuple(size)} is that of a sequence.")
        region = [math.ceil(width / spec.kv_stride) for width in window]
        offsets = sum(window)
    pairs = queries * math.prod(region)
    # Without a query in the energies and without a window all queries share one weighted sum.
    sums = keys if spec.terms == "0010" and spec.window is None else pairs
    return PaperCount(
        query_projection=queries * dim**2 if e1 or e2 else 0,
        key_projection=keys * dim**2 if e1 or e3 else 0,
        value_projection=keys * dim**2,
        position_projection=offsets * dim**2 if e2 or e4 else 0,
        e1=pairs * dim if e1 else 0,
        e2=queries * sum(region) * dim if e2 and not e1 else 0,
        e3=keys * dim if e3 else 0,
        e4=offsets * dim if e4 else 0,
        weighted_sum=sums * dim,
        output_projection=queries * dim**2,
    )


def _dynamic(spec: AttentionSpec, dim: int, size: Sequence[int]) -> PaperCount:
    positions, taps = math.prod(size), spec.kernel_size ** len(size)
    return PaperCount(
        gated_linear_unit=positions * 2 * dim**2,
        kernel_prediction=positions * dim * spec.groups * taps,
        kernel_sum=positions * dim * taps,
        output_projection=positions * dim**2,
    )


def _check_size(name: str, size: Sequence[int]) -> None:
    if len(size) not in (1, 2) or min(size) < 1:
        raise ValueError(f"{name} must be (L,) for a sequence or (H, W) for a map, all at least 1, got {tuple(size)}.")


@dataclasses.dataclass(frozen=True)
class AttentionSlots:
    """Attention layers of equal size in a network of the paper.

    Attributes:
        count: Their number.
        dim: Their width C.
        size: Extent of the queries; the keys of encoder-decoder attention have the same.
        cross: Whether they are encoder-decoder attention.
    """

    count: int
    dim: int
    size: tuple[int, ...]
    cross: bool = False


@dataclasses.dataclass(frozen=True)
class PaperNetwork:
    """The attention layers of a network of the paper (section 4.1 and Fig. 2), and the cost of the rest.

    Attributes:
        slots: Its attention layers.
        rest_gflops: 10^9 multiply-adds of everything except attention.
    """

    slots: tuple[AttentionSlots, ...]
    rest_gflops: float

    def gflops(self, self_attention: AttentionSpec, cross_attention: AttentionSpec | None = None) -> float:
        """10^9 multiply-adds of the network for one input, as in Tables 2 and 3 and Fig. 3.

        Args:
            self_attention: The self-attention layers.
            cross_attention: The encoder-decoder attention layers; only for a network that has them.

        Raises:
            ValueError: If `cross_attention` is missing, or the network has no encoder-decoder attention.
        """
        has_cross = any(slots.cross for slots in self.slots)
        if has_cross and cross_attention is None:
            raise ValueError("cross_attention is missing: this network has encoder-decoder attention; give its spec.")
        if cross_attention is not None and not has_cross:
            raise ValueError("cross_attention must be None: this network has no encoder-decoder attention.")
        total = 0
        for slots in self.slots:
            if slots.cross:
                assert cross_attention is not None, "checked above"
                total += slots.count * paper_count(cross_attention, slots.dim, slots.size, slots.size).total
            else:
                total += slots.count * paper_count(self_attention, slots.dim, slots.size).total
        return self.rest_gflops + total / 1e9


DETECTION_NETWORK = PaperNetwork(
    slots=(AttentionSlots(6, 256, (50, 84)), AttentionSlots(3, 512, (25, 42))), rest_gflops=213.7
)
"""Faster R-CNN with ResNet-50 and FPN on COCO, 800 x 1344 pixels: conv4 and conv5. The rest is the paper's "w/o"."""

SEGMENTATION_NETWORK = PaperNetwork(
    slots=(AttentionSlots(6, 256, (96, 96)), AttentionSlots(3, 512, (96, 96)), AttentionSlots(1, 512, (96, 96))),
    rest_gflops=449.5,
)
"""ResNet-50 on Cityscapes, 768 x 768 pixels at stride 8: conv4, conv5 and the head. The rest is the paper's "w/o"."""

_LENGTH, _WIDTH = 50, 512

TRANSLATION_NETWORK = PaperNetwork(
    slots=(AttentionSlots(12, _WIDTH, (_LENGTH,)), AttentionSlots(6, _WIDTH, (_LENGTH,), cross=True)),
    rest_gflops=12 * 2 * _LENGTH * _WIDTH * 4 * _WIDTH / 1e9,
)
"""Transformer base, 50 source and 50 target tokens, without embedding and softmax. The rest is the feed-forward layers.

The paper gives translation to one decimal only (Tables 2 and 3). The count is within 0.02 of the points of Fig. 3 and,
beyond the rounding, of the tables. This takes the points 0110 and 0010 + deformable of Fig. 3c as swapped, in agreement
with Table 2.
"""
