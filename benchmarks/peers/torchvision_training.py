"""The training of torchvision's detector in a plain loop, from this project's configuration files.

The configuration gives the sizes of the network, and data, optimizer, schedule, clipping, precision and the moving
average of weights, which are this project's. The network is torchvision's alone: blocks of its ResNet, its
``BackboneWithFPN`` and ``FasterRCNN``, in torch's usual memory layout and without attention. Under bf16 torchvision
would round anchors and boxes too; here they stay in float32, as ours do.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.case import Case, Run, Table
from benchmarks.peers.torchvision_detector import torchvision_detector, train_mode
from benchmarks.report import settings
from benchmarks.results import Comparison, Result
from benchmarks.runner import positive_float, positive_int
from lightning_attn.callbacks import ExponentialAveraging
from lightning_attn.cli.parser import Parser
from lightning_attn.cli.run_options import RunOptions
from lightning_attn.datamodules.detection.coco import COCODataModule
from lightning_attn.datamodules.detection.datamodule import DetectionBatch
from lightning_attn.metrics.detection import CocoDetectionMetrics
from lightning_attn.tasks import BaseTask, DetectionTask
from lightning_attn.tasks.evaluation import without_nan

PRECISIONS = ("32-true", "bf16-mixed")
_REPORT_SECONDS = 30.0


def _option(text: str, default: Any = None, **keywords: Any) -> Any:
    """A field that is an option of the command line."""
    return dataclasses.field(default=default, metadata={"help": f"torchvision: {text}", **keywords})


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
        clock: Gives the time in seconds.

    Attributes:
        steps: Optimizer steps so far.
        seconds: Time that they took, with reading the data.
        losses: The sum of the losses of each step.
        scores: What each scoring found.
    """

    def __init__(
        self, configuration: Configuration, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.configuration, self.device, self.clock = configuration, torch.device(device), clock
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
        reported = self.clock()
        finished = True
        try:
            while self.steps < (steps or math.inf) and self.seconds < budget:
                start = self.clock()
                total = steps or max(self.steps + 1, round(self.steps * budget / max(self.seconds, 1e-9)))
                self._step(batches, total)
                self.steps += 1
                self.seconds += self.clock() - start
                if self.clock() - reported > _REPORT_SECONDS:
                    reported = self.clock()
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
        train_mode(self.network)
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
        numbers = without_nan(dict(metrics.scores()))
        self.scores.append({"step": self.steps, "minutes": self.seconds / 60, **numbers})
        report(f"step {self.steps}, {self.seconds / 60:.1f} min: AP {_number(numbers['ap'])}")


def _in_unit_range(batch: DetectionBatch) -> list[Tensor]:
    return [image / 255 for image in batch.images]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, and for how long; the help of the command line says what each field is."""

    config: tuple[str, ...] = _option("configuration files", (), nargs="+", metavar="FILE")
    root: str | None = _option("folder of the data (that of the configuration)")
    steps: int | None = _option("optimizer steps (trainer.max_steps, unless --minutes is given)", type=positive_int)
    minutes: float | None = _option("bound of the training's time", type=positive_float)
    score_every: int = _option("steps between scorings (at the end)", 0, type=int)
    precision: str | None = _option("in place of the configuration's", choices=PRECISIONS)
    device: str = _option("where it is trained (cpu)", "cpu")

    def __str__(self) -> str:
        return settings({name: value for name, value in dataclasses.asdict(self).items() if value})

    def configuration(self) -> Configuration:
        """What the files say.

        Raises:
            ValueError: As `read_configuration`.
        """
        if not self.config:
            raise ValueError("detection.torchvision needs --config FILE, such as configs/detection/bccd.yaml")
        try:
            found = read_configuration([Path(file) for file in self.config], self.root)
        except (OSError, ValueError) as error:
            raise ValueError(f"--config: {error}") from error
        return found if self.precision is None else found._replace(bf16=self.precision == "bf16-mixed")

    def completed(self) -> "Training":
        """With the configuration's number of steps, if no bound is given.

        Raises:
            ValueError: If it has none, or is none that a plain loop can run.
        """
        steps = self.configuration().max_steps
        if self.steps is not None or self.minutes is not None:
            return self
        if steps < 1:
            raise ValueError("--steps or --minutes is needed: the configuration has no trainer.max_steps")
        return dataclasses.replace(self, steps=steps)


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """Trains and scores the peer; see `Peer`.

    Raises:
        KeyboardInterrupt: After what was trained is there, if its training was interrupted.
    """
    training: Training = case.problem
    peer = Peer(training.configuration(), training.device, run.clock)
    finished = peer.train(training.steps, training.minutes, training.score_every, run.report)
    yield Comparison(
        figures={
            "finished": finished,
            "steps": peer.steps,
            "minutes": peer.seconds / 60,
            "parameters": sum(parameter.numel() for parameter in peer.network.parameters()),
            "losses": peer.losses,
            "scores": peer.scores,
        }
    )
    if not finished:
        raise KeyboardInterrupt


def table(result: Result) -> Table:
    """A line for each scoring."""
    [comparison] = result.comparisons
    figures = comparison.figures
    cells = [
        [str(score["step"]), f"{score['minutes']:.1f}", *(_number(score[name]) for name in ("ap", "ap50", "ap75"))]
        for score in figures["scores"]
    ]
    speed = f"{figures['steps']} steps in {figures['minutes']:.1f} minutes"
    size = f"{figures['parameters'] / 1e6:.2f} M parameters"
    note = f"{speed}{'' if figures['finished'] else ' (ended early)'}; {size}"
    return Table(["step", "minutes", "AP", "AP50", "AP75"], cells, [note])


CASE = Case(
    "detection.torchvision",
    "torchvision's detector, trained on the same data with the same budget",
    measure,
    Training(),
    complete=Training.completed,
    table=table,
    by_default=False,
    quick={"problem": Training(steps=20)},
)
