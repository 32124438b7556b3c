"""Independent pieces of work on threads of their own, each with single-threaded arithmetic.

Matrix products of a few hundred rows gain little from a second core, since its threads meet after every operation.
Pieces that never meet use all cores: measured in docs/performance.md.
"""

import collections
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Tools = TypeVar("Tools")

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_key: tuple[int, int] | None = None  # process and number of threads that the pool was made for


def run_pieces(
    work: Callable[[Piece, Tools], None], pieces: Sequence[Piece], make_tools: Callable[[], Tools], device: torch.device
) -> None:
    """Calls `work` for every piece, on the CPU with as many threads as torch may use.

    The pieces must write to different memory. Gradients are not recorded.

    Args:
        work: Does one piece, with tools that no other thread uses at the time.
        pieces: What is to be done.
        make_tools: Called once for each thread: scratch memory is touched first by the thread that uses it, and is
            used again for its next piece.
        device: Where the tensors are.

    Raises:
        Exception: The first that `work` raises, once all pieces have ended.
    """
    count = min(torch.get_num_threads(), len(pieces)) if device.type == "cpu" else 1
    if count <= 1:
        tools = make_tools()
        for piece in pieces:
            work(piece, tools)
        return
    inference = torch.is_inference_mode_enabled()
    waiting = collections.deque(pieces)

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            tools = make_tools()
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                work(piece, tools)

    pool = _get_pool(torch.get_num_threads())
    futures = [pool.submit(run) for _ in range(count)]
    for future in futures:
        future.exception()  # wait for all: memory is not given back while a thread still writes to it
    for future in futures:
        future.result()


def _get_pool(num_threads: int) -> ThreadPoolExecutor:
    """The pool of this process; another one after a fork, whose child has no threads, or a changed thread number."""
    global _pool, _pool_key
    key = (os.getpid(), num_threads)
    with _lock:
        if _pool is None or _pool_key != key:
            ready = threading.Barrier(num_threads + 1)

            def start() -> None:
                torch.set_num_threads(1)
                torch.get_num_threads()  # a thread's first use of torch takes over the process's setting: use it now
                ready.wait()

            _pool = ThreadPoolExecutor(num_threads, thread_name_prefix="attention", initializer=start)
            for _ in range(num_threads):
                _pool.submit(_nothing)
            ready.wait()
            # The setting is each thread's own, but the last one is also what threads made later start with.
            torch.set_num_threads(num_threads)
            _pool_key = key
        return _pool


def _nothing() -> None:
    """A pool starts a thread for a task that finds none idle."""
