"""One set of weights for several modules of the same structure, such as a ResNet at two output strides.

The modules stay apart: each has its own strides and dilations, and its own statistics of batch normalisation. Their
parameters are the same objects, and their other buffers hold the same values.
"""

from torch import nn

from lightning_attn.errors import InputError

__all__ = ["copy_buffers", "share_parameters", "statistics_in"]


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Makes the parameters of one module those of another, and copies the values of its buffers.

    Args:
        source: Has the parameters.
        target: A module of the same structure; its own parameters are dropped.

    Raises:
        ValueError: If names or shapes differ; the message says which.
    """
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (source, target)]
    differing = [name for name in sorted(shapes[0].keys() | shapes[1].keys()) if not _same(name, *shapes)]
    if differing:
        first = ", ".join(f"{name} ({shapes[0].get(name)} and {shapes[1].get(name)})" for name in differing[:3])
        raise InputError(
            f"the tasks' backbones differ in {len(differing)} tensors: {first}. Tasks of a joint training have one "
            "backbone: give each the same attention and the same ResNet."
        )
    parameters = dict(source.named_parameters())
    for path, module in target.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, parameters[f"{path}.{name}" if path else name])
    copy_buffers(source, target)


def _same(name: str, one: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> bool:
    return name in one and name in other and one[name] == other[name]


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copies the values of the buffers of a module of the same structure, statistics too."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])


def statistics_in(module: nn.Module) -> set[str]:
    """Names of the buffers with running statistics of batch normalisation, in the state of a module."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm)
        for name, _ in part.named_buffers(recurse=False)
    }
