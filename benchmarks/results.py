"""What measuring gives: times, memory, ratios of sides and targets, as plain data that JSON holds."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Outcome: TypeAlias = Literal["measured", "wrong", "failed", "not run"]


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of repeated runs of one thing, in the order they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these lies the middle half of the runs, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process of its own, or what an accelerator's allocator holds, in bytes."""

    before: int
    peak: int

    @property
    def increase(self) -> int:
        """What the measured steps added at their peak to the program, its modules and inputs, in bytes."""
        return self.peak - self.before


@dataclass
class Side:
    """What one implementation cost.

    Attributes:
        timing: Of its steps.
        memory: Of a fresh process.
        error: Why one of them is missing.
    """

    timing: Timing | None = None
    memory: Memory | None = None
    error: str | None = None

    @classmethod
    def of(cls, found: Timing | str) -> "Side":
        """From what `measure.timed_in_turn` found: a timing, or the error of a step that failed."""
        return cls(timing=found) if isinstance(found, Timing) else cls(error=found)


@dataclass(frozen=True)
class Target:
    """A figure beside its bound.

    Attributes:
        name: What the figure is.
        value: The figure; None if it could not be measured.
        bound: What it should reach.
        at_least: Whether the bound is a lower one.
        noise: Whether the two sides' middle halves overlap, where the bound is that one is not slower than the other.
        verdict: `met`, `met within noise`, `not met` or `not measured`.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool = False
    noise: bool = False
    verdict: str = field(init=False)

    def __post_init__(self) -> None:
        if self.value is None:
            verdict = "not measured"
        elif self.value >= self.bound if self.at_least else self.value <= self.bound:
            verdict = "met"
        else:
            verdict = "met within noise" if self.noise else "not met"
        object.__setattr__(self, "verdict", verdict)

    def __str__(self) -> str:
        figure = "-" if self.value is None else f"{self.value:.2f}"
        return f"{self.name} {figure} ({'>=' if self.at_least else '<='} {self.bound:g}): {self.verdict}"


@dataclass
class Comparison:
    """Sides that were measured together.

    Attributes:
        name: Which of the case's comparisons; empty where it has only one.
        sides: What each side cost.
        difference: Largest difference between the results of sides that compute the same, relative to the largest
            value; None where none was compared.
        figures: Everything else that was measured, as plain values.
        targets: Figures beside their bounds.
        outcome: `wrong` if a value is incorrect, `failed` after an error, `not run` if time or a package is missing.
        reason: Why it is not `measured`.
    """

    name: str = ""
    sides: dict[str, Side] = field(default_factory=dict)
    difference: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    outcome: Outcome = "measured"
    reason: str = ""

    def add_wrong(self, reason: str) -> None:
        """Marks it as incorrect; reasons add up."""
        earlier = f"{self.reason}; " if self.outcome == "wrong" else ""
        self.outcome, self.reason = "wrong", earlier + reason


@dataclass
class Result:
    """What a case gave.

    Attributes:
        case: Its name.
        title: What is compared.
        sizes: The problem in words.
        problem: The same as plain values.
        comparisons: What was measured.
    """

    case: str
    title: str
    sizes: str = ""
    problem: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Result":
        """From what `dataclasses.asdict` made of one.

        Raises:
            KeyError: If something is missing.
            TypeError: If something else is there.
        """

        def side(cost: dict[str, Any]) -> Side:
            timing, memory = cost["timing"], cost["memory"]
            timing = None if timing is None else Timing(tuple(timing["seconds"]))
            return Side(timing, None if memory is None else Memory(**memory), cost["error"])

        def comparison(found: dict[str, Any]) -> Comparison:
            targets = [
                Target(**{name: target[name] for name in target if name != "verdict"}) for target in found["targets"]
            ]
            sides = {name: side(cost) for name, cost in found["sides"].items()}
            return Comparison(**found | {"sides": sides, "targets": targets})

        return cls(**{**values, "comparisons": [comparison(found) for found in values["comparisons"]]})


def ratio(numerator: Side | None, denominator: Side | None, figure: Literal["time", "memory"]) -> float | None:
    """One side's median time, or increase of memory, divided by another's; None where one is missing."""
    if numerator is None or denominator is None:
        return None
    if figure == "time":
        if numerator.timing is None or denominator.timing is None:
            return None
        return numerator.timing.median / denominator.timing.median
    if numerator.memory is None or denominator.memory is None or denominator.memory.increase == 0:
        return None
    return numerator.memory.increase / denominator.memory.increase


def overlap(one: Side | None, other: Side | None) -> bool:
    """Whether the middle halves of two sides' times overlap."""
    if one is None or other is None or one.timing is None or other.timing is None:
        return False
    (lower, upper), (other_lower, other_upper) = one.timing.quartiles, other.timing.quartiles
    return lower <= other_upper and other_lower <= upper
