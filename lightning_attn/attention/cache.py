"""What attention keeps between the steps of a sequence that is decoded token by token."""

import torch
from torch import Tensor


class AttentionCache:
    """Projected keys and values of a sequence that is decoded step by step; made by `new_cache`.

    Attributes:
        is_memory: Whether the keys are fixed (encoder-decoder attention) instead of growing with the queries.
        length: Number of queries seen so far.
    """

    def __init__(self, is_memory: bool) -> None:
        self.is_memory = is_memory
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.padding: Tensor | None = None
        self.table: Tensor | None = None
        self.table_lowest = 0

    def append(self, key: Tensor | None, value: Tensor) -> None:
        """Adds projected keys and values `[B, M, n, d]` behind those that are there."""
        if key is not None:
            self.key = key if self.key is None else torch.cat((self.key, key), dim=2)
        self.value = value if self.value is None else torch.cat((self.value, value), dim=2)

    def reorder(self, index: Tensor) -> None:
        """Keeps the batch rows `index` `[B']`, in that order; rows may be left out or doubled (beam search)."""
        for name in ("key", "value", "padding"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index))
