"""Reads pretrained weights from torchvision or from a file safely, and loads them strictly."""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from lightning_attn.archives import ArchiveError, read_archive
from lightning_attn.attention import DeformableConv, GatedResidual
from lightning_attn.errors import InputError, MissingFileError, UnusableFileError

_logger = logging.getLogger(__name__)

_CLASSIFIER = "fc."
COUNTER = ".num_batches_tracked"  # a counter, not a weight; older files do not have it


def weight_names(architecture: str) -> list[str]:
    """The names of torchvision's weights for an architecture such as `"resnet50"`; none if it publishes none."""
    if architecture not in list_models():
        return []
    return [entry.name for entry in get_model_weights(architecture)]


def read_weights(weights: str, architecture: str) -> dict[str, Tensor]:
    """Reads the state of a classifier or a backbone. Only tensors are unpickled.

    Args:
        weights: A name of torchvision's, such as `"IMAGENET1K_V1"`, which is downloaded once into torch's hub folder
            and checked against its hash; or the path of a file written by `torch.save(module.state_dict(), path)`.
        architecture: Name of the architecture of torchvision's weights.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        FileNotFoundError: If `weights` is neither a name nor a file.
        OSError: If a download fails or has the wrong hash, or a file cannot be read.
        ValueError: If a file does not contain tensors by name.
    """
    names = weight_names(architecture)
    if weights in names:
        return _download(weights, architecture)
    path = Path(weights).expanduser()
    if not path.is_file():
        published = (
            f"one of torchvision's for {architecture} ({', '.join(names)})" if names else "a name of torchvision's"
        )
        raise MissingFileError(
            f"weights={weights!r} is neither {published} nor a file"
            f"{' but a folder' if path.is_dir() else ''}. Give the path of a file from "
            "torch.save(module.state_dict(), path), or 'none' for random initialisation."
        )
    return _read_file(path)


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copies a state into a module, all tensors or none, and logs how many were copied.

    Names and shapes must match exactly. Exceptions: parameters added by attention (see `names_added_by_attention`) keep
    their values if the state lacks them, and a classifier `fc` of the state is ignored.

    Args:
        module: A backbone with torchvision's names.
        state: Tensors by name.
        source: Their origin, for messages.

    Raises:
        ValueError: If names are missing or unexpected or shapes differ; the message lists them.
    """
    own = module.state_dict()
    new = names_added_by_attention(module)
    offered = {name: value for name, value in state.items() if name in own or not name.startswith(_CLASSIFIER)}
    missing = [name for name in own if name not in offered and name not in new and not name.endswith(COUNTER)]
    unexpected = [name for name in offered if name not in own and not name.endswith(COUNTER)]
    wrong = [
        f"{name} {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in offered.items()
        if name in own and value.shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise InputError(
            f"The weights of {source} do not fit the network. {'; '.join(problems)}. "
            "Choose the architecture, width and norm that they were trained with, or weights: none."
        )
    matching = {name: value for name, value in offered.items() if name in own}
    module.load_state_dict(matching, strict=False)
    initialised = [name for name in own if name in new and name not in matching]
    _logger.info(
        "%d of %d tensors read from %s%s",
        len(matching),
        len(own),
        source,
        f"; {len(initialised)} of the attention keep their initialisation" if initialised else "",
    )


def names_added_by_attention(module: nn.Module) -> set[str]:
    """Names in a network's state that pretrained weights lack: gated attention, and offsets of convolutions."""
    parts = {
        **{f"{name}.": part for name, part in module.named_modules() if isinstance(part, GatedResidual)},
        **{f"{name}.offset.": part.offset for name, part in module.named_modules() if isinstance(part, DeformableConv)},
    }
    return {prefix + name for prefix, part in parts.items() for name in part.state_dict()}


def _download(name: str, architecture: str) -> dict[str, Tensor]:
    entry = get_model_weights(architecture)[name]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    fix = (
        f"Download it elsewhere and put it into {folder} (TORCH_HOME sets that folder), or set weights to the path of "
        "the file."
    )
    try:
        state: dict[str, Tensor] = entry.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        cached = folder / Path(entry.url).name
        if cached.is_file():
            raise UnusableFileError(
                f"weights={name!r}: {cached} is damaged ({_first_line(error)}). Delete it to download it again."
            ) from error
        raise UnusableFileError(
            f"weights={name!r}: {entry.url} could not be downloaded ({_first_line(error)}). {fix}"
        ) from error
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    fix = "Write the file by torch.save(module.state_dict(), path)."
    try:
        state = read_archive(path, legacy=True)
    except ArchiveError as error:
        raise InputError(f"weights={str(path)!r} {str(error).rstrip('.')}. {fix}") from error
    if not isinstance(state, Mapping):
        raise InputError(f"weights={str(path)!r} contains a {type(state).__name__}, not tensors by name. {fix}")
    if not state:
        raise InputError(f"weights={str(path)!r} is an empty mapping. {fix}")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"weights={str(path)!r} must contain tensors by name, but these are not: {', '.join(others[:5])}. {fix}"
        )
    return dict(state)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
