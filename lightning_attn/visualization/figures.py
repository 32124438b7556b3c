"""Figures of attention maps: over an image, and as matrices of tokens."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from lightning_attn.io import write_file
from lightning_attn.visualization.maps import TermMaps
from lightning_attn.visualization.pixel_grid import PixelGrid

Heads = Literal["mean", "each", "both"]
Quantity = Literal["weights", "energies"]
Array = npt.NDArray[np.float64]

TERM_TITLES = {
    "E1": "E1: query content\nand key content",
    "E2": "E2: query content and\nrelative position",
    "E3": "E3: key content\nalone",
    "E4": "E4: relative position\nalone",
}
WHOLE_TITLES = {"weights": "whole: softmax of\nthe summed energies", "energies": "whole: sum of\nthe energies"}
MAP_UNITS = {"weights": "weight × number of keys", "energies": "energy (mean over keys 0)"}
MATRIX_UNITS = {"weights": "weight", "energies": "energy (mean over keys 0)"}
HIDDEN_COLOUR = "0.75"
QUERY_COLOUR = "#00d5e5"
PANEL_INCHES = 2.2
MAX_INCHES = 40.0


def draw_term_maps(
    maps: TermMaps,
    image: npt.ArrayLike | Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    grid: PixelGrid | None = None,
    terms: Sequence[str] | None = None,
    heads: Heads | int = "mean",
    quantity: Quantity = "weights",
    title: str | None = None,
) -> Figure:
    """Draws the attention maps of one query of a map: a column for each term alone and one for the whole.

    Weights are drawn relative to uniform weights, on a logarithmic scale common to all panels, so that panels can be
    compared: only keys above the uniform weight have a colour. A key is drawn at its position, as a square of
    `kv_stride` positions around it. Keys that are hidden from the query are grey.

    Args:
        maps: From `term_maps`, of one query.
        image: The image as the network saw it, resized, but neither normalised nor padded: `[H, W]` or `[H, W, 3]`, or
            a tensor `[1 or 3, H, W]`; uint8, or floats from 0 to 1. None draws the maps alone.
        path: File to write, in the format of its suffix (.png, .svg, .pdf); an existing file is replaced. None writes
            nothing.
        grid: Where the map's positions lie in the image; keys in the padding are not drawn. Needed for the maps of a
            network (`RecordedImage.grid`). None for an image that is cut into equal cells, one for each position.
        terms: Which of the terms that are on; None for all. `()` draws the whole alone.
        heads: Rows: the mean over heads, each head, both, or one head, counted from 1 as in the figures.
        quantity: `"weights"`, or `"energies"`.
        title: Above the figure; None for the position of the query.

    Returns:
        The figure.

    Raises:
        ValueError: If a term is off, the image does not fit the map, or the maps are those of a sentence.
        OSError: If the file cannot be written; no partial file remains.
    """
    if maps.position is None or len(maps.key_size) != 2:
        raise ValueError("maps are those of a sentence: use draw_token_matrix.")
    columns, rows = [*maps.selected(terms), "whole"], _rows(maps, heads)
    picture = None if image is None else fitting_image(image, maps.key_size, grid)
    panels = _panels(rows, columns, quantity, factor=int(maps.visible.sum()))
    if grid is not None:
        key_rows, key_columns = grid.keys_inside(maps.kv_stride)
        for row in panels:
            for values in row.values():
                values[key_rows:], values[:, key_columns:] = math.nan, math.nan
    scale = _map_scale(panels, quantity)

    (height, width), first = maps.key_size, 0 if picture is None else 1
    extent = (-0.5, width - 0.5, height - 0.5, -0.5) if grid is None else grid.image_extent()
    ratio = (extent[2] - extent[3]) / (extent[1] - extent[0])
    count, tall = first + len(columns), PANEL_INCHES * min(2.0, max(0.3, ratio))
    figure = Figure(figsize=(PANEL_INCHES * count + 1.0, (tall + 0.1) * len(rows) + 1.0), dpi=100, layout="compressed")
    panel_axes = figure.subplots(len(rows), count, squeeze=False)
    for axes in panel_axes.flat:
        axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[], aspect="equal")
    if picture is not None:
        panel_axes[0, 0].imshow(picture, extent=extent)
        panel_axes[0, 0].set_title("image and\nquery", fontsize=9)
        _mark_query(panel_axes[0, 0], maps)
        for axes in panel_axes[1:, 0]:
            axes.set_axis_off()
    for r, (label, _) in enumerate(rows):
        panel_axes[r, first].set_ylabel(label, fontsize=10)
        for axes, name in zip(panel_axes[r, first:], columns, strict=True):
            if picture is not None:
                axes.imshow(faint(picture), extent=extent)
            axes.imshow(_hidden_overlay(maps, padding=grid), extent=_key_extent(maps), interpolation="nearest")
            axes.imshow(panels[r][name], extent=_key_extent(maps), interpolation="nearest", **scale)
            axes.set(xlim=extent[:2], ylim=extent[2:])
            _mark_query(axes, maps)
    for axes, name in zip(panel_axes[0, first:], columns, strict=True):
        axes.set_title(_column_title(name, quantity), fontsize=9)
    colour_bar(figure, panel_axes[:, first:], scale, MAP_UNITS[quantity])
    position = f"row {maps.position[0]}, column {maps.position[1]} of a {height} × {width} map"
    label = "" if grid is None else _padding_note(rows, grid)
    _write_titles(figure, f"Attention of the query at {position}" if title is None else title, maps, label)
    if path is not None:
        save_figure(figure, path)
    return figure


def draw_token_matrix(
    maps: TermMaps,
    queries: Sequence[str],
    keys: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    terms: Sequence[str] | None = None,
    heads: Heads | int = "mean",
    quantity: Quantity = "weights",
    title: str | None = None,
    query_label: str = "query token",
    key_label: str = "key token",
) -> Figure:
    """Draws the attention matrices of a sentence: one for each term alone and one for the whole.

    All matrices have one colour scale. Keys that are hidden from a query are grey.

    Args:
        maps: From `term_maps` of a sentence, of all queries or of one.
        queries: Names of the queries, from top to bottom.
        keys: Names of all keys, including those that `kv_stride` skips.
        path: As in `draw_term_maps`.
        terms: As in `draw_term_maps`; `()` draws the whole alone.
        heads: As in `draw_term_maps`.
        quantity: As in `draw_term_maps`.
        title: Above the figure; None for none.
        query_label: Axis label of the queries.
        key_label: Axis label of the keys.

    Returns:
        The figure.

    Raises:
        ValueError: If a term is off, names are too few or too many, or the maps are those of a map.
        OSError: If the file cannot be written; no partial file remains.
    """
    if len(maps.key_size) != 1:
        raise ValueError("maps are those of a query of a map: use draw_term_maps.")
    columns, rows = [*maps.selected(terms), "whole"], _rows(maps, heads)
    num_queries = 1 if maps.position is not None else maps.visible.shape[0]
    for what, tokens, number in (("queries", queries, num_queries), ("keys", keys, maps.key_size[0])):
        if len(tokens) != number:
            raise ValueError(f"{what}: {len(tokens)} names for {number} tokens: one name each.")
    shown = list(keys)[:: maps.kv_stride]
    panels = _panels(rows, columns, quantity)
    scale = _matrix_scale(panels, quantity)

    # A token gets 0.2 inches, or less in a long sentence.
    cell = min(0.2, MAX_INCHES / max(1, len(shown) * len(columns)), MAX_INCHES / max(1, num_queries * len(rows)))
    fontsize = max(3.0, min(8.0, 40 * cell))
    left, below = (0.35 + fontsize / 105 * max(map(len, tokens), default=0) for tokens in (queries, shown))
    wide, tall = (max(1.3, cell * number) + 0.15 for number in (len(shown), num_queries))
    figure = Figure(
        figsize=(wide * len(columns) + left + 0.9, tall * len(rows) + below + 1.0), dpi=120, layout="constrained"
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    overlay = _hidden_overlay(maps).reshape(num_queries, -1, 4)
    for r, (label, _) in enumerate(rows):
        grid[r, 0].set_ylabel(f"{label}\n{query_label}" if len(rows) > 1 else query_label, fontsize=9)
        for axes, name in zip(grid[r], columns, strict=True):
            axes.imshow(overlay, aspect="auto", interpolation="nearest")
            axes.imshow(panels[r][name].reshape(num_queries, -1), aspect="auto", interpolation="nearest", **scale)
            axes.set_xticks(range(len(shown)), shown, rotation=90)
            axes.set_yticks(range(num_queries), queries)
            axes.tick_params(length=0, labelsize=fontsize)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(_column_title(name, quantity), fontsize=9)
    colour_bar(figure, grid, scale, MATRIX_UNITS[quantity])
    _write_titles(figure, title, maps, key_label)
    if path is not None:
        save_figure(figure, path)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure atomically, in the format of the suffix; an existing file is replaced.

    Raises:
        ValueError: If the suffix is not a format of figures.
        OSError: If the folder cannot be written to or is full; no partial file remains.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"path={str(path)!r} must end with the format of the figure, one of {sorted(known)}.")
    # No date and no random names in the file, so that files of the same figure are bitwise identical.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}.get(kind)
    with rc_context({"svg.hashsalt": "lightning_attn"}):
        return write_file(
            path,
            lambda file: figure.savefig(file, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.08),
            replace=True,
        )


def _rows(maps: TermMaps, heads: Heads | int) -> list[tuple[str, TermMaps]]:
    """The rows of a figure, each with its label, as maps of a single head."""
    if isinstance(heads, int):
        if not 1 <= heads <= maps.num_heads:
            raise ValueError(f"heads: {heads} is none of the heads 1 to {maps.num_heads}.")
        return [(f"head {heads}", maps.head(heads - 1))]
    if heads not in ("mean", "each", "both"):
        raise ValueError(f"heads must be 'mean', 'each', 'both' or the number of a head, got {heads!r}.")
    rows = [] if heads == "each" else [("mean over heads" if maps.num_heads > 1 else "", maps.mean())]
    if heads != "mean":
        rows += [(f"head {m + 1}", maps.head(m)) for m in range(maps.num_heads)]
    return rows


def _panels(
    rows: list[tuple[str, TermMaps]], columns: Sequence[str], quantity: Quantity, factor: float = 1.0
) -> list[dict[str, Array]]:
    """For every row, the values of each panel: weights times the factor, or energies; NaN where a key is hidden."""
    if quantity not in ("weights", "energies"):
        raise ValueError(f"quantity must be 'weights' or 'energies', got {quantity!r}.")
    panels = []
    for _, maps in rows:
        if quantity == "weights":
            found = {name: factor * values for name, values in {**maps.weights, "whole": maps.whole}.items()}
        else:
            found = {**maps.energies, "whole": torch.stack(list(maps.energies.values())).sum(0)}
        panels.append({name: _panel_values(found[name][0].double(), maps, quantity) for name in columns})
    return panels


def _panel_values(values: Tensor, maps: TermMaps, quantity: Quantity) -> Array:
    values = values.masked_fill(~maps.visible, math.nan)
    if quantity == "energies":  # centred: a constant added to all energies of a query changes no weight
        keys = tuple(range(values.dim() - len(maps.key_size), values.dim()))
        values = values - values.nanmean(keys, keepdim=True)
    panel: Array = values.numpy()
    return panel


def _write_titles(figure: Figure, title: str | None, maps: TermMaps, label: str = "") -> None:
    """Writes the title, and below the panels their label and the meaning of grey."""
    if not bool(maps.visible.all()):
        label += "  —  grey: keys hidden from the query" if label else "grey: keys hidden from the query"
    if label:
        figure.supxlabel(label, fontsize=9)
    if title is not None:
        figure.suptitle(title, fontsize=11)


def _column_title(name: str, quantity: Quantity) -> str:
    return WHOLE_TITLES[quantity] if name == "whole" else TERM_TITLES[name]


def _map_scale(panels: list[dict[str, Array]], quantity: Quantity) -> dict[str, Any]:
    """Norm and colour map of `imshow`; values up to the uniform weight are transparent."""
    if quantity == "energies":
        return _diverging_scale(panels)
    return {"norm": LogNorm(1.0, max(2.0, _largest(panels)), clip=True), "cmap": _ramp("YlOrRd")}


def _matrix_scale(panels: list[dict[str, Array]], quantity: Quantity) -> dict[str, Any]:
    if quantity == "energies":
        return _diverging_scale(panels)
    return {"norm": Normalize(0.0, _largest(panels) or 1.0), "cmap": colormaps["Blues"]}


def _diverging_scale(panels: list[dict[str, Array]]) -> dict[str, Any]:
    largest = _largest(panels) or 1.0
    return {"norm": Normalize(-largest, largest), "cmap": colormaps["RdBu_r"]}


def _largest(panels: list[dict[str, Array]]) -> float:
    """The largest finite absolute value; 0 if there is none."""
    values = np.abs(np.concatenate([values.ravel() for row in panels for values in row.values()]))
    return float(values[np.isfinite(values)].max(initial=0.0))


def _ramp(name: str) -> Colormap:
    """A colour map that starts transparent."""
    colours = colormaps[name](np.linspace(0, 1, 256))
    colours[:, 3] = 0.9 * np.linspace(0, 1, 256) ** 0.4
    return ListedColormap(colours)


def colour_bar(figure: Figure, grid: npt.NDArray[np.object_], scale: dict[str, Any], label: str) -> None:
    """Adds one colour bar for the common `norm` and `cmap` of all panels of a grid."""
    bar = figure.colorbar(
        ScalarMappable(**scale), ax=grid.ravel().tolist(), fraction=0.05, aspect=18 * len(grid), pad=0.01
    )
    bar.set_label(label, fontsize=9)
    if isinstance(scale["norm"], LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    bar.ax.tick_params(labelsize=8)


def fitting_image(image: npt.ArrayLike | Tensor, size: tuple[int, ...], grid: PixelGrid | None = None) -> Array:
    """The image as `[H, W, 3]` floats from 0 to 1.

    Args:
        image: As in `draw_term_maps`.
        size: Rows and columns of the map.
        grid: As in `draw_term_maps`.

    Raises:
        ValueError: If it is not an image, is not the grid's, or cannot be cut into equal cells for a map of this size.
    """
    array = np.asarray(image.detach().cpu().movedim(0, -1) if isinstance(image, Tensor) and image.dim() == 3 else image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(
            f"image must be [H, W] or [H, W, 3], or a tensor [1 or 3, H, W], got shape {np.asarray(image).shape}."
        )
    pixels: Array = array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"image must be uint8 or from 0 to 1, its values are from {pixels.min():g} to {pixels.max():g}: undo the "
            "normalisation of the network's input."
        )
    described = f"image of {pixels.shape[0]} × {pixels.shape[1]} pixels"
    if grid is not None:
        if pixels.shape[:2] != grid.image_size or tuple(size) != grid.map_size:
            raise ValueError(
                f"{described} and map of {size[0]} × {size[1]} positions are not those of {grid}: pass the image that "
                "the network saw, without padding."
            )
    elif any(pixels.shape[axis] % size[axis] for axis in range(2)) or len(
        {pixels.shape[axis] // size[axis] for axis in range(2) if size[axis] > 1}
    ) not in (0, 1):
        raise ValueError(
            f"{described} cannot be cut into {size[0]} × {size[1]} equal squares, one for each position of the map. "
            "For the map of a network pass where its positions lie: grid=PixelGrid(...), such as that of "
            "record_image(network, image)."
        )
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def faint(picture: Array) -> Array:
    """An image of `fitting_image` in light grey, as a background for colours."""
    grey = picture @ np.array([0.299, 0.587, 0.114])
    return np.repeat((0.6 + 0.4 * grey)[..., None], 3, axis=2)


def _key_extent(maps: TermMaps) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the keys' squares, in positions of the map; key (0, 0) is centred at (0, 0)."""
    half, (rows, columns) = maps.kv_stride / 2, maps.visible.shape
    return -half, columns * maps.kv_stride - half, rows * maps.kv_stride - half, -half


def _hidden_overlay(maps: TermMaps, padding: PixelGrid | None = None) -> Array:
    """RGBA: grey where a key is hidden from the query, transparent elsewhere and in the padding of a grid."""
    overlay = np.zeros((*maps.visible.shape, 4))
    overlay[~maps.visible.numpy()] = to_rgba(HIDDEN_COLOUR, 0.8)
    if padding is not None:
        key_rows, key_columns = padding.keys_inside(maps.kv_stride)
        overlay[key_rows:], overlay[:, key_columns:] = 0.0, 0.0
    return overlay


def _padding_note(rows: list[tuple[str, TermMaps]], grid: PixelGrid) -> str:
    """How much weight lies on keys that are not drawn, since they are in the padding; empty if there are none."""
    maps = rows[0][1]
    share = weight_on_padding(maps.whole, grid, maps.kv_stride)
    if grid.keys_inside(maps.kv_stride) == tuple(maps.visible.shape):
        return ""
    whose = f" ({rows[0][0]})" if rows[0][0] else ""
    return f"not drawn: keys in the padding around the image, with {100 * share:.1f} % of the weight{whose}"


def weight_on_padding(weights: Tensor, grid: PixelGrid, kv_stride: int) -> float:
    """The share of the weights `[M, H_k, W_k]`, in the mean over heads, on keys that are centred beyond the image."""
    key_rows, key_columns = grid.keys_inside(kv_stride)
    inside = weights[:, :key_rows, :key_columns].double().sum()
    return max(0.0, 1.0 - float(inside) / max(1e-12, float(weights.double().sum())))


def _mark_query(axes: Axes, maps: TermMaps) -> None:
    assert maps.position is not None
    row, column = maps.position
    outline = [withStroke(linewidth=3.4, foreground="black")]
    axes.plot([column], [row], marker="o", ms=7, mfc="none", mec=QUERY_COLOUR, mew=1.8, path_effects=outline)
