import sys
from collections.abc import Callable
from typing import Any

import pytest
from ranks import run_on_ranks


@pytest.fixture
def on_two_ranks(tmp_path, monkeypatch) -> Callable[[Callable[[int], Any]], list[Any]]:
    """Calls a function with its rank in two processes of one group; gives what both return, as JSON holds it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return lambda function: run_on_ranks(function, tmp_path, 2)
