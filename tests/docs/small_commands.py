"""The command of the package at the size of a test: the same `main`, with options of size and hardware added.

`train.py` of a playground calls `run`, so that the cells of studies, shell pipes and launchers are small too.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import yaml
from small_sizes import (
    ONE_PROCESS,
    SMALL_DETECTION,
    SMALL_DIGITS,
    SMALL_MULTITASK,
    SMALL_SEGMENTATION,
    SMALL_TRANSLATION,
    TWO_STEPS,
    small_miniature_writers,
)

from lightning_attn.configurations import with_located_files
from lightning_attn.study.grid import Study

SIZES = {
    "TranslationTask": SMALL_TRANSLATION,
    "DetectionTask": SMALL_DETECTION,
    "SegmentationTask": SMALL_SEGMENTATION,
    "MultitaskTask": SMALL_MULTITASK,
    "DigitsTask": SMALL_DIGITS,
}
"""Options of `model` and `data` by the task's class; a task that is not here is trained as it is."""

RESUMED_STEPS = 4
"""Where a training that is resumed from a checkpoint of `TWO_STEPS` ends."""

_STAGES = ("fit", "validate", "test", "predict")


def small(arguments: Sequence[str]) -> list[str]:
    """The arguments with options of size, which those given overrule but for long trainings, and of hardware."""
    subcommand, *given = arguments
    if subcommand == "study":
        return ["study", *_small_study(given)]
    if subcommand == "attention-map" and _value("--source", given) and not _value("--target", given):
        return [*arguments, "--target", "Zwei Männer"]  # after two steps a network may translate by no word
    if subcommand == "export" and "--size" in given:
        place = given.index("--size") + 1
        height, width = (int(side) for side in given[place : place + 2])
        smaller = [str(side // max(1, max(height, width) // 256)) for side in (height, width)]
        return [subcommand, *given[:place], *smaller, *given[place + 2 :]]
    if subcommand not in (*_STAGES, "profile") or "--help" in given:
        return list(arguments)
    files = list(_files(given))
    size: list[object] = []
    if files or _value("--model", given):
        size = _without_refused(SIZES.get(_task(files, given), []), given)
    if subcommand == "profile":
        size = ["--repetitions", 1, *(option for option in size if _value("--device", given) != "meta")]
        return ["profile", *map(str, size), *given]
    if subcommand == "fit":
        steps = list(TWO_STEPS)
        if _value("--ckpt_path", given):
            steps[steps.index("--trainer.max_steps") + 1] = RESUMED_STEPS
        if int(_value("--trainer.max_steps", given) or 0) > RESUMED_STEPS:
            given = [*given, *map(str, steps)]  # as in the cells of a study
        size += steps
    hardware: list[object] = ["--trainer.accelerator", "cpu"]
    if _merged(files, "trainer", "accelerator") == "gpu":
        hardware = ONE_PROCESS
    if "data.download" in _keys(files):
        hardware = [*hardware, "--data.download", "false"]
    return [subcommand, *map(str, size), *given, *map(str, hardware)]


@contextlib.contextmanager
def small_sets() -> Iterator[None]:
    """The miniature DataModules write small sets."""
    with contextlib.ExitStack() as stack:
        for place, write in small_miniature_writers().items():
            stack.enter_context(mock.patch(place, write))
        yield


def run(arguments: Sequence[str]) -> None:
    """The command, at the size of a test."""
    from lightning_attn.cli import main

    with small_sets():
        main(small(arguments))


def _without_refused(options: Sequence[object], given: Sequence[str]) -> list[object]:
    """Without options that those given exclude: a vocabulary that is there has its own size."""
    pairs = list(zip(options[::2], options[1::2], strict=True))
    if _value("--data.vocabulary", given):
        pairs = [pair for pair in pairs if pair[0] != "--data.vocabulary_size"]
    return [word for pair in pairs for word in pair]


def _small_study(given: Sequence[str]) -> list[str]:
    """Of a study that is run, or whose commands are, one cell; if it says which, one of those."""
    if not given or given[0] not in ("run", "commands") or "--dry-run" in given:
        return list(given)
    words = [word for word in given[1:] if not word.startswith("-")]
    study = Study.read(words[0])
    only = [value for option, value in itertools.pairwise(given) if option == "--only"]
    cell = study.select(only)[0]
    chosen = [f"--only={axis}={label}" for axis, label in {**cell.labels, "seed": cell.seed}.items()]
    others = [word for word, before in zip(given, ["", *given], strict=False) if "--only" not in (word, before)]
    return [*others, *chosen]


def _value(option: str, given: Sequence[str]) -> str:
    for place, word in enumerate(given):
        if word == option:
            return "".join(given[place + 1 : place + 2])
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return ""


def _files(given: Sequence[str]) -> Iterator[dict[str, object]]:
    """The contents of the configuration files, in order."""
    located = with_located_files(given)
    for place, word in enumerate(located):
        if word in ("-c", "--config") and Path(located[place + 1]).is_file():
            content = yaml.safe_load(Path(located[place + 1]).read_text(encoding="utf-8"))
            if isinstance(content, dict):
                yield content


def _merged(files: Sequence[dict[str, object]], section: str, key: str) -> object:
    found: object = None
    for content in files:
        part = content.get(section)
        if isinstance(part, dict) and key in part:
            found = part[key]
    return found


def _task(files: Sequence[dict[str, object]], given: Sequence[str]) -> str:
    return str(_value("--model", given) or _merged(files, "model", "class_path")).rpartition(".")[2]


def _keys(files: Sequence[dict[str, object]]) -> set[str]:
    """Names of the data's arguments, such as data.download."""
    arguments = [part for content in files if isinstance(part := content.get("data"), dict)]
    return {f"data.{key}" for part in arguments for key in part.get("init_args", {})}


if __name__ == "__main__":
    run(sys.argv[1:])
