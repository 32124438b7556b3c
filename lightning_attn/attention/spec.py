"""`AttentionSpec`, the typed and validated description of an attention in configuration files."""

import dataclasses
import math
import re
from typing import Any, Literal, get_args

from lightning_attn.errors import InputError
from lightning_attn.validation import (
    is_number,
    refuse_unused,
    require_dropout,
    require_int,
    require_odd,
    require_window,
)

MECHANISMS = ("transformer", "dynamic", "none")
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
Convolution = Literal["regular", "deformable", "modulated_deformable"]
AlgorithmName = Literal["auto", "pooled", "separable", "dense", "sdpa", "augmented_sdpa", "tiled", "reference"]

TERM_NAMES = ("E1", "E2", "E3", "E4")

TERM_SETS = tuple(f"{bits:04b}" for bits in range(1, 2 ** len(TERM_NAMES)))
"""Every set of terms that can be switched on, from `"0001"` to `"1111"`."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The attention of a network's block (Zhu et al. 2019, Eq. 2 to 8 and Fig. 2).

    A field that the mechanism does not use must be left at its default, except `num_heads`, `scale` and `dropout`. A
    class of your own gets `num_heads` and `options`; the other fields may have any value.

    Attributes:
        mechanism: `"transformer"` for the generalized Transformer attention of Eq. 2, `"dynamic"` for the dynamic
            convolution of Eq. 5 to 7 instead (Table 3), `"none"` for no attention, the row "w/o" of the paper's
            tables; or the import path of a custom class, such as `"my_module.MyAttention"`; see `build_attention`.
        terms: Which energies are switched on, as the paper writes it: one bit each for E1 (query and key content),
            E2 (query content and relative position), E3 (key content only) and E4 (relative position only).
            Quote it in YAML, where an unquoted `0010` is the number 8. Transformer attention only.
        num_heads: Number of attention heads M; must divide the width of the network. Transformer attention only.
        convolution: The convolution before the attention (Fig. 2). In a residual block of an image network it is the
            kind of the 3x3 convolution: `"regular"` (Eq. 3), `"deformable"` (Eq. 4) or `"modulated_deformable"`,
            whose taps also have learned weights. In translation `"regular"` adds nothing, and the other two add a
            deformable unit of kernel 3 before the attention. Self-attention only.
        window: Odd width n_k of the region around a query that its keys come from, along each axis (Table 3), or
            null for all keys. For maps also two widths `[n_y, n_x]`. Transformer attention only.
        kv_stride: Keys and values are taken at every `kv_stride`-th position along each axis; 1 is the paper's.
            Transformer attention only.
        scale: Factor on all energies. The paper has none (1.0); `num_heads` heads of width d are often run with
            d ** -0.5 in translation. Transformer attention only.
        dropout: Probability of dropping an attention weight, or a weight of a dynamic convolution's kernel, during
            training.
        groups: Number of groups N_g of channels that share a kernel (Eq. 7); must divide the width of the network.
            16 is the paper's. Dynamic convolution only.
        kernel_size: Odd width n_k of the kernel along each axis (Table 3). Dynamic convolution only.
        algorithm: The algorithm, which does not change the results: `"auto"` selects the fastest that is suitable,
            `"reference"` is the slow, literal form of the equations, and `lightning_attn.attention.algorithms`
            describes the others. Transformer attention only.
        options: Further arguments of a custom class, as plain values.

    Raises:
        ValueError: If a field has an invalid value; the message names the field and the fix.
    """

    mechanism: str = "transformer"
    terms: str = "1111"
    num_heads: int = 8
    convolution: Convolution = "regular"
    window: int | tuple[int, int] | None = None
    kv_stride: int = 1
    scale: float = 1.0
    dropout: float = 0.0
    groups: int = 16
    kernel_size: int = 3
    algorithm: AlgorithmName = "auto"
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS and not self.is_custom:
            raise InputError(
                f"mechanism must be one of {list(MECHANISMS)}, or the import path of a class such as "
                f"'my_module.MyAttention', got {self.mechanism!r}."
            )
        if self.options and not self.is_custom:
            raise InputError(
                f"options={self.options} are for a custom mechanism; for mechanism={self.mechanism!r} use the other "
                "fields."
            )
        parse_terms(self.terms)
        require_int("num_heads", self.num_heads)
        if self.convolution not in get_args(Convolution):
            raise InputError(f"convolution must be one of {list(get_args(Convolution))}, got {self.convolution!r}.")
        if self.window is not None:
            require_window(self.window)
            if not isinstance(self.window, int):  # a list from YAML or JSON
                object.__setattr__(self, "window", tuple(self.window))
            if self.mechanism == "dynamic":
                raise InputError(
                    f"window={self.window} is for mechanism: transformer. "
                    "The range of a dynamic convolution is its kernel_size: set that, and window: null."
                )
        require_int("kv_stride", self.kv_stride)
        if not (is_number(self.scale) and math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"scale must be a positive finite number, got {self.scale!r}; the paper's value is 1.0.")
        require_dropout(self.dropout)
        require_int("groups", self.groups)
        require_odd("kernel_size", self.kernel_size)
        if not self.is_custom:
            used_by = {"transformer": ("terms", "window", "kv_stride"), "dynamic": ("groups", "kernel_size")}
            refuse_unused(self, "mechanism", used_by)
        if self.algorithm not in get_args(AlgorithmName):
            raise InputError(f"algorithm must be one of {list(get_args(AlgorithmName))}, got {self.algorithm!r}.")
        if self.mechanism == "dynamic" and self.algorithm != "auto":
            raise InputError(
                f"algorithm={self.algorithm!r} is for mechanism: transformer. A dynamic convolution of a spec always "
                "uses its fastest algorithm: set algorithm: auto."
            )

    @property
    def is_custom(self) -> bool:
        """Whether `mechanism` is the import path of a class."""
        return isinstance(self.mechanism, str) and _CLASS_PATH.fullmatch(self.mechanism) is not None

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for YAML and checkpoints."""
        fields = dataclasses.asdict(self)
        return fields | {"window": list(self.window) if isinstance(self.window, tuple) else self.window}


def parse_terms(terms: str) -> tuple[bool, bool, bool, bool]:
    """Which of E1, E2, E3 and E4 a term string such as `"0110"` switches on.

    Raises:
        ValueError: If `terms` is not four of the characters 0 and 1, is a number, or switches everything off.
    """
    if not isinstance(terms, str):
        raise InputError(
            f"terms must be a string of four bits such as '0110', got the {type(terms).__name__} {terms!r}. "
            "Quote it: YAML reads an unquoted 0010 as the number 8 and 1111 as an integer."
        )
    if len(terms) != len(TERM_NAMES) or set(terms) - set("01"):
        raise InputError(
            f"terms must be four bits, one each for {', '.join(TERM_NAMES)}, such as '0110'; got {terms!r}."
        )
    if terms == "0000":
        raise InputError(
            "terms '0000' switches every energy off. "
            'For no attention at all ("w/o" in the paper) set mechanism: none.'
        )
    e1, e2, e3, e4 = (bit == "1" for bit in terms)
    return e1, e2, e3, e4
