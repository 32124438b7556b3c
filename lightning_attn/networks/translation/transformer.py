"""The encoder-decoder Transformer of the paper's translation experiments, with any attention.

Relative positions come from the attention itself (E2 and E4); there is no absolute position embedding (paper, section
3, Fig. 2b). An attention without E2 and E4 therefore ignores the order of tokens.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention import AttentionCache, AttentionSpec, DecodingCache, SelfAttention, build_attention
from lightning_attn.attention.cpu.linear import Linear, PackedLinear, linear
from lightning_attn.attention.projections import is_hooked, is_plain
from lightning_attn.attention.transforms import is_exporting
from lightning_attn.errors import InputError
from lightning_attn.networks.compilation import outside_graph
from lightning_attn.networks.recomputation import RecomputableLayer
from lightning_attn.networks.translation.cross_entropy import summed_cross_entropy
from lightning_attn.networks.translation.dropout import Dropout

NormPosition = Literal["pre", "post"]


class Residual(nn.Module):
    """The residual connection of a sublayer: `norm(x + f(x))` (post-norm) or `x + f(norm(x))` (pre-norm)."""

    def __init__(self, dim: int, dropout: float, norm_position: NormPosition) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.norm_first = norm_position == "pre"

    def before(self, x: Tensor) -> Tensor:
        """The input of the sublayer."""
        normed: Tensor = self.norm(x) if self.norm_first else x
        return normed

    def after(self, x: Tensor, output: Tensor) -> Tensor:
        """Adds the sublayer's output to `x`, the input of `before`."""
        # Dropout is not called in evaluation: decoding runs this for every sublayer at every token.
        x = x + (self.dropout(output) if self.training else output)
        normed: Tensor = x if self.norm_first else self.norm(x)
        return normed


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU in between, applied to every position separately."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(Linear(dim, hidden_dim), nn.ReLU(), Dropout(dropout), Linear(hidden_dim, dim))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def packed(self) -> Callable[[Tensor], Tensor]:
        """The same function without gradients, fast for few rows; the weights must not change while it is in use."""
        expand, activation, dropout, contract = self
        if is_hooked(self) or not (is_plain(expand) and is_plain(contract)):
            return self
        first, last = PackedLinear(expand.weight, expand.bias), PackedLinear(contract.weight, contract.bias)
        return lambda x: last(dropout(activation(first(x))))


class _Layer(RecomputableLayer, nn.Module):
    """Base of encoder and decoder layers: an optional self-attention, and a feed-forward network."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        self_attention: AttentionSpec,
        role: Literal["self", "causal"],
        dropout: float,
        norm_position: NormPosition,
    ) -> None:
        super().__init__()
        self.self_attention: SelfAttention | None = build_attention(self_attention, dim, ndim=1, role=role)
        if self.self_attention is not None:
            self.self_attention_residual = Residual(dim, dropout, norm_position)
        self.feed_forward = FeedForward(dim, hidden_dim, dropout)
        self.feed_forward_residual = Residual(dim, dropout, norm_position)

    @property
    @override
    def has_attention(self) -> bool:
        return True

    def _compute_self_attention(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if self.self_attention is None:
            return x
        query = self.self_attention_residual.before(x)
        # A protocol, of modules only.
        output = outside_graph(self.self_attention, query, key_padding_mask=padding)  # type: ignore[arg-type]
        return self.self_attention_residual.after(x, output)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.feed_forward_residual.after(x, self.feed_forward(self.feed_forward_residual.before(x)))


class EncoderLayer(_Layer):
    """Self-attention and feed-forward network, each with its residual connection."""

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Maps `[B, S, C]` to the same shape; `padding` `[B, S]` is True where padded."""
        return self.run(self._compute, x, padding)

    def _compute(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return self._feed_forward(self._compute_self_attention(x, padding))


class DecoderLayer(_Layer):
    """Causal self-attention, encoder-decoder attention and feed-forward network."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        self_attention: AttentionSpec,
        cross_attention: AttentionSpec,
        dropout: float,
        norm_position: NormPosition,
    ) -> None:
        super().__init__(dim, hidden_dim, self_attention, "causal", dropout, norm_position)
        self.cross_attention = build_attention(cross_attention, dim, ndim=1, role="cross")
        self.cross_attention_residual = Residual(dim, dropout, norm_position)

    def forward(self, x: Tensor, memory: Tensor, memory_padding: Tensor | None) -> Tensor:
        """Maps `[B, T, C]` to the same shape, with the encoder's output `memory` `[B, S, C]`."""
        return self.run(self._compute, x, memory, memory_padding)

    def _compute(self, x: Tensor, memory: Tensor, memory_padding: Tensor | None) -> Tensor:
        x = self._compute_self_attention(x, None)
        query = self.cross_attention_residual.before(x)
        output = outside_graph(self.cross_attention, query, memory, key_padding_mask=memory_padding)
        return self._feed_forward(self.cross_attention_residual.after(x, output))

    def cross_attention_query(self, x: Tensor) -> Tensor:
        """The queries of the encoder-decoder attention, `[B, T, C]`, for the layer's input `x`."""
        return self.cross_attention_residual.before(self._compute_self_attention(x, None))


class Transformer(nn.Module):
    """Encoder-decoder Transformer over token ids.

    Args:
        vocabulary_size: Number of token ids V, shared by both languages.
        pad_id: The id of padding.
        self_attention: Attention of the encoder and of the decoder, or another mechanism of Fig. 2b; `mechanism: none`
            for none.
        cross_attention: Encoder-decoder attention.
        dim: Width C.
        hidden_dim: Width inside the feed-forward networks.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        dropout: Probability of dropping an element of embeddings, sublayer outputs and hidden layers.
        norm_position: `"post"` as in the original Transformer, or `"pre"`, which trains without a long warm-up.
        tie_embeddings: Use one matrix for the embeddings of source and target and for the output projection.

    Raises:
        ValueError: If a size is not positive or an attention does not fit.
    """

    def __init__(
        self,
        vocabulary_size: int,
        pad_id: int,
        self_attention: AttentionSpec,
        cross_attention: AttentionSpec,
        dim: int = 512,
        hidden_dim: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dropout: float = 0.1,
        norm_position: NormPosition = "post",
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary_size": vocabulary_size, "dim": dim, "hidden_dim": hidden_dim}
        layers = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
        for name, value in (sizes | layers).items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, got {dropout}.")
        self.pad_id, self.dim = pad_id, dim
        self.source_embedding = nn.Embedding(vocabulary_size, dim, padding_idx=pad_id)
        if not tie_embeddings:
            self.target_embedding = nn.Embedding(vocabulary_size, dim, padding_idx=pad_id)
            self.output_embedding = nn.Embedding(vocabulary_size, dim)
        for module in self.children():
            assert isinstance(module, nn.Embedding)
            nn.init.normal_(module.weight, std=dim**-0.5)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        self.dropout = Dropout(dropout)
        self.encoder = nn.ModuleList(
            EncoderLayer(dim, hidden_dim, self_attention, "self", dropout, norm_position) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, hidden_dim, self_attention, cross_attention, dropout, norm_position)
            for _ in range(decoder_layers)
        )
        last_norms = norm_position == "pre"  # the output of pre-norm layers is not normalised
        self.encoder_norm = nn.LayerNorm(dim) if last_norms else nn.Identity()
        self.decoder_norm = nn.LayerNorm(dim) if last_norms else nn.Identity()

    def modules_to_compile(self) -> list[nn.Module]:
        """The modules that `torch.compile` may compile, each as a whole: the layers."""
        return [*self.encoder, *self.decoder]

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output projection, `[V, C]`; with tied embeddings that of the source embedding."""
        embedding = self.output_embedding if hasattr(self, "output_embedding") else self.source_embedding
        return embedding.weight

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encodes source ids `[B, S]`.

        Returns:
            The memory `[B, S, C]` and its padding mask `[B, S]`, which on a CPU is None if nothing is padded.
        """
        padding: Tensor | None = source == self.pad_id
        # A GPU would make the host wait for the answer, the meta device has no values, and an exported program does not
        # know its sentences yet.
        looks = source.device.type == "cpu" and not is_exporting()
        if source.is_meta or (looks and padding is not None and not bool(padding.any())):
            padding = None
        x = self._embed(source)
        for layer in self.encoder:
            x = layer(x, padding)
        memory: Tensor = self.encoder_norm(x)
        return memory, padding

    def decode(self, target: Tensor, memory: Tensor, memory_padding: Tensor | None) -> Tensor:
        """Final decoder states `[B, T, C]` of the target prefixes `[B, T]`; row t sees the ids 0..t.

        Target padding needs no mask: it only follows the ids of the sentence, and later keys are hidden.
        """
        x = self.embed_target(target)
        for layer in self.decoder:
            x = layer(x, memory, memory_padding)
        states: Tensor = self.decoder_norm(x)
        return states

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits `[B, T, V]` of the token after each prefix of `target` `[B, T]`."""
        return linear(self.decode(target, *self.encode(source)), self.output_weight)

    def loss(self, source: Tensor, target: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy of a batch, summed over the target tokens that are not padding.

        Args:
            source: `[B, S]` source ids.
            target: `[B, T]` target ids from bos to eos.
            label_smoothing: Probability mass spread over the vocabulary.

        Returns:
            Smoothed loss (with gradient), negative log likelihood, and number of target tokens; each a sum.
        """
        states = self.decode(target[:, :-1], *self.encode(source))
        labels = target[:, 1:]
        real = labels != self.pad_id
        if target.device.type == "cpu":
            rows, targets, ignored = states[real], labels[real], None
        else:  # the number of rows that are selected would make the host wait for a GPU
            rows, targets, ignored = states.flatten(0, 1), labels.flatten(), self.pad_id
        loss, likelihood = summed_cross_entropy(rows, self.output_weight, targets, label_smoothing, ignored)
        return loss, likelihood, real.sum()

    def sentence_losses(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log likelihood and number of target tokens of each sentence, `[B]` each; arguments as in `loss`."""
        logits = self(source, target[:, :-1])
        labels = target[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        real = labels != self.pad_id
        return (losses.view_as(labels) * real).sum(dim=1), real.sum(dim=1)

    def start_decoding(self, source: Tensor) -> "DecodingState":
        """Encodes `source` `[B, S]` and prepares decoding one token at a time."""
        return DecodingState(self, *self.encode(source))

    def embed_target(self, ids: Tensor) -> Tensor:
        """Embeds target ids `[B, T]` as the decoder's input `[B, T, C]`."""
        return self._embed(ids, getattr(self, "target_embedding", self.source_embedding))

    def _embed(self, ids: Tensor, embedding: nn.Embedding | None = None) -> Tensor:
        embedding = self.source_embedding if embedding is None else embedding
        embedded: Tensor = self.dropout(embedding(ids) * math.sqrt(self.dim))
        return embedded


class _DecodingLayer:
    """The state of a decoder layer: its caches, and weights packed for many small products."""

    def __init__(self, layer: DecoderLayer, memory: Tensor, memory_padding: Tensor | None) -> None:
        cross_cache = layer.cross_attention.new_cache(memory, memory_padding)
        self.caches: list[DecodingCache] = [cross_cache]
        self.sublayers: list[tuple[Residual, Callable[[Tensor], Tensor]]] = [
            (layer.cross_attention_residual, _decoding_step(layer.cross_attention, cross_cache)),
            (layer.feed_forward_residual, layer.feed_forward.packed()),
        ]
        if layer.self_attention is not None:
            cache = layer.self_attention.new_cache()
            step = _decoding_step(layer.self_attention, cache)
            self.caches.append(cache)
            self.sublayers.insert(0, (layer.self_attention_residual, step))

    def step(self, x: Tensor) -> Tensor:
        """The output of `DecoderLayer.forward` for the next position, `[R, 1, C]`."""
        for residual, sublayer in self.sublayers:
            x = residual.after(x, sublayer(residual.before(x)))
        return x

    def reorder(self, index: Tensor, beams: int) -> None:
        """See `DecodingCache.reorder`."""
        for cache in self.caches:
            cache.reorder(index, beams)


def _decoding_step(attention: SelfAttention, cache: DecodingCache) -> Callable[[Tensor], Tensor]:
    """The attention of the next tokens. Without hooks the module is not called, which saves a good part of a step."""
    if isinstance(cache, AttentionCache) and not is_hooked(cache.attention):
        return cache.decode_step
    return partial(attention, cache=cache)


class DecodingState:
    """The state of the decoder in `beam_search`; implements `DecoderState`.

    It holds a second copy of the decoder's weights, packed for small products (`PackedLinear`).

    Args:
        network: The Transformer; its weights must not change while the state is in use.
        memory: `[B, S, C]`, the encoded sources.
        memory_padding: `[B, S]`, True where padded, or None.
    """

    def __init__(self, network: Transformer, memory: Tensor, memory_padding: Tensor | None) -> None:
        self.network = network
        self.sentences = self.rows = memory.shape[0]
        self.layers = []
        for layer in network.decoder:
            assert isinstance(layer, DecoderLayer)
            self.layers.append(_DecodingLayer(layer, memory, memory_padding))
        self.output = PackedLinear(network.output_weight)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to every row, `[R]`, and returns the logits of the next, `[R, V]`, without gradients."""
        x = self.network.embed_target(tokens.unsqueeze(1))
        for layer in self.layers:
            x = layer.step(x)
        return self.output(self.network.decoder_norm(x).squeeze(1))

    def reorder(self, index: Tensor) -> None:
        """See `DecoderState.reorder`; with one row per sentence, rows may move in any way."""
        beams = self.rows // max(1, self.sentences)
        if len(index) > self.rows:
            beams = len(index) // self.sentences
        self.rows = len(index)
        self.sentences = self.rows // beams
        for layer in self.layers:
            layer.reorder(index, beams)
