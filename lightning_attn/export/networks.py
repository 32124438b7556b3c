"""The networks of this package as graphs to export: their inputs, outputs and what `torch.export` needs of them."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms

from lightning_attn.attention.cpu.linear import linear
from lightning_attn.export.graph import ExportGraph
from lightning_attn.networks.images.network import Detector, Segmenter
from lightning_attn.networks.translation.transformer import Transformer

__all__ = ["detection_graphs", "segmentation_graphs", "translation_graphs"]


def detection_graphs(detector: Detector, image: Tensor) -> dict[str, ExportGraph]:
    """The whole detector for one image `[3, H, W]`, uint8, of this size."""
    outputs = {
        "boxes": "x1, y1, x2, y2 in pixels of the image, [n, 4]",
        "labels": "numbers of the categories in model.json, from 1, [n]",
        "scores": "best first, [n]",
    }
    return {"detector": ExportGraph(DetectorGraph(detector), {"image": image}, outputs, ordered=False)}


def segmentation_graphs(segmenter: Segmenter, image: Tensor) -> dict[str, ExportGraph]:
    """The network for one image `[3, H, W]`, uint8, of this size, as a whole and at one scale."""
    outputs = {"logits": "of the classes in model.json at every pixel, [classes, height, width]"}
    return {"segmenter": ExportGraph(SegmenterGraph(segmenter), {"image": image}, outputs)}


def translation_graphs(network: Transformer) -> dict[str, ExportGraph]:
    """Encoder and decoder for any number of sentences of any length."""
    generator = torch.Generator().manual_seed(0)
    source, target = (
        torch.randint(network.source_embedding.num_embeddings, (3, length), generator=generator) for length in (11, 7)
    )
    source[1, 6:] = network.pad_id
    encoder = EncoderGraph(network)
    with torch.no_grad():
        memory = encoder(source)
    axes = {0: "sentences", 1: "source tokens"}
    return {
        "encoder": ExportGraph(
            encoder,
            {"source": source},
            {"memory": "of the encoder, [sentences, source tokens, width]"},
            {"source": axes},
        ),
        "decoder": ExportGraph(
            DecoderGraph(network),
            {"target": target, "memory": memory, "source": source},
            {"logits": "of the next token, [sentences, vocabulary]"},
            {"target": {0: "sentences", 1: "target tokens"}, "memory": axes, "source": axes},
        ),
    }


class DetectorGraph(nn.Module):
    """A detector in evaluation mode for one image.

    Args:
        detector: The detector; it is used, not copied.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps an image as in `ImageNetwork`, `[3, H, W]`, to boxes `[n, 4]`, labels `[n]` and scores `[n]`."""
        with _exportable_suppression() if torch.compiler.is_exporting() else contextlib.nullcontext():
            (found,) = self.detector([image])
        return found["boxes"], found["labels"], found["scores"]


@contextlib.contextmanager
def _exportable_suppression() -> Iterator[None]:
    """Uses one suppression for any number of boxes: torchvision chooses between two by that, which a graph cannot."""
    original = box_ops.batched_nms
    box_ops.batched_nms = _batched_suppression
    try:
        yield
    finally:
        box_ops.batched_nms = original


def _batched_suppression(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """The boxes that are kept, best first: classes are moved apart, so that one suppression serves all.

    Args:
        boxes: Within the image, `[n, 4]`; there may be none.
        scores: Not below 0, `[n]`.
        classes: `[n]`, int64.
        iou_threshold: Boxes that overlap a better one of their class by more are dropped.
    """
    largest = F.pad(boxes.flatten(), (0, 1)).max()
    apart = boxes + (classes.to(boxes.dtype) * (largest + 1)).unsqueeze(1)
    # torch.export assumes that at least two are kept: two outside of every image make that true.
    outside = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
    kept = nms(torch.cat((apart, outside)), F.pad(scores, (0, 2), value=-1.0), iou_threshold)
    inside: Tensor = kept[kept < boxes.shape[0]]
    return inside


class SegmenterGraph(nn.Module):
    """A segmentation network in evaluation mode for one image.

    Args:
        segmenter: The network; it is used, not copied.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Maps an image as in `ImageNetwork`, `[3, H, W]`, to logits `[K, H, W]`."""
        found: list[Tensor] = self.segmenter([image])
        return found[0]


class EncoderGraph(nn.Module):
    """From source ids `[B, S]` to the memory `[B, S, C]`."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, source: Tensor) -> Tensor:
        """See the class."""
        memory, _ = self.network.encode(source)
        return memory


class DecoderGraph(nn.Module):
    """From target prefixes `[B, T]`, the memory `[B, S, C]` and its source ids `[B, S]` to the next token's logits.

    The prefixes are read as a whole: it has no cache.
    """

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """See the class; `[B, V]`."""
        states = self.network.decode(target, memory, source == self.network.pad_id)
        return linear(states[:, -1], self.network.output_weight)
