"""Tensors that claim to be on CUDA, without numbers: whatever asks for a number raises an error.

Such an operation (`item`, `bool`, boolean indexing, `nonzero`) would make the host wait for a real GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (  # noqa: PLC2701 - torch has no public names
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

__all__ = ["DataDependentOutputException", "DynamicOutputShapeException", "FakeTensorMode", "fake_cuda", "gradients"]


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Makes all tensors fake, and on CUDA unless a device is given."""
    with FakeTensorMode(), torch.device("cuda"):
        yield


def gradients(loss: Tensor) -> dict[int, Tensor]:
    """The gradients of all parameters, by `id`.

    The engine of torch's backward pass needs the driver of the device, so this calls the nodes of the graph itself.
    """
    order, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((one, False) for one, _ in node.next_functions if one is not None)]
    pending: dict[object, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    found = {}
    for node in reversed(order):
        of_outputs = pending.pop(node, {})
        if type(node).__name__ == "AccumulateGrad":
            if of_outputs:
                found[id(node.variable)] = of_outputs[0]
            continue
        if not of_outputs:
            continue
        is_python = not callable(node)
        given = []
        for index, output in enumerate(node._input_metadata):
            gradient = of_outputs.get(index)
            if gradient is not None:
                gradient = gradient.sum_to_size(output.shape)
            elif is_python:
                gradient = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
            given.append(gradient)
        results = node.apply(*given) if is_python else node(*given)
        results = results if isinstance(results, tuple) else (results,)
        edges = node.next_functions
        if is_python:  # edges are those of tensors, results those of all arguments
            results = [one for one, needed in zip(results, node.needs_input_grad, strict=True) if needed]
            edges = [edge for edge in edges if edge[0] is not None]
        for (following, index), gradient in zip(edges, results, strict=True):
            if following is not None and gradient is not None:
                of_following = pending.setdefault(following, {})
                earlier = of_following.get(index)
                of_following[index] = gradient if earlier is None else earlier + gradient
    return found
