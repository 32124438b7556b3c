"""The accelerator that is measured, or the CPU where there is none: its facts, its clock, its memory, its graphs."""

import contextlib
import gc
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.results import Memory

PRECISIONS: Mapping[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of autocast by the name of a precision; None for none."""


def device() -> torch.device:
    """Where everything is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_gpu() -> bool:
    """Whether that is a GPU."""
    return device().type == "cuda"


def describe_card() -> dict[str, str | float]:
    """What figures of a GPU depend on; on a CPU only that it is one, where everything is small."""
    if not on_gpu():
        return {"card": "CPU, small sizes"}
    facts = torch.cuda.get_device_properties(device())
    cudnn: Any = torch.backends.cudnn
    return {
        "card": facts.name,
        "card_memory_GiB": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn.version()),
    }


def card_slug() -> str:
    """The card in the names of files, such as `h100`."""
    name = str(describe_card()["card"]).lower()
    found = re.search(r"[a-z]+\d+[a-z]*|cpu", name)
    return found[0] if found else re.sub(r"\W+", "_", name)


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (answer.stdout.splitlines() or ["unknown"])[0]


def autocast(precision: str) -> torch.autocast:
    """Autocast of one of `PRECISIONS`."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device().type, dtype, enabled=dtype is not None)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 products of full precision, also in convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Only algorithms that give the same bits in every run; others raise an error."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def synchronize() -> None:
    """Waits for the GPU."""
    if on_gpu():
        torch.cuda.synchronize()


def synchronized(step: Callable[[], object]) -> Callable[[], None]:
    """The step, and waiting for it: what a clock around it measures is the whole of it."""

    def run() -> None:
        step()
        synchronize()

    return run


def graphed(step: Callable[[], object]) -> Callable[[], None]:
    """The step as a CUDA graph, which replays its kernels without the host's share.

    Raises:
        RuntimeError: If the step cannot be captured, such as one that asks the GPU for a number.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # lazy initialisation and the choice of algorithms are no part of a graph
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with no_synchronisation():  # a capture that fails leaves the random generator unusable
        step()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()

    return replay


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Makes operations that wait for the GPU raise a `RuntimeError`; nothing on a CPU."""
    if not on_gpu():
        yield
        return
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_memory(step: Callable[[], object]) -> Memory | None:
    """What the allocator holds before the step and at its peak; None on a CPU."""
    if not on_gpu():
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize()
    return Memory(before, torch.cuda.max_memory_allocated())


def free_memory() -> None:
    """Gives back what nothing uses any more."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def answers() -> bool:
    """Whether the GPU still computes: after an illegal access, every later call of the process fails.

    A graph whose capture broke off may leave the random generator of the process unusable, which counts too.
    """
    try:
        free_memory()
        return bool(torch.rand((), device=device()).item() < 1)
    except RuntimeError:
        return False
