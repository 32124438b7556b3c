"""A segmentation head on a feature pyramid, without dilation: the cheap alternative to CCNet's."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.networks.images.heads.segmentation import SegmentationHead, convolution, upsampled

_LEVELS = ("c5", "c4", "c3", "c2")  # from coarse to fine


class PyramidHead(SegmentationHead):
    """Maps conv2 to conv5 to logits of stride 4: the semantic branch of panoptic feature pyramid networks.

    A top-down path adds conv4, conv3 and conv2, each behind a 1x1 convolution, to the resized map above. Every level is
    then brought to stride 4 by a 3x3 convolution and resizing for each factor of 2, and the sum of all is classified
    (Kirillov et al. 2019, figure 3). Here the attention is on the coarsest map, levels have no further 3x3 convolution
    of their own, and the norm is that of the spec.

    Attributes:
        laterals: 1x1 convolutions of conv4, conv3 and conv2, by name.
        branches: For each level, the 3x3 convolutions before its resizings, by name.
    """

    @override
    def build_layers(self, channels: Mapping[str, int]) -> None:
        width, names = self.spec.head_channels, tuple(reversed(_LEVELS))
        self.laterals = nn.ModuleDict({name: nn.Conv2d(channels[name], width, 1) for name in _LEVELS[1:]})
        counts = {name: max(1, doublings) for doublings, name in enumerate(names)}
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(*(convolution(width, self.spec) for _ in range(count)))
                for name, count in counts.items()
            }
        )

    @override
    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        level = self.context(maps["c5"])
        parts = [self._at_stride_4("c5", level, maps)]
        for name in _LEVELS[1:]:
            own: Tensor = self.laterals[name](maps[name])
            level = own + _resized(level, own)
            parts.append(self._at_stride_4(name, level, maps))
        logits: Tensor = self.classifier(self.dropout(torch.stack(parts).sum(0)))
        return logits

    @override
    def modules_to_compile(self) -> list[nn.Module]:
        """The convolutions with their norms; a graph of all levels would be compiled anew for many sizes."""
        steps = [step for branch in self.branches.values() for step in branch.children()]
        return [self.reduce, *steps, *([] if self.auxiliary is None else [self.auxiliary])]

    def _at_stride_4(self, name: str, level: Tensor, maps: Mapping[str, Tensor]) -> Tensor:
        """A level behind its convolutions, each of which is followed by resizing to the next finer level."""
        finer = _LEVELS[_LEVELS.index(name) + 1 :] or ("",)
        for step, target in zip(self.branches.get_submodule(name).children(), finer, strict=True):
            level = step(level)
            if target:
                level = _resized(level, maps[target])
        return level


def _resized(level: Tensor, like: Tensor) -> Tensor:
    """A map in the height and width of another."""
    return upsampled(level, like.shape[-2:]).to(level.dtype)
