"""What `benchmarks.translation` compares with: `torch.nn.Transformer` and Hugging Face's Marian."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attn.networks.translation.cross_entropy import summed_cross_entropy


class TorchTransformer(nn.Module):
    """`torch.nn.Transformer` with embeddings, output and loss as this project's network has them.

    Args:
        vocabulary: Number of tokens.
        pad: Id of padding.
        dim: Width.
        heads: Attention heads.
        hidden: Width of the feed-forward networks.
        layers: Layers of the encoder, and of the decoder.
        dropout: Of embeddings, sublayer outputs and hidden layers.
        longest: Tokens of the longest sentence, with begin-of-sentence.
    """

    positions: Tensor

    def __init__(
        self, vocabulary: int, pad: int, *, dim: int, heads: int, hidden: int, layers: int, dropout: float, longest: int
    ) -> None:
        super().__init__()
        self.pad = pad
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=pad)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.transformer = nn.Transformer(dim, heads, layers, layers, hidden, dropout, batch_first=True)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        self.dropout = nn.Dropout(dropout)
        angles = torch.arange(longest).unsqueeze(1) * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("positions", torch.cat((angles.sin(), angles.cos()), dim=1))

    def _embed(self, ids: Tensor) -> Tensor:
        scaled = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)
        embedded: Tensor = self.dropout(scaled + self.positions[: ids.shape[1]])
        return embedded

    def loss(self, source: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """As `lightning_attn.networks.translation.transformer.Transformer.loss`."""
        padding, inputs, labels = source == self.pad, target[:, :-1], target[:, 1:]
        states = self.transformer(
            self._embed(source),
            self._embed(inputs),
            tgt_mask=torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool, device=inputs.device).triu(1),
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        real = labels != self.pad
        loss, likelihood = summed_cross_entropy(states[real], self.embedding.weight, labels[real], label_smoothing)
        return loss, likelihood, real.sum()


def marian_decoding(sources: Tensor, config: dict[str, Any], *, beam: int, tokens: int) -> Callable[[], Tensor]:
    """Beam search of a Marian of random weights; all translations have `tokens` tokens.

    Args:
        sources: Ids, `[B, S]`, without padding.
        config: Of `transformers.MarianConfig`.
        beam: Width of the beam.
        tokens: Length of the translations, with end-of-sentence.
    """
    transformers = importlib.import_module("transformers")  # not an import statement: it need not be installed
    model = transformers.MarianMTModel(transformers.MarianConfig(**config)).eval()
    mask = torch.ones_like(sources)

    def decode() -> Tensor:
        with torch.inference_mode():
            found: Tensor = model.generate(
                sources,
                attention_mask=mask,
                num_beams=beam,
                min_new_tokens=tokens - 1,
                max_new_tokens=tokens,
                do_sample=False,
            )
        return found[:, 1:]

    return decode
