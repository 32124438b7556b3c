"""The check of a GPU, at the small sizes of a CPU: its sections, what they find, and what an early end leaves."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    device_behaviour,
    device_check,
    device_correctness,
    device_first_look,
    device_tasks,
    device_training,
)
from benchmarks.attention_shape import Shape
from benchmarks.case import Run
from benchmarks.checks import Check, OutOfTimeError, run_checks, time_limit
from benchmarks.device_check import BENCHMARK, main
from benchmarks.fresh_process import REPOSITORY
from benchmarks.peers.attention import build_module
from benchmarks.report import read_report
from benchmarks.results import Comparison, Memory, Result, Side, Timing
from benchmarks.runner import run_named
from lightning_attn.attention import algorithms
from lightning_attn.attention.algorithms.dense import Dense
from lightning_attn.attention.spec import TERM_SETS


def check(tmp_path, only, *options, **settings):
    """The status of a run, and its results by the name of their case without the benchmark's."""
    status = main(["--only", only, "--minutes", "10", "--output", str(tmp_path), *options], **settings)
    return status, results_in(tmp_path)


def results_in(folder):
    [path] = folder.glob("*.json")
    assert path.name.startswith("device_check_cpu_20")
    assert path.with_suffix(".md").read_text().startswith("# Device check\n")
    return {result.case.removeprefix("device_check."): result for result in read_report(path).results}


def outcomes(result):
    return {comparison.name: comparison.outcome for comparison in result.comparisons}


class Allowance:
    """Time for so many checks and no more."""

    def __init__(self, checks):
        self.checks = checks

    def __call__(self):
        self.checks -= 1
        return 1000.0 if self.checks >= 0 else 0.0


class Wrong(Dense):
    """Gives values that are a tenth too large."""

    name = "wrong"

    def compute(self, inputs):
        return 1.1 * super().compute(inputs)


class Broken(Dense):
    name = "broken"

    def compute(self, inputs):
        raise RuntimeError("an illegal memory access was encountered")


class TestSections:
    def test_values_and_gradients(self, tmp_path, capsys):
        only = "correctness.maps,correctness.sentences,correctness.deformable,correctness.dynamic,correctness.dropout"
        status, results = check(tmp_path, only)
        assert status == 0
        assert list(results) == only.split(",")
        for result in results.values():
            assert set(outcomes(result).values()) == {"measured"}
        maps, sentences = results["correctness.maps"], results["correctness.sentences"]
        names = [comparison.name for comparison in (*maps.comparisons, *sentences.comparisons)]
        for situation in ("map", "map, padded", "map, stride 2", "map, window 5", "sentence, causal, padded"):
            assert f"{situation} 0011" in names
        compared = {name for comparison in maps.comparisons for name in comparison.figures}
        used = {algorithm.name for algorithm in algorithms.ORDER} - {"reference"}
        assert {name.split()[0] for name in compared} >= {"auto", "dense", "tiled", "augmented_sdpa"}
        assert {name.split()[0] for name in compared} <= {"auto", *used}
        assert {name.split()[1] for name in compared} == {"float32", "bf16"}
        # Float32 lies as close as it can, and bfloat16 does not: the precisions are what they are called.
        assert 0 < maps.comparisons[0].figures["auto float32"]["value"] < 1e-5
        assert maps.comparisons[0].figures["auto bf16"]["value"] > 1e-4
        deformable = {name for one in results["correctness.deformable"].comparisons for name in one.figures}
        assert deformable >= {"auto float32", "gather bf16", "torchvision float32"}
        printed = capsys.readouterr().out
        assert printed.startswith("card: CPU, small sizes, torch: ")
        assert "device_check.correctness.maps: values and gradients of attention on maps beside float64" in printed

    def test_runs_repeat_and_waits_are_found(self, tmp_path):
        status, results = check(tmp_path, "correctness.determinism,correctness.synchronisations")
        assert status == 0, "a wait is no incorrect value"
        assert set(outcomes(results["correctness.determinism"]).values()) == {"measured"}
        waits = results["correctness.synchronisations"]
        counts = {one.name: one.figures["host synchronisations"] for one in waits.comparisons}
        assert counts["map 1111"] == 0
        [target] = [target for one in waits.comparisons for target in one.targets]
        assert target.name == f"host synchronisations in {len(counts)} training steps"
        assert target.value == sum(counts.values())

    def test_a_wait_is_counted_with_its_place(self):
        class Asks(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x) if bool(x.sum() > 0) else x

        found = Comparison()
        step = device_behaviour.Step(Asks(4, 4), [torch.ones(2, 4)])
        [one] = run_checks([Check("asks", lambda found: device_behaviour.check_waits(lambda: step, found))], Run())
        assert one.figures["host synchronisations"] == 1
        assert "_local_scalar_dense" in one.figures["places"][0]
        device_behaviour.check_waits(lambda: device_behaviour.Step(torch.nn.Linear(4, 4), step.inputs), found)
        assert found.figures["host synchronisations"] == 0

    @pytest.mark.slow
    def test_operators(self, tmp_path):
        status, results = check(tmp_path, "correctness.operators")
        assert status == 0
        found = outcomes(results["correctness.operators"])
        assert {found[f"attention tiled, {where}"] for where in ("map", "sentence, causal")} == {"measured"}
        table = device_behaviour.operator_table(results["correctness.operators"])
        counts = {name: int(count) for name, count in table.cells}
        assert counts.keys() == device_behaviour.known_operators()
        assert min(counts.values()) > 0

    def test_attention(self, tmp_path):
        cases = ("2x256x50x84s1-bf16", "sentences-128x30x512", "windows", "convolutions-bf16")
        status, results = check(tmp_path, ",".join(f"attention.{case}" for case in cases))
        assert status == 0
        assert set(results) == {f"attention.{case}" for case in cases}
        first = results["attention.2x256x50x84s1-bf16"].comparisons[0]
        assert first.name == "1111"
        assert first.sides["ours eager"].timing.median > 0
        assert first.sides.keys() >= {"ours eager", "floor eager"}
        assert 1e-4 < first.figures["error"] < 0.08, "bfloat16 beside float64"
        assert not first.targets, "they are of the full size on a GPU"
        assert results["attention.windows"].comparisons[0].difference < 1e-5
        deformable, dynamic = results["attention.convolutions-bf16"].comparisons
        assert deformable.sides.keys() >= {"ours eager", "ours gather eager", "floor eager"}
        assert dynamic.sides.keys() == {"ours eager", "1111 eager"}

    def test_tasks(self, tmp_path):
        status, results = check(tmp_path, "tasks.detection,tasks.translation,tasks.segmentation")
        assert status == 0
        for case, side in (
            ("detection", "torchvision"),
            ("translation", "torch.nn.Transformer"),
            ("segmentation", "1111"),
        ):
            [comparison] = results[f"tasks.{case}"].comparisons
            assert {name: cost.error for name, cost in comparison.sides.items()} == dict.fromkeys(comparison.sides)
            assert device_tasks.rate(comparison, side) > 0

    def test_profiles(self, tmp_path):
        status, results = check(tmp_path, "profile")
        assert status == 0
        found = {one.name: one for one in results["profile.steps"].comparisons}
        assert {"translation 1111", "detection none", "deformable"} < found.keys()
        for one in found.values():
            assert one.outcome == "measured"
            times = [kernel["ms"] for kernel in one.figures["kernels"]]
            assert times == sorted(times, reverse=True)
            assert 0 < sum(times) <= one.figures["busy, ms"] * (1 + 1e-9)

    def test_the_quickstart(self, tmp_path, here, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        [case] = device_check.chosen_cases(["tasks.trainings"], small=True)
        quickstart, *_ = device_training.measure(case, Run(isolate=here, time_left=Allowance(1)))
        assert (quickstart.outcome, quickstart.reason) == ("measured", "")
        assert quickstart.figures["steps"] == case.problem.quickstart
        assert quickstart.figures["last loss"] < quickstart.figures["first loss"]

    @pytest.mark.slow
    def test_trainings_in_processes(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        status, results = check(tmp_path / "out", "tasks.trainings")
        assert status == 0
        assert outcomes(results["tasks.trainings"]) == dict.fromkeys(("quickstart", "resumed", "torchrun"), "measured")
        _, resumed, torchrun = results["tasks.trainings"].comparisons
        assert resumed.figures["difference"] == 0
        losses = resumed.figures["losses"]
        assert len(losses) == 4
        assert resumed.figures["resumed losses"] == losses[2:]
        assert torchrun.figures["losses by torchrun"] == pytest.approx(torchrun.figures["losses"])

    def test_the_first_look_stands_beside_the_earlier_one(self, tmp_path):
        rows = [{"case": "1x64x6x10 stride 1", "what": "ours 1111", "ms": 1e6, "first_s": 1.0, "MB": 3}]
        rows.append({"case": "1x64x6x10 stride 1", "what": "ours 0111", "failed": "RuntimeError: no"})
        stored = {
            "device": "A card",
            "date": "2026-01-01",
            "sections": {"speed": rows, "correctness": [{"case": "map"}]},
        }
        (tmp_path / "first_look_acard_2026-01-01.json").write_text(json.dumps(stored))
        [case] = device_check.chosen_cases(["first_look"], small=True)
        problem = dataclasses.replace(case.problem, folder=str(tmp_path))
        case = dataclasses.replace(case, problem=problem)
        found = list(itertools.islice(device_first_look.measure(case, Run()), 4))
        assert [comparison.outcome for comparison in found] == ["measured"] * 4
        table = device_first_look.table(Result(case.name, case.title, comparisons=found))
        by_what = {line[2]: line for line in table.cells}
        assert by_what["ours 1111"][5] == "1000000.0"
        assert float(by_what["ours 1111"][6]) == pytest.approx(1e6 / found[1].figures["ms"], rel=0.01)
        assert by_what["ours 0111"][5] == "failed"
        assert by_what["ours 0110"][5] == ""
        assert "earlier: A card, 2026-01-01" in table.notes
        names = {comparison.name for comparison in found}
        assert "speed | 1x64x6x10 stride 1 | floor: E1 by SDPA" in names

    def test_the_figures_that_are_there_have_the_names_of_the_first_look(self):
        earlier = device_first_look.read_earlier(REPOSITORY / "benchmarks" / "results")
        problem = device_first_look.Problem()
        rows = {row[:3] for row in (*device_first_look.speed_rows(problem), *device_first_look.network_rows(problem))}
        rows |= {row[:3] for row in device_first_look.synchronisation_rows()}
        rows |= {row[:3] for row in device_first_look.changing_rows(problem)}
        assert rows <= earlier.figures.keys()
        assert all("augmented keys" in what for _, _, what in earlier.figures.keys() - rows), "the prototype alone"


class TestOutcomes:
    def test_a_wrong_value_ends_with_status_1(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(algorithms, "ORDER", (*algorithms.ORDER, Wrong()))
        status, results = check(tmp_path, "correctness.maps")
        assert status == 1
        first = results["correctness.maps"].comparisons[0]
        assert first.outcome == "wrong"
        assert first.reason.startswith("wrong float32: value 1.0e-01, gradient of ")
        assert "auto" not in first.reason
        assert first.figures["wrong float32"]["value"] == pytest.approx(0.1, rel=0.1)
        assert "wrong: device_check.correctness.maps | map 1111: wrong float32" in capsys.readouterr().out

    def test_what_users_get_is_compared_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr(algorithms, "ORDER", (Wrong(), *algorithms.ORDER))
        status, results = check(tmp_path, "correctness.sentences,attention.2x512x25x42s1")
        assert status == 1
        assert "auto float32: value 1.0e-01" in results["correctness.sentences"].comparisons[0].reason
        found = results["attention.2x512x25x42s1"].comparisons[0]
        assert found.outcome == "wrong"
        assert "of the largest value away from float64" in found.reason

    def test_dropout_that_is_not_made_up_for_and_runs_that_differ_are_wrong(self, tmp_path, monkeypatch):
        class Shrunk(Dense):
            def compute(self, inputs):
                return (1 - inputs.dropout) * super().compute(inputs)

        class Restless(Dense):
            def compute(self, inputs):
                return super().compute(inputs) * (1 + time.perf_counter_ns() % 997 / 1000)

        monkeypatch.setattr(algorithms, "ORDER", (Shrunk(),))
        status, results = check(tmp_path / "shrunk", "correctness.dropout")
        assert status == 1
        assert set(outcomes(results["correctness.dropout"]).values()) == {"wrong"}
        assert "deviations away from the output without dropout" in results["correctness.dropout"].comparisons[0].reason
        monkeypatch.setattr(algorithms, "ORDER", (Restless(),))
        status, results = check(tmp_path / "restless", "correctness.determinism")
        assert status == 1
        found = results["correctness.determinism"].comparisons[0]
        assert found.reason.startswith("another value, input 0, ")
        assert found.reason.endswith("in a second run under deterministic algorithms")

    def test_an_error_is_recorded_and_the_rest_goes_on(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(algorithms, "ORDER", (Broken(), *algorithms.ORDER))
        status, results = check(tmp_path, "correctness.maps,correctness.dynamic")
        assert status == 0
        first = results["correctness.maps"].comparisons[0]
        assert first.outcome == "failed"
        assert first.reason == "auto float32: RuntimeError: an illegal memory access was encountered"
        assert first.figures["dense float32"]["value"] < 1e-5
        assert set(outcomes(results["correctness.dynamic"]).values()) == {"measured"}
        assert "failed: map 1111; map 0110" in capsys.readouterr().out

    def test_an_error_between_checks_ends_its_case_alone(self, tmp_path, monkeypatch):
        def measure(case, run):
            yield from run_checks([Check("fine", lambda found: None)], run)
            raise RuntimeError("no algorithm is left")

        cases = [
            dataclasses.replace(BENCHMARK.cases_named(name)[0], measure=measure, quick={})
            for name in ("correctness.dynamic", "correctness.deformable")
        ]
        monkeypatch.setattr(device_check, "chosen_cases", lambda names, small: cases)
        assert main(["--output", str(tmp_path)]) == 0
        for result in results_in(tmp_path).values():
            assert outcomes(result) == {"fine": "measured", "the case itself": "failed"}
            assert result.comparisons[1].reason == "RuntimeError: no algorithm is left"

    def test_values_that_are_not_finite_are_wrong(self):
        found = Comparison()
        attention = torch.nn.Linear(3, 3)
        compared = device_correctness.Compared(attention, attention, [torch.ones(2, 3)], {})
        compared.module.weight.data[0, 0] = float("nan")
        device_correctness.judge_values(found, compared, "auto", "float32")
        assert found.outcome == "wrong"
        assert "value inf" in found.reason
        json.loads(json.dumps(found.figures, allow_nan=False))

    def test_a_missing_package_is_named(self):
        def needs(name):
            def fill(found):
                found.figures["before"] = 1
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            return fill

        missing, ours = run_checks([Check("a", needs("mmcv.cnn")), Check("b", needs("lightning_attn.gone"))], Run())
        assert (missing.outcome, missing.reason) == ("not run", "package mmcv missing")
        assert missing.figures == {"before": 1}, "what was found is kept"
        assert ours.outcome == "failed"
        error = device_training.missing_package("ModuleNotFoundError: No module named 'jsonargparse'")
        assert error.name == "jsonargparse"
        assert device_training.missing_package("ValueError: no") is None

    def test_the_memory_of_a_fallen_gpu_is_left_to_a_new_process(self, tmp_path, monkeypatch):
        monkeypatch.setattr(algorithms, "ORDER", (Broken(), *algorithms.ORDER))
        monkeypatch.setattr(device_check, "answers", lambda: False)
        commands = []
        status, results = check(tmp_path, "correctness.maps", "--no-memory", restart=commands.append)
        assert status == 0
        [path] = tmp_path.glob("*.json")
        [command] = commands
        assert command[1:5] == ["-m", "benchmarks.device_check", "--only", "correctness.maps"]
        assert command[5:7] == ["--no-memory", "--minutes"]
        assert 0 < float(command[7]) < 10
        assert command[8:] == ["--resume", str(path)]
        assert outcomes(results["correctness.maps"]) == {"map 1111": "failed"}
        monkeypatch.undo()
        assert main(command[3:]) == 0
        found = outcomes(results_in(tmp_path)["correctness.maps"])
        assert found.pop("map 1111") == "failed", "what ended the process is not run again"
        assert len(found) == 15
        assert set(found.values()) == {"measured"}


class TestTime:
    def test_what_does_not_fit_is_listed(self, tmp_path, capsys):
        ticks = itertools.count()

        def clock():
            return 4.0 * next(ticks)

        status, results = check(tmp_path, "correctness.maps,tasks.detection", "--minutes", "1", clock=clock)
        assert status == 0
        found = results["correctness.maps"]
        names = [comparison.name for comparison in found.comparisons]
        assert len(names) == 16, "everything is listed"
        measured = [one.name for one in found.comparisons if one.outcome == "measured"]
        assert 0 < len(measured) < 16
        assert names[: len(measured)] == measured
        assert {one.reason for one in found.comparisons[len(measured) :]} == {"no time left"}
        assert outcomes(results["tasks.detection"]) == {"batch 2": "not run"}
        assert f"not run: {'; '.join(names[len(measured) :][:8])}" in capsys.readouterr().out

    def test_a_check_ends_when_its_time_is_out(self):
        def fill(found):
            found.figures["first"] = 1
            while True:
                try:
                    time.sleep(0.01)
                except Exception:
                    continue

        start = time.monotonic()
        slow, next_one = run_checks([Check("slow", fill, 0.1), Check("next", fill, 1.0)], Run(time_left=lambda: 0.3))
        assert time.monotonic() - start < 30
        assert (slow.outcome, slow.reason) == ("not run", "no time left: ended after 0 s")
        assert slow.figures == {"first": 1}
        assert (next_one.outcome, next_one.reason) == ("not run", "no time left")

    def test_a_timer_of_someone_else_goes_on(self):
        rang = []
        handler = signal.getsignal(signal.SIGALRM)
        before, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(OutOfTimeError), time_limit(0.05):
                time.sleep(5)
            assert not rang
            time.sleep(0.4)
            assert rang == [True]
        finally:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, before)

    def test_shares_of_sections_that_do_not_run_go_to_the_others(self):
        now = [100.0]
        deadlines = device_check.Deadlines(10, ["correctness", "first_look", "attention", "tasks"], lambda: now[0])
        assert deadlines.left("correctness") == pytest.approx(180)
        assert deadlines.left("tasks") == pytest.approx(600)
        alone = device_check.Deadlines(10, ["attention"], lambda: now[0])
        assert alone.left("attention") == pytest.approx(600)
        now[0] += 60
        assert deadlines.left("correctness") == pytest.approx(120)

    def test_a_killed_run_leaves_what_it_has_and_is_resumed(self, tmp_path, capsys):
        """Killed where nothing can be tidied up; and without the packages that these sections do not need."""
        program = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"rich", "pytorch_lightning", "jsonargparse", "torchmetrics", "albumentations",
                                      "matplotlib", "yaml", "psutil", "mmcv", "sentencepiece", "cv2", "sacrebleu"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from benchmarks.device_check import main
sys.exit(main(["--only", "correctness.maps,attention,tasks.trainings", "--output", {str(tmp_path)!r}]))
"""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                end = time.monotonic() + 300
                while time.monotonic() < end and process.poll() is None:
                    if "attention.2x256x50x84s1-bf16" in "".join(map(Path.read_text, tmp_path.glob("device*.json"))):
                        break
                    time.sleep(0.02)
            finally:
                process.kill()
        results = results_in(tmp_path)
        assert set(outcomes(results["correctness.maps"]).values()) == {"measured"}
        first = results["attention.2x256x50x84s1-bf16"].comparisons[0]
        assert first.sides["mmcv"].error == "absent: package mmcv missing"
        [path] = tmp_path.glob("device*.json")
        again = ["--resume", str(path), "--only", "attention.2x256x50x84s1-bf16"]
        assert main(again) == 0
        resumed = results_in(tmp_path)
        assert resumed["correctness.maps"] == results["correctness.maps"], "what is not chosen stays"
        found = resumed["attention.2x256x50x84s1-bf16"].comparisons
        assert found[0] == first
        assert [one.name for one in found] == ["1111", "0011"]
        assert str(path.with_suffix("")) in capsys.readouterr().out


class TestCommand:
    def test_help_says_what_there_is(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        for part in ("--minutes", "--only", "--output", "correctness", "attention", "tasks", "study", "--multi30k"):
            assert part in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--only", "speed"],
                "--only speed: there are the sections correctness, first_look, attention, tasks, profile, study",
            ),
            (["--minutes", "0"], "0 is not a number above 0"),
            (["--resume", "no/such/file.json"], "no/such/file.json"),
        ],
    )
    def test_bad_arguments_are_named(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_the_folder_of_the_environment_is_used(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OUT", str(tmp_path))
        assert main(["--only", "attention.sentences-128x30x512", "--no-memory"]) == 0
        assert list(results_in(tmp_path)) == ["attention.sentences-128x30x512"]

    def test_it_is_among_the_benchmarks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(algorithms, "ORDER", (*algorithms.ORDER, Wrong()))
        with pytest.raises(SystemExit) as stopped:
            run_named(["device_check.correctness.maps", "--minutes", "5", "--output", str(tmp_path)])
        assert stopped.value.code == 1
        assert list(results_in(tmp_path)) == ["correctness.maps"]

    def test_an_interrupt_keeps_what_was_measured(self, tmp_path, monkeypatch):
        def interrupt(found):
            raise KeyboardInterrupt

        [case] = BENCHMARK.cases_named("correctness.dynamic")
        fine = Check("fine", lambda found: None)
        broken = dataclasses.replace(
            case, measure=lambda case, run: run_checks([fine, Check("interrupt", interrupt)], run)
        )
        monkeypatch.setattr(device_check, "chosen_cases", lambda names, small: [broken])
        assert main(["--output", str(tmp_path)]) == 130
        assert outcomes(results_in(tmp_path)["correctness.dynamic"]) == {"fine": "measured"}


def side(milliseconds, megabytes=0):
    return Side(Timing((milliseconds / 1e3,)), Memory(0, megabytes * 2**20))


class TestTargets:
    def judged(self, name, comparisons):
        [case] = BENCHMARK.cases_named(name)
        problem = dataclasses.asdict(case.problem)
        result = Result(case.name, case.title, str(case.problem), problem, comparisons)
        case.set_targets(result)
        return {target.name: target.verdict for one in comparisons for target in one.targets}

    def test_attention_beside_the_floor_and_mmcv(self):
        sides = {"ours": side(1.5), "floor": side(1.0), "ours eager": side(9.0, 10), "floor eager": side(3.0)}
        sides |= {"mmcv": side(16.0), "mmcv eager": side(20.0, 190)}
        pooled = {"ours": side(0.3), "floor": side(1.0)}
        found = self.judged("attention.2x256x50x84s1-bf16", [Comparison("1111", sides), Comparison("0010", pooled)])
        shape = "2x256x50x84s1-bf16"
        assert found == {
            f"{shape} 1111: ours / floor (graph)": "met",
            f"{shape} 1111: ours / floor (graph), aim": "not met",
            f"{shape} 1111: mmcv / ours (graph)": "met",
            f"{shape} 1111: mmcv / ours (graph), aim": "not met",
            f"{shape} 1111: memory mmcv / ours": "not met",
            f"{shape} 0010: ours / floor (graph)": "not met",
        }
        eager = {"ours": Side(error="no graph"), "ours eager": side(2.0), "floor": side(1.0), "floor eager": side(2.0)}
        found = self.judged("attention.2x512x96x96s1-bf16", [Comparison("0111", eager), Comparison("1000", eager)])
        assert found == {
            "2x512x96x96s1-bf16 0111: ours / floor (eager)": "met",
            "2x512x96x96s1-bf16 0111: ours / floor (eager), aim": "met",
        }
        assert not self.judged("attention.2x512x96x96s1", [Comparison("1111", sides)]), "they are of bfloat16"

    def test_convolutions(self):
        deformable = Comparison("deformable 3x3", {"ours": side(1.0), "torchvision": side(2.0)})
        dynamic = Comparison("dynamic 31x31", {"ours": side(9.0), "1111": side(2.0)})
        shape = "2x256x50x84s1-bf16"
        assert self.judged("attention.convolutions-bf16", [deformable, dynamic]) == {
            f"{shape} deformable: torchvision / ours (graph)": "met",
            f"{shape} deformable: torchvision / ours (graph), aim": "not met",
            f"{shape} dynamic 31x31 / 1111 (graph)": "not met",
            f"{shape} dynamic 31x31 / 1111 (graph), aim": "not met",
        }

    def test_networks(self):
        sides = {"none": side(200.0), "torchvision": side(190.0), "1111": side(220.0), "0010": side(400.0)}
        figures = {name: {"count": 16, "first step, s": 1.0} for name in sides}
        found = self.judged("tasks.detection", [Comparison("batch 16", sides, figures=figures), Comparison("batch 8")])
        assert found == {
            "Faster R-CNN, batch 16, images/s": "met",
            "Faster R-CNN, batch 16, images/s, aim": "not met",
            "Faster R-CNN, batch 16: torchvision / ours": "not met",
            "Faster R-CNN, batch 16: share of the speed with 1111": "met",
            "Faster R-CNN, batch 16: share of the speed with 1111 stride 2": "not measured",
            "Faster R-CNN, batch 16: share of the speed with 0010": "not met",
            "Faster R-CNN, batch 16: share of the speed with 0010 deformable": "not measured",
        }
        sides = {"1111": side(20.0), "torch.nn.Transformer": side(25.0)}
        figures = {name: {"count": 6000, "first step, s": 1.0} for name in sides}
        found = self.judged("tasks.translation", [Comparison("batch 256", sides, figures=figures)])
        assert list(found.values()) == ["met", "not met", "met"]


@pytest.mark.parametrize("terms", TERM_SETS)
def test_the_unfolded_window_computes_the_same(terms):
    shape = Shape.parse("2x64x5x7s1")
    x = shape.tensor()
    ours, theirs = (build_module(side, shape, terms, window=3) for side in ("ours", "unfold"))
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "mask"), [("1x64x5x7s1", {"window": 3}), ("sentences:2x9x64", {"causal": True})])
def test_the_floor_hides_what_ours_hides(size, mask):
    shape = Shape.parse(size)
    modules = [build_module(side, shape, "1000", **mask).double() for side in ("floor", "ours")]
    floor, ours = (getattr(module, "attention", module) for module in modules)
    with torch.no_grad():
        for theirs, name in (
            ("query", "query_proj"),
            ("key", "key_proj"),
            ("value", "value_proj"),
            ("out", "out_proj"),
        ):
            weight = getattr(floor, theirs).weight
            weight.copy_(getattr(ours, name).weight.view_as(weight))
        floor.out.bias.copy_(ours.out_proj.bias)
    x = shape.tensor().double()
    torch.testing.assert_close(modules[0](x), modules[1](x), atol=1e-9, rtol=0)
