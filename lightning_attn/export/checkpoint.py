"""Exports a checkpoint's model to safetensors, `torch.export` programs or ONNX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_attn.archives import reading_once
from lightning_attn.errors import ExistingFileError, InputError
from lightning_attn.export.graph import SUFFIXES, ExportGraph, write_graph
from lightning_attn.export.networks import export_graphs
from lightning_attn.io import unused_path, write_json, written_together
from lightning_attn.tasks.base import BaseTask
from lightning_attn.training.checkpoints import (
    SAFETENSORS,
    Weights,
    choose_weights,
    member_checkpoint,
    read_checkpoint,
    stored_task,
    write_safetensors,
)

ExportFormat = Literal["safetensors", "program", "onnx"]


def export_checkpoint(
    path: str | Path,
    output: str | Path | None = None,
    weights: Weights = "averaged",
    *,
    format: ExportFormat = "safetensors",
    size: tuple[int, int] | None = None,
    task: str | None = None,
    trust: Sequence[str] = (),
) -> list[Path]:
    """Exports a checkpoint's model to files that are usable without the checkpoint.

    `safetensors` writes the weights, and a JSON file with the class and its arguments (with the attention's spec) and
    the properties of the data: classes or categories, and the sizes that images are resized to. A vocabulary is among
    the tensors. The file can replace a checkpoint in `load`, `--ckpt_path` for evaluation, `--run.initial_weights` and
    `average`.

    The other two formats also write an executable graph, after comparing its outputs with the network's: a program of
    `torch.export`, or ONNX, run by onnxruntime. `programs.json` has their inputs, outputs and largest differences.

    Args:
        path: The checkpoint.
        output: The folder to write to, created if necessary; None for `export` beside the checkpoint, `export_<task>`
            of one task, or `export-2` and so on.
        weights: Of a run with weight averaging, the average or the "current" weights.
        format: What to write.
        size: Height and width of a program's input images; None for the size that the data was resized to.
        task: Which task of a joint training, by its name there; it becomes a model of its own. None for all of them.
        trust: Packages whose classes the checkpoint may name, for a program; see `BaseTask.load`.

    Returns:
        The paths of `model.safetensors` and of the programs.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        CheckpointError: If it cannot be used.
        FileExistsError: If the folder already has such a file.
        ValueError: If the network cannot be exported in this format.
        ImportError: If ONNX's packages are missing.
    """
    if format == "safetensors" and size is not None:
        raise InputError("size is for the formats program and onnx; safetensors has no image size. Leave it out.")
    beside = Path(path).parent / ("export" if task is None else f"export_{task}")
    folder = unused_path(beside) if output is None else Path(output)
    file = folder / f"model{SAFETENSORS}"
    graphs: dict[Path, ExportGraph] = {}
    written = [file, file.with_suffix(".json")]
    with reading_once():
        checkpoint = read_checkpoint(path)
        stored_task(checkpoint, path)
        choose_weights(checkpoint, weights, path)
        if task is not None:
            checkpoint = member_checkpoint(checkpoint, task, path)
        if format != "safetensors":
            found = export_graphs(BaseTask.load(path, weights=weights, trust=trust, task=task), size)
            graphs = {folder / f"{name}{SUFFIXES[format]}": graph for name, graph in found.items()}
            written += [*graphs, folder / "programs.json"]
    for one in written:
        if one.exists():
            raise ExistingFileError(f"output: {one} already exists and is not overwritten. Choose another folder.")
    descriptions = {}
    with written_together(folder) as scratch:
        for target, graph in graphs.items():
            assert format != "safetensors"
            difference = write_graph(graph, scratch / target.name, format)
            descriptions[target.name] = graph.describe() | {"largest_difference": difference}
        if descriptions:
            write_json(scratch / "programs.json", descriptions)
        write_safetensors(checkpoint, scratch / file.name)
    return [file, *graphs]
