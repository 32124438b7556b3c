"""A trained model as files that others can read."""

from pathlib import Path

from lightning_attn.files import unused_path
from lightning_attn.tasks.checkpoints import (
    SAFETENSORS,
    Weights,
    choose_weights,
    read_checkpoint,
    stored_task,
    write_safetensors,
)


def export_checkpoint(path: str | Path, output: str | Path | None = None, weights: Weights = "averaged") -> Path:
    """Writes the weights of a checkpoint as safetensors, and beside them what they mean as JSON.

    The JSON file has the class and its arguments, the attention's spec among them, and what came from the data: classes
    or categories, and the lengths that images are resized to. A vocabulary is among the tensors. The file is read
    wherever a checkpoint is: by `load`, `--ckpt_path` for evaluation, `--run.initial_weights` and `average`.

    Args:
        path: The checkpoint.
        output: The folder to write into, made if need be; None for `export` beside the checkpoint, or
            `export-2` and so on.
        weights: Of a run that averages, the average or the "current" weights.

    Returns:
        `model.safetensors`.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be used.
        FileExistsError: If the folder has such a file.
    """
    checkpoint = read_checkpoint(path)
    stored_task(checkpoint, path)
    choose_weights(checkpoint, weights, path)
    folder = unused_path(Path(path).parent / "export") if output is None else Path(output)
    file = folder / f"model{SAFETENSORS}"
    for one in (file, file.with_suffix(".json")):
        if one.exists():
            raise FileExistsError(f"output: {one} is there already, and nothing is overwritten. Give another folder.")
    write_safetensors(checkpoint, file)
    return file
