"""Attention maps of a network for images: recorded in one run, and placed on the image."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_attn.attention import TransformerAttention
from lightning_attn.networks.images.batching import NormalizedBatch
from lightning_attn.visualization.figures import weight_on_padding
from lightning_attn.visualization.maps import TermMaps, attentions_of, layer_names, recorded_inputs_of, term_maps
from lightning_attn.visualization.pictures import Picture, fitted
from lightning_attn.visualization.pixel_grid import PixelGrid

__all__ = ["RecordedImage", "image_attention", "record_image"]

_LONGEST_SIDE = 480  # of the picture, in pixels


@dataclasses.dataclass(frozen=True)
class RecordedImage:
    """What the attentions of a network computed with for one image.

    Attributes:
        image: RGB, uint8, `[3, H, W]`: as the network saw it, resized, but neither normalised nor padded.
        batch_size: Height and width of the padded batch.
        inputs: Of each attention that ran, by its layer's name, in the order of the network's modules.
    """

    image: Tensor
    batch_size: tuple[int, int]
    inputs: Mapping[str, tuple[TransformerAttention, dict[str, Any]]]

    def grid(self, layer: str) -> PixelGrid:
        """Where the positions of a layer's map lie in the image."""
        rows, columns = self.inputs[layer][1]["query"].shape[2:]
        return PixelGrid.of_batch((self.image.shape[1], self.image.shape[2]), self.batch_size, (rows, columns))

    def maps(self, layer: str, position: tuple[int, int]) -> TermMaps:
        """The maps of one query of a layer; see `term_maps`."""
        attention, inputs = self.inputs[layer]
        return term_maps(attention, **inputs, position=position)


@torch.no_grad()
def record_image(network: nn.Module, image: Tensor) -> RecordedImage | None:
    """Runs a network on one image, and records the inputs of its attentions.

    Args:
        network: Maps a list of images, in evaluation mode; with a `NormalizedBatch`.
        image: RGB, uint8, `[3, H, W]`.

    Returns:
        None if no attention with terms runs.
    """
    batch_size = [0, 0]

    def record_batch(module: nn.Module, arguments: Any, output: Tensor) -> None:
        batch_size[:] = output.shape[2:]

    handles = [one.register_forward_hook(record_batch) for one in network.modules() if isinstance(one, NormalizedBatch)]
    try:
        inputs = recorded_inputs_of(attentions_of(network), lambda: network([image]))
    finally:
        for handle in handles:
            handle.remove()
    if not inputs or not all(batch_size):
        return None
    named = {name: (module, inputs[module]) for name, module in layer_names(network).items() if module in inputs}
    return RecordedImage(image, (batch_size[0], batch_size[1]), named)


def image_attention(network: nn.Module, image: Tensor) -> tuple[dict[str, Any], Picture] | None:
    """The weights of the attention with the largest map (the last of equal ones), for the query in the middle.

    Args:
        network: As for `record_image`.
        image: RGB, uint8, `[3, H, W]`.

    Returns:
        Title, position of the query, size of the map, `kv_stride`, and weights as `TermMaps.as_lists`, null also for
        keys in the padding; their share of the weight of all terms (`padding`); where the query (`query_at`: x, y) and
        the squares of all keys (`key_box`: left, top, width, height) lie, in parts of the image's width and height. And
        the image. None if no attention with terms runs.
    """
    recorded = record_image(network, image)
    if recorded is None:
        return None
    # The last of equal ones.
    layer = max(reversed(list(recorded.inputs)), key=lambda one: recorded.inputs[one][1]["query"].shape[2:].numel())
    grid = recorded.grid(layer)
    height, width = grid.image_size
    query = grid.position_of((height - 1) / 2, (width - 1) / 2)
    maps = recorded.maps(layer, query)
    key_rows, key_columns = grid.keys_inside(maps.kv_stride)
    weights = {
        name: [
            [value if row < key_rows and column < key_columns else None for column, value in enumerate(values)]
            for row, values in enumerate(rows)
        ]
        for name, rows in maps.as_lists().items()
    }
    y, x = grid.pixel_of(query)
    return {
        "kind": "map",
        "title": f"Attention of {layer}",
        "query": list(query),
        "query_at": [round((x + 0.5) / width, 5), round((y + 0.5) / height, 5)],
        "size": list(grid.map_size),
        "kv_stride": maps.kv_stride,
        "key_box": [round(value, 5) for value in grid.key_box(maps.kv_stride)],
        "padding": round(weight_on_padding(maps.whole, grid, maps.kv_stride), 4),
        "weights": weights,
    }, np.asarray(fitted(image.cpu(), _LONGEST_SIDE)[0])
