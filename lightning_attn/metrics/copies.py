"""Copies of results from a GPU to the host, without making the host wait for the batch that is being computed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["DelayedCopies"]

Use = Callable[[list[Tensor]], None]


class DelayedCopies:
    """Passes tensors to functions on the host; those of a GPU one call later, when they are there without waiting.

    A copy that waits for the GPU would leave it without work until the next batch is sent. Here a batch's results are
    copied to page-locked memory while the host sends the next batch, and used after that.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event, list[Tensor], Use]] = []

    def add(self, tensors: Sequence[Tensor], use: Use) -> None:
        """Calls `use` with the tensors on the CPU: at once if they are there, else in the next `add` or `finish`.

        Args:
            tensors: On one GPU, or on the CPU, where they must not be modified meanwhile.
            use: The function. What it raises comes out of the call in which it is called.
        """
        earlier, self._pending = self._pending, []
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None:
            copies = [_started(tensor) for tensor in tensors]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._pending.append((event, copies, use))
        _use(earlier)
        if device is None:
            use([tensor.cpu() for tensor in tensors])

    def finish(self) -> None:
        """Waits for all copies, and uses them."""
        pending, self._pending = self._pending, []
        _use(pending)


def _started(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory that is complete when the GPU comes to it; the tensor itself if it is on the CPU."""
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


def _use(pending: Sequence[tuple[torch.cuda.Event, list[Tensor], Use]]) -> None:
    for event, copies, use in pending:
        event.synchronize()
        use(copies)
