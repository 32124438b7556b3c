"""The Trainer and the bare loop do the same, and each is charged with what it does."""

import dataclasses

import pytest
import torch
from detection_problems import SMALL

from benchmarks.case import Run
from benchmarks.results import Result
from benchmarks.trainer_overhead import BARE, CASE, TRAINER
from lightning_attn.tasks import DetectionTask


def measured(**settings):
    case = dataclasses.replace(CASE, problem=SMALL, repetitions=2)
    result = Result(case.name, case.title, comparisons=list(case.measure(case, Run(**settings))))
    case.set_targets(result)
    return result


def test_trainer_and_bare_loop_compute_the_same_losses():
    result = measured()
    [part] = result.comparisons
    bare, trainer = part.figures["losses"][BARE], part.figures["losses"][TRAINER]
    assert bare[0] == trainer[0]
    assert bare == pytest.approx(trainer, rel=1e-5)
    assert len(set(bare)) == len(bare) == 6, "three steps before those that count, and one after"
    assert len(part.sides[BARE].timing.seconds) == len(part.sides[TRAINER].timing.seconds) == 2
    [target] = part.targets
    assert target.value == part.sides[TRAINER].timing.median / part.sides[BARE].timing.median
    assert target.bound == 1.03
    [note] = CASE.notes(result)
    assert note.startswith(f"the losses of 6 steps, the first {bare[0]:.6f}, differ by ")


def test_time_of_the_task_falls_on_the_trainer_and_that_of_the_optimizer_on_both(monkeypatch):
    now = [0.0]

    def lasting(seconds, function):
        def run(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(DetectionTask, "log_dict", lasting(0.25, DetectionTask.log_dict))
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lasting(1.0, torch.optim.SGD.zero_grad))
    [part] = measured(clock=lambda: now[0]).comparisons
    assert part.sides[BARE].timing.seconds == (1.0, 1.0)
    assert part.sides[TRAINER].timing.seconds == (1.25, 1.25)
    assert [(target.value, target.verdict) for target in part.targets] == [(1.25, "not met")]
