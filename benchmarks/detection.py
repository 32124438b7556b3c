"""What detection costs here, and a detector of torchvision alone trained on the same data with the same budget.

``python -m benchmarks.detection`` prints tables and writes JSON and Markdown. Four parts, chosen with ``--parts``:

``overhead`` is a training step through Lightning's Trainer beside the same step in a bare loop: network, batches in
memory, optimizer, schedule and clipping are the same, and so are the random draws, so that both sides compute the same
losses. They take turns within one process: the bare step runs in a callback before each step of the Trainer. The
network is a small one, without attention, in which a fixed cost weighs most; a larger one hides it.

``attention`` is the forward and backward pass of the whole detector, ResNet-50 with frozen statistics, on one image of
800x1344, under several attentions. All sides have the weights of the one without attention, and what attention adds
starts, as in training, without an effect: losses, proposals and sampled regions are the same everywhere. Two more rows
are the 3x3 convolutions of the attended blocks by themselves, deformable and regular, forward and backward.

``memory`` is the peak of a fresh process that makes one training step with two such images under 1111 with all keys.

``torchvision`` trains a peer, which needs data and a configuration:

    python -m benchmarks.detection --parts torchvision --config FILE --root DATA --steps 3000

The configuration gives the sizes of the network, and data, optimizer, schedule, clipping, precision and the moving
average of weights, which are this project's. The network is torchvision's alone: blocks of its ResNet, its
``BackboneWithFPN`` and ``FasterRCNN``, in torch's usual memory layout and without attention. The loop is a plain one.
Under bf16 torchvision would round anchors and boxes too; here they stay in float32, as ours do. ``--minutes`` bounds
the time of training, which scoring is no part of, with or without ``--steps``. Ctrl-C ends the training, and what was
trained is scored; a second one leaves that out.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytorch_lightning as pl
import torch
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning_attn.networks.images.detection import Detector, DetectorSpec
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from benchmarks.measure import (
    Side,
    Target,
    Timing,
    add_arguments,
    answer_parent,
    comma_separated,
    machine,
    markdown_settings,
    markdown_table,
    output_console,
    peak_memory,
    positive_int,
    print_target,
    ratio,
    require,
    run_child,
    timed_in_turn,
)
from datamodules.detection.annotations import Categories
from datamodules.detection.coco import COCODataModule
from datamodules.detection.datamodule import DetectionBatch
from lightning_attn.attention import AttentionSpec, DeformableConv
from lightning_attn.callbacks import ExponentialAveraging
from lightning_attn.cli.parser import Parser
from lightning_attn.cli.run_options import RunOptions
from lightning_attn.io import unused_path, write_json, write_text
from lightning_attn.metrics.detection import CocoDetectionMetrics
from lightning_attn.networks.images.backbone import NormalizedBatch, ResNetSpec, build_resnet
from lightning_attn.tasks import BaseTask, DetectionTask, OptimizerSpec, ScheduleSpec

BARE, TRAINER = "bare loop", "Trainer"
DEFORMABLE_ALONE, REGULAR_ALONE = "deformable 3x3 alone", "regular 3x3 alone"
ATTENTIONS: Mapping[str, dict[str, Any]] = {
    "none": {"mechanism": "none"},
    "0010": {"terms": "0010"},
    "1111 stride 2": {"terms": "1111", "kv_stride": 2},
    "1111": {"terms": "1111"},
    "0010 deformable": {"terms": "0010", "convolution": "deformable"},
    "none deformable": {"mechanism": "none", "convolution": "deformable"},
}
PARTS = ("overhead", "attention", "memory", "torchvision")
BASES = {"overhead": BARE, "attention": "none"}
# What is asked for: times divided by the base's, and the memory of the whole process in GB; each at most.
TIME_BOUNDS = {"overhead": {TRAINER: 1.03}, "attention": {"0010": 1.1, "1111 stride 2": 1.5}}
PEAK_GB = {"backbone": 24.0, "detector": 24.0}
REPETITIONS = {"overhead": 40, "attention": 3}
PRECISIONS = ("32-true", "bf16-mixed")
_UNMEASURED_STEPS = 3  # of the Trainer, which is slower in its first ones
_REPORT_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and a random batch for it.

    Attributes:
        backbone: Which ResNet.
        detector: What stands on it.
        images: Images in the batch.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        boxes: Boxes in each image.
        classes: Number of classes without the background.
        heads: Attention heads.
    """

    backbone: ResNetSpec
    detector: DetectorSpec
    images: int
    height: int
    width: int
    boxes: int = 6
    classes: int = 80
    heads: int = 8

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` made of one."""
        parts = {"backbone": ResNetSpec(**values["backbone"]), "detector": DetectorSpec(**values["detector"])}
        return cls(**{**values, **parts})

    def batch(self, seed: int = 0) -> DetectionBatch:
        """Random images with random boxes, each at most half as wide and high as its image."""
        generator = torch.Generator().manual_seed(seed)
        size = torch.tensor((self.width, self.height))
        images, targets = [], []
        for _ in range(self.images):
            shape = 3, self.height, self.width
            images.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
            corners = 0.5 * torch.rand(self.boxes, 2, generator=generator)
            extents = 0.1 + 0.4 * torch.rand(self.boxes, 2, generator=generator)
            boxes = torch.cat((corners * size, (corners + extents) * size), dim=1)
            labels = torch.randint(1, self.classes + 1, (self.boxes,), generator=generator)
            targets.append({"boxes": boxes, "labels": labels})
        sizes = torch.tensor([[self.height, self.width]] * self.images)
        return DetectionBatch(torch.arange(self.images), images, targets, sizes)  # type: ignore[arg-type]

    def attention(self, side: str) -> AttentionSpec:
        """The attention of one of `ATTENTIONS`."""
        return AttentionSpec(num_heads=self.heads, **ATTENTIONS[side])


# The paper's network and its input, and the network of the miniature set, the smallest that is configured here.
_PAPER = {"backbone": ResNetSpec("resnet50", norm="frozen", trainable_layers=3), "detector": DetectorSpec()}
PROBLEMS: Mapping[str, Problem] = {
    "overhead": Problem(
        ResNetSpec("bottleneck14", width=32),
        DetectorSpec(
            fpn_channels=64,
            anchor_sizes=(8.0, 16.0, 32.0, 64.0, 128.0),
            rpn_candidates_train=500,
            proposals_train=300,
            roi_batch_size=128,
            roi_canonical_size=64,
            fc_dim=256,
        ),
        images=8,
        height=128,
        width=160,
        classes=8,
    ),
    "attention": Problem(**_PAPER, images=1, height=800, width=1344),  # type: ignore[arg-type]
    "memory": Problem(**_PAPER, images=2, height=800, width=1344),  # type: ignore[arg-type]
}


@dataclasses.dataclass
class Part:
    """What a part of the benchmark measured.

    Attributes:
        name: One of `PARTS`.
        sides: What each side cost.
        figures: Everything else, as plain values.
        targets: Figures beside their bounds.
    """

    name: str
    sides: dict[str, Side] = dataclasses.field(default_factory=dict)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: list[Target] = dataclasses.field(default_factory=list)

    def judge(self) -> None:
        """Sets the targets from the sides."""
        base = BASES.get(self.name, "")
        self.targets = [
            Target(f"{name} / {base}", ratio(self.sides[name], self.sides.get(base), "time"), bound, at_least=False)
            for name, bound in TIME_BOUNDS.get(self.name, {}).items()
            if name in self.sides
        ]
        if self.name == "memory":
            for name, side in self.sides.items():
                peak = None if side.memory is None else side.memory.peak / 1e9
                self.targets.append(Target(f"{name}, GB", peak, PEAK_GB[name], at_least=False))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the verdict on each target is added."""
        return dataclasses.asdict(self) | {"targets": [target.as_dict() for target in self.targets]}


# Overhead of the Trainer


class RandomImages(pl.LightningDataModule):
    """Batches that lie in memory, as many as there are steps."""

    def __init__(self, problem: Problem, steps: int) -> None:
        super().__init__()
        batches = [problem.batch(seed) for seed in range(min(steps, 8))]
        self.batches = list(itertools.islice(itertools.cycle(batches), steps))
        labels = range(1, problem.classes + 1)
        self.categories = Categories(names=tuple(f"class {label}" for label in labels), ids=tuple(labels))

    def train_dataloader(self) -> DataLoader[DetectionBatch]:
        """The batches, in order."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class BareLoop:
    """The training of a task without Lightning, from a copy of its network.

    Args:
        task: Whose network has been built and not been trained.
        batches: What to train on.
        steps: Length of the training, for the schedule.
        clip: Bound of the gradient's norm.

    Attributes:
        losses: The sum of the losses of each step.
    """

    def __init__(self, task: DetectionTask, batches: Iterator[DetectionBatch], steps: int, clip: float) -> None:
        self.network = copy.deepcopy(task.built_network).train()
        groups = task.optimizer.parameter_groups(self.network)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = task.optimizer.build(groups, fused=True)
        self.schedule = task.schedule.build(self.optimizer, steps)
        self.batches, self.clip = batches, clip
        self.losses: list[Tensor] = []

    def step(self) -> None:
        """One step."""
        batch = next(self.batches)
        self.optimizer.zero_grad()
        losses = self.network(batch.images, batch.targets)
        total = torch.stack(list(losses.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(total.detach())


class _InTurn(pl.Callback):
    """Runs a bare step before every step of the Trainer, with the same random draws, and takes the time of both.

    A step of the Trainer lasts from here to the next time that it comes here: getting the batch, hooks and progress
    are part of it. Where its training begins and ends, at its first and last step, is not.
    """

    def __init__(self, clip: float) -> None:
        self.clip = clip
        self.seconds: dict[str, list[float]] = {BARE: [], TRAINER: []}
        self.losses: list[Tensor] = []
        self._left: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DetectionTask)
        batches = iter(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        self.bare = BareLoop(pl_module, batches, trainer.max_steps, self.clip)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self._left is not None:
            self.seconds[TRAINER].append(time.perf_counter() - self._left)
        torch.manual_seed(batch_idx)
        start = time.perf_counter()
        self.bare.step()
        self.seconds[BARE].append(time.perf_counter() - start)
        torch.manual_seed(batch_idx)
        self._left = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())


def measure_overhead(problem: Problem, repetitions: int) -> Part:
    """Times steps of the Trainer and of the bare loop in turn."""
    torch.manual_seed(0)
    steps = _UNMEASURED_STEPS + repetitions + 1  # the last one has no next one that would end its time
    clip = 10.0
    task = DetectionTask(
        AttentionSpec(mechanism="none"),
        problem.backbone,
        problem.detector,
        OptimizerSpec("sgd", learning_rate=1e-3, weight_decay=1e-4),
        ScheduleSpec("cosine", warmup_steps=2, warmup_start=0.5),
    )
    in_turn = _InTurn(clip)
    messages = logging.getLogger("pytorch_lightning")
    level = messages.level
    messages.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",  # the batches are there already
                ".*defined a `validation_step` but have no `val_dataloader`.*",  # nothing is validated
                ".*treespec, LeafSpec.*is deprecated.*",  # Lightning's own call
            ):
                warnings.filterwarnings("ignore", message=message)
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=steps,
                gradient_clip_val=clip,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                callbacks=[in_turn],
            )
            trainer.fit(task, datamodule=RandomImages(problem, steps))
    finally:
        messages.setLevel(level)
    measured = slice(_UNMEASURED_STEPS, _UNMEASURED_STEPS + repetitions)
    part = Part("overhead", {name: Side(Timing(tuple(runs[measured]))) for name, runs in in_turn.seconds.items()})
    part.figures["losses"] = {
        BARE: torch.stack(in_turn.bare.losses).tolist(),
        TRAINER: torch.stack(in_turn.losses).tolist(),
    }
    return part


# Attention in the detector


def random_detector(problem: Problem, attention: AttentionSpec) -> Detector:
    """A detector that trains, with random weights whose features stay in range."""
    torch.manual_seed(0)
    network = Detector(problem.classes, problem.backbone, attention, problem.detector)
    damp(network)
    return network.train()


def damp(network: nn.Module) -> None:
    """Lets each residual branch add little where frozen statistics, made up, would let it double the variance."""
    for name, buffer in network.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)


def detectors(problem: Problem, sides: Sequence[str]) -> dict[str, Detector]:
    """A detector for each side; all have the weights of the one without attention, as far as that has them."""
    weights = random_detector(problem, problem.attention("none")).state_dict()
    networks = {}
    for side in sides:
        networks[side] = random_detector(problem, problem.attention(side))
        unknown = networks[side].load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, "attention only adds to a network"
    return networks


def forward_and_backward(network: Detector, batch: DetectionBatch) -> dict[str, float]:
    """One pass in each direction, always with the same random draws; returns the losses."""
    torch.manual_seed(0)
    network.zero_grad()
    losses = network(batch.images, batch.targets)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {name: float(loss.detach()) for name, loss in losses.items()}


def convolutions_alone(
    deformable: Detector, regular: Detector, batch: DetectionBatch
) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of all 3x3 convolutions that are deformable in one network, and of those in the other.

    Each runs by itself, on the input that it has in its network.
    """
    names = [name for name, module in deformable.named_modules() if isinstance(module, DeformableConv)]

    def passes(network: Detector) -> Callable[[], object]:
        found: list[tuple[nn.Module, Tensor]] = []
        hooks = [
            network.get_submodule(name).register_forward_pre_hook(
                lambda module, inputs: found.append((module, inputs[0].detach().clone().requires_grad_()))
            )
            for name in names
        ]
        torch.manual_seed(0)
        with torch.no_grad():
            network(batch.images, batch.targets)
        for hook in hooks:
            hook.remove()

        def run() -> None:
            for module, x in found:
                x.grad = None
                module.zero_grad()
                out = module(x)
                out.backward(torch.ones_like(out))

        return run

    return {DEFORMABLE_ALONE: passes(deformable), REGULAR_ALONE: passes(regular)}


def measure_attention(problem: Problem, sides: Sequence[str], repetitions: int) -> Part:
    """Times the passes of the chosen sides, "none" first, in turn."""
    sides = list(dict.fromkeys(("none", *sides)))
    batch = problem.batch()
    networks = detectors(problem, sides)
    losses: dict[str, dict[str, float]] = {}

    def passes(side: str) -> Callable[[], object]:
        return lambda: losses.update({side: forward_and_backward(networks[side], batch)})

    steps = {side: passes(side) for side in sides}
    part = Part("attention")
    deformable = next((side for side in sides if side.endswith("deformable")), None)
    if deformable is not None:
        steps |= convolutions_alone(networks[deformable], networks["none"], batch)
    for side, timing in timed_in_turn(steps, repetitions=repetitions, budget=math.inf).items():
        part.sides[side] = Side(timing=timing) if isinstance(timing, Timing) else Side(error=timing)
    part.figures["losses"] = losses
    part.figures["deformable_share"] = {
        side: ratio(part.sides[DEFORMABLE_ALONE], part.sides[side], "time")
        for side in sides
        if side.endswith("deformable")
    }
    return part


# Memory


def memory_step(side: str, problem: Problem) -> Callable[[], object]:
    """One training step of the `backbone` or the `detector` under 1111 with all keys."""
    torch.manual_seed(0)
    attention, batch = problem.attention("1111"), problem.batch()
    network: nn.Module
    if side == "backbone":
        network, images = build_resnet(problem.backbone, attention), NormalizedBatch()(batch.images)
        damp(network)
    else:
        network = random_detector(problem, attention)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        if side == "backbone":
            losses = [level.square().mean() for level in network(images).values()]
        else:
            losses = list(network(batch.images, batch.targets).values())
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure_memory(problem: Problem, threads: int, report: Callable[[str], object]) -> Part:
    """Peaks of a fresh process for the backbone and for the detector."""
    part = Part("memory")
    for side in PEAK_GB:
        report(f"memory of the {side}")
        part.sides[side] = memory_of(side, problem, threads)
    return part


def memory_of(side: str, problem: Problem, threads: int) -> Side:
    """Memory of a fresh process, and the time of its steps, or the error that it ended with."""
    request = {"side": side, "problem": dataclasses.asdict(problem)}
    arguments = ["--child", json.dumps(request)]
    figures = run_child("benchmarks.detection", arguments, threads=threads, timeout=1800.0)
    return Side(error=figures) if isinstance(figures, str) else Side.from_dict(figures)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What `memory_of` asks of its fresh process; the optimizer has its state before the step that counts."""
    memory, timing = peak_memory(memory_step(request["side"], Problem.from_dict(request["problem"])))
    return dataclasses.asdict(Side(timing, memory))


# The peer: torchvision alone


class _AsTheyAre(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision publishes no types
    """Normalises and pads; the data module has resized the images."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


_LAYOUTS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "bottleneck14": (Bottleneck, (1, 1, 1, 1)),
    "bottleneck26": (Bottleneck, (2, 2, 2, 2)),
}
_NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.BatchNorm2d,  # there is one process
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
}
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")


def torchvision_resnet(spec: ResNetSpec) -> nn.Sequential:
    """The backbone of a spec without attention, of torchvision's blocks; its children have torchvision's names."""
    block, counts = _LAYOUTS[spec.name]
    make_norm = _NORMS[spec.norm]
    body = nn.Sequential()
    body.add_module("conv1", nn.Conv2d(3, spec.width, 7, stride=2, padding=3, bias=False))
    body.add_module("bn1", make_norm(spec.width))
    body.add_module("relu", nn.ReLU(inplace=True))
    body.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    inputs = spec.width
    for stage, count in enumerate(counts):
        planes, layer = spec.width * 2**stage, nn.Sequential()
        outputs = planes * block.expansion
        for index in range(count):
            stride = 2 if stage and not index else 1
            shortcut = None
            if stride != 1 or inputs != outputs:
                shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), make_norm(outputs))
            layer.append(block(inputs, planes, stride, shortcut, norm_layer=make_norm))
            inputs = outputs
        body.add_module(f"layer{stage + 1}", layer)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if spec.weights != "none":
        if Path(spec.weights).is_file():
            state = torch.load(spec.weights, map_location="cpu", weights_only=True)
        else:
            state = get_model_weights(spec.name)[spec.weights].get_state_dict(check_hash=True)
        body.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    return body


def torchvision_detector(num_classes: int, backbone: ResNetSpec, spec: DetectorSpec) -> FasterRCNN:
    """The Faster R-CNN of the specs without attention, built by torchvision; it takes images in 0..1.

    Raises:
        ValueError: If the spec is of another detector.
    """
    if spec.head != "faster_rcnn":
        raise ValueError(f"head={spec.head!r}: the peer is torchvision's Faster R-CNN. Set head: faster_rcnn.")
    body = torchvision_resnet(backbone)
    for name, module in body.named_children():
        trained = _LAYERS[: backbone.trainable_layers]
        module.requires_grad_(name in trained or (name == "bn1" and len(trained) == len(_LAYERS)))
    expansion = _LAYOUTS[backbone.name][0].expansion
    levels = [str(level) for level in range(4)]
    ratios = tuple(spec.aspect_ratios)
    norm = None if spec.norm == "none" else _NORMS[spec.norm]
    if spec.roi_convolutions:
        size = spec.fpn_channels, spec.roi_size, spec.roi_size
        second_stage = FastRCNNConvFCHead(size, [spec.fpn_channels] * spec.roi_convolutions, [spec.fc_dim], norm)
    else:
        second_stage = TwoMLPHead(spec.fpn_channels * spec.roi_size**2, spec.fc_dim)
    network = FasterRCNN(
        BackboneWithFPN(
            body,
            {f"layer{stage + 1}": level for stage, level in enumerate(levels)},
            [backbone.width * 2**stage * expansion for stage in range(4)],
            spec.fpn_channels,
            norm_layer=norm,
        ),
        rpn_anchor_generator=AnchorGenerator([(size,) for size in spec.anchor_sizes], (ratios,) * 5),
        rpn_pre_nms_top_n_train=spec.rpn_candidates_train,
        rpn_pre_nms_top_n_test=spec.rpn_candidates_eval,
        rpn_post_nms_top_n_train=spec.proposals_train,
        rpn_post_nms_top_n_test=spec.proposals_eval,
        rpn_nms_thresh=spec.rpn_nms_threshold,
        rpn_fg_iou_thresh=spec.rpn_foreground_iou,
        rpn_bg_iou_thresh=spec.rpn_background_iou,
        rpn_batch_size_per_image=spec.rpn_batch_size,
        rpn_positive_fraction=spec.rpn_positive_fraction,
        box_roi_pool=MultiScaleRoIAlign(
            levels, spec.roi_size, spec.roi_samples, canonical_scale=spec.roi_canonical_size, canonical_level=4
        ),
        box_head=second_stage,
        box_predictor=FastRCNNPredictor(spec.fc_dim, num_classes + 1),
        box_score_thresh=spec.score_threshold,
        box_nms_thresh=spec.nms_threshold,
        box_detections_per_img=spec.detections,
        box_fg_iou_thresh=spec.roi_foreground_iou,
        box_bg_iou_thresh=spec.roi_foreground_iou,
        box_batch_size_per_image=spec.roi_batch_size,
        box_positive_fraction=spec.roi_positive_fraction,
    )
    # The sizes are not used, since nothing is resized.
    transform = network.transform
    network.transform = _AsTheyAre(1, 1, transform.image_mean, transform.image_std)
    # What these hand on in the precision of autocast would become that of the boxes.
    for module in (network.backbone, network.rpn.head, network.roi_heads.box_predictor):
        module.register_forward_hook(lambda module, inputs, output: tree_map(Tensor.float, output))
    return network


def _train_mode(network: nn.Module) -> None:
    """Training mode, in which layers that are not trained keep their statistics."""
    network.train()
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        if isinstance(module, nn.BatchNorm2d) and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


class Configuration(NamedTuple):
    """What the training of the peer takes from configuration files."""

    task: DetectionTask
    data: COCODataModule
    seed: int
    max_steps: int
    clip: float
    accumulate: int
    bf16: bool
    averaging: ExponentialAveraging | None


def read_configuration(files: Sequence[Path], root: str | None = None) -> Configuration:
    """Reads files as `train.py fit` does, later ones over earlier ones.

    Args:
        files: The files.
        root: Folder of the data, in place of the configured one.

    Raises:
        ValueError: If a file is not a configuration, or holds what the plain loop does not do.
    """
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--seed_everything", type=bool | int | None, default=0)
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    parser.add_lightning_class_args(BaseTask, "model", subclass_mode=True)
    parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True)
    parser.add_class_arguments(RunOptions, "run")
    arguments = [f"--config={file}" for file in files] + ([] if root is None else [f"--data.root={root}"])
    configured = parser.instantiate(parser.parse_args(arguments))
    task, data, trainer = configured["model"], configured["data"], configured["trainer"]
    names = ", ".join(map(str, files))
    if not (isinstance(task, DetectionTask) and isinstance(data, COCODataModule)):
        raise ValueError(
            f"{names}: the model is a {type(task).__name__} and the data a {type(data).__name__}; "
            "the peer needs a DetectionTask and data in the layout of COCO."
        )
    precision = trainer["precision"] or "32-true"
    if precision not in PRECISIONS:
        raise ValueError(f"{names}: trainer.precision is {precision}; the peer trains in {' or '.join(PRECISIONS)}.")
    callbacks = trainer["callbacks"] or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    for callback in callbacks:
        if not isinstance(callback, ExponentialAveraging):
            raise ValueError(
                f"{names}: trainer.callbacks has a {type(callback).__name__}, which a plain loop cannot run; "
                "ExponentialAveraging alone is known. Take it out."
            )
    seed = configured["seed_everything"]
    return Configuration(
        task,
        data,
        seed if isinstance(seed, int) else 0,
        trainer["max_steps"],
        trainer["gradient_clip_val"] or 0.0,
        trainer["accumulate_grad_batches"],
        precision == "bf16-mixed",
        callbacks[0] if callbacks else None,
    )


class Peer:
    """torchvision's detector and its training in a plain loop.

    Args:
        configuration: What to train, how and on what; the data is prepared and set up here.
        device: Where.

    Attributes:
        steps: Optimizer steps so far.
        seconds: Time that they took, with reading the data.
        losses: The sum of the losses of each step.
        scores: What each scoring found.
    """

    def __init__(self, configuration: Configuration, device: str = "cpu") -> None:
        self.configuration, self.device = configuration, torch.device(device)
        task, data = configuration.task, configuration.data
        data.prepare_data()
        data.setup("fit")
        torch.manual_seed(configuration.seed)
        assert data.categories is not None, "the annotations name them"
        self.category_ids = torch.tensor((0, *data.categories.ids), device=self.device)
        self.network = torchvision_detector(len(data.categories), task.backbone, task.detector).to(self.device)
        spec = task.optimizer.scaled(data.batch_size * configuration.accumulate)
        groups = spec.parameter_groups(self.network)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = spec.build(groups, fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.average: AveragedModel | None = None
        if configuration.averaging is not None:
            self.average = AveragedModel(self.network, multi_avg_fn=self._average, use_buffers=True)
        self.steps, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.scores: list[dict[str, Any]] = []

    @torch.no_grad()
    def _average(self, averages: Any, currents: Any, number: Tensor | int) -> None:
        assert self.configuration.averaging is not None
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, self.configuration.averaging.share(int(number)))
        else:
            torch._foreach_copy_(averages, currents)

    def train(
        self, steps: int | None, minutes: float | None, score_every: int, report: Callable[[str], object]
    ) -> bool:
        """Trains until as many steps are done or the time is over, and scores; Ctrl-C ends it early.

        Args:
            steps: Optimizer steps; None for as many as the time allows. The schedule then goes by the number of steps
                that the speed so far lets expect.
            minutes: Time of training; None for no bound.
            score_every: Steps between two scorings; 0 for one at the end.
            report: Is told the progress now and then.

        Returns:
            Whether it came to its end.
        """
        batches = self._batches()
        budget = math.inf if minutes is None else 60 * minutes
        reported = time.perf_counter()
        finished = True
        try:
            while self.steps < (steps or math.inf) and self.seconds < budget:
                start = time.perf_counter()
                total = steps or max(self.steps + 1, round(self.steps * budget / max(self.seconds, 1e-9)))
                self._step(batches, total)
                self.steps += 1
                self.seconds += time.perf_counter() - start
                if time.perf_counter() - reported > _REPORT_SECONDS:
                    reported = time.perf_counter()
                    of = f"/{steps}" if steps else ""
                    report(f"step {self.steps}{of}, {self.seconds / 60:.1f} min, loss {self.losses[-1]:.3f}")
                if score_every and self.steps % score_every == 0:
                    self._score(report)
        except KeyboardInterrupt:
            finished = False
        if self.steps and (not self.scores or self.scores[-1]["step"] != self.steps):
            try:
                self._score(report)
            except KeyboardInterrupt:
                finished = False
        return finished

    def _batches(self) -> Iterator[DetectionBatch]:
        loader: Any = self.configuration.data.train_dataloader()
        for epoch in itertools.count():
            loader.batch_sampler.set_epoch(epoch)
            yield from loader

    def _step(self, batches: Iterator[DetectionBatch], total_steps: int) -> None:
        _train_mode(self.network)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.configuration.task.schedule.factor(self.steps, total_steps)
        self.optimizer.zero_grad()
        summed = 0.0
        for _ in range(self.configuration.accumulate):
            batch = next(batches).to(self.device)
            with self._precision():
                losses = self.network(_in_unit_range(batch), batch.targets)
            loss = torch.stack(list(losses.values())).sum() / self.configuration.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            summed += loss.item()
        if self.configuration.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.configuration.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.losses.append(summed)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.configuration.bf16)

    @torch.inference_mode()
    def _score(self, report: Callable[[str], object]) -> None:
        data = self.configuration.data
        network = self.network if self.average is None else self.average.module
        network.eval()
        metrics = CocoDetectionMetrics(data.ground_truth("val"))
        for batch in data.val_dataloader():
            found = []
            inputs = batch.to(self.device)
            with self._precision():
                detections = network(_in_unit_range(inputs))
            for image, (height, width), detection in zip(inputs.images, batch.sizes.tolist(), detections, strict=True):
                factors = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2, device=self.device)
                labels = self.category_ids[detection["labels"]]
                boxes = detection["boxes"] * factors
                found.append({"boxes": boxes, "labels": labels, "scores": detection["scores"]})
            metrics.update(batch.ids, found)
        metrics.compute()
        numbers = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in metrics.scores().items()
        }
        self.scores.append({"step": self.steps, "minutes": self.seconds / 60, **numbers})
        report(f"step {self.steps}, {self.seconds / 60:.1f} min: AP {_number(numbers['ap'])}")


def _in_unit_range(batch: DetectionBatch) -> list[Tensor]:
    return [image / 255 for image in batch.images]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def train_peer(
    configuration: Configuration,
    *,
    steps: int | None,
    minutes: float | None,
    score_every: int = 0,
    device: str = "cpu",
    report: Callable[[str], object] = lambda text: None,
) -> Part:
    """Trains and scores the peer; see `Peer`."""
    peer = Peer(configuration, device)
    finished = peer.train(steps, minutes, score_every, report)
    part = Part("torchvision")
    part.figures = {
        "finished": finished,
        "steps": peer.steps,
        "minutes": peer.seconds / 60,
        "parameters": sum(parameter.numel() for parameter in peer.network.parameters()),
        "losses": peer.losses,
        "scores": peer.scores,
    }
    return part


# Results


def table(part: Part) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    if part.name == "torchvision":
        scores = part.figures["scores"]
        names = ("ap", "ap50", "ap75")
        return ["step", "minutes", "AP", "AP50", "AP75"], [
            [str(score["step"]), f"{score['minutes']:.1f}", *(_number(score[name]) for name in names)]
            for score in scores
        ]
    if part.name == "memory":
        header = ["side", "GB at the peak", "GB more than before the step"]
        return header, [
            [name, f"{side.memory.peak / 1e9:.2f}", f"{side.memory.increase / 1e9:.2f}"]
            if side.memory is not None
            else [name, side.error or "-", ""]
            for name, side in part.sides.items()
        ]
    base = BASES[part.name]
    cells = []
    for name, side in part.sides.items():
        if side.timing is None:
            cells.append([name, side.error or "-", "", ""])
            continue
        relative = ratio(side, part.sides.get(base), "time")
        quartiles = "-".join(f"{1e3 * quartile:.0f}" for quartile in side.timing.quartiles)
        milliseconds = f"{1e3 * side.timing.median:.0f}"
        cells.append([name, milliseconds, quartiles, "" if relative is None else f"{relative:.3f}"])
    return ["side", "ms", "quartiles", f"time / {base}"], cells


def notes(part: Part) -> list[str]:
    """What the table does not say."""
    figures = part.figures
    if part.name == "overhead":
        pairs = list(zip(*figures["losses"].values(), strict=True))
        difference = max(abs(one - other) for one, other in pairs)
        return [f"the losses of {len(pairs)} steps, the first {pairs[0][0]:.6f}, differ by {difference:g} at most"]
    if part.name == "attention":
        replaced = part.sides.get(REGULAR_ALONE)
        regular = "" if replaced is None or replaced.timing is None else f"{1e3 * replaced.timing.median:.0f} ms"
        return [
            f"{side}: its deformable convolutions are {100 * share:.0f} % of it; regular ones in their place take "
            f"{regular or '-'}"
            for side, share in figures["deformable_share"].items()
            if share is not None
        ]
    if part.name == "torchvision":
        speed = f"{figures['steps']} steps in {figures['minutes']:.1f} minutes"
        size = f"{figures['parameters'] / 1e6:.2f} M parameters"
        return [f"{speed}{'' if figures['finished'] else ' (ended early)'}; {size}"]
    return []


def markdown(run: Mapping[str, Any], parts: Sequence[Part]) -> str:
    """All tables, the machine, and how it was measured."""
    lines = ["# Detection: time, memory and a peer", ""]
    lines += [markdown_settings(run[name]) for name in ("machine", "options")]
    lines += ["", "Medians of interleaved repetitions, float32; memory is that of a fresh process.", ""]
    for part in parts:
        header, cells = table(part)
        lines += [f"## {part.name.capitalize()}", ""]
        problem = run["problems"].get(part.name)
        if problem is not None:
            lines += [
                f"{problem['backbone']['name']} of width {problem['backbone']['width']}; batch of {problem['images']}, "
                f"images of {problem['height']}x{problem['width']}"
                + "".join(
                    f"; {len(side.timing.seconds)} rounds" for side in list(part.sides.values())[:1] if side.timing
                ),
                "",
            ]
        lines += markdown_table(header, cells)
        lines += ["", *(f"- {target}" for target in part.targets), *(f"- {note}" for note in notes(part)), ""]
    return "\n".join(lines)


def show(console: Console, part: Part) -> None:
    """Prints a part."""
    header, cells = table(part)
    styled = Table(*header, title=part.name, title_justify="left")
    for line in cells:
        styled.add_row(*line)
    console.print(styled)
    for target in part.targets:
        print_target(console, target)
    for note in notes(part):
        console.print(f"  {note}", highlight=False)


def positive_float(text: str) -> float:
    """Type of an argument: a number above 0.

    Raises:
        argparse.ArgumentTypeError: If it is not.
        ValueError: If it is no number.
    """
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=comma_separated, default=PARTS[:3], help=f"{','.join(PARTS)}; all but the last by default"
    )
    parser.add_argument(
        "--sides", type=comma_separated, default=tuple(ATTENTIONS), help="of attention; names with commas between"
    )
    parser.add_argument("--repetitions", type=positive_int, help="measured rounds (overhead 40, attention 3)")
    parser.add_argument("--config", type=Path, nargs="+", metavar="FILE", help="torchvision: configuration files")
    parser.add_argument("--root", help="torchvision: folder of the data (that of the configuration)")
    parser.add_argument(
        "--steps", type=positive_int, help="torchvision: optimizer steps (trainer.max_steps, unless --minutes is given)"
    )
    parser.add_argument("--minutes", type=positive_float, help="torchvision: bound of the training's time")
    parser.add_argument("--score-every", type=int, default=0, help="torchvision: steps between scorings (at the end)")
    parser.add_argument("--precision", choices=PRECISIONS, help="torchvision: in place of the configuration's")
    parser.add_argument("--device", default="cpu", help="torchvision: where it is trained (cpu)")
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None, problems: Mapping[str, Problem] = PROBLEMS) -> None:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.child is not None:
        answer_parent(lambda: answer(chosen.child))
        return
    for name, values, known in (("parts", chosen.parts, PARTS), ("sides", chosen.sides, tuple(ATTENTIONS))):
        unknown = [value for value in values if value not in known]
        if unknown:
            parser.error(f"--{name} {','.join(unknown)}: there are {','.join(known)}")
    parts = [name for name in chosen.parts if not (name == "memory" and chosen.no_memory)]
    require(*(["psutil"] if "memory" in parts else []))
    configuration = None
    if "torchvision" in parts:
        if not chosen.config:
            parser.error("--parts torchvision needs --config FILE, such as configs/detection/bccd.yaml")
        try:
            configuration = read_configuration(chosen.config, chosen.root)
        except (OSError, ValueError) as error:
            parser.error(f"--config: {error}")
        if chosen.precision is not None:
            configuration = configuration._replace(bf16=chosen.precision == "bf16-mixed")
        if chosen.steps is None and chosen.minutes is None:
            if configuration.max_steps < 1:
                parser.error("--steps or --minutes is needed: the configuration has no trainer.max_steps")
            chosen.steps = configuration.max_steps
    torch.set_num_threads(chosen.threads)
    options = ("sides", "repetitions", "config", "root", "steps", "minutes", "score_every", "precision", "device")
    run: dict[str, Any] = {
        "machine": machine("torch", "torchvision", "pytorch-lightning"),
        "options": {
            name: ",".join(map(str, value)) if isinstance(value, tuple | list) else value
            for name, value in vars(chosen).items()
            if name in options and value is not None
        },
        "problems": {name: dataclasses.asdict(problem) for name, problem in problems.items() if name in parts},
    }
    console, errors = output_console(width=120), Console(stderr=True)
    done: list[Part] = []
    try:
        for name in parts:
            with errors.status(name) as status:

                def report(text: str, status: Any = status) -> None:
                    if errors.is_terminal:
                        status.update(text)
                    else:
                        errors.print(text, highlight=False)

                repetitions = chosen.repetitions or REPETITIONS.get(name, 0)
                if name == "overhead":
                    part = measure_overhead(problems[name], repetitions)
                elif name == "attention":
                    part = measure_attention(problems[name], chosen.sides, repetitions)
                elif name == "memory":
                    part = measure_memory(problems[name], chosen.threads, report)
                else:
                    assert configuration is not None
                    part = train_peer(
                        configuration,
                        steps=chosen.steps,
                        minutes=chosen.minutes,
                        score_every=chosen.score_every,
                        device=chosen.device,
                        report=report,
                    )
            part.judge()
            done.append(part)
            show(console, part)
            if not part.figures.get("finished", True):
                break
    finally:
        if done:  # also of a run that was interrupted
            file = unused_path(chosen.output / "detection.json")
            write_json(file, run | {"parts": [part.as_dict() for part in done]})
            write_text(file.with_suffix(".md"), markdown(run, done))
            print(f"Results: {file.parent / file.stem}.*")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it keeps as much as after Ctrl-C
    main()
