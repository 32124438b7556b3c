"""Locks on files: who is refused, what ends one, and that looking at one disturbs nobody."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from lightning_attn import locks

HOLD = "import pathlib, sys; from lightning_attn import locks; print(locks.take(pathlib.Path(sys.argv[1]))); input()"


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-u", "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip().isdigit()
    yield process
    process.kill()
    process.communicate()


def test_a_lock_is_of_one_process_until_it_is_closed(path):
    assert not locks.is_held(path)
    assert not path.exists()  # looking makes no file
    descriptor = locks.take(path)
    assert locks.is_held(path)
    assert locks.take(path, seconds=0) is None
    os.close(descriptor)
    assert not locks.is_held(path)
    os.close(locks.take(path, seconds=0))


def test_it_ends_with_a_process_that_is_killed(path, holder):
    assert locks.is_held(path)
    assert locks.take(path, seconds=0.1) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not locks.is_held(path)
    os.close(locks.take(path, seconds=0))


def test_no_other_program_inherits_it(path):
    """As the git that a training asks for its version, or a service that it starts."""
    descriptor = locks.take(path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    os.close(descriptor)
    assert not locks.is_held(path)
    child.communicate(b"\n")


def test_looking_refuses_nobody_and_is_not_seen(path):
    os.close(locks.take(path))
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(locks.is_held(path))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        while len(seen) < 200:
            descriptor = locks.take(path)
            assert descriptor is not None
            os.close(descriptor)
            stop.wait(0.05)  # so that the lock is free nearly always
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen.count(True) < len(seen) / 20


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither")
def test_links_and_pipes_of_others_are_left_alone(path, tmp_path):
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"\.lock"):
        locks.take(path)
    assert not locks.is_held(path)
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    os.mkfifo(path)
    assert not locks.is_held(path)


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), OSError(38, "fcntl is unavailable")])
def test_a_file_system_without_locks_is_named(path, monkeypatch, error):
    def refuse(descriptor, blocking):
        raise error

    monkeypatch.setattr(locks.filelock, "lock_descriptor", refuse)
    with pytest.raises(OSError, match=r"\.lock") as raised:
        locks.take(path)
    assert raised.value.errno == error.errno
    assert not locks.is_held(path)


def test_a_file_that_may_only_be_read_is_looked_at(path, holder, monkeypatch):
    """As another user's study; this process may be root's, which may write everything."""
    original = os.open

    def opened(file, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    assert locks.is_held(path)
    holder.kill()
    holder.wait()
    assert not locks.is_held(path)
