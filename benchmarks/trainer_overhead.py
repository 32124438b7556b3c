"""A training step through Lightning's Trainer beside the same step in a bare loop.

Network, batches in memory, optimizer, schedule and clipping are the same, and so are the random draws, so that both
sides compute the same losses. They take turns within one process: the bare step runs in a callback before each step of
the Trainer. The network is a small one, without attention, in which a fixed cost weighs most; a larger one hides it.
"""

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.case import Case, Run
from benchmarks.detection_problem import MINIATURE, Problem
from benchmarks.results import Comparison, Result, Side, Timing
from lightning_attn.datamodules.detection.annotations import Categories
from lightning_attn.datamodules.detection.datamodule import DetectionBatch
from lightning_attn.tasks import DetectionTask, OptimizerSpec, ScheduleSpec

BARE, TRAINER = "bare loop", "Trainer"
_UNMEASURED_STEPS = 3  # of the Trainer, which is slower in its first ones


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

    def __init__(self, clip: float, clock: Callable[[], float]) -> None:
        self.clip, self.clock = clip, clock
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
            self.seconds[TRAINER].append(self.clock() - self._left)
        torch.manual_seed(batch_idx)
        start = self.clock()
        self.bare.step()
        self.seconds[BARE].append(self.clock() - start)
        torch.manual_seed(batch_idx)
        self._left = self.clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """Times steps of the Trainer and of the bare loop in turn."""
    run.report("time")
    problem: Problem = case.problem
    torch.manual_seed(0)
    steps = _UNMEASURED_STEPS + case.repetitions + 1  # the last one has no next one that would end its time
    clip = 10.0
    task = DetectionTask(
        problem.attention("none"),
        problem.backbone,
        problem.detector,
        OptimizerSpec("sgd", learning_rate=1e-3, weight_decay=1e-4),
        ScheduleSpec("cosine", warmup_steps=2, warmup_start=0.5),
    )
    in_turn = _InTurn(clip, run.clock)
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
    measured = slice(_UNMEASURED_STEPS, _UNMEASURED_STEPS + case.repetitions)
    losses = {BARE: torch.stack(in_turn.bare.losses).tolist(), TRAINER: torch.stack(in_turn.losses).tolist()}
    yield Comparison(
        sides={name: Side(Timing(tuple(seconds[measured]))) for name, seconds in in_turn.seconds.items()},
        figures={"losses": losses},
    )


def notes(result: Result) -> list[str]:
    """How far the losses of the two sides lie apart."""
    [comparison] = result.comparisons
    pairs = list(zip(*comparison.figures["losses"].values(), strict=True))
    difference = max(abs(one - other) for one, other in pairs)
    return [f"the losses of {len(pairs)} steps, the first {pairs[0][0]:.6f}, differ by {difference:g} at most"]


CASE = Case(
    "detection.overhead",
    "a training step through Lightning's Trainer beside a bare loop",
    measure,
    MINIATURE,
    sides=(TRAINER,),
    base=BARE,
    bounds={TRAINER: 1.03},
    notes=notes,
    repetitions=40,
    quick={"repetitions": 5},
)
