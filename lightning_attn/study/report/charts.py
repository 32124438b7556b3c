"""The plots of a report, drawn once: the page and the files show the same elements."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from lightning_attn.study.report.collecting import Curve
from lightning_attn.study.report.labels import Box, Label, place_labels
from lightning_attn.study.report.svg import Scale, element, number, path, text_width

__all__ = [
    "Panel",
    "Point",
    "Row",
    "curve_panel",
    "curve_scales",
    "draw_curves",
    "draw_forest",
    "draw_forest_row",
    "draw_scatter",
    "forest_scale",
    "front_of",
    "thinned",
]

_SHAPES = ("circle", "square", "triangle", "diamond", "cross", "circle")
_SIZE = 11.5  # of labels
_LINE = 13.5  # their height
_MOST_LABELS = 40
_MOST_POINTS = 90  # of a curve
_MOST_REACH = 3.0  # of intervals of differences, in units of the largest difference


@dataclasses.dataclass(frozen=True)
class Point:
    """A group in accuracy over cost.

    Attributes:
        place: Number of the group, which ties points, rows and panels together.
        label: Beside the point.
        x: Cost.
        y: Score.
        low: Lower end of its interval; NaN for none.
        high: Upper end.
        seeds: Scores of single runs.
        tip: What is told of it.
        series: Its colour and shape.
        is_on_front: Whether none is both cheaper and better.
        x_low: Lower quartile of the cost; NaN for none.
        x_high: Upper quartile.
    """

    place: int
    label: str
    x: float
    y: float
    low: float
    high: float
    seeds: Sequence[float]
    tip: str
    series: int
    is_on_front: bool
    x_low: float = math.nan
    x_high: float = math.nan


@dataclasses.dataclass(frozen=True)
class Panel:
    """A drawing, without the `svg` element around it.

    Attributes:
        drawing: Its elements.
        width: Pixels.
        height: Pixels.
        title: In a few words.
        description: In a sentence, for screen readers.
    """

    drawing: Markup
    width: float
    height: float
    title: str
    description: str

    def inline(self, name: str) -> Markup:
        """As a part of a page.

        Args:
            name: An id, used by no other.
        """
        return element(
            "svg",
            element("desc", self.title, id=f"{name}-title"),
            element("desc", self.description, id=f"{name}-text"),
            self.drawing,
            class_="chart",
            viewBox=f"0 0 {number(self.width)} {number(self.height)}",
            role="group",
            aria_labelledby=f"{name}-title",
            aria_describedby=f"{name}-text",
            style=f"max-width:{1.25 * self.width:.0f}px",
        )


def front_of(points: Sequence[tuple[float, float]], *, more_is_better: bool) -> set[int]:
    """Which points no other beats: none is better without costing more, none is cheaper without being worse.

    Args:
        points: Costs and scores.
        more_is_better: Whether a greater score is.
    """
    sign = 1.0 if more_is_better else -1.0
    found, best = set(), -math.inf
    for place in sorted(range(len(points)), key=lambda one: (points[one][0], -sign * points[one][1])):
        if sign * points[place][1] > best:
            best = sign * points[place][1]
            found.add(place)
    return found


def draw_scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    title: str,
    more_is_better: bool,
    is_single: bool = False,
    series: Sequence[str] = (),
    width: float = 640,
    height: float = 430,
) -> Panel:
    """Score over cost with the front as stairs.

    Args:
        points: Groups, at least one.
        x_title: Of the axis of costs, with its unit.
        y_title: Of the axis of scores.
        title: Of the plot.
        more_is_better: Whether a greater score is.
        is_single: Whether the front depends on single runs, and is dotted.
        series: Names of colours, for a legend; empty for a single one.
        width: Pixels.
        height: Pixels.
    """
    legend = _legend(series, 58, 16, width - 70) if len(series) > 1 else (Markup(""), 0.0)
    left, top, right, bottom = 58.0, 16.0 + legend[1], width - 16.0, height - 46.0
    ends = _range([one.x for one in points], [end for one in points for end in (one.x_low, one.x_high)])
    x_scale = Scale(*ends, left, right, num_ticks=int(width / 80))
    low, high = _range(
        [value for one in points for value in (one.y, *one.seeds)],
        [end for one in points for end in (one.low, one.high)],
    )
    y_scale = Scale(low, high, bottom, top, num_ticks=int(height / 75))
    parts = [legend[0], _axes(x_scale, y_scale, (left, top, right, bottom), x_title, y_title)]
    on_front = sorted((one for one in points if one.is_on_front), key=lambda one: (one.x, one.y))
    stairs = _stairs([(x_scale(one.x), y_scale(one.y)) for one in on_front], right)
    if stairs:
        parts.append(element("path", d=path(stairs), class_="front single" if is_single else "front"))
    boxes, lines = _obstacles(points, x_scale, y_scale, stairs)
    clusters = _clusters(points, x_scale, y_scale, width)
    placed = place_labels([one.box for one in clusters], boxes, lines, (left + 1, top + 1, right - 1, bottom - 1))
    labels = {}
    for cluster, box in zip(clusters, placed, strict=True):
        labels[cluster.points[0].place] = _draw_label(cluster, box)
    # Drawn from the right and lowest to the most important, which then lie above the others.
    for order, one in enumerate(sorted(points, key=lambda each: (each.is_on_front, each.y))):
        parts.append(_draw_point(one, x_scale, y_scale, labels.get(one.place, Markup("")), first=order == 0))
    names = ", ".join(one.label for one in on_front)
    better = "upper" if more_is_better else "lower"
    return Panel(
        Markup("").join(parts),
        width,
        height,
        title,
        f"{y_title} over {x_title} of {len(points)} groups. On the {better} left envelope: {names or 'none'}.",
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A difference with its interval.

    Attributes:
        claim: In words.
        mean: The difference; NaN for none.
        low: Lower end of its interval over seeds; -inf for none.
        high: Upper end.
        test_low: Of resampled test sets; NaN for none.
        test_high: Upper end.
        margin: On either side of zero, within which a difference is none.
        kind: "good", "bad" or "warn".
        verdict: In a word, and what was expected.
    """

    claim: str
    mean: float
    low: float
    high: float
    test_low: float
    test_high: float
    margin: float
    kind: str
    verdict: str


def forest_scale(rows: Sequence[Row], start: float, end: float) -> Scale:
    """A scale of zero, margins, differences, and intervals up to three times the largest of those."""
    means = [row.mean for row in rows if math.isfinite(row.mean)]
    reach = max((abs(value) for value in [*means, *(row.margin for row in rows)]), default=0.0) or 1.0
    ends = [value for row in rows for value in (row.low, row.high, row.test_low, row.test_high) if math.isfinite(value)]
    inside = [*means, *(min(max(value, -_MOST_REACH * reach), _MOST_REACH * reach) for value in ends)]
    low = min([-reach * 0.2, *inside, *(-row.margin for row in rows)])
    high = max([reach * 0.2, *inside, *(row.margin for row in rows)])
    return Scale(low, high, start, end, num_ticks=4)


def draw_forest_row(row: Row, scale: Scale, middle: float, height: float) -> Markup:
    """Zero, margin, difference and intervals of one row.

    Args:
        row: The difference.
        scale: To pixels.
        middle: The row's middle, in pixels from the top.
        height: The row's.
    """
    top = middle - height / 2
    parts = []
    if row.margin:
        start, end = scale.clip(-row.margin), scale.clip(row.margin)
        parts.append(element("rect", x=start, y=top, width=end - start, height=height, class_="margin"))
    parts.append(element("path", d=f"M{number(scale(0.0))} {number(top)}v{number(height)}", class_="zero"))
    if math.isfinite(row.test_low):
        parts.append(_whisker(scale, row.test_low, row.test_high, middle + 6, "test"))
    if math.isfinite(row.mean):
        inner = [_whisker(scale, row.low, row.high, middle, "ci")] if row.high > row.low else []
        x = scale.clip(row.mean)
        inner.append(element("circle", cx=x, cy=middle, r=4.5, class_="mark solid"))
        parts.append(element("g", *inner, class_=row.kind))
    return Markup("").join(parts)


def draw_forest(rows: Sequence[Row], x_title: str, title: str) -> Panel:
    """Differences of findings below each other, with their claims.

    Args:
        rows: One or more.
        x_title: Of the axis.
        title: Of the plot.
    """
    width, text_end, row_height, top = 900.0, 450.0, 58.0, 34.0
    bottom = top + row_height * len(rows)
    scale = forest_scale(rows, text_end + 20, width - 20)
    parts = [element("text", title, x=16, y=20, class_="head")]
    for value, shown in scale.ticks():
        parts.append(element("path", d=f"M{number(scale(value))} {number(top)}V{number(bottom)}", class_="grid"))
        parts.append(element("text", shown, x=scale(value), y=bottom + 17, text_anchor="middle", class_="tick"))
    for place, row in enumerate(rows):
        middle = top + row_height * (place + 0.5)
        lines = _wrapped(row.claim, 430, 12, 2)
        below = _wrapped(row.verdict, 430, 11.5, 2)
        first = middle - 7 * (len(lines) + len(below)) + 11
        for line, words in enumerate([*lines, *below]):
            is_claim = line < len(lines)
            parts.append(
                element("text", words, x=16, y=first + 14 * line + (not is_claim), class_=None if is_claim else "tick")
            )
        parts.append(draw_forest_row(row, scale, middle, row_height - 18))
    parts.append(element("text", x_title, x=scale.end, y=bottom + 36, text_anchor="end", class_="axis"))
    return Panel(
        Markup("").join(parts), width, bottom + 50, title, f"Differences and intervals of {len(rows)} findings."
    )


def curve_panel(
    curves: Sequence[Curve],
    x_scale: Scale,
    y_scale: Scale,
    *,
    series: int = 0,
    ticks: bool = True,
) -> Markup:
    """Curves of a group's runs over the steps.

    Args:
        curves: Steps and values of each run.
        x_scale: Of steps.
        y_scale: Of values.
        series: Its colour.
        ticks: Whether numbers stand at the axes.
    """
    parts = []
    left, right, bottom = x_scale.start, x_scale.end, y_scale.start
    for value, shown in y_scale.ticks():
        y = y_scale(value)
        parts.append(element("path", d=f"M{number(left)} {number(y)}H{number(right)}", class_="grid"))
        if ticks:
            parts.append(element("text", shown, x=left - 5, y=y + 4, text_anchor="end", class_="tick"))
    if ticks:
        for value, _ in x_scale.ticks():
            if value % 1:
                continue
            near_end = x_scale(value) > right - 12
            anchor = "end" if near_end else "start" if x_scale(value) < left + 12 else "middle"
            parts.append(
                element("text", _short(value), x=x_scale(value), y=bottom + 14, text_anchor=anchor, class_="tick")
            )
    lines = []
    for curve in curves:
        points = [(x_scale.clip(step), y_scale.clip(value)) for step, value in thinned(curve)]
        if len(points) == 1:
            lines.append(element("circle", cx=points[0][0], cy=points[0][1], r=2.5, class_="mark"))
        elif points:
            lines.append(element("path", d=path(points), class_="curve"))
    parts.append(element("g", *lines, class_=f"s{series}") if lines else Markup(""))
    return Markup("").join(parts)


def draw_curves(groups: Mapping[str, Sequence[Curve]], y_title: str, title: str) -> Panel:
    """A small plot for each group, with the same axes.

    Args:
        groups: Curves of runs by the group's title.
        y_title: What is over the steps.
        title: Of the plot.
    """
    columns = min(5, max(1, len(groups)))
    width, height = 210.0, 150.0
    x_scale, y_scale = curve_scales([curve for curves in groups.values() for curve in curves], 44, 200, 122, 28)
    parts = [element("text", f"{title}: {y_title} over optimizer steps", x=14, y=22, class_="head")]
    for place, (name, curves) in enumerate(groups.items()):
        across, down = place % columns, place // columns
        inner = [curve_panel(curves, x_scale, y_scale), element("text", _cut(name, 24), x=44, y=18)]
        parts.append(
            element("g", *inner, transform=f"translate({number(across * width)} {number(34 + down * height)})")
        )
    rows = math.ceil(len(groups) / columns)
    names = f"{y_title} over steps of {len(groups)} groups."
    return Panel(Markup("").join(parts), max(420.0, columns * width + 10), 40 + rows * height, title, names)


def curve_scales(curves: Sequence[Curve], left: float, right: float, bottom: float, top: float) -> tuple[Scale, Scale]:
    """Axes that all curves fit in, but for rare outliers such as a loss before the first step."""
    steps = [step for curve in curves for step, _ in curve]
    values = sorted(value for curve in curves for _, value in curve)
    if not values:
        return Scale(0, 1, left, right), Scale(0, 1, bottom, top)
    low, high = values[0], values[-1]
    middle = values[len(values) // 50], values[-1 - len(values) // 50]
    if high - low > 3 * (middle[1] - middle[0]) > 0:
        low, high = (
            max(low, middle[0] - (middle[1] - middle[0]) / 2),
            min(high, middle[1] + (middle[1] - middle[0]) / 2),
        )
    return (
        Scale(0, max(steps), left, right, num_ticks=4, padding=0.0),
        Scale(low, high, bottom, top, num_ticks=3),
    )


def thinned(curve: Curve) -> Sequence[tuple[int, float]]:
    """At most so many points of a curve, the last among them."""
    if len(curve) <= _MOST_POINTS:
        return curve
    distance = (len(curve) - 1) / (_MOST_POINTS - 1)
    return [curve[round(place * distance)] for place in range(_MOST_POINTS)]


@dataclasses.dataclass(frozen=True)
class _Cluster:
    """Points at the same place, which share a label."""

    points: Sequence[Point]
    lines: Sequence[str]
    box: Label


def _range(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """All values, and ends of their intervals unless these are far wider."""
    low, high = min(values), max(values)
    reach = 0.75 * ((high - low) or abs(high) * 0.05 or 1.0)
    ends = [value for value in ends if math.isfinite(value)]
    return max(low - reach, min([low, *ends])), min(high + reach, max([high, *ends]))


def _axes(x_scale: Scale, y_scale: Scale, frame: Box, x_title: str, y_title: str) -> Markup:
    left, top, right, bottom = frame
    parts = []
    for value, shown in y_scale.ticks():
        y = y_scale(value)
        parts.append(element("path", d=f"M{number(left)} {number(y)}H{number(right)}", class_="grid"))
        parts.append(element("text", shown, x=left - 8, y=y + 4, text_anchor="end", class_="tick"))
    for value, shown in x_scale.ticks():
        x = x_scale(value)
        parts.append(element("path", d=f"M{number(x)} {number(bottom)}v5", class_="frame"))
        parts.append(element("text", shown, x=x, y=bottom + 19, text_anchor="middle", class_="tick"))
    parts.append(element("path", d=f"M{number(left)} {number(bottom)}H{number(right)}", class_="frame"))
    middle = (left + right) / 2
    parts.append(element("text", x_title, x=middle, y=bottom + 38, text_anchor="middle", class_="axis"))
    across = f"translate(15 {number((top + bottom) / 2)}) rotate(-90)"
    parts.append(element("text", y_title, transform=across, text_anchor="middle", class_="axis"))
    return Markup("").join(parts)


def _stairs(points: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """The front as stairs: between two points it is as high as the cheaper one."""
    found: list[tuple[float, float]] = []
    for x, y in points:
        if found:
            found.append((x, found[-1][1]))
        found.append((x, y))
    return [*found, (end, found[-1][1])] if found else []


def _obstacles(
    points: Sequence[Point], x_scale: Scale, y_scale: Scale, stairs: Sequence[tuple[float, float]]
) -> tuple[list[Box], list[Box]]:
    """Boxes of points, and those of lines, in pixels."""
    boxes: list[Box] = []
    lines: list[Box] = []
    for one in points:
        x, y = x_scale(one.x), y_scale(one.y)
        boxes.append((x - 6, y - 6, x + 6, y + 6))
        lines += [(x - 3, y_scale(seed) - 3, x + 3, y_scale(seed) + 3) for seed in one.seeds]
        if math.isfinite(one.low):
            lines.append((x - 3, y_scale.clip(one.high), x + 3, y_scale.clip(one.low)))
        if math.isfinite(one.x_low):
            lines.append((x_scale.clip(one.x_low), y - 3, x_scale.clip(one.x_high), y + 3))
    for (x, y), (next_x, next_y) in itertools.pairwise(stairs):
        lines.append((min(x, next_x) - 2, min(y, next_y) - 2, max(x, next_x) + 2, max(y, next_y) + 2))
    return boxes, lines


def _clusters(points: Sequence[Point], x_scale: Scale, y_scale: Scale, width: float) -> list[_Cluster]:
    """Points that lie on each other get one label; the front comes first, and of very many the rest has none."""
    together: dict[tuple[int, int], list[Point]] = {}
    for one in sorted(points, key=lambda each: (not each.is_on_front, each.place)):
        x, y = x_scale(one.x), y_scale(one.y)
        near = next((key for key in together if abs(key[0] - x) <= 4 and abs(key[1] - y) <= 4), None)
        together.setdefault(near or (round(x), round(y)), []).append(one)
    clusters: list[_Cluster] = []
    most = _MOST_LABELS if width > 500 else 24
    for (x, y), members in together.items():
        if len(clusters) >= most and not any(one.is_on_front for one in members):
            continue
        lines = _wrapped(
            ", ".join(dict.fromkeys(one.label for one in members)), 118 if len(members) > 1 else width, _SIZE, 6
        )
        across = max(text_width(line, _SIZE) for line in lines)
        clusters.append(_Cluster(members, lines, Label(float(x), float(y), across, _LINE * len(lines))))
    return clusters


def _draw_label(cluster: _Cluster, box: Box) -> Markup:
    left, top, right, bottom = box
    x, y = cluster.box.x, cluster.box.y
    parts = []
    near_x, near_y = min(max(x, left), right), min(max(y, top + 2), bottom - 2)
    distance = math.hypot(near_x - x, near_y - y)
    if distance > 16:
        start = (x + (near_x - x) * 6 / distance, y + (near_y - y) * 6 / distance)
        parts.append(element("path", d=path([start, (near_x, near_y)]), class_="leader"))
    anchor, at = (
        ("start", left) if left >= x - 2 else ("end", right) if right <= x + 2 else ("middle", (left + right) / 2)
    )
    style = "label" if any(one.is_on_front for one in cluster.points) else "label off"
    for place, line in enumerate(cluster.lines):
        parts.append(element("text", line, x=at, y=top + _LINE * place + 10.5, text_anchor=anchor, class_=style))
    return Markup("").join(parts)


def _draw_point(one: Point, x_scale: Scale, y_scale: Scale, label: Markup, *, first: bool) -> Markup:
    x, y = x_scale(one.x), y_scale(one.y)
    parts = []
    if math.isfinite(one.low):
        parts.append(_bar(x, y_scale, one.low, one.high))
    if math.isfinite(one.x_low):
        parts.append(_whisker(x_scale, one.x_low, one.x_high, y, "ci"))
    parts += [element("circle", cx=x, cy=y_scale(seed), r=2.6, class_="seed") for seed in one.seeds]
    parts.append(_mark(one.series, x, y, 5.0, "mark solid" if one.is_on_front else "mark hollow"))
    parts.append(label)
    return element(
        "g",
        element("circle", cx=x, cy=y, r=11, fill="transparent"),
        *parts,
        class_=f"pt s{one.series}",
        data_g=one.place,
        data_tip=one.tip,
        tabindex=0 if first else -1,
        role="img",
        aria_label=one.tip.replace("\n", "; "),
    )


def _bar(x: float, scale: Scale, low: float, high: float) -> Markup:
    """An interval, with a tick at each end that lies within the plot."""
    top, bottom = scale.clip(high), scale.clip(low)
    d = f"M{number(x)} {number(bottom)}V{number(top)}"
    for value, y in ((low, bottom), (high, top)):
        if scale.low <= value <= scale.high:
            d += f"M{number(x - 3)} {number(y)}h6"
    return element("path", d=d, class_="ci")


def _whisker(scale: Scale, low: float, high: float, y: float, style: str) -> Markup:
    """A horizontal interval; an end outside of the plot is an arrow."""
    start, end = scale.clip(low), scale.clip(high)
    d = f"M{number(start)} {number(y)}H{number(end)}"
    for value, x, inward in ((low, start, 5), (high, end, -5)):
        if scale.low <= value <= scale.high:
            d += f"M{number(x)} {number(y - 3)}v6"
        else:
            d += f"M{number(x + inward)} {number(y - 4)}L{number(x)} {number(y)}L{number(x + inward)} {number(y + 4)}"
    return element("path", d=d, class_=style)


def _mark(series: int, x: float, y: float, r: float, style: str) -> Markup:
    shape = _SHAPES[series % len(_SHAPES)]
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=r, class_=style)
    if shape == "square":
        return element("rect", x=x - r * 0.9, y=y - r * 0.9, width=r * 1.8, height=r * 1.8, class_=style)
    corners = {
        "triangle": [(0, -1.2), (1.1, 0.85), (-1.1, 0.85)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "cross": [
            *((-1.2, -0.45), (-0.45, -0.45), (-0.45, -1.2), (0.45, -1.2), (0.45, -0.45), (1.2, -0.45)),
            *((1.2, 0.45), (0.45, 0.45), (0.45, 1.2), (-0.45, 1.2), (-0.45, 0.45), (-1.2, 0.45)),
        ],
    }[shape]
    return element("path", d=path([(x + r * across, y + r * down) for across, down in corners]) + "z", class_=style)


def _legend(names: Sequence[str], left: float, top: float, width: float) -> tuple[Markup, float]:
    """Marks with names, and how high that is."""
    parts, x, y = [], left + 6, top
    for place, name in enumerate(names):
        needed = text_width(name, 12) + 34
        if x > left + 6 and x + needed > left + width:
            x, y = left + 6, y + 18
        mark = _mark(place, x, y - 4, 5.0, "mark solid")
        parts.append(element("g", mark, element("text", name, x=x + 10, y=y), class_=f"s{place}"))
        x += needed
    return Markup("").join(parts), y - top + 14


def _wrapped(text: str, width: float, size: float, most: int) -> list[str]:
    """Words in lines of a width, at most so many."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return lines


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _short(value: float) -> str:
    return f"{value / 1000:.3g}k" if abs(value) >= 10_000 else f"{value:,.0f}"
