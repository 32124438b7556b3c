"""Feeds damaged checkpoints to the command, one after the other, and notes what becomes of each; a program of its own.

    python hostile_inputs.py CHECKPOINT FOLDER SEED FIRST LAST

CHECKPOINT is a sound one. Of each number from FIRST to LAST a line of JSON goes to FOLDER/outcomes.jsonl: what was
changed, how the command ended, and what it said. The line before it says what is tried, for the reader whose process
died.
"""

import contextlib
import copy
import io
import json
import math
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from lightning_attn.cli import main

SECONDS = 60


def places(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested containers; of long lists, the first few."""
    found = [keys] if keys else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*keys, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:3]):
            found += places(inner, (*keys, number))
    return found


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def replacement(value: Any, chance: random.Random) -> tuple[str, Any]:
    """Something else for a value: of another type, size, sign, or damaged."""
    strange = [
        *(None, True, 0, -1, 1, 10**6, 2**53, 10**40, 0.5, -0.0, math.nan, math.inf, "", "x", "nan", "../../x", "/etc"),
        *("\0", "ü" * 1000, [], {}, [1], ["x"], {"x": 1}, {"class_path": "os.abort"}, nested(60), b"bytes"),
        *(torch.zeros(()), torch.zeros(1), torch.full((2, 2), math.nan), torch.zeros(1).expand(10**12)),
        *(torch.zeros(3, dtype=torch.complex64), torch.zeros(2, 0), torch.ones(3, dtype=torch.uint8)),
    ]
    if isinstance(value, torch.Tensor) and chance.random() < 0.5:
        changes = [
            (
                "transposed",
                lambda: value.flatten().flip(0).view(value.shape).t() if value.ndim == 2 else value.flatten()[:0],
            ),
            ("longer", lambda: torch.cat([value.flatten(), value.flatten()])),
            ("half", lambda: value.to(torch.float16) if value.is_floating_point() else value.double()),
            ("nan", lambda: torch.full(value.shape, math.nan)),
            ("huge", lambda: torch.full(value.shape, 3e38)),
            ("int64", lambda: value.to(torch.int64)),
            ("one", lambda: value.flatten()[:1].clone()),
        ]
        name, change = chance.choice(changes)
        return name, change()
    if isinstance(value, int | float) and not isinstance(value, bool) and chance.random() < 0.4:
        new = chance.choice([-value - 1, value + 1, value * 1000 + 7, float(value) + 0.5, str(value), [value]])
        return repr(new)[:60], new
    new = chance.choice(strange)
    return (f"tensor {tuple(new.shape)}" if isinstance(new, torch.Tensor) else repr(new)[:60]), new


def mutated(sound: dict[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A copy of a checkpoint with one to three changes, and what they are."""
    checkpoint = copy.deepcopy(sound)
    changes = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        # Every top-level part as often as any other, however much it holds.
        part = chance.choice(list(checkpoint))
        keys = chance.choice(places(checkpoint[part], (part,)))
        place: Any = checkpoint
        for key in keys[:-1]:
            place = place[key]
        where = ".".join(map(str, keys))[:120]
        if chance.random() < 0.2:
            del place[keys[-1]]
            changes.append(f"{where} dropped")
        else:
            name, new = replacement(place[keys[-1]], chance)
            place[keys[-1]] = new
            changes.append(f"{where} = {name}")
        if not checkpoint:
            break
    return "; ".join(changes), checkpoint


def damaged_bytes(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The bytes of a file cut off, changed or repeated somewhere."""
    kind, place = chance.choice(["cut", "flip", "zero", "repeat"]), chance.randrange(len(content))
    changed = bytearray(content)
    if kind == "cut":
        changed = changed[:place]
    elif kind == "flip":
        for _ in range(chance.choice([1, 4, 64])):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        changed[place : place + 256] = bytes(len(changed[place : place + 256]))
    else:
        changed[place:place] = changed[:place]
    return f"bytes: {kind} at {place}", bytes(changed)


def too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"not done in {SECONDS} s")


def outcome(arguments: list[str]) -> dict[str, Any]:
    """How the command ends."""
    printed = io.StringIO()
    begun = time.monotonic()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    result: dict[str, Any] = {"status": 0}
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            main(arguments)
    except SystemExit as stop:
        result["status"] = stop.code
    except BaseException as error:
        result |= {"status": "traceback", "error": "".join(traceback.format_exception(error))[-1500:]}
    finally:
        signal.alarm(0)
    said = [line for line in printed.getvalue().splitlines() if line.startswith("error:")]
    result |= {"said": said[-1][:400] if said else "", "seconds": round(time.monotonic() - begun, 1)}
    result["largest_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def run(source: Path, folder: Path, seed: int, numbers: range) -> None:
    sound = torch.load(source, weights_only=True)
    with (folder / "outcomes.jsonl").open("a") as file:
        for number in numbers:
            chance = random.Random(f"{seed}-{number}")
            run_folder = folder / "translation" / f"try-{number}"
            shutil.copytree(source.parent, run_folder)
            path = run_folder / "last.ckpt"
            if number % 5 == 4:
                what, content = damaged_bytes(source.read_bytes(), chance)
                path.write_bytes(content)
            else:
                what, checkpoint = mutated(sound, chance)
                torch.save(checkpoint, path)
            stage = "test" if number % 2 else "fit"
            file.write(json.dumps({"number": number, "stage": stage, "what": what}) + "\n")
            file.flush()
            options = ["--trainer.max_steps", "6"] if stage == "fit" else ["--model.num_examples", "0"]
            result = outcome([stage, "--ckpt_path", str(path), *options])
            file.write(json.dumps({"number": number, **result}) + "\n")
            file.flush()
            shutil.rmtree(run_folder)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), range(int(sys.argv[4]), int(sys.argv[5])))
