import dataclasses
import json

import pytest

pytest.importorskip("psutil")

from benchmarks.fresh_process import FreshProcessError
from benchmarks.memory_growth import BENCHMARK, Problem, growth, judge, table, train
from benchmarks.results import Comparison, Result, Side
from benchmarks.runner import main

TINY = Problem(steps=6, settled=2, validate_every=3, every=2)
SMALL = (
    *("--model.dim", "16", "--model.hidden_dim", "32", "--model.encoder_layers", "1", "--model.decoder_layers", "1"),
    *("--model.self_attention.num_heads", "2", "--model.cross_attention.num_heads", "2"),
    *("--trainer.limit_val_batches", "1"),
)


def judged(seen):
    comparison = Comparison(sides={"detection": Side()}, figures={"detection": seen})
    result = Result("", "", problem={"settled": 200}, comparisons=[comparison])
    judge(result)
    return result, comparison.targets[0]


def test_growth_is_from_the_settled_step_to_the_last():
    seen = {"20": 50, "200": 100, "220": 130, "400": 103}
    assert growth(seen, 200) == ([100, 130, 103], pytest.approx(0.03))
    result, target = judged({step: size * 2**20 for step, size in seen.items()})
    assert target.value == pytest.approx(0.03)
    assert target.verdict == "not met"
    assert judged(seen | {"400": 101})[1].verdict == "met"
    assert judged({"20": 50})[1].verdict == "not measured"
    result.comparisons[0].sides["other"] = Side(error="no")
    found = table(result)
    assert found.header[1] == "MiB after step 200"
    assert found.cells == [["detection", "100", "103", "130", "+3.0%"], ["other", "no", "", "", ""]]


def test_memory_is_noted_while_a_task_trains(in_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_folder / "cache"))
    options = (*SMALL, "--data.root", str(in_folder / "corpus"))
    seen = train("translation", dataclasses.replace(TINY, options=options))
    assert list(seen) == ["2", "4", "6"]
    assert all(2**27 < size < 2**35 for size in seen.values())


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    asked = []

    def isolate(function, task, problem, *, threads, timeout):
        asked.append((function, task, problem.steps, threads))
        if task == "segmentation":
            raise FreshProcessError("ended by signal 9")
        return {"200": 100 * 2**20, "300": 101 * 2**20}

    arguments = ["--sides", "translation,segmentation", "--steps", "300", "--threads", "1", "--output", str(tmp_path)]
    main(BENCHMARK, arguments, isolate=isolate)
    assert asked == [(train, "translation", 300, 1), (train, "segmentation", 300, 1)]
    assert "+1.0%" in capsys.readouterr().out
    [result] = json.loads((tmp_path / "memory_growth.json").read_text())["results"]
    [comparison] = result["comparisons"]
    assert [target["verdict"] for target in comparison["targets"]] == ["met"]
    assert comparison["figures"]["translation"] == {"200": 100 * 2**20, "300": 101 * 2**20}
    assert "| segmentation | ended by signal 9 |" in (tmp_path / "memory_growth.md").read_text()
    with pytest.raises(SystemExit):
        main(BENCHMARK, ["--sides", "speech"])
    assert "--sides speech: there are translation,detection,segmentation" in capsys.readouterr().err


def test_too_few_steps_are_refused_before_training(capsys):
    with pytest.raises(SystemExit):
        main(BENCHMARK, ["--steps", "200"])
    assert "--steps 200 ends before memory is compared: give more than 200" in capsys.readouterr().err
