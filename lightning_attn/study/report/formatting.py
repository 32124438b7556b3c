"""Numbers as people read them."""

import datetime
import math
from collections.abc import Iterable

__all__ = ["MINUS", "bytes_of", "count", "date", "decimals", "duration", "durations", "fixed", "signed"]

MINUS = "\N{MINUS SIGN}"
_NONE = "\N{EN DASH}"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def decimals(values: Iterable[float]) -> int:
    """Digits behind the point that scores of this size need: 27.35, 1.234, 0.4321."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest >= 1000:
        return 0 if largest >= 10_000 else 1
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def fixed(value: float | None, places: int) -> str:
    """A number with so many digits behind the point; a dash for none."""
    if value is None or not math.isfinite(value):
        return _NONE
    shown = f"{value:,.{places}f}"
    return shown.replace("-", MINUS) if float(shown.replace(",", "")) else shown.lstrip("-")


def signed(value: float | None, places: int) -> str:
    """The same with its sign."""
    shown = fixed(value, places)
    return f"+{shown}" if value is not None and math.isfinite(value) and value > 0 and shown[0].isdigit() else shown


def count(value: float | None, digits: int = 3) -> str:
    """A count in thousands, millions and so on: 2.69 G."""
    if value is None or not math.isfinite(value):
        return _NONE
    for size, prefix in _PREFIXES:
        if size <= abs(value) < 1e15:
            return f"{_digits(value / size, digits)} {prefix}"
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it: 3.2 ms, 4 min 5 s, 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return _NONE
    if seconds < 1:
        for size, unit in ((1e-3, "ms"), (1e-6, "µs")):
            if seconds >= size:
                return f"{_digits(seconds / size, 3)} {unit}"
        return f"{seconds / 1e-9:.3g} ns"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours / 24:.3g} d"


def durations(low: float, high: float) -> str:
    """Two short times in the unit of the longer one: 2.50 to 2.71 ms."""
    size, unit = next((one for one in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if high >= one[0]), (1e-9, "ns"))
    return f"{_digits(low / size, 3)} to {_digits(high / size, 3)} {unit}"


def bytes_of(value: float | None) -> str:
    """Bytes in MiB or GiB."""
    if value is None or not math.isfinite(value):
        return _NONE
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def date(seconds: float | None) -> str:
    """A moment in UTC: 2026-01-31 14:05."""
    try:
        moment = datetime.datetime.fromtimestamp(seconds or math.nan, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return _NONE
    return f"{moment:%Y-%m-%d %H:%M}"


def _digits(value: float, digits: int) -> str:
    """With so many significant digits, zeros at the end among them: 2.00, 28.1, 281."""
    return f"{value:#.{digits}g}".removesuffix(".") if abs(value) < 10**digits else f"{value:.0f}"
