"""The networks of this package as graphs to export, with their inputs and outputs."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms

from lightning_attn.attention.cpu.linear import linear
from lightning_attn.attention.transforms import is_exporting
from lightning_attn.errors import InputError, MissingMethodError
from lightning_attn.export.graph import ExportGraph
from lightning_attn.networks.images.network import Detector, Segmenter
from lightning_attn.networks.translation.transformer import Transformer
from lightning_attn.tasks import BaseTask, DetectionTask, MultitaskTask, SegmentationTask, TranslationTask

__all__ = ["detection_graphs", "export_graphs", "segmentation_graphs", "translation_graphs"]


def export_graphs(task: BaseTask, size: tuple[int, int] | None = None) -> dict[str, ExportGraph]:
    """The graphs of a task's network to export, by file name.

    A custom task defines a method `export_graphs(size)` that returns them.

    Args:
        task: The task, with a network.
        size: Height and width of images in pixels, for tasks on images; None for the size that the data was resized to.

    Raises:
        ValueError: If `size` does not fit the task.
        NotImplementedError: If the task has no graphs.
    """
    own: Callable[[tuple[int, int] | None], dict[str, ExportGraph]] | None = getattr(task, "export_graphs", None)
    if own is not None:
        return own(size)
    if isinstance(task, DetectionTask):
        return detection_graphs(task.built_network, task.example_image(size))
    if isinstance(task, SegmentationTask):
        return segmentation_graphs(task.built_network, task.example_image(size))
    if isinstance(task, MultitaskTask):
        return {
            f"{name}_{file}": graph
            for name, member in task.tasks().items()
            for file, graph in export_graphs(member, size).items()
        }
    if isinstance(task, TranslationTask):
        if size is not None:
            raise InputError("size is for tasks on images; graphs of a translation are for all lengths. Leave it out.")
        return translation_graphs(task.built_network)
    raise MissingMethodError(
        f"{type(task).__name__} must define export_graphs(self, size) for export as a program or ONNX."
    )


def detection_graphs(detector: Detector, image: Tensor) -> dict[str, ExportGraph]:
    """The graph of a detector for one image `[3, H, W]`, uint8, of this size."""
    outputs = {
        "boxes": "x1, y1, x2, y2 in pixels of the image, [n, 4]",
        "labels": "indices of the categories in model.json, from 1, [n]",
        "scores": "best first, [n]",
    }
    return {"detector": ExportGraph(DetectorGraph(detector), {"image": image}, outputs, ordered=False)}


def segmentation_graphs(segmenter: Segmenter, image: Tensor) -> dict[str, ExportGraph]:
    """The graph of a segmentation network for one image `[3, H, W]`, uint8, of this size, without tiles and scales."""
    outputs = {"logits": "of the classes in model.json at every pixel, [classes, height, width]"}
    return {"segmenter": ExportGraph(SegmenterGraph(segmenter), {"image": image}, outputs)}


def translation_graphs(network: Transformer) -> dict[str, ExportGraph]:
    """The graphs of encoder and decoder for any number of sentences of any length."""
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
            {"memory": "output of the encoder, [sentences, source tokens, width]"},
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
        with _exportable_suppression() if is_exporting() else contextlib.nullcontext():
            (found,) = self.detector([image])
        return found["boxes"], found["labels"], found["scores"]


@contextlib.contextmanager
def _exportable_suppression() -> Iterator[None]:
    """Replaces torchvision's NMS, which selects one of two implementations by the number of boxes, a symbolic value."""
    original = box_ops.batched_nms
    box_ops.batched_nms = _batched_suppression
    try:
        yield
    finally:
        box_ops.batched_nms = original


def _batched_suppression(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression by class in one call: boxes of different classes are shifted apart.

    Args:
        boxes: Within the image, `[n, 4]`; may be empty.
        scores: Not below 0, `[n]`.
        classes: `[n]`, int64.
        iou_threshold: Boxes that overlap a better one of their class by more are dropped.

    Returns:
        Indices of the remaining boxes, best first.
    """
    largest = F.pad(boxes.flatten(), (0, 1)).max()
    shifted = boxes + (classes.to(boxes.dtype) * (largest + 1)).unsqueeze(1)
    # torch.export assumes at least two results: two boxes outside of every image make that true.
    outside = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
    selected = nms(torch.cat((shifted, outside)), F.pad(scores, (0, 2), value=-1.0), iou_threshold)
    inside: Tensor = selected[selected < boxes.shape[0]]
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
    """The encoder of a Transformer in evaluation mode."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, source: Tensor) -> Tensor:
        """Maps source ids `[B, S]` to the memory `[B, S, C]`."""
        memory, _ = self.network.encode(source)
        return memory


class DecoderGraph(nn.Module):
    """The decoder of a Transformer in evaluation mode, without a cache: each call processes whole prefixes."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """Maps target prefixes `[B, T]`, memory `[B, S, C]` and source ids `[B, S]` to the next logits `[B, V]`."""
        states = self.network.decode(target, memory, source == self.network.pad_id)
        return linear(states[:, -1], self.network.output_weight)
