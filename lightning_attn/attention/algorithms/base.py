"""The interface of attention algorithms, and the problem and inputs that they are given."""

import abc
import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_attn.attention.energies import Energies
from lightning_attn.attention.layout import Layout

if TYPE_CHECKING:
    from lightning_attn.attention.transformer import TransformerAttention


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """The facts that decide which algorithm computes an attention; no tensors.

    Attributes:
        terms: The terms that are on, such as `"0110"`.
        ndim: 1 for sentences, 2 for maps.
        layout: The grids, and which keys a query may see by its position.
        pairs: Heads times samples.
        device: Kind of device, such as `"cpu"`.
        dtype: Of the projections, which is autocast's if that is on.
        padded: Whether keys of some samples are padding.
        masked: Whether an `attention_mask` is given.
        dropout: Probability of dropping a weight in this pass.
        transformed: Whether a forward-mode derivative or a transform of `torch.func` is active, for which our custom
            operators have no rule.
        exported: Whether a program is being exported, which must run without this package. Sentence lengths are
            symbolic then.
        plain_projections: Whether no projection is replaced or hooked; see `projections.is_plain`.
    """

    terms: str
    ndim: int
    layout: Layout
    pairs: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    padded: bool = False
    masked: bool = False
    dropout: float = 0.0
    transformed: bool = False
    exported: bool = False
    plain_projections: bool = True

    @property
    def uses(self) -> tuple[bool, bool, bool, bool]:
        """Which of E1, E2, E3 and E4 are on."""
        e1, e2, e3, e4 = (bit == "1" for bit in self.terms)
        return e1, e2, e3, e4

    @property
    def num_weights(self) -> int:
        """Number of attention weights of all heads and samples."""
        return self.pairs * self.layout.num_queries * self.layout.num_keys

    @property
    def same_keys_for_all(self) -> bool:
        """Whether every query of a sample sees the same keys."""
        return not (self.layout.masked or self.masked)


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """The inputs of an algorithm. Projections are computed on request; each algorithm requests them once.

    Attributes:
        attention: The module, for its projections and settings.
        query: As passed to the module, `[B, L, C]` or `[B, C, H, W]`.
        key: Contents of the keys in the same layout, before `kv_stride`; zero where padded.
        value: The input of the value projection, as `key`.
        layout: The grids, and which keys a query may see by its position.
        key_padding_mask: True where a key is padding, `[B, L_k]` or `[B, H_k, W_k]`.
        attention_mask: True where a key is hidden from a query, `[B or 1, M or 1, N_q, keys before kv_stride]`.
        dropout: Probability of dropping a weight.
    """

    attention: "TransformerAttention"
    query: Tensor
    key: Tensor
    value: Tensor
    layout: Layout
    key_padding_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    dropout: float = 0.0

    def energies(self, terms: str | None = None) -> Energies:
        """The parts of the energies of `terms`, a subset of the terms that are on; None for all of these."""
        return self.attention.project_energies(
            _flat(self.query), _flat(self._strided(self.key)), self.layout, terms or self.attention.terms
        )

    def projected_value(self) -> Tensor:
        """W' x_k, `[B, M, N_k, d]`."""
        return self.attention.project_value(_flat(self._strided(self.value)))

    def pooled_value(self, weights: Tensor) -> Tensor:
        """The sums of W' x_k over the keys with weights `[B, M, N_k]`, `[B, M, 1, d]`."""
        return self.attention.pool_value(_flat(self._strided(self.value)), weights)

    def padding(self) -> Tensor | None:
        """True where a key is padding, `[B, N_k]`."""
        if self.key_padding_mask is None:
            return None
        mask, stride = self.key_padding_mask, self.layout.stride
        return mask[:, ::stride] if mask.dim() == 2 else mask[:, ::stride, ::stride].flatten(1)

    def hidden_pairs(self, start: int = 0, stop: int | None = None) -> Tensor | None:
        """`attention_mask` at the keys that `kv_stride` selects and the queries `start:stop`."""
        if self.attention_mask is None:
            return None
        mask = self.attention_mask[:, :, start:stop]
        if self.layout.stride == 1:
            return mask
        stride = self.layout.stride
        if self.key.dim() == 3:
            return mask[..., ::stride]
        return torch.unflatten(mask, 3, self.key.shape[2:])[..., ::stride, ::stride].flatten(3)

    def hidden(self, start: int, stop: int) -> Tensor | None:
        """True where a key is hidden from the queries `start:stop` for any reason, `[B or 1, M or 1, queries, N_k]`.

        None if nothing is hidden.
        """
        hidden, padding, pairs = None, self.padding(), self.hidden_pairs(start, stop)
        if self.layout.masked:
            hidden = self.layout.hidden_from(torch.arange(start, stop, device=self.query.device))[None, None]
        for mask in (None if padding is None else padding[:, None, None], pairs):
            if mask is not None:
                hidden = mask if hidden is None else hidden | mask
        return hidden

    def _strided(self, x: Tensor) -> Tensor:
        stride = self.layout.stride
        if stride == 1:
            return x
        return x[:, ::stride] if x.dim() == 3 else x[..., ::stride, ::stride]


def _flat(x: Tensor) -> Tensor:
    """`[B, N, C]` of sentences, `[B, C, N]` of maps."""
    return x if x.dim() == 3 else x.flatten(2)


class Algorithm(abc.ABC):
    """An exact algorithm for Eq. 2 and 8.

    Attributes:
        name: The name for `TransformerAttention(algorithm=...)`.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        """Why it cannot compute this attention, as the end of an error message; None if it can."""

    @abc.abstractmethod
    def is_suitable(self, problem: AttentionProblem) -> bool:
        """Whether it is a good choice for an attention that it can compute: fast there, and within memory."""

    @abc.abstractmethod
    def compute(self, inputs: AttentionInputs) -> Tensor:
        """The weighted sums of values of Eq. 2.

        Returns:
            `[B, M, N_q, d]`, or `[B, M, 1, d]` if they are the same for every query; zeros for a query that sees no
            key. In the dtype of the projected values.
        """
