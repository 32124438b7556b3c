"""`train.py study`, with a command in the place of train.py for the cells."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

TRAIN = """
import json, sys
from pathlib import Path

stage, *words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2]))
if stage == "profile":
    step = {"training_step": {"latency": {"median": 1.0}}}
    Path(options["--output"]).write_text(json.dumps(step))
    raise SystemExit
run = Path(options["--run.root"]) / "translation" / "run"
if "--model.fail" in options:
    raise SystemExit("broken, as it was told to be")
run.mkdir(parents=True, exist_ok=True)
if stage == "fit":
    from lightning_attn.training.code_version import code_version

    (run / "run.json").write_text(json.dumps({"code": code_version()}))
else:
    score = float(options["--model.quality"]) + 0.1 * int(options["--seed_everything"]) ** 2
    (run / "test_metrics.json").write_text(json.dumps({"test/bleu": score}))
"""

STUDY = """
base: base.yaml
axes:
  attention:
    none: {model.quality: 20.9}
    "0010": [{model.quality: 24.2}, better.yaml]
seeds: [0, 1, 2]
metric: test/bleu
budget: 1 h
time_per_cell: 20 min
reference:
  - {cell: none, BLEU: 20.9, GFLOPs: 1.75}
findings:
  - {claim: E3 alone is far from useless, cells: ["0010", none], expected: equal, margin: 1}
"""


@pytest.fixture
def study(in_folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("COLUMNS", "160")
    Path("train.py").write_text(TRAIN)
    Path("base.yaml").write_text("model: {}\n")
    Path("better.yaml").write_text("model: {better: true}\n")
    Path("study.yaml").write_text(STUDY)
    return in_folder


@pytest.fixture
def call(study, run):
    return partial(run, "study")


def test_run_then_status(call):
    printed = call("run", "study.yaml", "--jobs", "3")
    assert "6 waiting; 6 to run, about 40 min" in printed
    assert "study: 6 done. Files: checkpoints/studies/study" in printed
    shown = call("status", "study.yaml")
    for words in ("21.07", "24.37", "20.9", "1.75", "within 1", "the same difference with every seed"):
        assert words in shown
    data = json.loads(call("status", "study.yaml", "--json"))
    assert data["counts"]["done"] == 6
    assert data["groups"][0]["reference"] == {"BLEU": 20.9, "GFLOPs": 1.75}
    assert [cell["score"] for cell in data["cells"]] == pytest.approx([20.9, 21.0, 21.3, 24.2, 24.3, 24.6])
    assert "6 done; nothing to run" in call("run", "study.yaml")


def test_verdicts_are_shown(call):
    Path("study.yaml").write_text(STUDY.replace("24.2}", "24.2, model.noise: 1}"))
    Path("train.py").write_text(TRAIN.replace("** 2", '** (3 if "--model.noise" in options else 2)'))
    printed = call("run", "study.yaml", "--jobs", "3")
    assert "contradicted" in printed
    assert "+3.43" in printed


def test_only_some_cells(call):
    printed = call("run", "study.yaml", "--only", "attention=none", "--only", "seed=1")
    assert "1 waiting; 1 to run" in printed
    data = json.loads(call("status", "study.yaml", "--json"))
    assert [cell["state"] for cell in data["cells"]] == ["waiting", "done", "waiting", "waiting", "waiting", "waiting"]


def test_a_dry_run_writes_nothing(call, study):
    before = sorted(study.rglob("*"))
    printed = call("run", "study.yaml", "--dry-run")
    assert "6 to run, about 2 h" in printed  # 6 x 20 min, past the budget, which a dry run does not ask about
    assert printed.count("attention=none_seed=") == 3
    call("status", "study.yaml")
    call("commands", "study.yaml")
    assert sorted(study.rglob("*")) == before


def test_the_budget(call, monkeypatch):
    printed = call("run", "study.yaml", status=2)
    assert "study.yaml: this would take about 2 h, and its budget is 60 min. Give --yes" in printed

    class Terminal:
        def __init__(self, answer):
            self.readline = lambda: answer
            self.isatty = lambda: True

    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert "Continue? [y/N]" in call("run", "study.yaml", status=1)
    assert not list(Path("checkpoints").rglob("cell.json"))
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert "1 done" in call("run", "study.yaml", "--only", "seed=0", "--only", "attention=none")
    assert "6 done" in call("run", "study.yaml", "--yes")


def test_a_failure_is_the_status_of_the_call(call):
    Path("study.yaml").write_text(STUDY.replace("24.2}", "24.2, model.fail: 1}"))
    printed = call("run", "study.yaml", "--yes", status=1)
    assert printed.count("broken, as it was told to be") == 3
    assert "3 done, 3 failed" in printed
    assert "3 failed; --retry-failed runs them again" in call("run", "study.yaml", status=1)


def test_commands_are_lines_of_a_shell(call):
    lines = call("commands", "study.yaml", "--root", "a folder").splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"{sys.executable} train.py fit -c base.yaml") for line in lines)
    for line in lines:
        # The stand-in takes options by pairs; -c is one too.
        subprocess.run(line, shell=True, check=True, env=dict(os.environ))
    data = json.loads(call("status", "study.yaml", "--root", "a folder", "--json"))
    assert data["counts"]["done"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: run|status|report|commands. See python train.py study --help"),
        (["start", "study.yaml"], "invalid choice: 'start'"),
        (["run", "stud.yaml"], "study: stud.yaml is not there. The current folder holds base.yaml, better.yaml, study"),
        (["run", "study.yaml", "--job", "2"], "unrecognized arguments: --job"),
        (["run", "study.yaml", "--jobs", "0"], "jobs must be at least 1, got 0"),
        (["status", "study.yaml", "--only", "attention=1111"], "only: attention has no '1111'; it has none, 0010"),
        (["run", "base.yaml"], "base.yaml: model: there is no such key"),
    ],
)
def test_mistakes_end_with_a_message(call, arguments, message):
    printed = call(*arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed


def test_no_call_imports_torch(study):
    code = (
        "import sys; sys.argv = ['train.py']; from lightning_attn.cli import main\n"
        "for words in (['status', 'study.yaml'], ['run', 'study.yaml', '--yes'], ['status', 'study.yaml', '--json']):\n"
        "    main(['study', *words])\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'matplotlib') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]"
