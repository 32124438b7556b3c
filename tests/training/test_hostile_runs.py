"""Run directories and checkpoints that lead elsewhere, never end, or train wrongly: found by an outside trial."""

import copy
import os
import pickletools
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.miniature.translation import write_miniature_corpus
from lightning_attn.archives import ArchiveError, read_archive

GO_ON = ["--trainer.max_steps", 6]


@pytest.fixture
def received(trained, in_folder) -> Path:
    """A copy of it, as it comes from somebody."""
    return Path(shutil.copytree(trained, in_folder / "received/translation/tiny"))


@pytest.fixture
def change(received) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Changes its last checkpoint."""

    def write(function):
        checkpoint = torch.load(received / "last.ckpt", weights_only=True)
        function(checkpoint)
        torch.save(checkpoint, received / "last.ckpt")
        return received / "last.ckpt"

    return write


def doubled(depth):
    """Lists that each hold the next one twice: few in a file, and 2^depth to whoever walks over them."""
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def callback_of(checkpoint):
    return next(state for state in checkpoint["callbacks"].values() if "best_model_path" in state)


@pytest.mark.parametrize("name", ["../../../escaped", "ABSOLUTE", "\0x", "\ud800", "a\\b", ".."])
def test_a_stored_name_is_no_path(run, change, received, in_folder, name):
    name = str(in_folder / "escaped") if name == "ABSOLUTE" else name
    path = change(lambda checkpoint: checkpoint["run"].update(name=name))
    (received / "run.json").unlink()
    before = set(in_folder.rglob("*"))
    printed = run("fit", "--ckpt_path", path, "--run.root", in_folder / "runs", *GO_ON, status=2)
    assert f"{path} is damaged: " in printed
    assert set(in_folder.rglob("*")) == before
    assert not (in_folder / "escaped").exists()


@pytest.mark.parametrize(
    "callback",
    [
        {"dict_kwargs": {"dirpath": "evil", "every_n_train_steps": 1}},
        {"init_args": {"filename": "../evil", "every_n_train_steps": 1}},
        {"init_args": {"filename": "{step].__doc__[3]}", "every_n_train_steps": 1}},
        {"init_args": {"filename": "x{epoch:>7000000000}", "every_n_train_steps": 1}},
        {"init_args": {"filename": "x{epoch:d}{", "every_n_train_steps": 1}},
        {"init_args": {"filename": "x{zz:c}", "every_n_train_steps": 1}},
    ],
)
def test_callbacks_write_into_the_run_directory(run, change, in_folder, callback):
    def stored(checkpoint):
        checkpoint["run"]["configuration"]["trainer"]["callbacks"] = [{"class_path": "ModelCheckpoint"} | callback]

    printed = run("fit", "--ckpt_path", change(stored), *GO_ON, status=2)
    assert "trainer.callbacks[0]" in printed
    assert not list(in_folder.rglob("*evil*"))


def test_ordinary_names_of_checkpoints_are_kept(run, change, received):
    def stored(checkpoint):
        arguments = {"filename": "own-{step:03d}-{val/loss:.2f}", "every_n_train_steps": 6}
        entry = {"class_path": "ModelCheckpoint", "init_args": arguments | {"auto_insert_metric_name": False}}
        checkpoint["run"]["configuration"]["trainer"]["callbacks"] = [entry]

    run("fit", "--ckpt_path", change(stored), *GO_ON)
    assert list(received.rglob("own-006-*.ckpt"))


def test_data_is_written_nowhere_by_a_checkpoint(run, change, in_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_folder / "home"))
    path = change(
        lambda checkpoint: checkpoint["run"]["configuration"]["data"].update(dict_kwargs={"cache_dir": "evil"})
    )
    assert "data.dict_kwargs" in run("fit", "--ckpt_path", path, *GO_ON, status=2)

    def miniature(checkpoint):
        checkpoint["run"]["configuration"]["data"] = {
            "class_path": "MiniatureTranslationDataModule",
            "init_args": {"root": str(in_folder / "evil")},
        }

    run(
        "test",
        "--ckpt_path",
        change(lambda checkpoint: (checkpoint["run"]["configuration"]["data"].clear(), miniature(checkpoint))),
    )
    assert not (in_folder / "evil").exists()


@pytest.mark.parametrize("how", ["link", "protocol", "above"])
def test_no_file_outside_is_removed_for_a_better_score(run, change, received, in_folder, how):
    other = in_folder / "oth::er"
    other.mkdir()
    (other / "best.ckpt").write_text("precious")
    (received / "sub").symlink_to(other)
    name = {"link": "sub/best.ckpt", "protocol": str(other / "best.ckpt"), "above": "../x.ckpt"}[how]
    score = torch.tensor(99.0)
    state = {"best_k_models": {name: score}, "kth_best_model_path": name, "kth_value": score}
    path = change(
        lambda checkpoint: callback_of(checkpoint).update(state, best_model_path=name, best_model_score=score)
    )
    if how != "link":
        (received / "sub").unlink()
    run("fit", "--ckpt_path", path, *GO_ON, status=2)
    assert (other / "best.ckpt").read_text() == "precious"


@pytest.mark.parametrize("name", [".lock", "hparams.yaml", "metrics.csv", "predictions", "test_metrics.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_entries_that_lead_elsewhere(run, received, in_folder, name, kind):
    victim = in_folder / "victim"
    if kind == "link":
        victim.write_text("precious")
    shutil.rmtree(received / name, ignore_errors=True)
    (received / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(received / name)
    else:
        (received / name).symlink_to(victim)
    for stage in ("fit", "test"):
        printed = run(stage, "--ckpt_path", received / "last.ckpt", *(GO_ON if stage == "fit" else []), status=2)
        assert f"{received}: {name} in it is" in printed
        assert "--run.root FOLDER" in printed
    printed = run("compare", received, received, status=2)
    assert f"{received}: {name} in it is" in printed
    assert "files of a run are read from its own directory only" in printed
    assert victim.exists() == (kind == "link")
    assert kind != "link" or victim.read_text() == "precious"


def test_links_inside_of_a_run_directory_are_fine(run, received):
    (received / "newest.ckpt").symlink_to("last.ckpt")
    run("fit", "--ckpt_path", received / "last.ckpt", *GO_ON)


@pytest.mark.timeout(60)
def test_tuples_that_take_for_ever_to_hash(tmp_path):
    pickled = b"\x80\x02}K\x01\x85q\x01" + b"".join(
        b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(1, 40)
    )
    pickled += b"K\x01s."
    assert sum(1 for _ in pickletools.genops(pickled)) > 40
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(ArchiveError, match="a tuple in it has more than"):
        read_archive(tmp_path / "bomb.ckpt")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", ["x", "optimizer"])
@pytest.mark.parametrize("command", ["export", "average", "fit"])
def test_few_lists_that_are_many(run, change, place, command):
    def stored(checkpoint):
        if place == "x":
            checkpoint["x"] = doubled(40)
        else:
            checkpoint["optimizer_states"][0]["state"][3]["foo"] = doubled(40)

    path = change(stored)
    arguments = {"export": ["--ckpt_path", path], "average": [path, path], "fit": ["--ckpt_path", path, *GO_ON]}
    printed = run(command, *arguments[command], status=2)
    assert f"{path} is damaged: {'x' if place == 'x' else 'optimizer_states'} contains more than" in printed


@pytest.mark.timeout(120)
def test_what_takes_memory(run, change, tmp_path):
    path = change(lambda checkpoint: checkpoint.update(x={"A" * 5_000_000: [1] * 400}))
    run("export", "--ckpt_path", path, "--output", tmp_path / "out")
    large = torch.zeros(3_000_000)
    path = change(lambda checkpoint: checkpoint["state_dict"].update({f"w{i}": large for i in range(60)}))
    assert "state_dict claims" in run("average", path, path, status=2)


@pytest.mark.parametrize("step", [-5, 0, 3, 10**9, 10**300])
def test_a_schedule_at_another_step(run, change, step):
    path = change(lambda checkpoint: checkpoint["lr_schedulers"][0].update(last_epoch=step))
    printed = run("fit", "--ckpt_path", path, *GO_ON, status=2)
    assert "lr_schedulers[0].last_epoch is" in printed
    assert f"{path}" in printed


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c: c["optimizer_states"][0]["state"][3].update(exp_avg=None), "state[3].exp_avg is NoneType"),
        (lambda c: callback_of(c).update(kth_best_model_path=None), "kth_best_model_path is no path"),
        (
            lambda c: c["run"]["configuration"]["data"]["init_args"].update(max_tokens=torch.Size([4])),
            "data.init_args.max_tokens is a Size",
        ),
        (lambda c: c.update({0: torch.ones(2)}), "has '0' for a name"),
        (lambda c: c.update(task="x"), "its task is not a name, a class and its arguments"),
        (lambda c: c["state_dict"].update({"\ud800": torch.ones(1)}), "'state_dict' is not tensors by name"),
        (lambda c: c["random_streams"][0]["python"].__setitem__(2, 10**500), "random_streams[0] is no state"),
        (lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=10**500), "param_groups[0].lr is"),
        (lambda c: c["lr_schedulers"][0].update(last_epoch=10**500), "lr_schedulers[0].last_epoch is"),
    ],
)
def test_states_of_other_kinds(run, change, function, message):
    path = change(function)
    printed = run("fit", "--ckpt_path", path, *GO_ON, status=2)
    assert f"{path} is" in printed
    assert message in printed


@pytest.mark.parametrize("value", [b"abc", {"a": torch.ones(1)}, {1: 2, "a": 3}])
def test_exports_of_what_json_cannot_hold(run, change, in_folder, value):
    path = change(lambda checkpoint: checkpoint.update(x=value))
    assert "x of the checkpoint cannot be written as JSON" in run(
        "export", "--ckpt_path", path, "--output", "out", status=2
    )
    assert not (in_folder / "out").exists()


def test_averages_of_nested_values(run, change):
    path = change(lambda checkpoint: checkpoint.update(x={"t": torch.ones(3), "l": [torch.ones(3)]}))
    other = path.with_name("other.ckpt")
    shutil.copy(path, other)
    run("average", path, other)
    changed = torch.load(other, weights_only=True)
    changed["x"]["l"][0] += 1
    torch.save(changed, other)
    assert "mean different things" in run("average", path, other, status=2)


def test_tied_weights_are_exported(run, change, in_folder):
    def tied(checkpoint):
        name = next(iter(checkpoint["state_dict"]))
        checkpoint["state_dict"]["tied"] = checkpoint["state_dict"][name]

    run("export", "--ckpt_path", change(tied), "--output", "out")
    assert Path("out/model.safetensors").is_file()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\n1\n2\n",
        b"step,a\n0," + b"x" * 200_000 + b"\n",
        b"step,epoch\n0,1,2,3,4\n",
        b"a,b\n1,2\n",
        b"step\nabc\n",
    ],
)
def test_damaged_curves(run, received, content):
    (received / "metrics.csv").write_bytes(content)
    printed = run("fit", "--ckpt_path", received / "last.ckpt", *GO_ON, status=2)
    assert "metrics.csv is damaged (" in printed
    assert (received / "metrics.csv").read_bytes() == content


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "config_fit.yaml",
            "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40)),
        ),
        ("config_fit.yaml", "[" * 5000),
        ("test_metrics.json", '{"a":' + "[" * 100_000),
        ("test_metrics.json", '{"a": 1' + "0" * 400 + "}"),
        ("metrics.csv", "step,val/a\n0,1,2\n"),
        ("metrics.csv", "step,val/a\ninf,1\n"),
    ],
)
def test_comparisons_of_damaged_runs(run, received, name, content):
    (received / name).write_text(content)
    assert f"compare: {received / name} cannot be read" in run("compare", received, received, status=2)


def test_values_are_no_markup(run, received):
    configuration = yaml.safe_load((received / "config_fit.yaml").read_text())
    other = Path(shutil.copytree(received, received.with_name("other")))
    configuration["model"]["init_args"]["norm_position"] = "[/red]"
    (other / "config_fit.yaml").write_text(yaml.safe_dump(configuration))
    assert "[/red]" in run("compare", received, other)


def test_a_class_that_this_call_replaces_need_not_be_trusted(run, change, corpus):
    def foreign(checkpoint):
        configuration = checkpoint["run"]["configuration"]
        configuration["trainer"]["callbacks"] = [{"class_path": "theirs.Shout"}]
        configuration["data"] = {"class_path": "theirs.Data", "init_args": {"root": "x"}}

    path = change(foreign)
    printed = run("fit", "--ckpt_path", path, *GO_ON, status=2)
    assert "names the classes " in printed
    assert "theirs.Shout (trainer.callbacks[0])" in printed
    assert "theirs.Data (data)" in printed
    own = ["--data", "WMT14DataModule", "--data.root", corpus, "--data.vocabulary_size", 300, "--data.max_tokens", 400]
    printed = run("fit", "--ckpt_path", path, *GO_ON, *own, status=2)
    assert "names the class theirs.Shout" in printed
    assert "theirs" not in sys.modules
    printed = run("fit", "--ckpt_path", path, *GO_ON, "--trust", "thiers", status=2)
    assert "(thiers, which this call trusts, has none of them)" in printed
    run("fit", "--ckpt_path", path, *GO_ON, *own, "--trainer.callbacks", "null")


def test_the_last_validation_loses_little(run_process, tiny_config, in_folder):
    """The step before it is stored, as a run that has done its last step is not resumed."""
    Path("bad.py").write_text(
        "from lightning_attn.tasks import TranslationTask\n\n\n"
        "class Bad(TranslationTask):\n"
        "    def validation_step(self, *arguments):\n"
        "        raise OSError('my validation fails')\n"
    )
    more = ["--model", "bad.Bad", "--trainer.max_steps", 4, "--trainer.val_check_interval", 4]
    run_process("fit", "-c", tiny_config, *more, status=1, PYTHONPATH=str(in_folder))
    (path,) = in_folder.glob("checkpoints/*/tiny/last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 3


def test_a_miniature_set_can_still_be_drawn_where_this_call_says(run, change, in_folder):
    write_miniature_corpus(in_folder / "mini", {"train": 40, "valid": 5, "test": 5})
    path = change(copy.copy)
    run("test", "--ckpt_path", path, "--data.root", in_folder / "mini")


def test_settings_of_an_impossible_network(run, change):
    path = change(lambda checkpoint: checkpoint["run"]["configuration"]["model"]["init_args"].update(dim=10**500))
    printed = run("test", "--ckpt_path", path, status=2)
    assert len([line for line in printed.splitlines() if "frame #" in line or "C++" in line]) == 0


def test_a_vocabulary_that_is_none(run, change):
    path = change(lambda checkpoint: checkpoint.update(vocabulary=torch.tensor([255, 254, 253], dtype=torch.uint8)))
    assert "checkpoint's vocabulary is damaged: " in run("test", "--ckpt_path", path, status=2)


def test_sentences_are_no_markup(run, received, corpus, in_folder):
    data = Path(shutil.copytree(corpus, in_folder / "data"))
    for language in ("en", "de"):
        path = data / f"test.{language}"
        path.write_text("A tag [/b] and [red].\n" + path.read_text())
    printed = run("test", "--ckpt_path", received / "last.ckpt", "--data.root", data)
    assert "First sentences" in printed


def test_a_wrong_trust_is_no_damage(run, received):
    printed = run("test", "--ckpt_path", received / "last.ckpt", "--trust", "mine/x", status=2)
    assert "error: trust: 'mine/x' is no name of a package" in printed
