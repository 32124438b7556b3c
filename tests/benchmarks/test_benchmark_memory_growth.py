import json

import pytest

pytest.importorskip("psutil")

from benchmarks import memory_growth
from benchmarks.memory_growth import Problem, judge, main, table, train

TINY = Problem(steps=6, settled=2, validate_every=3, every=2)
SMALL = [
    *("--model.dim", "16", "--model.hidden_dim", "32", "--model.encoder_layers", "1", "--model.decoder_layers", "1"),
    *("--model.self_attention.num_heads", "2", "--model.cross_attention.num_heads", "2"),
    *("--trainer.limit_val_batches", "1"),
]


def test_growth_is_from_the_settled_step_to_the_last():
    seen = {"20": 50, "200": 100, "220": 130, "400": 103}
    target = judge("detection", seen, 200)
    assert target.value == pytest.approx(0.03)
    assert target.verdict == "not met"
    assert judge("detection", seen | {"400": 101}, 200).verdict == "met"
    assert judge("detection", {"20": 50}, 200).verdict == "not measured"
    header, cells = table({"detection": {step: size * 2**20 for step, size in seen.items()}, "other": "no"}, 200)
    assert header[1] == "MiB after step 200"
    assert cells == [["detection", "100", "103", "130", "+3.0%"], ["other", "no", "", "", ""]]


def test_memory_is_noted_while_a_task_trains(in_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_folder / "cache"))
    seen = train("translation", TINY, [*SMALL, "--data.root", str(in_folder / "corpus")])
    assert list(seen) == ["2", "4", "6"]
    assert all(2**27 < size < 2**35 for size in seen.values())


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(request, threads):
        asked.append(request["task"])
        return {"200": 100 * 2**20, "300": 101 * 2**20}

    monkeypatch.setattr(memory_growth, "measure", measure)
    main(["--tasks", "translation,detection", "--output", str(tmp_path)])
    assert asked == ["translation", "detection"]
    assert "+1.0%" in capsys.readouterr().out
    run = json.loads((tmp_path / "memory_growth.json").read_text())
    assert [target["verdict"] for target in run["targets"]] == ["met", "met"]
    assert "+1.0%" in (tmp_path / "memory_growth.md").read_text()
    with pytest.raises(SystemExit):
        main(["--tasks", "speech", "--output", str(tmp_path)])


def test_too_few_steps_are_refused_before_training(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "200"])
    assert "--steps 200 ends before memory is compared: give more than 200" in capsys.readouterr().err
