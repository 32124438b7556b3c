"""How long the cells of a study will take."""

import dataclasses
from collections.abc import Mapping, Sequence

from lightning_attn.study.grid import Cell, Group, Study
from lightning_attn.study.profiling import PROFILE_FILE, step_seconds
from lightning_attn.study.states import CellStatus

__all__ = ["Prediction", "estimated_seconds", "predicted_seconds"]

_START = 20.0  # seconds until the training and the test have begun, together
_SHARE = 1.15  # of the time of the training steps: with the data, validations, checkpoints and the test


def estimated_seconds(
    study: Study, statuses: Sequence[CellStatus], needed: Sequence[CellStatus], jobs: int
) -> float | None:
    """How long cells will take.

    A cell takes as long as the finished cells of its group did. Before there is one, the profile tells, corrected by
    how much longer than their profiles tell the finished cells of other groups took. Without a profile it is what
    finished cells took, or else the study's `time_per_cell`.

    Args:
        study: The study.
        statuses: Of all its cells.
        needed: Of those to be run; one that was begun takes what is left of its steps.
        jobs: Cells at a time.

    Returns:
        Seconds; None if nothing is known.
    """
    measured: dict[Group, list[float]] = {}
    steps: dict[Group, float] = {}  # seconds of one, by the profile
    cells: dict[Group, Cell] = {}
    for status in statuses:
        group = status.cell.group
        cells.setdefault(group, status.cell)
        if status.is_finished and status.seconds is not None:
            measured.setdefault(group, []).append(status.seconds)
        step = None if group in steps else step_seconds(status.folder.path / PROFILE_FILE)
        if step is not None:
            steps[group] = step
    everything = [seconds for some in measured.values() for seconds in some]

    def whole(group: Group) -> float | None:
        if group in measured:
            return sum(measured[group]) / len(measured[group])
        if group in steps:
            own = predicted_seconds(cells[group], steps[group])
            factor = _correction(cells[group], cells, steps, measured)
            if own.is_complete or factor is not None:
                return own.seconds * (factor or 1.0)
        return sum(everything) / len(everything) if everything else study.time_per_cell

    total = 0.0
    for status in needed:
        one = whole(status.cell.group)
        if one is None:
            return None
        length = status.cell.total_steps
        share = min(1.0, (status.step or 0) / length) if length and not status.is_finished else 0.0
        total += one * (1 - share)
    return total / min(jobs, max(1, len(needed)))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How long a cell takes by its profile.

    Attributes:
        seconds: Of the cell, or else in proportion to it.
        is_complete: Whether it is the former: the configuration says how many steps there are.
    """

    seconds: float
    is_complete: bool


def predicted_seconds(cell: Cell, step: float) -> Prediction:
    """How long a cell takes by its profile.

    Args:
        cell: The cell.
        step: Seconds of a training step of one batch.
    """
    one = step * cell.batches_per_step
    if cell.total_steps is None:
        return Prediction(one, False)
    return Prediction(_START + _SHARE * one * cell.total_steps, True)


def _correction(
    cell: Cell, cells: Mapping[Group, Cell], steps: Mapping[Group, float], measured: Mapping[Group, Sequence[float]]
) -> float | None:
    """What finished cells took, divided by what their profiles tell; None if no such cell is like this one."""
    took = told = 0.0
    for group, some in measured.items():
        if group in steps:
            prediction = predicted_seconds(cells[group], steps[group])
            if prediction.is_complete == (cell.total_steps is not None):
                took += sum(some)
                told += len(some) * prediction.seconds
    return took / told if told else None
