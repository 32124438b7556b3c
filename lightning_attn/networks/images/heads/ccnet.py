"""CCNet's segmentation head with another attention (Zhu et al. 2019, section 4.1)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_attn.networks.images.heads.segmentation import SegmentationHead, convolution


class CCNetHead(SegmentationHead):
    """Maps conv5 to logits: 3x3, attention, 3x3, concatenation with the input, 3x3, dropout, 1x1.

    The attention replaces CCNet's criss-cross attention. Norm and ReLU follow each 3x3 convolution. (In CCNet's code it
    is a leaky ReLU of slope 0.01, the default of its fused normalisation.)

    Attributes:
        refine: The convolution after the attention.
        fuse: The convolution of the concatenated input and `refine`'s output.
    """

    @override
    def build_layers(self, channels: Mapping[str, int]) -> None:
        width = self.spec.head_channels
        self.refine = convolution(width, self.spec)
        self.fuse = convolution(channels["c5"] + width, self.spec)

    @override
    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        conv5 = maps["c5"]
        context = self.refine(self.context(conv5))
        logits: Tensor = self.classifier(self.dropout(self.fuse(torch.cat((conv5, context), 1))))
        return logits
