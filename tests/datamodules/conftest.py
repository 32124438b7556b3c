import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest


@dataclass
class Mirror:
    """What a server of archives at 127.0.0.1 has, and what it was asked."""

    url: str = ""
    archives: dict[str, bytes] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)  # bytes after which the next answer for a path breaks off
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def mirror(serve) -> Mirror:
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            path = self.path.removeprefix("/pub/")
            state.requests.append((path, self.headers.get("Range")))
            if path not in state.archives:
                self.send_error(404)
                return
            data = state.archives[path]
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : state.breaks.pop(path)] if path in state.breaks else data[start:])

    state.url = f"{serve(Handler)}/pub"
    return state


@pytest.fixture
def run_on_two_ranks(tmp_path, free_port, request) -> Callable[..., None]:
    """Runs a script as both ranks; it can import the test module and its helpers."""

    def call(script: str, *arguments: object) -> None:
        path = tmp_path / "two_ranks.py"
        path.write_text(script)
        command = [sys.executable, str(path), *map(str, arguments)]
        tests = Path(__file__).parents[1]
        modules = os.pathsep.join(map(str, (request.path.parent, tests, tests.parent)))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "NODE_RANK": "0", "PYTHONPATH": modules}
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | group | {"LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                output, _ = process.communicate(timeout=900)
                assert process.returncode == 0, output
        finally:
            for process in processes:
                process.kill()

    return call
