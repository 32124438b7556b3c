"""Dropout whose random numbers do not hold up a CPU."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws one random byte per element on the CPU.

    torch draws one double per element there, on a single thread, which took a fifth of a training step of a small
    Transformer on two cores (docs/translation.md). A byte makes the probability a multiple of 1/256: 0.1 becomes
    26/256. What is kept is scaled by the probability that was really used, so the expectation is exact.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zeroes elements in training, scales the others; the identity in evaluation."""
        if not self.training:
            return input
        dropped = round(self.p * 256)
        if input.device.type != "cpu" or dropped in (0, 256):
            return super().forward(input)
        count = input.numel()
        words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        # 1 where kept. Clamping bytes and converting them is several times as fast as comparing them or using bools.
        kept = words.view(torch.uint8)[:count].clamp_(dropped - 1, dropped).sub_(dropped - 1).view(input.shape)
        return input * kept.to(input.dtype).mul_(256 / (256 - dropped))
