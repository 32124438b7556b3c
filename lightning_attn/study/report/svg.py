"""SVG as text: escaped elements, axes with round ticks, and styles for the page and for files."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from lightning_attn.study.report.formatting import MINUS

__all__ = ["DARK", "LIGHT", "Scale", "element", "number", "path", "standalone", "text_width", "variables"]

# Colours of Okabe and Ito (2008), which colour-blind people can tell apart; of the dark theme, lighter ones.
LIGHT: Mapping[str, str] = {
    **{"page": "#f6f7f9", "surface": "#ffffff", "raised": "#f1f3f6", "line": "#dfe3e8", "strong": "#c3cad3"},
    **{"text": "#1b2128", "muted": "#5b6672", "accent": "#0a5fb4", "focus": "#d55e00", "faint": "#8a95a1"},
    **{"good": "#00704a", "bad": "#b3261e", "warn": "#8a5a00", "other": "#7b3f98", "info": "#0a5fb4"},
    **{"good-soft": "#dff3ea", "bad-soft": "#fbe4e1", "warn-soft": "#fbeed2", "other-soft": "#f1e4f6"},
    **{"info-soft": "#e0edfa", "mute-soft": "#eceff2"},
    **{"s0": "#0072b2", "s1": "#d55e00", "s2": "#009e73", "s3": "#b4568f", "s4": "#a67c00", "s5": "#4b5563"},
}
DARK: Mapping[str, str] = {
    **{"page": "#0f1317", "surface": "#171c22", "raised": "#1f262d", "line": "#2b333c", "strong": "#465260"},
    **{"text": "#e6eaee", "muted": "#9da9b5", "accent": "#6cb4f5", "focus": "#ff9d5c", "faint": "#74808d"},
    **{"good": "#5fd3a2", "bad": "#ff8f86", "warn": "#f0bd57", "other": "#d2a1e8", "info": "#6cb4f5"},
    **{"good-soft": "#12382a", "bad-soft": "#47201d", "warn-soft": "#40300e", "other-soft": "#38234a"},
    **{"info-soft": "#15324e", "mute-soft": "#262e36"},
    **{"s0": "#56b4e9", "s1": "#f5864a", "s2": "#2fc79a", "s3": "#e29bc6", "s4": "#e6b83c", "s5": "#aeb8c4"},
}

_FOLDER = Path(__file__).parent / "templates"
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML cannot hold
_LARGEST, _LEAST = 1e300, 1e-290  # of values that are drawn
_VARIABLE = re.compile(r"var\(--([\w-]+)\)")


def element(name: str, *children: str, **attributes: object) -> Markup:
    """An element; text and values are escaped.

    Args:
        name: Of the element.
        children: Elements, or text.
        attributes: By name, with `_` for `-` and behind words of Python (`class_`); those that are None are left out.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            shown = escape(value) if isinstance(value, str) else number(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{shown}"')
    if children:
        parts += [">", *map(escape, children), f"</{name}>"]
    else:
        parts.append("/>")
    return Markup("".join(parts))


def number(value: object) -> str:
    """A coordinate with a digit behind the point."""
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return str(value)


def path(points: Sequence[tuple[float, float]]) -> str:
    """A line through points, as `d` of a path."""
    return "".join(
        f"{'L' if place else 'M'}{number(float(x))} {number(float(y))}" for place, (x, y) in enumerate(points)
    )


def text_width(text: str, size: float) -> float:
    """About how wide a text is in a system font of a size."""
    return size * sum(0.34 if letter in "iljt.,:;'|! " else 0.86 if letter in "mwMW" else 0.6 for letter in text)


class Scale:
    """From values to pixels, linearly, with round ticks.

    Args:
        low: Least value.
        high: Greatest value.
        start: Pixel of `low`.
        end: Pixel of `high`.
        num_ticks: About how many ticks.
        padding: Share of the range that is added on either side.
    """

    def __init__(
        self, low: float, high: float, start: float, end: float, *, num_ticks: int = 5, padding: float = 0.06
    ) -> None:
        low, high = (min(max(value, -_LARGEST), _LARGEST) for value in (low, high))
        if not high - low > _LEAST:
            around = abs(low) * 0.1 if abs(low) > _LEAST else 1.0
            low, high = low - around, high + around
        extra = (high - low) * padding
        self.low, self.high = low - extra, high + extra
        self.start, self.end = start, end
        self.step = _round_step((self.high - self.low) / max(1, num_ticks))

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def clip(self, value: float) -> float:
        """The pixel of the nearest value within the range."""
        return self(min(max(value, self.low), self.high))

    def ticks(self) -> list[tuple[float, str]]:
        """Round values and their labels."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        places = max(0, -math.floor(math.log10(self.step) + 1e-9))
        if round(self.step, places) != round(self.step, places + 1):  # 0.25
            places += 1
        values = [place * self.step for place in range(first, last + 1)]
        return [(value, f"{value:,.{places}f}".replace("-", MINUS) if value else "0") for value in values]


def standalone(drawing: Markup, title: str, description: str, width: float, height: float) -> str:
    """A file of its own, in the light theme, with fixed colours.

    Args:
        drawing: Elements that the classes of `chart.css` style.
        title: For screen readers, and what browsers show.
        description: For screen readers.
        width: Pixels.
        height: Pixels.
    """
    styles = _VARIABLE.sub(lambda match: LIGHT[match[1]], (_FOLDER / "chart.css").read_text(encoding="utf-8"))
    styles = styles.replace("inherit", 'system-ui, "DejaVu Sans", sans-serif')
    drawn = element(
        "svg",
        element("title", title),
        element("desc", description),
        element("style", Markup(styles)),
        element("rect", width=width, height=height, fill=LIGHT["surface"]),
        element("g", drawing, class_="chart"),
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
    )
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", f'<?xml version="1.0" encoding="UTF-8"?>\n{drawn}\n')


def variables(colours: Mapping[str, str]) -> str:
    """A theme as properties of CSS."""
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


def _round_step(wanted: float) -> float:
    size = 10.0 ** math.floor(math.log10(wanted))
    return next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= wanted * 0.999)
