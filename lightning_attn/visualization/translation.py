"""Figures of the attention maps of a translation network."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attn.attention import TransformerAttention
from lightning_attn.datamodules.translation.vocabulary import Vocabulary
from lightning_attn.networks.translation.transformer import DecoderLayer, Transformer
from lightning_attn.visualization.figures import draw_token_matrix
from lightning_attn.visualization.maps import TermMaps, layer_names, recorded_inputs_of, term_maps


@dataclasses.dataclass(frozen=True)
class RecordedPair:
    """What the attentions of a translation network computed with for one sentence and its translation.

    Attributes:
        inputs: Of each attention that ran, by its layer's name, in the order of the network's modules.
        sources: The tokens of the source.
        targets: The tokens that are predicted; the decoder sees those before each.
        read: The tokens that the decoder reads: the beginning, and all but the last of `targets`.
    """

    inputs: Mapping[str, tuple[TransformerAttention, dict[str, Any]]]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    read: tuple[str, ...]

    def queries(self, layer: str) -> tuple[str, ...]:
        """Names of a layer's queries: tokens of the source, or those that the decoder is to predict there."""
        return self.sources if layer.startswith("encoder.") else self.targets

    def keys(self, layer: str) -> tuple[str, ...]:
        """Names of a layer's keys, also of those that `kv_stride` skips."""
        is_self = layer.startswith("decoder.") and "cross_attention" not in layer
        return self.read if is_self else self.sources

    def maps(self, layer: str, position: int | None = None) -> TermMaps:
        """The maps of one query of a layer, or of all; see `term_maps`."""
        attention, inputs = self.inputs[layer]
        return term_maps(attention, **inputs, position=position)


@torch.no_grad()
def record_pair(network: Transformer, vocabulary: Vocabulary, source: Tensor, target: Tensor) -> RecordedPair:
    """Runs a network on a sentence and its translation, and records the inputs of its attentions.

    Args:
        network: The Transformer, in evaluation mode.
        vocabulary: The pieces of the tokens.
        source: `[1, S]` source ids; padding is omitted.
        target: `[1, T]` target ids from bos to eos; padding is omitted.
    """
    source, target = source[:, source[0] != vocabulary.pad_id], target[:, target[0] != vocabulary.pad_id]
    layers = layer_names(network)
    inputs = recorded_inputs_of(list(layers.values()), lambda: network(source, target[:, :-1]))
    names = [tuple(_names(vocabulary, ids.tolist())) for ids in (source[0], target[0, 1:], target[0, :-1])]
    return RecordedPair({name: (one, inputs[one]) for name, one in layers.items() if one in inputs}, *names)


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
    recorded = record_pair(network, vocabulary, source, target)
    layer = next((one for one in reversed(list(recorded.inputs)) if one.endswith("cross_attention")), None)
    if layer is None:
        raise ValueError("network: its encoder-decoder attention is no TransformerAttention, which alone has terms.")
    draw_token_matrix(
        recorded.maps(layer),
        recorded.queries(layer),
        recorded.keys(layer),
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
    recorded = record_pair(network, vocabulary, source, target)
    found = []
    for title, part, kind in (
        ("Self-attention of the last encoder layer", "encoder", "self_attention"),
        ("Encoder-decoder attention of the last layer", "decoder", "cross_attention"),
    ):
        last = len(getattr(network, part)) - 1
        for layer in recorded.inputs:
            if layer.startswith(f"{part}.{last}.{kind}"):
                maps = recorded.maps(layer)
                found.append(
                    {
                        "kind": "sentence",
                        "title": title,
                        "queries": list(recorded.queries(layer)),
                        "keys": list(recorded.keys(layer)),
                        "kv_stride": maps.kv_stride,
                        "weights": maps.as_lists(),
                    }
                )
    return found


def _names(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    """Token names; sentencepiece marks a word's beginning by U+2581, drawn here as a thin underscore."""
    return [piece.replace("\u2581", "_") for piece in vocabulary.pieces(ids)]
