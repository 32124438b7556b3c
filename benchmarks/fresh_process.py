"""Calls a function in a fresh process, so that its memory is its own."""

import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

REPOSITORY = Path(__file__).parents[1]

# glibc raises its threshold for mmap while a process runs, and how far depends on what ran before. Pinned, a freed
# tensor goes back to the system at once, so that resident memory is the memory in use, whoever allocates it.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class FreshProcessError(RuntimeError):
    """Why a fresh process has no result: its error, its signal, or the time that it was given."""


def describe(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def in_fresh_process(
    function: Callable[..., Any],
    *arguments: Any,
    threads: int | None = None,
    limit: int | None = None,
    timeout: float = 600.0,
) -> Any:
    """Calls `function(*arguments)` in a fresh process; all of them, and the result, are pickled.

    Args:
        function: One that its module has by name.
        arguments: Its arguments.
        threads: Threads of the tensor operations; memory is then freed at once, too. None for the environment of this
            process as it is.
        limit: Bytes of data it may allocate; more is an error in it, not a danger to the machine.
        timeout: Seconds after which it is killed.

    Raises:
        FreshProcessError: If it fails.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment |= _MALLOC | {"OMP_NUM_THREADS": str(threads)}
    try:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.fresh_process"],
            cwd=REPOSITORY,
            env=environment,
            input=pickle.dumps((sys.path, threads, limit)) + pickle.dumps((function, arguments)),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FreshProcessError(f"ended after {timeout:.0f} s") from error
    if run.returncode < 0:
        raise FreshProcessError(f"ended by signal {-run.returncode}")
    if run.returncode > 0:
        lines = run.stderr.decode(errors="replace").strip().splitlines()
        raise FreshProcessError((lines or [f"exit status {run.returncode}"])[-1])
    return pickle.loads(run.stdout)  # noqa: S301 - written by `_answer`


def _answer(requests: BinaryIO, results: BinaryIO) -> None:
    """The other side: calls the function, and writes the result or ends with the error."""
    path, threads, limit = pickle.load(requests)  # noqa: S301 - written by `in_fresh_process`
    sys.path[:] = path
    try:
        function, arguments = pickle.load(requests)  # noqa: S301 - the same; imports the function's module
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        if limit is not None and sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        pickle.dump(function(*arguments), results)
    except Exception as error:
        raise SystemExit(describe(error)) from error


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # what the function prints is not part of the result
        _answer(sys.stdin.buffer, output)
