"""Figures of the sampling points of deformable convolution and the kernels of dynamic convolution."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from lightning_attn.attention.deformable import DeformableConv
from lightning_attn.attention.dynamic import DynamicConv
from lightning_attn.visualization.figures import colour_bar, faint, fitting_image, save_figure
from lightning_attn.visualization.maps import find_query
from lightning_attn.visualization.pixel_grid import PixelGrid

POINT_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")  # Okabe and Ito's colour-blind safe palette


@dataclasses.dataclass(frozen=True)
class SamplingPoints:
    """The sampling points of a deformable convolution for one query (Eq. 4).

    Attributes:
        points: q + p_m + w_m x_q, (row, column) of each tap m in positions of the input, `[taps, 2]`.
        grid: q + p_m, those of the regular convolution, `[taps, 2]`.
        modulation: Factor on the sample of each tap, `[taps]`; ones if the convolution is not modulated.
        size: Height and width of the input.
    """

    points: Tensor
    grid: Tensor
    modulation: Tensor
    size: tuple[int, ...]


@torch.no_grad()
def sampling_points(
    convolution: DeformableConv,
    x: Tensor,
    position: tuple[int, int] | int,
    *,
    sample: int = 0,
    key_padding_mask: Tensor | None = None,
) -> SamplingPoints:
    """The sampling points of a deformable convolution of maps for the output at a position.

    Args:
        convolution: With `ndim=2`.
        x: Input of the convolution, `[B, C, H, W]`.
        position: (row, column) of the output, or its index row by row.
        sample: Index in the batch.
        key_padding_mask: `[B, H, W]`, as passed to the convolution.

    Raises:
        ValueError: If the convolution is one of sequences, or the position or sample does not exist.
    """
    if convolution.offset_groups != 1:
        raise ValueError(f"sampling points need offset_groups=1, the convolution has {convolution.offset_groups}.")
    if convolution.ndim != 2 or x.dim() != 4:
        raise ValueError(
            f"sampling points need a map (ndim=2): convolution has ndim={convolution.ndim}, x shape {tuple(x.shape)}."
        )
    if not 0 <= sample < x.shape[0]:
        raise ValueError(f"sample={sample} is not in the batch of {x.shape[0]}.")
    x = x[sample : sample + 1]
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask[sample : sample + 1, None], 0)
    offsets = convolution.offset(x)[0].double().cpu()
    query, _ = find_query(position, tuple(offsets.shape[1:]))
    assert query is not None, "a position was given"
    taps = math.prod(convolution.kernel_size)
    rows, columns = torch.meshgrid(
        *(
            torch.arange(count) * dilation - padding + index * stride
            for count, dilation, padding, stride, index in zip(
                convolution.kernel_size,
                convolution.dilation,
                convolution.padding,
                convolution.stride,
                query,
                strict=True,
            )
        ),
        indexing="ij",
    )
    grid = torch.stack((rows.flatten(), columns.flatten()), dim=1).double()
    channels = offsets[:, query[0], query[1]]
    modulation = channels[2 * taps :].sigmoid() if convolution.modulated else torch.ones(taps, dtype=torch.float64)
    return SamplingPoints(grid + channels[: 2 * taps].view(taps, 2), grid, modulation, tuple(x.shape[2:]))


@torch.no_grad()
def dynamic_kernel(convolution: DynamicConv, x: Tensor, position: tuple[int, int] | int, *, sample: int = 0) -> Tensor:
    """The kernels that a dynamic convolution predicts at a position (Eq. 6 and 7).

    Args:
        convolution: Of maps or of sequences.
        x: Input of the convolution, `[B, C, H, W]` or `[B, L, C]`.
        position: (row, column) or an index.
        sample: Index in the batch.

    Returns:
        One kernel for each of the N_g groups, each with the sum 1: `[N_g, n_k, n_k]` or `[N_g, n_k]`.

    Raises:
        ValueError: If the position or sample does not exist.
    """
    if not 0 <= sample < x.shape[0]:
        raise ValueError(f"sample={sample} is not in the batch of {x.shape[0]}.")
    contents = x[sample] if convolution.ndim == 1 else x[sample].movedim(0, -1)
    query, _ = find_query(position, tuple(contents.shape[:-1]))
    content = F.glu(convolution.input_proj(contents[query]), dim=-1)
    logits: Tensor = convolution.kernel_proj(content).double().cpu()
    return (
        logits.view(convolution.groups, -1)
        .softmax(dim=1)
        .view(convolution.groups, *[convolution.kernel_size] * convolution.ndim)
    )


def draw_sampling_points(
    points: SamplingPoints | Sequence[SamplingPoints],
    image: npt.ArrayLike | Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    grid: PixelGrid | None = None,
    title: str | None = "Sampling points of deformable convolution",
) -> Figure:
    """Draws the taps of one or several queries: rings on the regular grid, discs at the sampling points.

    Args:
        points: From `sampling_points`; of several queries in one map, at most as many as `POINT_COLOURS`.
        image: As in `draw_term_maps`.
        path: As in `draw_term_maps`.
        grid: As in `draw_term_maps`.
        title: Above the figure.

    Raises:
        ValueError: If the image does not fit the map, or the queries are too many or of different maps.
        OSError: If the file cannot be written; no partial file remains.
    """
    queries = [points] if isinstance(points, SamplingPoints) else list(points)
    if not 1 <= len(queries) <= len(POINT_COLOURS) or len({query.size for query in queries}) != 1:
        raise ValueError(f"points: {len(queries)} queries; pass 1 to {len(POINT_COLOURS)}, all of one map.")
    height, width = queries[0].size
    figure = Figure(figsize=(5.2, 0.7 + 5.0 * min(2.0, max(0.3, height / width))), dpi=100, layout="compressed")
    axes = figure.subplots()
    extent = (-0.5, width - 0.5, height - 0.5, -0.5) if grid is None else grid.image_extent()
    if image is not None:
        axes.imshow(faint(fitting_image(image, queries[0].size, grid)), extent=extent)
    for query, colour in zip(queries, POINT_COLOURS, strict=False):
        (down, right), (moved_down, moved_right) = query.grid.T.numpy(), query.points.T.numpy()
        for line in zip(right, moved_right, down, moved_down, strict=True):
            axes.plot(line[:2], line[2:], color=colour, linewidth=0.8, alpha=0.7, zorder=2)
        axes.scatter(right, down, s=16, facecolors="white", edgecolors=colour, linewidths=0.9, zorder=3)
        area = 46 * query.modulation.numpy()
        axes.scatter(moved_right, moved_down, s=area, color=colour, edgecolors="white", linewidths=0.7, zorder=4)
    axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[], aspect="equal")
    note = "rings: the regular grid; discs: after the offsets"
    modulated = any(not bool((query.modulation == 1).all()) for query in queries)
    axes.set_xlabel(note + ("; area: modulation" if modulated else ""), fontsize=9)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        save_figure(figure, path)
    return figure


def draw_dynamic_kernels(
    kernels: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = "Kernels of dynamic convolution",
) -> Figure:
    """Draws the kernels of all groups at one or several positions, with one colour scale.

    Args:
        kernels: From `dynamic_kernel`; of several positions, each with the name of its row.
        path: As in `draw_term_maps`.
        title: Above the figure.

    Raises:
        ValueError: If there are no kernels, or they have different shapes.
        OSError: If the file cannot be written; no partial file remains.
    """
    rows = {"": kernels} if isinstance(kernels, Tensor) else dict(kernels)
    shapes = {tuple(kernel.shape) for kernel in rows.values()}
    if len(shapes) != 1:
        raise ValueError(f"kernels must be one or more of the same shape, got the shapes {sorted(shapes)}.")
    groups, *size = shapes.pop()
    figure = Figure(
        figsize=(0.95 * groups + 1.2, (1.05 if len(size) == 2 else 0.35) * len(rows) + 0.8),
        dpi=100,
        layout="compressed",
    )
    grid = figure.subplots(len(rows), groups, squeeze=False)
    largest = max(float(kernel.max()) for kernel in rows.values())
    scale: dict[str, Any] = {"norm": Normalize(0.0, largest), "cmap": colormaps["Blues"]}
    for r, (label, kernel) in enumerate(rows.items()):
        for g, axes in enumerate(grid[r]):
            axes.imshow(kernel[g].reshape(-1, size[-1]).numpy(), interpolation="nearest", **scale)
            axes.set(xticks=[], yticks=[])
            if r == 0:
                axes.set_title(f"group {g + 1}", fontsize=8)
        grid[r, 0].set_ylabel(label, fontsize=8)
    colour_bar(figure, grid, scale, "weight of the tap")
    if title is not None:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        save_figure(figure, path)
    return figure
