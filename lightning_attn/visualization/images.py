"""Attention maps of a network for images, as plain values."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attn.networks.images.batching import NormalizedBatch
from lightning_attn.visualization.maps import attentions_of, recorded_inputs_of, term_maps
from lightning_attn.visualization.pictures import Picture, fitted

__all__ = ["image_attention"]

_LONGEST_SIDE = 480  # of the picture, in pixels


@torch.no_grad()
def image_attention(network: nn.Module, image: Tensor) -> tuple[dict[str, Any], Picture] | None:
    """The weights of the attention with the largest map (the last of equal ones), for the query in the middle.

    Args:
        network: Maps a list of images, in evaluation mode; with a `NormalizedBatch`.
        image: RGB, uint8, `[3, H, W]`.

    Returns:
        Title, position of the query, size of the map, `kv_stride`, and weights as `TermMaps.as_lists`; and the image as
        the map covers it, with the padding. None if no attention with terms runs.
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
    # The last of equal ones.
    attention = max(reversed(inputs), key=lambda one: inputs[one]["query"].shape[2:].numel())
    height, width = inputs[attention]["query"].shape[2:]
    query = image.shape[1] * height // (2 * batch_size[0]), image.shape[2] * width // (2 * batch_size[1])
    maps = term_maps(attention, **inputs[attention], position=query)
    name = next(name for name, module in network.named_modules() if module is attention)
    padded = F.pad(image, (0, batch_size[1] - image.shape[2], 0, batch_size[0] - image.shape[1]), value=128)
    picture = np.asarray(fitted(padded, _LONGEST_SIDE)[0])
    return {
        "kind": "map",
        "title": f"Attention of {name}",
        "query": list(query),
        "size": [height, width],
        "kv_stride": maps.kv_stride,
        "weights": maps.as_lists(),
    }, picture
