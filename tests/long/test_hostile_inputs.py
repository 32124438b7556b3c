"""Hundreds of damaged inputs, made from sound ones: a message or a sound result, in bounded time and memory."""

import collections
import json
import os
import random
import shutil

import pytest
import torch
from data_layouts import write_voc, write_yolo
from mutations import damaged_bytes, damaged_text, mutated, odd_picture
from trials import attempt

pytestmark = [pytest.mark.long, pytest.mark.timeout(6000)]
SEED = int(os.environ.get("LONG_SEED", "1"))
CHECKPOINTS = int(os.environ.get("LONG_CHECKPOINTS", "80"))  # of each task
INPUTS = int(os.environ.get("LONG_INPUTS", "100"))  # of each kind
MOST_MEMORY = 4 << 30
SHORT = ["--trainer.max_steps", 2, "--trainer.val_check_interval", 2]


class Tried:
    """What became of many trials; `report` fails if one was not sound."""

    def __init__(self, name):
        self.name, self.counts, self.bad = name, collections.Counter(), []
        self.slowest, self.most = 0.0, 0

    def add(self, what, trial):
        self.counts[trial.status] += 1
        self.slowest, self.most = max(self.slowest, trial.seconds), max(self.most, trial.memory)
        if "LONG_ACCEPTED" in os.environ and trial.status == 0:
            print(f"accepted: {what}")
        if not trial.is_sound or trial.memory > MOST_MEMORY:
            self.bad.append((what, trial.status, trial.memory >> 20, trial.printed[-3000:]))

    def report(self):
        ends = ", ".join(f"{count} ended with {status}" for status, count in sorted(self.counts.items()))
        print(f"\nseed {SEED}, {self.name}: {ends}; slowest {self.slowest:.1f} s, most memory {self.most >> 20} MiB")
        for what, status, memory, printed in self.bad:
            print(f"--- {what}: {status}, {memory} MiB\n{printed}")
        assert not self.bad


@pytest.mark.parametrize("config", ["tiny_config", "detection_config", "segmentation_config"])
def test_damaged_checkpoints(request, in_folder, config):
    path = request.getfixturevalue(config)
    assert attempt(["fit", "-c", path], in_folder, seconds=300).status == 0
    (source,) = in_folder.glob("checkpoints/*/tiny/last.ckpt")
    sound = torch.load(source, weights_only=True)
    tried = Tried(f"checkpoints, {config}")
    for number in range(CHECKPOINTS):
        chance = random.Random(f"{SEED}-{number}")
        folder = in_folder / "tried" / source.parent.parent.name / f"try-{number}"
        shutil.copytree(source.parent, folder)
        if number % 5 == 4:
            what, content = damaged_bytes(source.read_bytes(), chance)
            (folder / "last.ckpt").write_bytes(content)
        else:
            what, checkpoint = mutated(sound, chance)
            torch.save(checkpoint, folder / "last.ckpt")
        stage = ["test", "--model.num_examples", "0"] if number % 2 else ["fit", "--trainer.max_steps", 6]
        if config != "tiny_config":
            stage = [one for one in stage if one not in ("--model.num_examples", "0")]
        tried.add(f"{stage[0]} {number}: {what}", attempt([*stage, "--ckpt_path", folder / "last.ckpt"], in_folder))
        shutil.rmtree(folder)
    tried.report()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_odd_pictures(request, in_folder, task):
    """Among sound ones: to be trained on, labels among them, or to be predicted."""
    config = request.getfixturevalue(f"{task}_config")
    data = request.getfixturevalue("coco" if task == "detection" else "cityscapes")
    assert attempt(["fit", "-c", config], in_folder, seconds=300).status == 0
    (checkpoint,) = in_folder.glob("checkpoints/*/tiny/last.ckpt")
    tried = Tried(f"pictures, {task}")
    for number in range(INPUTS // 2):
        chance = random.Random(f"{SEED}-{task}-{number}")
        root, picked = in_folder / f"data-{number}", in_folder / f"pictures-{number}"
        shutil.copytree(data, root)
        names = {"train": "train2017" if task == "detection" else "leftImg8bit/train", "labels": "gtFine/train"}
        use = chance.choice(["train", "predict"] if task == "detection" else ["train", "labels", "predict"])
        source = chance.choice(sorted((root / names.get(use, names["train"])).rglob("*.png")))
        what, content = odd_picture(source, chance)
        if use == "predict":
            picked.mkdir()
            (picked / f"odd{chance.choice(['.png', '.jpg', '.tif', '.webp', '.bmp', '.gif'])}").write_bytes(content)
            shutil.copy(source, picked / "sound.png")
            call = ["predict", "--ckpt_path", checkpoint, "--data.predict_folder", picked]
        else:
            source.write_bytes(content)
            call = ["fit", "-c", config, "--data.root", root, *SHORT, "--run.name", f"of-{number}"]
        trial = attempt(call, in_folder)
        tried.add(f"{number}, {use}: {what}", trial)
        shutil.rmtree(root)
        shutil.rmtree(picked, ignore_errors=True)
    tried.report()


def damaged_annotations(layout, root, chance):
    """Damages an annotation file of a layout of data in place; what was done."""
    if layout == "coco":
        path = root / "annotations" / f"instances_{chance.choice(['train2017', 'val2017'])}.json"
        if chance.random() < 0.75:
            what, content = mutated(json.loads(path.read_text()), chance, plain=True)
            path.write_text(json.dumps(content))
        else:
            what, damaged = damaged_bytes(path.read_bytes(), chance)
            path.write_bytes(damaged)
        return what
    pattern = "Annotations/*.xml" if layout == "voc" else chance.choice(["train/labels/*.txt", "data.yaml"])
    path = chance.choice(sorted(root.glob(pattern)))
    damage = chance.choice([damaged_bytes, damaged_text, replaced_word])
    what, damaged = damage(path.read_bytes(), chance)
    path.write_bytes(damaged)
    return f"{path.name}: {what}"


def replaced_word(content, chance):
    """A number or name replaced."""
    words = sorted({word for word in content.replace(b">", b" ").replace(b"<", b" ").split() if word.isalnum()})
    word = chance.choice(words or [b""])
    other = chance.choice([b"nan", b"-1", b"1e400", b"0", b"99999999999", b"x", b"", b"&lol;", b"*a", b"../../x"])
    return f"{word!r} is {other!r}", content.replace(word, other, chance.choice([1, -1]))


def test_damaged_annotations(detection_config, coco, in_folder):
    splits = {"train2017": "train", "val2017": "val"}
    sources = {
        "coco": coco,
        "voc": write_voc(coco, in_folder / "voc", splits),
        "yolo": write_yolo(coco, in_folder / "yolo", splits),
    }
    own = {
        "coco": [],
        "voc": ["--data", "VOCDetectionDataModule"],
        "yolo": ["--data", "YOLODetectionDataModule"],
    }
    tried = Tried("annotations")
    for number in range(INPUTS):
        chance = random.Random(f"{SEED}-{number}")
        layout = chance.choice(["coco", "coco", "coco", "voc", "yolo"])
        root = in_folder / f"data-{number}"
        shutil.copytree(sources[layout], root)
        what = damaged_annotations(layout, root, chance)
        call = ["fit", "-c", detection_config, *own[layout], "--data.root", root, *SHORT, "--run.name", f"of-{number}"]
        if layout != "coco":
            call += ["--data.test_split", ""]
        tried.add(f"{number}, {layout}: {what}", attempt(call, in_folder))
        shutil.rmtree(root)
    tried.report()


def test_damaged_texts(tiny_config, corpus, in_folder):
    assert attempt(["fit", "-c", tiny_config], in_folder, seconds=300).status == 0
    (checkpoint,) = in_folder.glob("checkpoints/*/tiny/last.ckpt")
    tried = Tried("texts")
    for number in range(INPUTS):
        chance = random.Random(f"{SEED}-{number}")
        root = in_folder / f"data-{number}"
        root.mkdir()
        for path in corpus.glob("*.*"):
            shutil.copy(path, root)
        use = chance.choice(["train", "train", "valid", "predict"])
        path = root / f"{'test' if use == 'predict' else use}.{chance.choice(['en', 'de'])}"
        what, content = damaged_text(path.read_bytes(), chance)
        path.write_bytes(content)
        if use == "predict":
            call = ["predict", "--ckpt_path", checkpoint, "--data.predict_file", path]
        else:
            call = ["fit", "-c", tiny_config, "--data.root", root, *SHORT, "--run.name", f"of-{number}"]
        tried.add(f"{number}, {use}: {what}", attempt(call, in_folder))
        shutil.rmtree(root)
    tried.report()
