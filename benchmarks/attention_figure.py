"""The figure of `benchmarks.attention`."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.attention_shape import Shape, terms_and_size
from benchmarks.results import Comparison, Result, Side

# Told apart by shape too, and by readers who do not see red and green apart.
COLORS = {"ours": "#0072b2", "peer": "#d55e00", "naive": "#cc79a7", "floor": "#555555"}
UNITS = {"time": "ms, forward + backward", "memory": "MB at the peak"}
MARKERS = {"ours": "o", "peer": "s", "naive": "^", "floor": "_"}


def _seconds(side: Side) -> float | None:
    return None if side.timing is None else 1e3 * side.timing.median


def _increase(side: Side) -> float | None:
    return None if side.memory is None else side.memory.increase / 1e6


def _draw_sets(axes: Axes, rows: Sequence[Comparison], figure: Callable[[Side], float | None], unit: str) -> None:
    """One position for each term set, one marker for each side."""
    peer = _peer(rows)
    for name, label in {peer: "peer", "naive": "naive", "ours": "ours", "floor": "floor"}.items():
        found = [(index, figure(row.sides[name])) for index, row in enumerate(rows) if name in row.sides]
        points = [(index, value) for index, value in found if value is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker=MARKERS[label],
                markersize=13 if label == "floor" else 7,
                markeredgewidth=2 if label == "floor" else 1,
                color=COLORS[label],
                label="floor (SDPA, E1)" if label == "floor" else name,
            )
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=45)
    _style(axes, unit)
    axes.grid(axis="x", visible=False)
    failures = {index: row.sides[peer].error for index, row in enumerate(rows) if peer in row.sides}
    words = {index: error.split(":")[0] for index, error in failures.items() if error is not None}
    if words:
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** 0.4)  # room above the markers
    for index, word in words.items():
        axes.annotate(
            f"{peer} {word}",
            (index, 0.99),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="center",
            va="top",
            color=COLORS["peer"],
            fontsize="small",
        )


def _style(axes: Axes, unit: str) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_growth(axes: Axes, rows: Sequence[Comparison], figure: Callable[[Side], float | None], unit: str) -> None:
    """One line for each term set and side over the number of queries."""
    styles = {"ours": ("-", "o"), _peer(rows): ("--", "s")}
    kinds = list(dict.fromkeys(terms_and_size(row.name)[0] for row in rows))
    for index, kind in enumerate(kinds):
        for name, (line, marker) in styles.items():
            points = [
                (_queries(row), value)
                for row in rows
                if terms_and_size(row.name)[0] == kind
                and name in row.sides
                and (value := figure(row.sides[name])) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), line, marker=marker, color=f"C{index}", label=f"{name} {kind}")
    floor = {_queries(row): figure(row.sides["floor"]) for row in rows if "floor" in row.sides}
    points = [(queries, value) for queries, value in floor.items() if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), ":", color=COLORS["floor"], label="floor (SDPA, E1)")
    axes.legend(loc="upper left", fontsize="small")
    _style(axes, unit)
    axes.set_xscale("log")
    sizes = dict(sorted((_queries(row), terms_and_size(row.name)[1]) for row in rows))
    axes.set_xticks(list(sizes), list(sizes.values()))
    axes.set_xticks([], minor=True)


def _queries(row: Comparison) -> int:
    return Shape.parse(terms_and_size(row.name)[1]).num_queries


def _peer(rows: Sequence[Comparison]) -> str:
    """The peer that the rows are about: mmcv's module where it takes part."""
    return "mmcv" if any("mmcv" in row.sides for row in rows) else "naive"


def draw_results(results: Sequence[Result]) -> Figure | None:
    """Times and memory of each case side by side, and how they grow; None if there is no case of either kind."""
    kinds = {result.case: result.case.removeprefix("attention.").partition(":")[0] for result in results}
    sets = [result for result in results if kinds[result.case] not in ("growth", "deformable")]
    growth = [result for result in results if kinds[result.case] == "growth"]
    height = len(sets) + bool(growth)
    if height == 0:
        return None
    figure = Figure(figsize=(13, 3.4 * height + 0.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels = figure.subplots(height, 2, squeeze=False)
    for result, (left, right) in zip(sets, panels, strict=False):
        rows = result.comparisons
        _draw_sets(left, rows, _seconds, UNITS["time"])
        left.set_title(f"time: {result.title}", loc="left", fontsize="medium")
        if all(side.memory is None for row in rows for side in row.sides.values()):
            right.set_axis_off()
            continue
        _draw_sets(right, rows, _increase, UNITS["memory"])
        right.set_title(f"memory: {result.title}", loc="left", fontsize="medium")
    if sets:
        labelled = [axes.get_legend_handles_labels() for axes in panels[: len(sets), 0]]
        by_label = {
            label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)
        }
        figure.legend(by_label.values(), by_label, loc="outside upper center", ncols=4, frameon=False)
    if growth:
        for axes, measure, quantity in zip(panels[-1], (_seconds, _increase), ("time", "memory"), strict=True):
            _draw_growth(axes, growth[-1].comparisons, measure, UNITS[quantity])
            axes.set_title(f"{quantity}: {growth[-1].title}", loc="left", fontsize="medium")
    return figure
