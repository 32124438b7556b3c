"""Figures of the attention maps of a translation network."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attn.datamodules.translation.vocabulary import Vocabulary
from lightning_attn.networks.translation.transformer import DecoderLayer, Transformer
from lightning_attn.visualization.figures import draw_token_matrix
from lightning_attn.visualization.maps import attentions_of, recorded_inputs, term_maps


@torch.no_grad()
def cross_attention_maps(network: Transformer, source: Tensor, target: Tensor) -> Tensor:
    """The encoder-decoder attention weights of every layer and head for the target prefix `target`.

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
    """Draws the last decoder layer's attention to the source for each target token, by each term and by all.

    The weights are averaged over heads.

    Args:
        network: The Transformer.
        vocabulary: The pieces of the tokens.
        source: `[1, S]` source ids; padding is omitted.
        target: `[1, T]` target ids from bos to eos; padding is omitted.
        path: The file to write.
    """
    source, target = source[:, source[0] != vocabulary.pad_id], target[:, target[0] != vocabulary.pad_id]
    layer = network.decoder[-1]
    assert isinstance(layer, DecoderLayer)
    inputs = recorded_inputs(layer.cross_attention, lambda: network(source, target[:, :-1]))
    draw_token_matrix(
        term_maps(layer.cross_attention, **inputs),
        _names(vocabulary, target[0, 1:].tolist()),
        _names(vocabulary, source[0].tolist()),
        path,
        title="Encoder-decoder attention of the last layer, mean over heads",
        query_label="predicted target token (query)",
        key_label="source token (key)",
    )


@torch.no_grad()
def translation_attention(
    network: Transformer, vocabulary: Vocabulary, source: Tensor, target: Tensor
) -> list[dict[str, Any]]:
    """The weights of the last encoder layer's attention and of the last encoder-decoder attention, as plain values.

    Args:
        network: The Transformer.
        vocabulary: The pieces of the tokens.
        source: As in `draw_translation_attention`.
        target: As in `draw_translation_attention`.

    Returns:
        For each that has terms: title, names of queries and keys, `kv_stride`, and weights as `TermMaps.as_lists`.
    """
    source, target = source[:, source[0] != vocabulary.pad_id], target[:, target[0] != vocabulary.pad_id]
    sources, targets = _names(vocabulary, source[0].tolist()), _names(vocabulary, target[0, 1:].tolist())
    last = network.decoder[-1]
    assert isinstance(last, DecoderLayer)
    found = []
    for title, module, queries in (
        ("Self-attention of the last encoder layer", network.encoder[-1].self_attention, sources),
        ("Encoder-decoder attention of the last layer", last.cross_attention, targets),
    ):
        for attention in attentions_of(module) if isinstance(module, nn.Module) else []:
            inputs = recorded_inputs(attention, lambda: network(source, target[:, :-1]))
            maps = term_maps(attention, **inputs)
            found.append(
                {
                    "kind": "sentence",
                    "title": title,
                    "queries": queries,
                    "keys": sources,
                    "kv_stride": maps.kv_stride,
                    "weights": maps.as_lists(),
                }
            )
    return found


def _names(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    """Token names; sentencepiece marks a word's beginning by U+2581, drawn here as a thin underscore."""
    return [piece.replace("\u2581", "_") for piece in vocabulary.pieces(ids)]
