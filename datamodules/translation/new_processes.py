"""Worker processes that are spawned without importing the user's main module."""

import contextlib
import sys
import types
from collections.abc import Iterator
from multiprocessing.context import BaseContext, SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any


def without_main_module() -> BaseContext:
    """A "spawn" context for process pools (fork is unsafe once torch has started threads).

    Python's own imports the main module in each process: a script without `if __name__ == "__main__"` would run again
    there. So functions for these processes must be importable from other modules.
    """
    return _Context()


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # noqa: N802 (the name is Python's)
        with _hidden_main_module():
            return SpawnProcess._Popen(process_obj)


class _Context(SpawnContext):
    Process = _Process


@contextlib.contextmanager
def _hidden_main_module() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")  # it has no file, so there is nothing to import
    try:
        yield
    finally:
        sys.modules["__main__"] = main
