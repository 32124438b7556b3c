"""The peak memory of a process, as the system knows it."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["PROCESS_STATUS", "ProcessStatus", "growth_of_memory"]


class ProcessStatus:
    """What Linux knows exactly of the memory of this process; see proc_pid_status(5) and proc_pid_clear_refs(5)."""

    status, clear_refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    @classmethod
    def here(cls) -> "ProcessStatus | None":
        """None on other systems, and where the peak cannot be reset."""
        return cls() if cls.status.exists() and os.access(cls.clear_refs, os.W_OK) else None

    def reset_peak(self) -> None:
        """`VmHWM` becomes `VmRSS`."""
        self.clear_refs.write_text("5", encoding="ascii")

    def read(self, field: str) -> int:
        """Bytes of a field.

        Raises:
            OSError: If there is no such field.
        """
        for line in self.status.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"{self.status} has no field {field}.")


PROCESS_STATUS = ProcessStatus.here()


def growth_of_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of memory that a function needs at its peak beyond what is in use before it.

    Args:
        run: Called once; call it before, so that all code is loaded.
        device: On CUDA, allocations of torch count; on the CPU the resident memory of this process, whatever allocates.

    Returns:
        None where that cannot be measured: other devices, and systems other than Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or PROCESS_STATUS is None:
        return None
    _return_freed_memory()
    PROCESS_STATUS.reset_peak()
    resident = PROCESS_STATUS.read("VmRSS")
    run()
    return max(0, PROCESS_STATUS.read("VmHWM") - resident)


def _return_freed_memory() -> None:
    """Makes glibc return what it keeps of freed memory, which a new allocation would take without any growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
