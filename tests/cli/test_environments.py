"""Shells, limits and places that are not as usual: a message, or nothing of it is felt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.machine import user_cache_folder

LONG = "x" * 300


def python(script, shell="", **options):
    """Runs a script in a process of its own, perhaps with redirections of a shell."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_opened(tmp_path, closed):
    """And no file that is opened later gets the number of one of them."""
    script = (
        "import sys, os; from lightning_attn.cli.launching import open_standard_streams\n"
        "open_standard_streams(); print('out'); print('err', file=sys.stderr); sys.stdin.read()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); file.write(str(file.fileno()))"
    )
    done = python(script, closed, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "file").read_text()) > 2
    assert ("out" in done.stdout) == (" >&-" not in f" {closed}")


@pytest.mark.parametrize(
    ("hard", "workers", "enough"), [(24, 2, False), (100, 2, False), (100, 0, True), (200, 2, True)]
)
def test_the_limit_of_open_files(hard, workers, enough):
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (20, {hard}))\n"
        "from lightning_attn.cli.checks import check_open_files\n"
        "try:\n"
        f"    check_open_files({workers})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    ).replace("(20, ", "(24, ")
    done = python(script)
    if enough:
        assert done.stdout.split() == [str(hard), str(hard)], "raised as far as that goes"
    else:
        assert f"may open {hard} files at a time, and needs {64 + 32 * workers}" in done.stdout, done.stderr
        assert "--data.num_workers" in done.stdout


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    with pytest.raises(NotADirectoryError, match=r"Set XDG_CACHE_HOME or HOME.*--data\.cache_dir"):
        user_cache_folder()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.cache_dir", "/proc/nothing"], "/proc/nothing: No such file or directory. --data.cache_dir names it"),
        (["--run.root", "/proc/nothing"], "/proc/nothing: No such file or directory. --run.root names it"),
        (["--run.root", LONG], "File name too long. --run.root names it"),
        (["--data.cache_dir", LONG], "File name too long. --data.cache_dir names it"),
        (["--data.train_files", LONG], "File name too long"),
        (["-c", LONG], "File name too long"),
        (["--ckpt_path", LONG], "File name too long"),
    ],
)
def test_places_that_cannot_be(run, tiny_config, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    printed = run("fit", "-c", tiny_config, *arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed
    assert not list(Path.cwd().rglob("*.part"))
