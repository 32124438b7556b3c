"""Processes that begin anew, without running the user's script again."""

import contextlib
import sys
import types
from collections.abc import Iterator
from multiprocessing.context import BaseContext, SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any


def without_main_module() -> BaseContext:
    """A context for pools whose processes start anew (fork is unsafe once torch has started threads).

    Python's own would import the main module in each of them: a script or notebook that does its work without
    `if __name__ == "__main__"` would begin it again there. So what goes to these processes must be importable.
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
    sys.modules["__main__"] = types.ModuleType("__main__")  # without a file, there is nothing to import
    try:
        yield
    finally:
        sys.modules["__main__"] = main
