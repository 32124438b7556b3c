"""Figures of attention maps."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from datamodules.vocabulary import Vocabulary
from lightning_attn.networks.transformer import DecoderLayer, Transformer


@torch.no_grad()
def cross_attention_maps(network: Transformer, source: Tensor, target: Tensor) -> Tensor:
    """The encoder-decoder attention weights of every layer and head while `target` is decoded.

    Args:
        network: The Transformer.
        source: `[1, S]` source ids.
        target: `[1, T]` target ids; row t of a map is the query that predicts the token after `target[:, t]`.

    Returns:
        `[layers, M, T, N_k]`.
    """
    memory, padding = network.encode(source)
    maps = []
    x = network.embed_target(target)
    for layer in network.decoder:
        assert isinstance(layer, DecoderLayer)
        query = layer.cross_attention_query(x)
        maps.append(layer.cross_attention.weights(query, memory, key_padding_mask=padding)[0])
        x = layer(x, memory, padding)
    return torch.stack(maps)


def draw_translation_attention(
    network: Transformer, vocabulary: Vocabulary, source: Tensor, target: Tensor, path: Path
) -> None:
    """Draws which source tokens the last decoder layer looks at for each target token, averaged over heads.

    Args:
        network: The Transformer.
        vocabulary: Names the tokens.
        source: `[1, S]` source ids; padding is left out.
        target: `[1, T]` target ids from bos to eos; padding is left out.
        path: Where the PNG is written.
    """
    source, target = source[:, source[0] != vocabulary.pad_id], target[:, target[0] != vocabulary.pad_id]
    weights = cross_attention_maps(network, source, target[:, :-1])[-1].mean(dim=0).float().cpu()
    stride = -(-source.shape[1] // weights.shape[1])
    columns = _names(vocabulary, source[0].tolist())[::stride]
    rows = _names(vocabulary, target[0, 1:].tolist())
    figure = Figure(figsize=(2.5 + 0.32 * len(columns), 2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0.0, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("source token (key)")
    axes.set_ylabel("target token that is predicted (query)")
    axes.set_title("Encoder-decoder attention, last layer, mean over heads", fontsize=10)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _names(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    """Token names; sentencepiece marks a word's beginning by U+2581, drawn here as a thin underscore."""
    return [piece.replace("\u2581", "_") for piece in vocabulary.pieces(ids)]
