"""Exports networks as graphs that run without this package: `torch.export` programs and ONNX."""

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
_MAX_DIFFERENCE = 1e-2


@dataclasses.dataclass(frozen=True)
class ExportGraph:
    """A module to export, with examples of its inputs.

    Attributes:
        module: The module, in evaluation mode on the CPU. Its `forward` takes the inputs by position and returns
            a tensor, or a tuple of tensors.
        inputs: An example of each input by name.
        outputs: Descriptions of the outputs, by name.
        free_axes: By input, the axes of variable length, and their names; axes of the same name have the same length.
            All others are fixed.
        ordered: Whether the order of an output's first axis is independent of rounding.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, str]
    free_axes: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    ordered: bool = True

    def describe(self) -> dict[str, Any]:
        """Descriptions of inputs and outputs as plain values."""
        inputs = {
            name: {
                "dtype": str(example.dtype).removeprefix("torch."),
                "shape": [self.free_axes.get(name, {}).get(axis, length) for axis, length in enumerate(example.shape)],
            }
            for name, example in self.inputs.items()
        }
        return {"inputs": inputs, "outputs": dict(self.outputs)}


def write_graph(graph: ExportGraph, path: Path, kind: GraphFormat) -> float:
    """Exports a graph, compares its outputs with those of the module, and writes it.

    Args:
        graph: The graph.
        path: The file, which must not exist.
        kind: `"program"` for a file for `torch.export.load`, `"onnx"` for ONNX.

    Returns:
        The largest difference between outputs of the exported graph and of the module, for the example inputs.

    Raises:
        ValueError: If torch or ONNX cannot export the module, or the outputs differ.
        ImportError: If `onnx`, `onnxscript` or `onnxruntime` is missing.
        OSError: If the file cannot be written.
    """
    examples = tuple(graph.inputs.values())
    with torch.no_grad(), _quiet():
        expected = _outputs(graph.module(*examples))
        exported = _export(graph, path.name)
        if kind == "onnx":
            contents, run = _as_onnx(exported, graph, path.name)
        else:
            file = io.BytesIO()
            torch.export.save(exported, file)
            contents, run = file.getvalue(), exported.module()
        difference = _difference(_outputs(run(*examples)), expected, graph.ordered)
    if difference is None or not difference <= _MAX_DIFFERENCE:
        problem = "have other sizes than" if difference is None else f"differ by {difference:.3g} from"
        raise InputError(f"{path.name}: outputs of the exported program {problem} the network's. It was not written.")
    write_file(path, lambda file: file.write(contents))
    return difference


def _export(graph: ExportGraph, name: str) -> torch.export.ExportedProgram:
    free = tuple(
        dict.fromkeys(graph.free_axes.get(input_name, {}), torch.export.Dim.AUTO) for input_name in graph.inputs
    )
    try:
        return torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=free, strict=False)
    except Exception as error:
        # torch raises errors of many kinds for networks that it cannot trace.
        raise InputError(
            f"{name}: torch.export cannot export this network: {_first_line(error)} Export the weights alone instead "
            "(--format safetensors)."
        ) from error


def _as_onnx(
    exported: torch.export.ExportedProgram, graph: ExportGraph, name: str
) -> tuple[bytes, Callable[..., list[Tensor]]]:
    """The contents of the ONNX file, and a function that runs it."""
    try:
        import onnxruntime  # an optional dependency
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"ONNX needs packages that are not installed ({error}). pip install 'generalized-attention[onnx]'"
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
        options.log_severity_level = 3  # errors only, no warnings about the exporter's graph
        session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(
            f"{name}: this network cannot be exported to ONNX: {_first_line(error)} torch.export may support it "
            "(--format program)."
        ) from error

    def run(*inputs: Tensor) -> list[Tensor]:
        named = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, named)]

    return contents, run


def _outputs(result: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _difference(found: list[Tensor], expected: list[Tensor], ordered: bool) -> float | None:
    """The largest difference, relative to the output's largest absolute value if above 1; None if sizes differ."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return None
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
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
    """Suppresses the exporters' warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
