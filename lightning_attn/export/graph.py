"""Networks as graphs of plain operations, which run without this package: `torch.export` programs and ONNX."""

import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_attn.errors import InputError, MissingPackageError
from lightning_attn.io import write_file

GraphFormat = Literal["program", "onnx"]

SUFFIXES: Mapping[GraphFormat, str] = {"program": ".pt2", "onnx": ".onnx"}
_LARGEST_DIFFERENCE = 1e-2


@dataclasses.dataclass(frozen=True)
class ExportGraph:
    """A part of a network, from tensors to tensors.

    Attributes:
        module: What is exported, in evaluation mode on the CPU. Its `forward` takes the inputs by position and returns
            a tensor, or a tuple of them.
        inputs: An example of each input by name.
        outputs: What the outputs are, by name.
        free_axes: By input, the axes whose length may differ from the example's, and what they are; the same name
            stands for the same length. All others are fixed.
        ordered: Whether the first axis of an output has an order that another machine's rounding cannot change.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, str]
    free_axes: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    ordered: bool = True

    def described(self) -> dict[str, Any]:
        """Inputs and outputs as plain values."""
        inputs = {
            name: {
                "dtype": str(example.dtype).removeprefix("torch."),
                "shape": [self.free_axes.get(name, {}).get(axis, length) for axis, length in enumerate(example.shape)],
            }
            for name, example in self.inputs.items()
        }
        return {"inputs": inputs, "outputs": dict(self.outputs)}


def write_graph(graph: ExportGraph, path: Path, kind: GraphFormat) -> float:
    """Exports a program, runs it beside the network, and writes it.

    Args:
        graph: What to write.
        path: The file; there must be none.
        kind: `"program"` for what `torch.export.load` reads, `"onnx"` for ONNX.

    Returns:
        The largest difference between an output of the program and of the network, on the example.

    Raises:
        ValueError: If torch, or ONNX, has no program for the network, or one that gives something else.
        ImportError: If `onnx`, `onnxscript` or `onnxruntime` is missing.
        OSError: If the file cannot be written.
    """
    examples = tuple(graph.inputs.values())
    with torch.no_grad(), _quiet():
        wanted = _outputs(graph.module(*examples))
        exported = _export(graph, path.name)
        if kind == "onnx":
            contents, run = _as_onnx(exported, graph, path.name)
        else:
            file = io.BytesIO()
            torch.export.save(exported, file)
            contents, run = file.getvalue(), exported.module()
        difference = _difference(_outputs(run(*examples)), wanted, graph.ordered)
    if difference is None or not difference <= _LARGEST_DIFFERENCE:
        found = "outputs of other sizes" if difference is None else f"outputs that differ by {difference:.3g}"
        raise InputError(f"{path.name}: the exported program has {found} than the network's. It was not written.")
    write_file(path, lambda file: file.write(contents))
    return difference


def _export(graph: ExportGraph, name: str) -> torch.export.ExportedProgram:
    free = tuple(
        dict.fromkeys(graph.free_axes.get(input_name, {}), torch.export.Dim.AUTO) for input_name in graph.inputs
    )
    try:
        return torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=free, strict=False)
    except Exception as error:
        # Whatever torch raises here says that it cannot follow the network.
        raise InputError(
            f"{name}: torch.export has no program for this network: {_first_line(error)} The weights alone can be "
            "exported (--format safetensors)."
        ) from error


def _as_onnx(
    exported: torch.export.ExportedProgram, graph: ExportGraph, name: str
) -> tuple[bytes, Callable[..., list[Tensor]]]:
    """The contents of the file, and what runs it."""
    try:
        import onnxruntime  # an optional dependency
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"ONNX needs packages that are not installed ({error}). pip install 'lightning-attn[onnx]'"
        ) from error
    try:
        converted = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
        )
        assert converted is not None
        contents: bytes = converted.model_proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; it also has remarks on what the exporter left behind
        session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(
            f"{name}: ONNX has no program for this network: {_first_line(error)} torch.export may have one "
            "(--format program)."
        ) from error

    def run(*inputs: Tensor) -> list[Tensor]:
        named = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, named)]

    return contents, run


def _outputs(result: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _difference(found: list[Tensor], wanted: list[Tensor], ordered: bool) -> float | None:
    """The largest, relative to the output's largest number if that is above 1; None if sizes differ."""
    if [one.shape for one in found] != [one.shape for one in wanted]:
        return None
    largest = 0.0
    for one, other in zip(found, wanted, strict=True):
        if not one.numel():
            continue
        left, right = one.double(), other.double()
        if not ordered:
            left, right = left.sort(0).values, right.sort(0).values
        largest = max(largest, float((left - right).abs().max() / right.abs().max().clamp_min(1)))
    return largest


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400].rstrip(".") + "."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own inner workings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
