"""ResNet backbones from torchvision's blocks, with attention in the blocks (Zhu et al. 2019, section 3, Fig. 2a)."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d
from typing_extensions import override

from lightning_attn.attention import AttentionSpec, DeformableConv, build_attention
from lightning_attn.attention.transforms import is_transformed
from lightning_attn.errors import InputError
from lightning_attn.networks.compilation import outside_graph
from lightning_attn.networks.images.batching import NormalizedBatch
from lightning_attn.networks.recomputation import RecomputableLayer
from lightning_attn.networks.weights.torchvision import (
    load_weights,
    names_added_by_attention,
    read_weights,
    weight_names,
)
from lightning_attn.validation import require_int

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "bottleneck14", "bottleneck26"]
Norm = Literal["frozen", "batch", "sync", "group"]

STAGES = ("conv2", "conv3", "conv4", "conv5")
"""The paper's names of torchvision's `layer1` to `layer4`."""

_PUBLISHED_WIDTH = 64
_GROUPS = 32  # of group normalisation

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """Which ResNet is the backbone, where its weights come from, and which of its blocks have attention.

    The defaults train from scratch. For fine-tuning as in detection with ImageNet weights, set
    `weights: IMAGENET1K_V1`, `norm: frozen`, `trainable_layers: 3`.

    Attributes:
        name: `"resnet18"` and `"resnet34"` of two 3x3 convolutions a block, `"resnet50"` and `"resnet101"` of
            bottlenecks; `"bottleneck14"` and `"bottleneck26"` have one and two bottlenecks in each stage (8.0 M and
            13.9 M parameters at width 64) and are meant for CPUs.
        width: Channels of the first convolution, and of the 3x3 convolutions in conv2; every stage doubles it. 64 is
            the published width.
        weights: `"none"`, a name of torchvision's weights such as `"IMAGENET1K_V1"`, or the path of a file.
        norm: `"frozen"` for batch normalisation whose statistics and factors never change, `"batch"`, `"sync"` for
            statistics over all GPUs, or `"group"` for group normalisation.
        trainable_layers: How many of conv5, conv4, conv3, conv2 and the first convolution are trained, in that order;
            as in torchvision, the first normalisation is trained with 5 only. Layers added by attention are always
            trained. Batch normalisation of frozen layers keeps its statistics.
        attended_blocks: Where attention is inserted: whole stages such as `"conv4"`, or blocks such as `"conv4_6"`,
            the sixth of conv4. The paper's are conv4 and conv5.
        deformable_blocks: Where the 3x3 convolution is the spec's `convolution`, if that is not regular; null for the
            `attended_blocks`. The models published with the paper have `["conv3", "conv4", "conv5"]`.

    Raises:
        ValueError: If a field has an invalid value, or does not fit the others; the message names the field and the
            fix.
    """

    name: Architecture = "resnet50"
    width: int = _PUBLISHED_WIDTH
    weights: str = "none"
    norm: Norm = "batch"
    trainable_layers: int = 5
    attended_blocks: tuple[str, ...] = ("conv4", "conv5")
    deformable_blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(Architecture):
            raise InputError(f"name must be one of {list(get_args(Architecture))}, got {self.name!r}.")
        require_int("width", self.width, 8)
        if self.norm not in get_args(Norm):
            raise InputError(f"norm must be one of {list(get_args(Norm))}, got {self.norm!r}.")
        if not isinstance(self.weights, str) or not self.weights:
            raise InputError(
                f"weights must be 'none', a name of torchvision's weights or a path, got {self.weights!r}."
            )
        if self.weights in weight_names(self.name):
            if self.width != _PUBLISHED_WIDTH:
                raise InputError(
                    f"weights={self.weights!r} were trained at width {_PUBLISHED_WIDTH}, got width={self.width}. "
                    f"Set width: {_PUBLISHED_WIDTH} or weights: none."
                )
            if self.norm == "group":
                raise InputError(
                    f"weights={self.weights!r} were trained with batch normalisation, got norm='group'. "
                    "Set norm: frozen, batch or sync, or weights: none."
                )
        require_int("trainable_layers", self.trainable_layers, 0)
        if self.trainable_layers > len(STAGES) + 1:
            raise InputError(f"trainable_layers must be at most {len(STAGES) + 1}, got {self.trainable_layers}.")
        self.block_indices("attended_blocks")
        self.block_indices("deformable_blocks")

    def block_indices(self, field: Literal["attended_blocks", "deformable_blocks"]) -> set[tuple[int, int]]:
        """The blocks that a field names, as (stage, block), both counted from 0.

        Raises:
            ValueError: If a name is neither a stage nor a block.
        """
        blocks = getattr(self, field)
        if blocks is None:
            return self.block_indices("attended_blocks")
        if isinstance(blocks, str):
            raise InputError(f"{field} must be a list such as [conv4, conv5], got the string {blocks!r}.")
        indices = set()
        for name in blocks:
            stage, _, block = str(name).partition("_")
            count = _LAYOUTS[self.name][1][STAGES.index(stage)] if stage in STAGES else 0
            chosen = range(count)
            if "_" in str(name):
                chosen = (
                    range(int(block) - 1, int(block)) if block.isdecimal() and 0 < int(block) <= count else range(0)
                )
            if not chosen:
                stages = ", ".join(
                    f"{stage} ({stage}_1 to {stage}_{count})" if count > 1 else f"{stage} ({stage}_1)"
                    for stage, count in zip(STAGES, _LAYOUTS[self.name][1], strict=True)
                )
                raise InputError(f"{field} has {name!r}, which {self.name} has not. Its stages and blocks: {stages}.")
            indices |= {(STAGES.index(stage), index) for index in chosen}
        return indices


class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision publishes no types
    """torchvision's `FrozenBatchNorm2d`, bitwise identical, but in place.

    No backward pass needs the output of the convolution before it, and not allocating memory for another map saved a
    tenth of a training step of ResNet-50 on two cores.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scales and shifts the map `[B, C, H, W]` in place."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x.mul_(scale.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))


class _AttendedBlock(RecomputableLayer):
    """What the residual blocks with attention have in common.

    Attributes:
        convolution_name: Name of the convolution before the attention.
        attention: Maps `[B, C, H, W]` to the same shape; None for none.
    """

    convolution_name: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention: nn.Module | None = None

    @property
    @override
    def has_attention(self) -> bool:
        return self.attention is not None or isinstance(getattr(self, self.convolution_name), DeformableConv)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C_in, H, W]` to `[B, C_out, H', W']`."""
        return self.run(self._compute, x)

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _convolve(self, x: Tensor) -> Tensor:
        """The convolution before the attention."""
        convolution: nn.Module = getattr(self, self.convolution_name)
        if not isinstance(convolution, DeformableConv):
            regular: Tensor = convolution(x)
            return regular
        convolved: Tensor = outside_graph(convolution, x)
        if not is_transformed() and x.is_contiguous(memory_format=torch.channels_last):
            return convolved.contiguous(memory_format=torch.channels_last)  # torchvision's operator returns the other
        return convolved

    def _attend(self, x: Tensor) -> Tensor:
        attended: Tensor = x if self.attention is None else outside_graph(self.attention, x)
        return attended


class AttendedBottleneck(_AttendedBlock, Bottleneck):  # type: ignore[misc]
    """torchvision's `Bottleneck` with attention between the 3x3 convolution and the last one (Fig. 2a).

    That is 1x1, 3x3 (regular or deformable), norm, ReLU, attention, 1x1, and the residual connection of the block.
    """

    convolution_name = "conv2"

    @override
    def _compute(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self._attend(self.relu(self.bn2(self._convolve(out))))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out)
        return activated


class AttendedBasicBlock(_AttendedBlock, BasicBlock):  # type: ignore[misc]
    """torchvision's `BasicBlock` with attention between its two 3x3 convolutions.

    The paper has bottlenecks only. The position after the first convolution corresponds to theirs: on the output of
    a 3x3 convolution after norm and ReLU, followed by the block's last convolution, and with the same channels, 256 in
    conv4 and 512 in conv5. The first convolution is therefore the one that may be deformable.
    """

    convolution_name = "conv1"

    @override
    def _compute(self, x: Tensor) -> Tensor:
        out = self._attend(self.relu(self.bn1(self._convolve(x))))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out)
        return activated


_LAYOUTS: dict[str, tuple[type[AttendedBottleneck] | type[AttendedBasicBlock], tuple[int, int, int, int]]] = {
    "resnet18": (AttendedBasicBlock, (2, 2, 2, 2)),
    "resnet34": (AttendedBasicBlock, (3, 4, 6, 3)),
    "resnet50": (AttendedBottleneck, (3, 4, 6, 3)),
    "resnet101": (AttendedBottleneck, (3, 4, 23, 3)),
    "bottleneck14": (AttendedBottleneck, (1, 1, 1, 1)),
    "bottleneck26": (AttendedBottleneck, (2, 2, 2, 2)),
}


class ResNet(nn.Module):
    """A ResNet without classifier, with torchvision's names, initialisation and outputs. Built by `build_resnet`.

    Args:
        name: See `ResNetSpec`; so are the next two.
        width: Channels of the first convolution.
        norm: Kind of normalisation.
        output_stride: Stride of conv5: 32, or 16 or 8, where later stages dilate their 3x3 convolutions instead of
            striding, as torchvision's `replace_stride_with_dilation` does.

    Attributes:
        channels: Number of channels of each output.
        layer1: The blocks of conv2, and so on to `layer4`.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, name: Architecture, width: int, norm: Norm, output_stride: Literal[8, 16, 32] = 32) -> None:
        super().__init__()
        block, counts = _LAYOUTS[name]
        make_norm = norm_factory(norm)
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.channels: dict[str, int] = {}
        inputs, dilation = width, 1
        for stage, count in enumerate(counts):
            planes = width * 2**stage
            stride, first_dilation = min(stage + 1, 2), dilation
            if 4 * 2**stage > output_stride:  # the first block still has the dilation of the stage before
                stride, dilation = 1, dilation * 2
            layer = nn.Sequential()
            for index in range(count):
                downsample = None
                step = stride if index == 0 else 1
                if index == 0 and (step != 1 or inputs != planes * block.expansion):
                    downsample = nn.Sequential(
                        conv1x1(inputs, planes * block.expansion, step), make_norm(planes * block.expansion)
                    )
                layer.append(
                    block(
                        inputs,
                        planes,
                        step,
                        downsample,
                        dilation=dilation if index else first_dilation,
                        norm_layer=make_norm,
                    )
                )
                inputs = planes * block.expansion
            setattr(self, f"layer{stage + 1}", layer)
            self.channels[f"c{stage + 2}"] = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._trained: list[str] = [name for name, _ in self.named_children()]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs of all stages.

        Args:
            images: Normalised, `[B, 3, H, W]`.

        Returns:
            `c2` to `c5` in this order, `[B, channels, H / s, W / s]`; s is 4, 8, 16, 32, and at most the output stride.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        outputs = {}
        for name, layer in zip(self.channels, (self.layer1, self.layer2, self.layer3, self.layer4), strict=True):
            x = outputs[name] = layer(x)
        return outputs

    def modules_to_compile(self) -> list[nn.Module]:
        """Whole stages without attention, and the blocks of the others."""
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        attended = [any(isinstance(one, _AttendedBlock) and one.has_attention for one in stage) for stage in stages]
        return [
            module
            for stage, has_attention in zip(stages, attended, strict=True)
            for module in (stage if has_attention else [stage])
        ]

    @override
    def train(self, mode: bool = True) -> "ResNet":
        """As in any module, but batch normalisation of frozen layers stays in evaluation mode."""
        super().train(mode)
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and name.split(".")[0] not in self._trained:
                module.eval()
        return self

    def freeze(self, trainable_layers: int) -> None:
        """Makes only the last layers, and those added by attention, trainable; see `ResNetSpec.trainable_layers`."""
        order = ["layer4", "layer3", "layer2", "layer1", "conv1"]
        self._trained = order[:trainable_layers] + (["bn1"] if trainable_layers == len(order) else [])
        added = names_added_by_attention(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in added or name.split(".")[0] in self._trained)
        self.train(self.training)

    def insert_attention(self, block_index: tuple[int, int], attention: AttentionSpec) -> None:
        """Inserts attention, and the spec's kind of 3x3 convolution, into one block.

        Args:
            block_index: Stage and block, both counted from 0.
            attention: The attention. The convolution starts with the weights of the one that it replaces.
        """
        stage, index = block_index
        block = getattr(self, f"layer{stage + 1}")[index]
        old: nn.Conv2d = getattr(block, block.convolution_name)
        built = build_attention(
            attention,
            old.out_channels,
            2,
            in_channels=old.in_channels,
            stride=old.stride[0],
            dilation=old.dilation[0],
        )
        with torch.no_grad():
            built.convolution.weight.copy_(old.weight)
        setattr(block, block.convolution_name, built.convolution)
        block.attention = built.attention


def build_resnet(spec: ResNetSpec, attention: AttentionSpec, output_stride: Literal[8, 16, 32] = 32) -> ResNet:
    """Builds a ResNet with attention, pretrained weights and frozen layers.

    Args:
        spec: Which ResNet.
        attention: Of its attended and deformable blocks; those of C channels (256 in conv4 and 512 in conv5 at the
            published width) encode relative positions in as many dimensions.
        output_stride: See `ResNet`.

    Returns:
        The backbone, in training mode.

    Raises:
        ValueError: If the parts do not fit one another, or the weights do not fit the network.
        OSError: If weights cannot be read; `FileNotFoundError` if no weights of that name exist.
    """
    if output_stride not in (8, 16, 32):
        raise InputError(f"output_stride must be 8, 16 or 32, got {output_stride!r}.")
    if output_stride != 32 and _LAYOUTS[spec.name][0] is AttendedBasicBlock:
        raise InputError(
            f"output_stride={output_stride} needs dilation, which the blocks of {spec.name} do not have. "
            "Choose an architecture of bottlenecks, such as bottleneck26 or resnet50."
        )
    network = ResNet(spec.name, spec.width, spec.norm, output_stride)
    attended = set() if attention.mechanism == "none" else spec.block_indices("attended_blocks")
    deformable = set() if attention.convolution == "regular" else spec.block_indices("deformable_blocks")
    for block_index in sorted(attended | deformable):
        block_attention = attention
        if block_index not in attended:
            block_attention = dataclasses.replace(AttentionSpec(mechanism="none"), convolution=attention.convolution)
        elif block_index not in deformable:
            block_attention = dataclasses.replace(attention, convolution="regular")
        network.insert_attention(block_index, block_attention)
    network.freeze(spec.trainable_layers)
    if spec.weights != "none":
        load_weights(network, read_weights(spec.weights, spec.name), f"{spec.name}, weights {spec.weights}")
    if network.conv1.weight.is_meta:  # a check of sizes only
        return network
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in network.parameters())
    _logger.info(
        "%s: weights %s, norm %s, %.2f M of %.2f M parameters trained; attention in %d blocks, deformable in %d",
        spec.name,
        spec.weights,
        spec.norm,
        trained / 1e6,
        total / 1e6,
        len(attended),
        len(deformable),
    )
    return network


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a batch of images, for any head.

    Attributes:
        maps: `c2` to `c5`, `[B, channels, H / s, W / s]`; see `ResNet.forward`.
        image_sizes: Height and width of each image, which is at the top left of the batch.
        batch_size: Height and width of the padded batch.
    """

    maps: Mapping[str, Tensor]
    image_sizes: list[tuple[int, int]]
    batch_size: tuple[int, int]


class Backbone(nn.Module):
    """Maps images of any sizes to features for the heads. Built by `build_backbone`.

    Args:
        body: The ResNet.
        stride: Of its smallest map.

    Attributes:
        channels: Number of channels of each map.
    """

    def __init__(self, body: ResNet, stride: int) -> None:
        super().__init__()
        self.body, self.stride = body, stride
        self.channels = body.channels
        self.batch = NormalizedBatch()

    def forward(self, images: Sequence[Tensor], *, align_corners: bool = False) -> Features:
        """Normalises and pads images, and computes their features.

        Args:
            images: RGB, uint8, `[3, H, W]` each.
            align_corners: How they are padded; see `padded_size`.

        Raises:
            ValueError: If images are not as described.
        """
        batch = self.batch(images, self.stride, align_corners=align_corners)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return Features(self.body(batch), sizes, (batch.shape[2], batch.shape[3]))


def build_backbone(spec: ResNetSpec, attention: AttentionSpec, output_stride: Literal[8, 16, 32] = 32) -> Backbone:
    """Builds a backbone for detectors and segmentation networks; arguments and errors as `build_resnet`."""
    return Backbone(build_resnet(spec, attention, output_stride), output_stride)


def norm_factory(norm: Norm) -> Callable[[int], nn.Module]:
    """The constructor of normalisation layers of this kind, from a number of channels."""
    if norm == "group":
        return lambda channels: nn.GroupNorm(math.gcd(_GROUPS, channels), channels)
    kinds = {"frozen": FrozenBatchNorm, "batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}
    return functools.partial(kinds[norm])
