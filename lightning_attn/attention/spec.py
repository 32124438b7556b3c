"""The typed description of an attention: the only thing that configuration files talk about."""

import dataclasses
import math
from typing import Any, Literal, get_args

Mechanism = Literal["transformer", "none"]

TERM_NAMES = ("E1", "E2", "E3", "E4")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What stands in an attention slot of a network (Zhu et al. 2019, Eq. 2 and 8).

    Attributes:
        mechanism: `"transformer"` for the generalized Transformer attention of Eq. 2, `"none"` for no attention at
            all, which is the row "w/o" of the paper's tables.
        terms: Which energies are switched on, as the paper writes it: one bit each for E1 (query and key content),
            E2 (query content and relative position), E3 (key content only) and E4 (relative position only).
            Quote it in YAML, where an unquoted `0010` is the number 8.
        num_heads: Number of attention heads M; must divide the width of the network.
        window: Odd width n_k of the region around a query that its keys come from, along each axis (Table 3), or
            null for all keys.
        kv_stride: Keys and values are taken at every `kv_stride`-th position along each axis; 1 is the paper's.
        scale: Factor on all energies. The paper has none (1.0); `num_heads` heads of width d are often run with
            d ** -0.5 in translation.
        dropout: Probability of dropping an attention weight during training.

    Raises:
        ValueError: If a field has a value that no attention has; the message names the field and the way out.
    """

    mechanism: Mechanism = "transformer"
    terms: str = "1111"
    num_heads: int = 8
    window: int | None = None
    kv_stride: int = 1
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism):
            raise ValueError(f"mechanism must be one of {list(get_args(Mechanism))}, got {self.mechanism!r}.")
        parse_terms(self.terms)
        _require_int("num_heads", self.num_heads)
        if self.window is not None:
            _require_int("window", self.window)
            if self.window % 2 == 0:
                raise ValueError(
                    f"window must be odd, so that it has a middle, got {self.window}: "
                    f"use {self.window - 1} or {self.window + 1}, or null for all keys."
                )
        _require_int("kv_stride", self.kv_stride)
        if not (_is_number(self.scale) and math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive finite number, got {self.scale!r}; the paper's value is 1.0.")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}; 0.0 switches it off.")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for YAML and for checkpoints."""
        return dataclasses.asdict(self)


def parse_terms(terms: str) -> tuple[bool, bool, bool, bool]:
    """Which of E1, E2, E3 and E4 a term string such as `"0110"` switches on.

    Raises:
        ValueError: If `terms` is not four of the characters 0 and 1, is a number, or switches everything off.
    """
    if not isinstance(terms, str):
        raise ValueError(
            f"terms must be a string of four bits such as '0110', got the {type(terms).__name__} {terms!r}. "
            "Quote it: YAML reads an unquoted 0010 as the number 8 and 1111 as an integer."
        )
    if len(terms) != len(TERM_NAMES) or set(terms) - set("01"):
        raise ValueError(
            f"terms must be four bits, one each for {', '.join(TERM_NAMES)}, such as '0110'; got {terms!r}."
        )
    if terms == "0000":
        raise ValueError(
            "terms '0000' leaves no energy to attend with. "
            'For no attention at all ("w/o" in the paper) set mechanism: none.'
        )
    e1, e2, e3, e4 = (bit == "1" for bit in terms)
    return e1, e2, e3, e4


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
