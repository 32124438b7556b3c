"""Folders of cells as trainings leave them, made up: scores, curves, profiles, pictures, attention, translations."""

import hashlib
import json
import os

import numpy as np
import yaml
from PIL import Image, ImageDraw

from lightning_attn.study.grid import Study
from lightning_attn.training.code_version import code_version

TERMS = ("0010", "0001", "0011", "0100", "0101", "0110", "0111", "1000")
TERMS += ("1010", "1001", "1011", "1100", "1101", "1110", "1111")
GROUPS = ("none", *TERMS, "deformable_0010")
REFERENCE = {
    **{"none": (20.9, 1.75), "0010": (24.2, 2.22), "0001": (27.2, 2.39), "0011": (27.4, 2.55), "0100": (27.4, 2.56)},
    **{"0101": (27.4, 2.56), "0110": (27.6, 2.69), "0111": (27.6, 2.69), "1000": (24.5, 2.41), "1010": (24.5, 2.41)},
    **dict.fromkeys(("1001", "1011", "1100", "1101", "1110", "1111"), (27.7, 2.73)),
    "deformable_0010": (27.7, 2.72),
}
SOURCE = "_the _children _have _been _play ing _in _the _old _garden _since _nine _o ' clock _this _morning _."
WORDS = [
    "Die",
    "Kinder",
    "spielen",
    "seit",
    "heute",
    "morgen",
    "um",
    "neun",
    "Uhr",
    "in",
    "dem",
    "alten",
    "Garten",
    ".",
]
START = 1_795_000_000.0


def write_study(folder, name="figure", *, groups=GROUPS, seeds=(0, 1, 2), **changes):
    """Writes a study file; keys of `changes` replace its own, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text("model: {class_path: none}\ntrainer: {max_steps: 400}\n")
    content = {
        "description": "The terms of self-attention in translation, on the miniature set.",
        "base": "base.yaml",
        "axes": {"self_attention": {group: {"model.terms": group} for group in groups}},
        "seeds": list(seeds),
        "metric": "test/bleu",
        "reference": [
            {"cell": group, "BLEU": REFERENCE[group][0], "GFLOPs": REFERENCE[group][1]}
            for group in groups
            if group in REFERENCE
        ],
        "findings": [
            {"claim": "E3 helps beside E2", "cells": ["0110", "0100"], "expected": "greater"},
            {"claim": "0110 is very close to 1111", "cells": ["0110", "1111"], "expected": "equal", "margin": 0.5},
            {"claim": "Attention helps", "cells": ["1111", "none"], "expected": "greater"},
            {
                "claim": "The query-irrelevant terms 0011 bring more than all query-sensitive ones on top of them",
                "cells": ["0011", "none"],
                "beyond": ["1111", "0011"],
                "expected": "greater",
            },
            {
                "claim": "0010 with deformable convolution is on par with the whole Transformer attention",
                "cells": ["deformable_0010", "1111"],
                "expected": "less",
            },
        ],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return Study.read(path)


def fill(
    study,
    root,
    *,
    parts=("profile", "bootstrap", "curves", "attention", "examples"),
    task="translation",
    cells=None,
    large=False,
):
    """Writes the folders of cells, of all by default, as if they were done.

    Args:
        study: The study.
        root: Folder of all studies.
        parts: What else there is: also "maps" and "pictures" of images.
        task: Its name in the folders.
        cells: Which.
        large: Whether pictures and maps are as large as they come.
    """
    for cell in study.cells if cells is None else cells:
        random = np.random.default_rng(int(hashlib.sha256(cell.readable_name.encode()).hexdigest()[:8], 16))
        folder = root / study.folder / cell.name
        run = folder / task / "run"
        predictions = run / study.member / "predictions"
        predictions.mkdir(parents=True)
        terms = cell.group[0][-4:]
        on = [f"E{place + 1}" for place, digit in enumerate(terms) if digit == "1"] if terms.isdecimal() else []
        quality = 0.32 + 0.012 * len(on) + 0.02 * ("E2" in on) + 0.01 * ("deformable" in cell.group[0])
        noise = float(random.normal(0, 0.004))
        score = (quality + noise) * 100 / study.scale
        start = START + 300 * study.cells.index(cell)
        attempts = [
            {
                "stage": "fit",
                "started": start,
                "ended": start + 170 + 9 * len(on),
                "exit_code": 0,
                "code": code_version(),
            },
            {"stage": "test", "started": start + 240, "ended": start + 262, "exit_code": 0, "code": code_version()},
        ]
        own = {"asked_to_stop": False, "host": "maxwell", "runner": 1, "runner_started": "1"}
        write(
            folder / "cell.json", {"attempts": [one | own for one in attempts], "cell": cell.labels, "seed": cell.seed}
        )
        write(
            run / "run.json",
            {
                **{
                    "code": code_version(),
                    "git": "265695659c25",
                    "lightning_attn": "0.1.0",
                    "name": "run",
                    "number": 1,
                },
                **{"python": "3.11.7", "pytorch_lightning": "2.6.6", "torch": "2.14.1"},
            },
        )
        (folder / "output.log").write_text(
            f"\n$ python train.py fit -c base.yaml --seed_everything {cell.seed}\n"
            "GPU available: True (cuda), used: True\n"
        )
        write(run / "test_metrics.json", {study.metric: score, "test/chrf": 50.0})
        if "curves" in parts:
            (run / "metrics.csv").write_text(_curves(study, score, random))
        if "profile" in parts:
            write(folder / "profile.json", _profile(terms, on))
        if "bootstrap" in parts:
            # The test set's part is the same in all runs, as in a paired bootstrap.
            shared = np.random.default_rng(1).normal(0, 0.012, 1000)
            scores = ((quality + noise + shared + random.normal(0, 0.002, 1000)) * 100 / study.scale).tolist()
            content = {"seed": 0, "num_samples": 500, "samples": "0a1b2c3d"}
            name = f"test/{study.metric.rpartition('/')[2]}"
            write(predictions / "test_bootstrap.json", content | {"scores": {name: scores}})
        maps = ([_sentence(on, random)] if "attention" in parts else []) + (
            [_map(on, random, 2 if large else 1)] if "maps" in parts else []
        )
        if maps and on:
            write(predictions / "test_attention.json", {"maps": maps})
            if "maps" in parts:
                _photo(np.random.default_rng(5), 320, 240).save(predictions / "test_attention.jpg")
        if "examples" in parts:
            write(predictions / "test_examples.json", {"examples": [_example(one, on, random) for one in range(4)]})
        if "pictures" in parts:
            folder = predictions / "test_pictures"
            folder.mkdir()
            for number in range(3):
                if large:  # drawing many of these would take minutes
                    _large_picture(root, number, folder / f"00000{number}.png")
                    continue
                picture = _photo(np.random.default_rng(number), 640, 240)
                draw = ImageDraw.Draw(picture)
                for _ in range(4):
                    x, y = random.integers(0, 500), random.integers(0, 150)
                    draw.rectangle((x, y, x + 90, y + 60), outline=(255, 210, 0), width=3)
                picture.save(folder / f"00000{number}.png")


def write(path, value):
    path.write_text(json.dumps(value))


def _curves(study, score, random):
    lines = [f"epoch,lr-Adam,step,train/loss,{study.metric.replace('test', 'val', 1)},val/loss"]
    for step in range(19, 400, 20):
        lines.append(f"0,0.001,{step},{6 * np.exp(-step / 120) + 1.2 + random.normal(0, 0.05):.4f},,")
        if step % 80 == 79:
            lines.append(f"0,,{step},,{score * (1 - np.exp(-step / 110)):.5f},{5 * np.exp(-step / 140) + 1.4:.4f}")
    return "\n".join(lines) + "\n"


def _profile(terms, on):
    paper = 1.75e9 + sum({"E1": 0.25e9, "E2": 0.5e9, "E3": 0.12e9, "E4": 0.3e9}[one] for one in on)
    done = 1.7e9 + sum({"E1": 0.2e9, "E2": 0.22e9, "E3": 0.01e9, "E4": 0.04e9}[one] for one in on)
    median = 0.1 + 0.03 * len(on) + 0.01 * ("E2" in on)
    wide = 3 if on == ["E4"] else 1  # as when the machine did other work
    latency = {
        "lower_quartile": median * (1 - 0.04 * wide),
        "median": median,
        "upper_quartile": median * (1 + 0.08 * wide),
        "runs": 10,
    }
    passes = {"latency": latency, "per_second": 1000.0, "uncounted": {}, "peak_memory": 2**28}
    return {
        **{
            "format": 1,
            "batch_size": 50,
            "sample": "pair",
            "unit": "tokens",
            "device": "NVIDIA H100",
            "task": "TranslationTask",
        },
        "parameters": 1_200_000 + 60_000 * len(on),
        "forward": passes | {"multiply_adds": int(50 * done), "paper_multiply_adds": int(50 * paper)},
        "training_step": passes | {"multiply_adds": int(150 * done), "paper_multiply_adds": None},
    }


def _softmax(energies):
    weights = np.exp(energies - energies.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _sentence(on, random):
    tokens = SOURCE.split()
    n = len(tokens)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    energies = {
        "E1": random.normal(0, 1.2, (n, n)),
        "E2": -np.abs(distance + random.integers(-2, 3)) / 1.3 + random.normal(0, 0.2, (n, n)),
        "E3": np.tile(random.normal(0, 1.5, n), (n, 1)),
        "E4": -np.abs(distance) / 3.0,
    }
    weights = {term: _softmax(energies[term]).round(5).tolist() for term in on}
    weights["whole"] = _softmax(sum((energies[term] for term in on), np.zeros((n, n)))).round(5).tolist()
    title = "Self-attention of the last encoder layer"
    return {"kind": "sentence", "title": title, "queries": tokens, "keys": tokens, "kv_stride": 1, "weights": weights}


def _map(on, random, factor):
    height, width = 24 * factor, 32 * factor
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - 10, x - 12)
    content = np.kron(random.normal(0, 1, (6, 8)), np.ones((4 * factor, 4 * factor)))
    energies = {"E1": content, "E2": -distance / 2, "E3": np.roll(content, 5, 1), "E4": -distance / 6}
    weights = {term: (_softmax(energies[term].reshape(-1)) * height * width).reshape(height, width) for term in on}
    whole = _softmax(sum((energies[term] for term in on), np.zeros((height, width))).reshape(-1)) * height * width
    weights["whole"] = whole.reshape(height, width)
    return {
        **{"kind": "map", "title": "Attention of the last block", "query": [10, 12], "size": [height, width]},
        **{"kv_stride": 1, "image": "test_attention.jpg"},
        "weights": {term: values.round(4).tolist() for term, values in weights.items()},
    }


def _photo(random, width, height):
    small = random.integers(40, 220, (6, 8, 3)).astype(np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(7):
        x, y = random.integers(0, width), random.integers(0, height)
        draw.ellipse((x, y, x + 50, y + 40), fill=tuple(map(int, random.integers(0, 255, 3))))
    return picture


def _large_picture(root, number, path):
    shared = root / f"large-{number}.png"
    if not shared.exists():
        _photo(np.random.default_rng(number), 1600, 900).save(shared)
    os.link(shared, path)


def _example(number, on, random):
    words = list(WORDS[number:] + WORDS[:number])
    for _ in range(max(0, 4 - len(on))):
        words[random.integers(len(words))] = "Haus"
    source = "The children have been playing in the old garden since nine o'clock this morning."
    return {
        **{"id": number, "source": f"{source} ({number})", "reference": " ".join(WORDS[number:] + WORDS[:number])},
        "hypothesis": " ".join(words),
    }
