import json

import pytest
from pytorch_lightning.utilities import rank_zero_only

from lightning_attn import io
from lightning_attn.training import run_directory


@pytest.fixture(autouse=True)
def no_claims(monkeypatch):
    monkeypatch.setattr(run_directory, "_claimed", [])
    monkeypatch.setenv(run_directory._VARIABLE, "")


def test_taken_names_get_a_number(tmp_path):
    names = [run_directory.claim(tmp_path, "translation", "name").name for _ in range(3)]
    assert names == ["name", "name-2", "name-3"]
    origin = json.loads((tmp_path / "translation" / "name" / run_directory.MARKER).read_text(encoding="utf-8"))
    assert {"lightning_attn", "torch", "git"} <= origin.keys()


def test_a_number_is_not_taken_for_a_name(tmp_path):
    """A run of another experiment is none of this name, whatever its own name ends in."""

    def last(name):
        return run_directory.newest(tmp_path, "translation", name, "last.ckpt")

    other = run_directory.claim(tmp_path, "translation", "seed-1")
    (other / "last.ckpt").touch()
    assert last("seed") is None
    assert not run_directory.is_named(other, "seed")
    first = run_directory.claim(tmp_path, "translation", "seed")
    second = run_directory.claim(tmp_path, "translation", "seed")
    assert second.name == "seed-2"
    (second / "last.ckpt").touch()
    assert last("seed") == second / "last.ckpt"
    assert last("seed-2") is None
    third = run_directory.claim(tmp_path, "translation", "seed-2")
    (third / "last.ckpt").touch()
    assert last("seed-2") == third / "last.ckpt"
    assert last("seed") == second / "last.ckpt"
    renamed = first.rename(first.with_name("best-of-all"))
    assert run_directory.is_named(renamed, "best-of-all")
    assert not run_directory.is_named(renamed, "seed")


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "scores.json"

    def write(file):
        path.write_text("of another process")
        file.write(b"{}")

    assert io.write_file(path, write) == path.with_name("scores-2.json")
    assert path.read_text() == "of another process"


def test_other_ranks_make_none(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.delenv(run_directory._VARIABLE)
    assert run_directory.claim(tmp_path, "translation", "name") == tmp_path / "translation" / "name"
    assert not list(tmp_path.iterdir())


def test_only_unused_directories_are_removed(tmp_path):
    empty = run_directory.claim(tmp_path, "translation", "empty")
    (empty / "config_fit.yaml").touch()
    used = run_directory.claim(tmp_path, "translation", "used")
    (used / "last.ckpt").touch()
    run_directory.discard_if_unused()
    assert not empty.exists()
    assert used.exists()


def test_owner_is_a_run_directory(tmp_path):
    path = run_directory.claim(tmp_path, "translation", "name")
    assert run_directory.owner(path / "last.ckpt") == path
    assert run_directory.owner(tmp_path / "last.ckpt") is None


def test_files_are_whole_and_never_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    assert io.write_json(path, {"ä": 1}) == path
    assert io.write_json(path, {"ä": 2}).name == "scores-2.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.write_text(tmp_path / "new.txt", "text")
    with pytest.raises(OSError, match="No space left"):
        io.write_file(path, lambda file: file.write(b"{}"), replace=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores-2.json", "scores.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}


def test_a_file_is_replaced_if_that_is_asked_for(tmp_path):
    path = tmp_path / "deeper" / "figure.png"
    for content in (b"longer\r\n", b"new\n"):
        assert io.write_file(path, lambda file, content=content: file.write(content), replace=True) == path
        assert path.read_bytes() == content
    assert io.write_text(path, "ü\n\r\n") == path.with_name("figure-2.png")
    assert path.with_name("figure-2.png").read_bytes() == "ü\n\r\n".encode()
    assert path.read_bytes() == b"new\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert len(list(path.parent.iterdir())) == 2
