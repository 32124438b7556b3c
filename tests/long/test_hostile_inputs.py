"""Hundreds of damaged inputs, made from sound ones: a message or a sound result, in bounded time and memory."""

import collections
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_attn.cli import main

pytestmark = [pytest.mark.long, pytest.mark.timeout(6000)]
SEED = int(os.environ.get("LONG_SEED", "1"))
NUMBER = int(os.environ.get("LONG_CHECKPOINTS", "80"))  # of each task
PROGRAM = Path(__file__).with_name("hostile_inputs.py")


@pytest.mark.parametrize("config", ["tiny_config", "detection_config", "segmentation_config"])
def test_damaged_checkpoints(request, in_folder, config):
    config = request.getfixturevalue(config)
    main(["fit", "-c", str(config)])
    (source,) = in_folder.glob("checkpoints/*/tiny/last.ckpt")
    folder = in_folder / "tried"
    folder.mkdir()
    begin = 0
    while begin < NUMBER:
        command = [sys.executable, str(PROGRAM), str(source), str(folder), str(SEED), str(begin), str(NUMBER)]
        with (folder / "log.txt").open("a") as log, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=log, stderr=log, timeout=3000, check=False, cwd=folder)
        lines = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
        tried = {line["number"]: line for line in lines if "what" in line}
        outcomes = {line["number"]: line for line in lines if "what" not in line}
        died = tried.keys() - outcomes.keys()
        assert not died, [tried[number] for number in died]
        begin = max(tried) + 1
    bad = [
        (tried[number]["what"], one)
        for number, one in outcomes.items()
        if one["status"] not in (0, 2) or (one["status"] == 2 and not one["said"]) or one["largest_memory"] > 4 << 30
    ]
    assert not bad, bad[:3]
    counts = collections.Counter(one["status"] for one in outcomes.values())
    slowest = max(one["seconds"] for one in outcomes.values())
    print(f"\nseed {SEED}, {config.parent.name}: {len(outcomes)} checkpoints: {dict(counts)}; slowest {slowest} s")
