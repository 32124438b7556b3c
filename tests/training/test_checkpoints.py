"""Checkpoints made to do harm, damaged, or from elsewhere: each is refused, and nothing in it runs."""

import builtins
import functools
import operator
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_attn.tasks import CheckpointError, TranslationTask
from lightning_attn.training.checkpoint_averaging import average_checkpoints
from lightning_attn.training.checkpoint_keys import FORMAT, FORMAT_KEY
from lightning_attn.training.checkpoints import choose_weights, read_checkpoint


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class SetsState:
    """Runs code in __setstate__, which unpickling calls."""

    def __setstate__(self, state):
        Path(state["path"]).touch()


class Tensor(torch.Tensor):
    """A subclass, whose own unpickling could do anything."""

    def __reduce_ex__(self, protocol):
        return Path.touch, (Path("ran"),)


def payloads():
    """What runs `touch ran` when it is unpickled, in the usual and in roundabout ways."""
    sets_state = SetsState()
    sets_state.path = "ran"
    script = "import pathlib; pathlib.Path('ran').touch()"
    return {
        "os.system": Calls(os.system, "touch ran"),
        "exec": Calls(exec, script),
        "eval": Calls(eval, "__import__('pathlib').Path('ran').touch()"),  # noqa: S307 - what must not run
        "getattr": Calls(getattr, Path("ran"), "touch"),
        "method": Calls(Path.touch, Path("ran")),
        "partial": Calls(functools.partial, os.system, "touch ran"),
        "methodcaller": Calls(operator.methodcaller, "touch"),
        "import": Calls(builtins.__import__, "antigravity"),
        "torch.load": Calls(torch.load, "other.ckpt"),
        "setstate": sets_state,
        "tensor subclass": torch.zeros(2).as_subclass(Tensor),
    }


PLACES = {
    "top": lambda checkpoint, payload: checkpoint | {"extra": payload},
    "optimizer": lambda checkpoint, payload: (
        checkpoint | {"optimizer_states": [{"state": {0: {"exp_avg": payload}}, "param_groups": []}]}
    ),
    "weights": lambda checkpoint, payload: checkpoint | {"state_dict": checkpoint["state_dict"] | {"last": payload}},
    "callbacks": lambda checkpoint, payload: checkpoint | {"callbacks": {"ModelCheckpoint": {"best": [payload]}}},
    "arguments": lambda checkpoint, payload: checkpoint | {"task": checkpoint["task"] | {"arguments": {"x": payload}}},
}


def checkpoint():
    return {
        "state_dict": {"weight": torch.zeros(2)},
        "task": {"name": "translation", "class_path": "lightning_attn.tasks.TranslationTask", "arguments": {}},
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", payloads())
def test_nothing_in_a_checkpoint_runs(in_folder, kind, place):
    torch.save(PLACES[place](checkpoint(), payloads()[kind]), "evil.ckpt", pickle_protocol=2)
    for read in (read_checkpoint, TranslationTask.load):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt contains objects other than tensors .* Nothing was run"):
            read("evil.ckpt")
    assert not Path("ran").exists()


def test_the_payloads_would_run(in_folder):
    """Or the test above would say nothing."""
    for kind in ("os.system", "exec", "eval", "method", "setstate", "tensor subclass"):
        torch.save({"state_dict": payloads()[kind]}, "evil.ckpt")
        torch.load("evil.ckpt", weights_only=False)
        assert Path("ran").exists(), kind
        Path("ran").unlink()


def test_files_that_are_only_a_pickle_are_not_opened(in_folder):
    """Also those of PyTorch before 1.6, and one that begins like an archive."""
    pickled = pickle.dumps(checkpoint() | {"extra": Calls(os.system, "touch ran")})
    Path("plain.ckpt").write_bytes(pickled)
    torch.save(
        checkpoint() | {"extra": Calls(os.system, "touch ran")}, "old.ckpt", _use_new_zipfile_serialization=False
    )
    Path("disguised.ckpt").write_bytes(b"PK\x03\x04" + pickled)
    for name in ("plain", "old", "disguised"):
        with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
            read_checkpoint(f"{name}.ckpt")
    with zipfile.ZipFile("archive.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError):
        read_checkpoint("archive.ckpt")
    assert not Path("ran").exists()


def test_every_part_of_the_command_refuses(run, tiny_config, in_folder):
    torch.save(checkpoint() | {"extra": Calls(os.system, "touch ran")}, "evil.ckpt")
    for stage in ("fit", "validate", "test", "predict"):
        for configuration in ([], ["-c", tiny_config]):
            printed = run(stage, *configuration, "--ckpt_path", "evil.ckpt", status=2)
            assert "contains objects other than tensors" in printed
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 1000])
def test_empty_and_foreign_files(in_folder, content):
    Path("bad.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.ckpt \({len(content)} bytes\) is not a complete checkpoint"):
        read_checkpoint("bad.ckpt")


@pytest.mark.parametrize(
    ("place", "value"), [(8, 1), (10, 8), (10, 12), (10, 14), (10, 99)], ids=["encrypted", *("as compressed",) * 4]
)
def test_archives_whose_directory_is_damaged(in_folder, place, value):
    torch.save(checkpoint(), "some.ckpt")
    damaged = bytearray(Path("some.ckpt").read_bytes())
    damaged[damaged.index(b"PK\x01\x02") + place] = value
    Path("some.ckpt").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"some\.ckpt is damaged.+\. Use another checkpoint"):
        read_checkpoint("some.ckpt")


def test_archives_of_something_else(in_folder):
    with zipfile.ZipFile("photos.zip", "w") as archive:
        archive.writestr("holiday.txt", "sun")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint("photos.zip")
    torch.save([torch.zeros(1)], "list.ckpt")
    with pytest.raises(CheckpointError, match="has no 'state_dict'"):
        read_checkpoint("list.ckpt")
    torch.save({"state_dict": {}}, "lightning.ckpt")
    with pytest.raises(CheckpointError, match="was not written by a task of lightning_attn"):
        TranslationTask.load("lightning.ckpt")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"state_dict": [torch.zeros(1)]}, "its 'state_dict' is not tensors by name"),
        ({"state_dict": {"weight": 1}}, "its 'state_dict' is not tensors by name"),
        ({"task": "translation"}, "what it says of its task is not a name, a class and its arguments"),
        ({"task": {"name": "x", "class_path": "a.B"}}, "what it says of its task is not a name, a class and its"),
        (
            {"task": {"name": "x", "class_path": "nowhere.B", "arguments": {}}},
            r"names the class nowhere\.B \(task\.class_path\)",
        ),
    ],
)
def test_parts_of_another_kind(in_folder, part, message):
    torch.save(checkpoint() | part, "odd.ckpt")
    with pytest.raises(CheckpointError, match=message):
        TranslationTask.load("odd.ckpt")


def test_unknown_weights(in_folder):
    torch.save(checkpoint(), "some.ckpt")
    with pytest.raises(ValueError, match="weights must be 'averaged' or 'current', got 'best'"):
        choose_weights(read_checkpoint("some.ckpt"), "best", "some.ckpt")


def test_a_checkpoint_of_a_later_version(in_folder):
    torch.save(checkpoint() | {FORMAT_KEY: FORMAT + 1}, "later.ckpt")
    with pytest.raises(CheckpointError, match=f"its format is {FORMAT + 1}, and this version reads {FORMAT}"):
        read_checkpoint("later.ckpt")


def test_a_mean_leaves_the_states_of_the_trainings_out(in_folder):
    for number in (1, 3):
        state = {"MixedPrecision": {"scale": float(number)}, "global_step": number, "random_streams": []}
        weights = {"state_dict": {"weight": torch.full((2,), float(number))}}
        torch.save(checkpoint() | state | weights, f"{number}.ckpt")
    mean = read_checkpoint(average_checkpoints(["1.ckpt", "3.ckpt"]))
    assert mean["state_dict"]["weight"].tolist() == [2.0, 2.0]
    assert mean.keys() == {"state_dict", "task", "global_step", "averaged"}
