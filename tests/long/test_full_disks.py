"""Commands on disks that fill at a random byte: one message, nothing older lost, success when there is room."""

import collections
import contextlib
import os
import random
import shutil
import subprocess

import pytest
from trials import attempt, limit_files

pytestmark = [pytest.mark.long, pytest.mark.timeout(6000)]
SEED = int(os.environ.get("LONG_SEED", "1"))
NUMBER = int(os.environ.get("LONG_DISKS", "8"))  # of each command and kind of limit
CONFIGURATIONS = ["tiny_config", "detection_config", "segmentation_config"]
# What a command may replace; it is whole before and after.
REPLACED = ("last.ckpt", "best.ckpt", "metrics.csv", ".lock")


def commands(config, pictures, checkpoint):
    """Each command, and how it is called again when there is room."""
    folder = checkpoint.parent
    predict = ["predict", "--ckpt_path", checkpoint, *(["--data.predict_folder", pictures] if pictures else [])]
    resume = ["fit", "-c", config, "--trainer.max_steps", 8, "--ckpt_path"]
    return {
        "fit": (["fit", "-c", config], ["fit", "-c", config, "--ckpt_path", "auto"]),
        "resume": ([*resume, checkpoint], [*resume, "auto"]),
        **{
            name: (one, one)
            for name, one in {
                "test": ["test", "--ckpt_path", checkpoint],
                "validate": ["validate", "--ckpt_path", checkpoint],
                "predict": predict,
                "export": ["export", "--ckpt_path", checkpoint, "--output", "exported"],
                "average": ["average", checkpoint, folder / "best.ckpt", "--output", "mean.ckpt"],
                "compare": ["compare", folder, folder, "--output", "compared.svg"],
            }.items()
        },
    }


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def space(folder):
    """In bytes, on a disk of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 if path.is_file() else 4096 for path in folder.rglob("*"))


@contextlib.contextmanager
def disk(folder, size):
    """A disk of so many bytes in a folder; skips the test where this user may mount none."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounts nothing: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def require_sound(what, trial, folder, before):
    assert trial.is_sound, (what, trial)
    after = contents(folder)
    assert before.keys() <= after.keys(), (what, before.keys() - after.keys())
    changed = [name for name in before if after[name] != before[name] and not name.endswith(REPLACED)]
    assert not changed, (what, changed)
    assert not [name for name in after if name.endswith(".part")], what


@pytest.fixture(params=CONFIGURATIONS)
def trained(request, in_folder):
    """A folder with a run, and the commands to be tried in a copy of it."""
    config = request.getfixturevalue(request.param)
    pictures = None
    if request.param != "tiny_config":
        data = request.getfixturevalue("coco" if request.param == "detection_config" else "cityscapes")
        pictures = data / ("test2017" if request.param == "detection_config" else "leftImg8bit/test")
    source = in_folder / "source"
    source.mkdir()
    assert attempt(["fit", "-c", config], source, seconds=300).status == 0
    (checkpoint,) = source.glob("checkpoints/*/tiny/last.ckpt")
    return source, commands(config, pictures, checkpoint.relative_to(source)), random.Random(f"{SEED}-{request.param}")


def test_a_disk_that_is_full(trained, in_folder):
    source, calls, chance = trained
    counts = collections.Counter()
    folder = in_folder / "small"
    for name, (call, again) in calls.items():
        with disk(folder, 1 << 30):
            shutil.copytree(source, folder, dirs_exist_ok=True)
            assert attempt(call, folder, seconds=300).status == 0, name
            needed = space(folder) - space(source)
        for _ in range(NUMBER):
            left = chance.randrange(0, needed + 4096) // 4096 * 4096
            with disk(folder, space(source) + 8192 + left):
                shutil.copytree(source, folder, dirs_exist_ok=True)
                before = contents(folder)
                trial = attempt(call, folder)
                require_sound((name, left), trial, folder, before)
                counts[name, trial.status] += 1
                if trial.status:
                    subprocess.run(["mount", "-o", f"remount,size={1 << 30}", str(folder)], check=True)
                    second = attempt(again, folder)
                    assert second.status == 0, (name, left, second)
                    require_sound((name, left, "again"), second, folder, before)
    print(f"\nseed {SEED}, full disks: {dict(counts)}")


def test_files_that_cannot_grow(trained, in_folder):
    source, calls, chance = trained
    counts = collections.Counter()
    for name, (call, _) in calls.items():
        folder = in_folder / "copy"
        shutil.copytree(source, folder)
        before = contents(folder)
        assert attempt(call, folder, seconds=300).status == 0, name
        sizes = [len(content) for name, content in contents(folder).items() if before.get(name) != content]
        shutil.rmtree(folder)
        for _ in range(NUMBER):
            size = chance.randrange(0, chance.choice(sizes) + 1)
            shutil.copytree(source, folder)
            trial = attempt(call, folder, prepare=limit_files(size))
            require_sound((name, size), trial, folder, before)
            counts[name, trial.status] += 1
            shutil.rmtree(folder)
    print(f"\nseed {SEED}, files of limited size: {dict(counts)}")
