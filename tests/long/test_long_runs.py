"""Thousands of steps and predictions: memory, open files and threads stay as they are after the first quarter."""

import json
import os
import shutil
from pathlib import Path

import pytest
from trials import attempt

pytestmark = [pytest.mark.long, pytest.mark.timeout(6000)]
STEPS = int(os.environ.get("LONG_STEPS", "2000"))
PREDICTIONS = int(os.environ.get("LONG_PREDICTIONS", "5000"))
MOST_GROWTH = 0.02
CONFIGURATIONS = ["tiny_config", "detection_config", "segmentation_config"]


def watched(folder, every):
    """A configuration file with the callback, and the file that it writes."""
    notes, path = folder / "footprint.jsonl", folder / "watch.yaml"
    notes.unlink(missing_ok=True)
    path.write_text(
        "trainer:\n  callbacks:\n    - class_path: footprint.Footprint\n"
        f"      init_args: {{path: {notes}, every: {every}}}\n"
    )
    return path, notes


def require_flat(what, notes, most_files=0):
    """`most_files`: how many more may be open, as batches on their way from workers are."""
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    quarter = len(lines) // 4
    assert quarter >= 2, lines
    settled, last = lines[quarter : 2 * quarter], lines[-quarter:]
    most = {key: (max(one[key] for one in settled), max(one[key] for one in last)) for key in lines[0]}
    growth = most["memory"][1] / most["memory"][0] - 1
    print(
        f"\n{what}: {lines[-1]['batches']} batches; memory {most['memory'][0] >> 20} MiB in the second quarter, "
        f"{most['memory'][1] >> 20} in the last ({growth:+.2%}); files {most['files']}, threads {most['threads']}"
    )
    assert growth < MOST_GROWTH, lines
    assert most["files"][1] <= most["files"][0] + most_files
    assert most["threads"][1] <= most["threads"][0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_training(request, in_folder, monkeypatch, config, workers):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = request.getfixturevalue(config)
    steps = STEPS if workers == 0 else STEPS // 4
    watch, notes = watched(in_folder, max(steps // 40, 1))
    call = ["fit", "-c", path, "-c", watch, "--trainer.max_steps", steps, "--trainer.val_check_interval", steps // 10]
    call += ["--trainer.log_every_n_steps", 10, "--data.num_workers", workers]
    trial = attempt(call, in_folder, seconds=2400)
    assert trial.status == 0, trial.printed[-3000:]
    require_flat(f"training, {config}, {workers} workers", notes, most_files=8 * workers)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_prediction(request, in_folder, monkeypatch, config):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = request.getfixturevalue(config)
    assert attempt(["fit", "-c", path], in_folder, seconds=300).status == 0
    (checkpoint,) = in_folder.glob("checkpoints/*/tiny/last.ckpt")
    if config == "tiny_config":
        # Of one length: batches are ordered by it, and take different memory.
        line = (request.getfixturevalue("corpus") / "test.en").read_text().splitlines()[0]
        source = in_folder / "many.en"
        source.write_text("".join(f"{line}\n" for _ in range(PREDICTIONS)))
        given, batches = ["--data.predict_file", source], PREDICTIONS // 40
    else:
        data = request.getfixturevalue("coco" if config == "detection_config" else "cityscapes")
        pictures = sorted((data / ("test2017" if config == "detection_config" else "leftImg8bit/test")).rglob("*.png"))
        source = in_folder / "many"
        source.mkdir()
        for number in range(PREDICTIONS):
            shutil.copy(pictures[number % len(pictures)], source / f"{number}.png")
        given, batches = ["--data.predict_folder", source], PREDICTIONS // 2
    watch, notes = watched(in_folder, max(batches // 40, 1))
    trial = attempt(["predict", "--ckpt_path", checkpoint, "-c", watch, *given], in_folder, seconds=2400)
    assert trial.status == 0, trial.printed[-3000:]
    require_flat(f"{PREDICTIONS} predictions, {config}", notes)
