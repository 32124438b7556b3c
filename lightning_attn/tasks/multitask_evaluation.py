"""Evaluators of a joint training: those of each task under its name, and one score of all."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.tasks.evaluation import Evaluator, write_resampled

if TYPE_CHECKING:
    from lightning_attn.tasks.base import BaseTask
    from lightning_attn.tasks.multitask import MultitaskTask

__all__ = ["JointScore", "MemberEvaluator"]


class MemberEvaluator(Evaluator):
    """An evaluator of one task, which gets the batches of that task, and whose scores have its name before theirs.

    Args:
        host: The task of the whole training.
        name: The task's name in it.
        task: The task.
        evaluator: One of its evaluators.
    """

    def __init__(self, host: "MultitaskTask", name: str, task: "BaseTask", evaluator: Evaluator) -> None:
        self._host, self._name, self._task, self._evaluator = host, name, task, evaluator
        self.prints_scores = evaluator.prints_scores  # type: ignore[misc]
        self._runs = False
        self._scores: dict[str, Any] = {}
        self.found: dict[str, float] = {}
        if evaluator.shown is not None:
            self.shown = tuple(f"{name}/{one}" for one in evaluator.shown)  # type: ignore[misc]

    @property
    def member(self) -> str:
        """The task's name in the joint training."""
        return self._name

    @property
    def runs(self) -> bool:
        """Whether the task has data in this pass."""
        return self._runs

    @override
    def reset(self, split: str) -> None:
        """Starts a pass, unless the task has no data for it."""
        super().reset(split)
        self.found = {}
        self._runs = self._name in self._host.evaluated_members()
        if self._runs:
            self._evaluator.reset(split)

    @override
    def update(self, batch: Any, outputs: Mapping[str, Any]) -> None:
        if self._name in batch.parts:
            self._evaluator.update(batch.parts[self._name], outputs[self._name])

    @override
    def compute(self) -> dict[str, Any]:
        self._scores = self._evaluator.compute() if self._runs else {}
        return {f"{self._name}/{key}": value for key, value in self._scores.items()}

    @override
    def logged(self, scores: dict[str, Any]) -> dict[str, float]:
        self.found = self._evaluator.logged(self._scores) if self._runs else {}
        return {f"{self._name}/{key}": value for key, value in self.found.items()}

    @override
    def write(self, scores: dict[str, Any]) -> None:
        if not self._runs:
            return
        if self.split == "test":
            write_resampled([self._evaluator], self._task.output_directory)
        self._evaluator.write(self._scores)

    @override
    def clear(self) -> None:
        if self._runs:
            self._evaluator.clear()
        self._scores = {}


class JointScore(Evaluator):
    """`joint`: one score of all tasks, by which `best.ckpt` is chosen.

    With baselines it is the mean over tasks of the relative change of the score that the task is monitored by, score /
    baseline - 1; else the mean of these scores. It counts with a minus sign where the least is best. A task without
    data for the pass is left out.

    Args:
        tasks: The tasks, by name.
        baselines: The score of each task that it is compared with, or nothing.
        evaluators: Those of all tasks, which compute before this one.
    """

    def __init__(
        self, tasks: Mapping[str, "BaseTask"], baselines: Mapping[str, float], evaluators: Sequence[MemberEvaluator]
    ) -> None:
        self._tasks, self._baselines, self._evaluators = tasks, baselines, evaluators

    @override
    def update(self, batch: Any, outputs: Mapping[str, Any]) -> None:
        pass

    @override
    def compute(self) -> dict[str, Any]:
        values = []
        for name, task in self._tasks.items():
            key = task.monitor.removeprefix("val/")
            own = [one for one in self._evaluators if one.member == name and one.runs]
            found = {score: value for one in own for score, value in one.found.items()}
            if own and key not in found:
                raise InputError(
                    f"tasks.{name}: {type(task).__name__} is monitored by {task.monitor!r}, which is no score "
                    f"of its evaluators: {', '.join(found) or 'they have none'}. Set monitor to one of these."
                )
            score = found.get(key, math.nan)
            change = score / self._baselines[name] - 1 if self._baselines else score
            values.append(change if task.monitor_mode == "max" else -change)
        known = [value for value in values if not math.isnan(value)]
        return {"joint": sum(known) / len(known)} if known else {}
