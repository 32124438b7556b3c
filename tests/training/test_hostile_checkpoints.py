"""Checkpoints from others: nothing in one is run or decides where files are written, and damage is told by name."""

import json
import shutil
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.translation.vocabulary import Vocabulary
from lightning_attn.errors import InputError
from lightning_attn.tasks import BaseTask, CheckpointError, TranslationTask
from lightning_attn.training.checkpoints import read_checkpoint

MODULE = """
import pathlib
import torch
from pytorch_lightning import Callback
from lightning_attn.tasks import TranslationTask

pathlib.Path("imported").touch()


class Task(TranslationTask):
    pass


class Mean(torch.nn.Module):
    def __init__(self, dim, ndim, num_heads, causal, **options):
        super().__init__()


class Watch(Callback):
    def on_fit_start(self, trainer, pl_module):
        pathlib.Path("watched").touch()
"""


@pytest.fixture(autouse=True)
def fresh_modules():
    """Lets each test import modules of its own folder."""
    yield
    sys.modules.pop("mine", None)


@pytest.fixture
def changed(trained, in_folder) -> Callable[..., Path]:
    """Writes the run's checkpoint with a change: outside of any run directory, or as the last.ckpt of a copy."""

    def write(change: Callable[[dict[str, Any], dict[str, Any]], None], *, in_run: bool = False) -> Path:
        path = in_folder / "evil.ckpt"
        if in_run:
            shutil.copytree(trained, in_folder / "run/tiny")
            path = in_folder / "run/tiny/last.ckpt"
        checkpoint = torch.load(trained / "last.ckpt", weights_only=True)
        change(checkpoint, checkpoint["run"]["configuration"])
        torch.save(checkpoint, path)
        return path

    return write


def shell(path: Path | str = "ran") -> dict[str, Any]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {path}", "shell": True}}


# What a stored configuration may name


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("slot", ["self_attention", "cross_attention"])
@pytest.mark.parametrize(
    "options", [{"x": shell()}, {"x": [[{"y": shell()}]]}, shell()], ids=["plain", "nested", "instead"]
)
def test_options_of_an_attention_are_not_made(run, changed, stage, slot, options):
    def change(checkpoint, configuration):
        configuration["model"]["init_args"][slot] |= {"mechanism": "torch.nn.Identity", "options": options}

    printed = run(stage, "--ckpt_path", changed(change), status=2)
    assert "names the class " in printed
    assert f"(model.init_args.{slot}." in printed
    assert not Path("ran").exists()


def test_fields_of_any_kind_are_data_in_yaml_too(run, tiny_config):
    """Also from YAML that the user gives: options are plain values."""
    Path("mine.py").write_text(MODULE)
    values = {"mechanism": "mine.Mean", "options": {"x": shell(), "y": 1}}
    Path("more.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"self_attention": values}}}))
    printed = run("fit", "-c", tiny_config, "-c", "more.yaml", status=2)
    assert "of a task is a description of an object (subprocess.Popen)" in printed
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("model", "init_args", "self_attention"), "evil.yaml"),
        (("model", "init_args", "optimizer"), "evil.yaml"),
        (("data", "init_args", "cleaning"), "evil"),
        (("trainer", "strategy"), "evil"),
        (("trainer", "callbacks"), "evil.yaml"),
        (("model",), "evil.yaml"),
    ],
)
def test_files_that_a_configuration_names_are_not_read(run, changed, keys, name):
    """The parser takes a path for any section: what is in the file nobody has looked at."""
    evil = {"class_path": "pytorch_lightning.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": "os.abort"}}
    for file in ("evil.yaml", "evil"):
        Path(file).write_text(yaml.safe_dump({"mechanism": "torch.nn.Identity"} if "model" in keys else evil))

    def change(checkpoint, configuration):
        put(configuration, keys, name)

    printed = run("fit", "--ckpt_path", changed(change), status=2)
    assert "evil.ckpt is damaged: " in printed or "evil.ckpt names " in printed


@pytest.mark.parametrize("with_configuration", [False, True])
def test_hyper_parameters_are_not_read(run, changed, tiny_config, with_configuration):
    def change(checkpoint, configuration):
        attention = {"mechanism": "torch.nn.Identity", "options": {"x": shell()}}
        checkpoint["hyper_parameters"] = {"class_path": "TranslationTask", "init_args": {"self_attention": attention}}

    given = ["-c", tiny_config] if with_configuration else []
    run("test", "--ckpt_path", changed(change), *given, "--model.num_examples", 0)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("model", {"class_path": "subprocess.Popen"}, "names the class subprocess.Popen (model)"),
        ("model", {"class_path": "torch.nn.Linear", "init_args": {}}, "names the class torch.nn.Linear (model)"),
        ("model", {"class_path": "datamodules.WMT14DataModule"}, "names datamodules.WMT14DataModule (model)"),
        ("model", {"class_path": "lightning_attn.__main__.x"}, "names the class lightning_attn.__main__.x (model)"),
        ("model", {"class_path": ["x"]}, "its configuration names no class of model"),
        ("data", {"class_path": "os.abort"}, "names the class os.abort (data)"),
        ("data", None, "its configuration names no class of data"),
        ("model", "os.abort", "model of its configuration is no section of options"),
        ("seed_everything", {"class_path": "os.abort"}, "seed_everything is"),
    ],
)
def test_classes_that_are_no_tasks_and_no_data(run, changed, section, value, message):
    def change(checkpoint, configuration):
        configuration[section] = value

    printed = run("test", "--ckpt_path", changed(change), status=2)
    assert message in printed


@pytest.mark.parametrize(
    "callback",
    [
        {"class_path": "pytorch_lightning.callbacks.LambdaCallback", "init_args": {"on_fit_start": "os.abort"}},
        {"class_path": "LambdaCallback", "init_args": {"on_fit_start": "os.abort"}},
        "pytorch_lightning.callbacks.LambdaCallback",
        "os.abort",
        {"class_path": "pytorch_lightning.callbacks.EarlyStopping", "init_args": {"monitor": shell()}},
        {"class_path": "pytorch_lightning.callbacks.Timer", "init_args": {"surprise": "os.abort"}},
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "../../x"}},
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "/tmp/x"}},
    ],
)
def test_callbacks_that_are_not_listed(run, changed, callback):
    def change(checkpoint, configuration):
        configuration["trainer"]["callbacks"] = [callback]

    printed = run("fit", "--ckpt_path", changed(change), "--trainer.max_steps", 5, status=2)
    assert "(trainer.callbacks[0]" in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strategy", "os.abort"),
        (
            "strategy",
            {"class_path": "pytorch_lightning.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": "os.abort"}},
        ),
        ("accelerator", {"class_path": "subprocess.Popen"}),
        ("plugins", [shell()]),
        ("max_steps", shell()),
        ("precision", shell()),
    ],
)
def test_other_options_of_the_trainer(run, changed, name, value):
    def change(checkpoint, configuration):
        configuration["trainer"][name] = value

    printed = run("fit", "--ckpt_path", changed(change), status=2)
    assert f"(trainer.{name}" in printed


def test_where_files_are_written_is_no_choice_of_a_checkpoint(run, changed, tmp_path):
    precious = tmp_path / "precious/metrics.csv"
    precious.parent.mkdir()
    precious.write_text("precious\n")
    there = str(precious.parent)

    def change(checkpoint, configuration):
        logger = {"class_path": "pytorch_lightning.loggers.CSVLogger"}
        saver = {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": {"dirpath": there}}
        configuration["trainer"] |= {
            "logger": logger | {"init_args": {"save_dir": there, "name": "", "version": ""}},
            "profiler": {"class_path": "AdvancedProfiler", "init_args": {"dirpath": there}},
            "default_root_dir": there,
            "callbacks": [saver],
            "max_steps": checkpoint["global_step"] + 1,
        }
        configuration["run"]["root"] = there
        configuration["data"]["init_args"] |= {"cache_dir": there, "download": True}

    printed = run("fit", "--ckpt_path", changed(change))
    assert [path.name for path in precious.parent.iterdir()] == ["metrics.csv"]
    assert precious.read_text() == "precious\n"
    for option in ("trainer.logger", "trainer.profiler", "trainer.callbacks[0].dirpath", "data.cache_dir"):
        assert f"{option} of the checkpoint is not taken" in printed
    assert Path("checkpoints/translation/tiny/last.ckpt").is_file()


def test_plain_options_and_listed_callbacks_are_taken(run, changed):
    def change(checkpoint, configuration):
        stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 7}}
        averaging = {"class_path": "lightning_attn.callbacks.ExponentialAveraging", "init_args": {"decay": 0.5}}
        configuration["trainer"] |= {"callbacks": [stopping, averaging], "gradient_clip_val": 0.25, "max_steps": 5}

    run("fit", "--ckpt_path", changed(change))
    written = yaml.safe_load(Path("checkpoints/translation/tiny/config_fit.yaml").read_text())
    assert written["trainer"]["gradient_clip_val"] == 0.25
    assert [one["class_path"].split(".")[-1] for one in written["trainer"]["callbacks"]] == [
        "EarlyStopping",
        "ExponentialAveraging",
    ]


def test_a_run_with_listed_callbacks_goes_on_from_its_checkpoint_alone(run, tiny_config):
    """With all their arguments, as the run has stored them."""
    names = {
        "EarlyStopping": {"monitor": "val/loss"},
        "LearningRateMonitor": {},
        "ModelCheckpoint": {"filename": "{epoch}-{step}", "monitor": "val/loss", "dirpath": "own"},
        "ModelSummary": {},
        "RichProgressBar": {},
        "Timer": {"duration": "00:01:00:00"},
    }
    callbacks = [{"class_path": name, "init_args": arguments} for name, arguments in names.items()]
    options = {"callbacks": callbacks, "strategy": {"class_path": "SingleDeviceStrategy"}, "max_time": "00:01:00:00"}
    options["strategy"]["init_args"] = {"device": "cpu"}
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": options}))
    run("fit", "-c", tiny_config, "-c", "more.yaml")
    path = Path("checkpoints/translation/tiny/last.ckpt")
    run("fit", "--ckpt_path", path, "--trainer.max_steps", 6)
    assert torch.load(path, weights_only=True)["global_step"] == 6
    written = yaml.safe_load(path.with_name("config_fit-2.yaml").read_text())
    assert [one["class_path"].split(".")[-1] for one in written["trainer"]["callbacks"]] == list(names)


# Classes of the user's own


def own_task(checkpoint, configuration):
    configuration["model"]["class_path"] = "mine.Task"
    checkpoint["task"]["class_path"] = "mine.Task"


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ((), False),
        (("--trust", "other"), False),
        (("--trust", "min"), False),
        (("--trust", "other", "--trust", "mine"), True),
        (("--trust=mine.Task",), True),
        (("--model", "mine.Task"), True),
        (("-c", "more.yaml"), True),
    ],
)
def test_a_task_of_the_users_own_has_to_be_named(run, changed, given, allowed):
    Path("mine.py").write_text(MODULE)
    Path("more.yaml").write_text("model: {class_path: mine.Task}\n")
    path = changed(own_task)
    printed = run("test", "--ckpt_path", path, *given, "--model.num_examples", 0, status=0 if allowed else 2)
    assert Path("imported").exists() == allowed
    if not allowed:
        assert "names the class mine.Task (model)" in printed
        assert "--trust mine" in printed


def test_a_callback_of_the_users_own_has_to_be_named(run, changed):
    Path("mine.py").write_text(MODULE)

    def change(checkpoint, configuration):
        configuration["trainer"] |= {"callbacks": [{"class_path": "mine.Watch"}], "max_steps": 5}

    path = changed(change)
    assert "names the class mine.Watch (trainer.callbacks[0])" in run("fit", "--ckpt_path", path, status=2)
    assert not Path("imported").exists()
    run("fit", "--ckpt_path", path, "--trust", "mine")
    assert Path("watched").exists()


def test_load_trusts_whom_it_is_told_to(changed, monkeypatch):
    Path("mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    path = changed(own_task)
    with pytest.raises(CheckpointError, match=r"names the class mine\.Task \(task\.class_path\).*trust=\('mine',\)"):
        BaseTask.load(path)
    assert not Path("imported").exists()
    task = BaseTask.load(path, trust=("mine",))
    assert type(task).__name__ == "Task"
    assert type(type(task).load(path)) is type(task), "the class that it is called on needs no mention"
    with pytest.raises(TypeError, match="trust must be a sequence of packages"):
        BaseTask.load(path, trust="mine")
    with pytest.raises(ValueError, match="trust: 'mine/x' is no name of a package"):
        BaseTask.load(path, trust=("mine/x",))


def test_a_mechanism_in_the_arguments_has_to_be_trusted(changed):
    def change(checkpoint, configuration):
        checkpoint["task"]["arguments"]["self_attention"] |= {"mechanism": "torch.nn.Identity", "options": {"x": 1}}

    with pytest.raises(CheckpointError, match=r"torch\.nn\.Identity \(task\.arguments\.self_attention\.mechanism\)"):
        TranslationTask.load(changed(change))


def test_a_description_beside_safetensors_is_data_too(run, changed, in_folder, trained):
    run("export", "--ckpt_path", trained / "last.ckpt", "--output", "export")
    path = Path("export/model.json")
    described = json.loads(path.read_text())
    described["run"]["configuration"]["model"]["init_args"]["self_attention"]["options"] = {"x": shell()}
    path.write_text(json.dumps(described))
    assert "subprocess.Popen" in run("test", "--ckpt_path", "export/model.safetensors", status=2)
    assert not Path("ran").exists()
    path.write_text('{"a":' * 100_000)
    assert "model.json is damaged" in run("test", "--ckpt_path", "export/model.safetensors", status=2)


# States


def test_files_that_a_callback_names_stay(run, changed, tmp_path):
    precious = tmp_path / "precious.ckpt"
    precious.write_text("precious")

    def change(checkpoint, configuration):
        key = next(key for key in checkpoint["callbacks"] if key.startswith("BestCheckpoint"))
        worst, path = torch.tensor(99.0), f"{tmp_path}/run/tiny/../../precious.ckpt"
        checkpoint["callbacks"][key] |= {
            "best_model_score": worst,
            "current_score": worst,
            "kth_value": worst,
            "best_model_path": path,
            "kth_best_model_path": path,
            "best_k_models": {path: worst},
            "dirpath": f"{tmp_path}/run/tiny",
        }

    path = changed(change, in_run=True)
    printed = run("fit", "--ckpt_path", path, "--trainer.max_steps", 8, status=2)
    assert "callbacks.BestCheckpoint names " in printed
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", ["metrics.csv", "run.json"])
def test_only_checkpoints_are_removed(run, changed, name):
    def change(checkpoint, configuration):
        key = next(key for key in checkpoint["callbacks"] if key.startswith("BestCheckpoint"))
        worst = torch.tensor(99.0)
        checkpoint["callbacks"][key] |= {
            "best_model_score": worst,
            "kth_value": worst,
            "kth_best_model_path": name,
            "best_k_models": {name: worst},
        }

    path = changed(change, in_run=True)
    run("fit", "--ckpt_path", path, "--trainer.max_steps", 8)
    assert (path.parent / name).is_file()


OPTIMIZER = ("optimizer_states", 0)
FIRST = (*OPTIMIZER, "state", 0)
GROUP = (*OPTIMIZER, "param_groups", 0)
LOOPS = ("loops", "fit_loop")
BEST = ("callbacks", "BestCheckpoint")
RUN = ("run", "configuration")
OPTIONS = (*RUN, "model", "init_args", "self_attention", "options")
NESTED: dict[str, Any] = {}
for _ in range(90):
    NESTED = {"x": NESTED}
SHARED: list[Any] = [1]
for _ in range(60):
    SHARED = [SHARED, SHARED]
DAMAGE = [
    ((*FIRST, "exp_avg"), torch.zeros(1), "optimizer_states[0].state[0].exp_avg is (1,), and not"),
    ((*FIRST, "exp_avg"), "x", "optimizer_states[0].state[0].exp_avg is str"),
    ((*OPTIMIZER, "state", 999), {}, "optimizer_states[0].state holds '999'"),
    ((*FIRST, "step"), torch.tensor(float("nan")), "step is no number of steps"),
    (OPTIMIZER, 7, "optimizer_states[0] is no state of an optimizer of 1 groups"),
    (OPTIMIZER[:1], [], "optimizer_states has 0 entries, and not 1"),
    (OPTIMIZER[:1], "x", "optimizer_states is no list"),
    ((*GROUP, "foreach"), "yes", "param_groups[0].foreach is 'yes'"),
    ((*GROUP, "lr"), "fast", "param_groups[0].lr is 'fast'"),
    ((*GROUP, "params"), [0, 0], "param_groups[0] is not of "),
    (("lr_schedulers", 0, "step"), "x", "lr_schedulers[0] holds "),
    (("lr_schedulers", 0, "last_epoch"), float("inf"), "lr_schedulers[0].last_epoch is 'inf'"),
    (LOOPS[:1], "x", "loops is no dict"),
    (LOOPS, {}, "loops.fit_loop is not that of a training"),
    ((*LOOPS, "epoch_progress", "current", "ready"), -1, "epoch_progress.current.ready is '-1'"),
    ((*LOOPS, "state_dict", "combined_loader"), [{"epoch": "x"}], "place in the data is damaged"),
    (("random_streams", 0, "numpy", 2), 10**6, "random_streams[0] is no state of random generators"),
    (("random_streams", 0, "python"), [3, [1], None], "random_streams[0] is no state of random generators"),
    (("random_streams", 0, "torch"), torch.zeros(3, dtype=torch.uint8), "random_streams[0] is no state of random"),
    (("metrics_lines",), -3, "metrics_lines is '-3'"),
    (("global_step",), "four", "global_step is 'four'"),
    (("callbacks",), [], "callbacks is no dict"),
    ((*BEST, "best_k_models"), [], "best_k_models is no table of scores by path"),
    ((*BEST, "kth_value"), "x", "the score of 'kth_value' is no number"),
    (("pytorch-lightning_version",), "0.0.1", "is of PyTorch Lightning '0.0.1'"),
    ((*RUN, "trainer"), [1], "trainer of its configuration is no section of options"),
    (OPTIONS, NESTED, "nested more than"),
    (OPTIONS, SHARED, "is damaged: run contains "),
    (("vocabulary",), "abc", "vocabulary"),
    (("vocabulary",), torch.zeros(1, dtype=torch.uint8).expand(10**12), "vocabulary claims 1,000,000,000,000"),
    (("vocabulary",), torch.zeros(50), "vocabulary"),
    (("vocabulary",), torch.zeros(50, dtype=torch.uint8), "vocabulary"),
    (("task", "arguments", "x"), SHARED, "is damaged: task contains "),
]


def put(checkpoint: Any, keys: tuple[Any, ...], value: Any) -> None:
    """Puts a value somewhere into a checkpoint."""
    *path, last = keys
    for key in path:
        checkpoint = checkpoint[key]
    checkpoint[last] = value


@pytest.mark.parametrize(("keys", "value", "message"), DAMAGE, ids=[f"{case[0][-1]}-{case[2][:30]}" for case in DAMAGE])
def test_damage_is_told_by_name(run, changed, keys, value, message):
    def change(checkpoint, configuration):
        if keys[:1] == ("callbacks",) and len(keys) == 3:
            state = next(state for key, state in checkpoint["callbacks"].items() if key.startswith(keys[1]))
            state[keys[2]] = value
        else:
            put(checkpoint, keys, value)

    path = changed(change, in_run=True)
    before = {one.name: one.read_bytes() for one in path.parent.iterdir()}
    printed = run("fit", "--ckpt_path", path, "--trainer.max_steps", 6, status=2)
    assert message in printed
    assert "Traceback" not in printed
    assert {name: (path.parent / name).read_bytes() for name in before} == before, "nothing is lost"


@pytest.mark.parametrize("key", ["trainer", "seed_everything", "run"])
def test_a_configuration_without_some_of_its_parts(run, changed, key):
    path = changed(lambda checkpoint, configuration: configuration.pop(key))
    run("test", "--ckpt_path", path, "--model.num_examples", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to_sparse(), r"state_dict\..* is not a dense tensor|sparse, quantised or"),
        (
            lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
            "holds objects|sparse, quantised or",
        ),
        (lambda weight: weight.to(torch.complex64), r"has the dtype torch\.complex64"),
        (lambda weight: weight.to(torch.float8_e4m3fn), r"has the dtype torch\.float8_e4m3fn"),
        (lambda weight: torch.empty(weight.shape, device="meta"), "has no data|is not at its expected offset"),
        (
            lambda weight: weight.flatten()[:1].expand(weight.numel()).view(weight.shape),
            "claims .* more than there are",
        ),
    ],
    ids=["sparse", "quantised", "complex", "float8", "meta", "expanded"],
)
def test_weights_of_another_kind(changed, change, message):
    def with_first(checkpoint, configuration):
        name = next(name for name, value in checkpoint["state_dict"].items() if value.numel() > 1)
        with warnings.catch_warnings(action="ignore"):
            checkpoint["state_dict"][name] = change(checkpoint["state_dict"][name])

    path = changed(with_first)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def rewritten(path: Path, compression: int, zeros: int = 0) -> Path:
    """The same records, or zeros in their place, as another program writes an archive."""
    other = path.with_name("rewritten.ckpt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, bytes(zeros) if zeros and "/data/" in record.filename else old.read(record))
    return other


def test_records_that_are_shorter_than_a_tensor(trained, in_folder):
    """With the right checksum: the tensor would go on with whatever follows in the file."""
    path = Path(shutil.copy(trained / "last.ckpt", "some.ckpt"))
    with zipfile.ZipFile(path) as archive:
        record = next(one for one in archive.infolist() if one.filename.endswith("/data/0"))
        shorter = archive.read(record)[:-4]
    content = bytearray(path.read_bytes())
    entry = content.index(record.filename.encode(), content.index(b"PK\x01\x02")) - 46
    struct.pack_into("<3I", content, entry + 16, zlib.crc32(shorter), len(shorter), len(shorter))
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with pytest.raises(CheckpointError, match=r"is damaged: it contains [\d,]+ bytes of .* instead of [\d,]+"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.to_sparse(), "a tensor in it is sparse"),
        (lambda stored: stored.flatten()[:1].expand(10**9), "claims .* more than there are"),
        (lambda stored: stored.float(), "its vocabulary is not bytes"),
        (lambda stored: stored.numpy().tobytes(), "its vocabulary is not bytes"),
        (lambda stored: Path("somewhere"), "contains objects other than tensors and plain values"),
    ],
    ids=["sparse", "expanded", "floats", "no tensor", "an object"],
)
def test_vocabularies_of_checkpoints_are_read_with_care(trained, in_folder, change, message):
    checkpoint = torch.load(trained / "last.ckpt", weights_only=True)
    with warnings.catch_warnings(action="ignore"):
        torch.save(checkpoint | {"vocabulary": change(checkpoint["vocabulary"])}, "some.ckpt")
    with pytest.raises(InputError, match=rf"vocabulary: some.ckpt holds none \(.*{message}"):
        Vocabulary.from_file("some.ckpt")
    compressed = rewritten(Path(shutil.copy(trained / "last.ckpt", "sound.ckpt")), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="in it is compressed"):
        Vocabulary.from_file(compressed)


def test_compressed_records_are_not_unpacked(trained, in_folder):
    path = Path(shutil.copy(trained / "last.ckpt", "some.ckpt"))
    with pytest.raises(CheckpointError, match="in it is compressed"):
        read_checkpoint(rewritten(path, zipfile.ZIP_DEFLATED))
    bomb = rewritten(path, zipfile.ZIP_DEFLATED, zeros=10**7)
    assert bomb.stat().st_size < 10**7
    with pytest.raises(CheckpointError, match="in it is compressed"):
        read_checkpoint(bomb)
    with pytest.raises(CheckpointError, match=r"is not an archive of torch\.save"):
        read_checkpoint(rewritten(path, zipfile.ZIP_STORED))


def test_sizes_are_compared_before_memory_is_taken(run, changed, tiny_config):
    def change(checkpoint, configuration):
        for arguments in (configuration["model"]["init_args"], checkpoint["task"]["arguments"]):
            arguments |= {"dim": 2**20, "hidden_dim": 2**20}

    path = changed(change)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        TranslationTask.load(path)
    assert "do not fit the network" in run("test", "--ckpt_path", path, status=2)


def test_a_run_directory_may_be_moved(run, trained, tiny_config):
    """The best score goes with it: a worse network does not replace a better one."""
    shutil.copytree(trained, "elsewhere/translation/tiny")
    Path("link").symlink_to("elsewhere")
    before = read_checkpoint(trained / "best.ckpt")
    options = ["--model.optimizer.learning_rate", 1000.0, "--trainer.max_steps", 8]
    printed = run("fit", "--ckpt_path", "link/translation/tiny/last.ckpt", *options)
    after = read_checkpoint("elsewhere/translation/tiny/best.ckpt")
    assert after["global_step"] == before["global_step"]
    state = next(state for key, state in after["callbacks"].items() if key.startswith("BestCheckpoint"))
    assert f"Best val/loss {float(state['best_model_score']):.5g}" in printed
    assert state["best_model_path"] == "best.ckpt", "relative to the run directory"
