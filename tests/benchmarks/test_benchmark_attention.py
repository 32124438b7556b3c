"""The benchmarks run, and report what they were given. No time that is measured here is looked at."""

import dataclasses
import importlib.util
import json
import time

import pytest
import torch
from torch import nn

from benchmarks import attention, measure
from benchmarks.attention_report import Row, Run, markdown, read_run, table, title
from benchmarks.attention_sides import Shape, build
from benchmarks.measure import Memory, Side, Target, Timing, overlap, ratio
from lightning_attn.attention.spec import TERM_SETS


def side(*seconds: float, increase: int | None = None) -> Side:
    memory = None if increase is None else Memory(before=500_000_000, peak=500_000_000 + increase)
    return Side(timing=Timing(seconds), memory=memory)


def row(kind: str, group: str = "256x50x84s2", case: str | None = None, **sides: Side) -> Row:
    peer = "torchvision" if kind == "deformable" else "mmcv"
    return Row(group=group, case=case or group, kind=kind, peer=peer, sides=sides)


# measure.py


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert Timing((2.0,)).quartiles == (2.0, 2.0)


def test_ratio_of_medians_and_of_increases():
    slow, fast = side(6.0, 600.0, 5.0, increase=800), side(2.0, 3.0, 1.0, increase=100)
    assert ratio(slow, fast, "time") == 3.0
    assert ratio(slow, fast, "memory") == 8.0
    assert ratio(Side(error="fails"), fast, "time") is None
    assert ratio(slow, Side(error="fails"), "memory") is None
    assert ratio(None, fast, "time") is None


def test_overlap_of_the_middle_halves():
    assert overlap(side(1.0, 2.0, 3.0), side(1.8, 2.8, 4.0))
    assert not overlap(side(1.0, 2.0, 3.0), side(3.0, 4.0, 5.0))
    assert not overlap(Side(error="fails"), side(1.0))


@pytest.mark.parametrize(
    ("value", "at_least", "noise", "verdict"),
    [
        (3.0, True, False, "met"),
        (2.99, True, False, "not met"),
        (2.99, True, True, "met within noise"),
        (3.0, False, False, "met"),
        (3.01, False, False, "not met"),
        (None, True, True, "not measured"),
    ],
)
def test_verdict(value, at_least, noise, verdict):
    assert Target("x", value, 3.0, at_least=at_least, noise=noise).verdict == verdict


def test_rounds_interleave_and_the_order_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = measure.timed_in_turn(steps, repetitions=4)
    assert order[:9] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3, "unmeasured runs come first"
    assert "".join(order[9:]) == "abc" + "bca" + "cab" + "abc"
    assert all(len(timing.seconds) == 4 for timing in timings.values())


def test_a_step_that_fails_is_reported_and_left_out():
    def failing():
        raise RuntimeError("sizes\n  do not match")

    timings = measure.timed_in_turn({"bad": failing, "good": lambda: None}, repetitions=2)
    assert timings["bad"] == "RuntimeError: sizes do not match"
    assert len(timings["good"].seconds) == 2


def test_a_step_may_fail_later_too():
    turns = iter("ab")
    timings = measure.timed_in_turn({"bad": lambda: next(turns)}, repetitions=5, unmeasured=0)
    assert timings == {"bad": "StopIteration"}


def test_the_budget_ends_the_rounds_after_the_least():
    count = []
    timings = measure.timed_in_turn({"a": lambda: count.append(1)}, repetitions=50, budget=0.0, least=4)
    assert len(timings["a"].seconds) == 4


@pytest.mark.parametrize("has_proc", [True, False])
def test_peak_memory_sees_what_a_step_frees_again(monkeypatch, has_proc):
    if not has_proc:
        pytest.importorskip("psutil")
        monkeypatch.setattr(measure.os, "access", lambda *_: False)
    size = 100_000_000  # bytes; large enough to be mapped and unmapped by itself

    def step(size=size):
        tensor = torch.ones(size // 4)
        time.sleep(0.05)  # so that a thread that looks at the memory has a chance to see it
        del tensor

    memory, timing = measure.peak_memory(step)
    assert 0.95 * size <= memory.increase < 1.5 * size
    assert len(timing.seconds) >= 2
    smaller, _ = measure.peak_memory(lambda: step(size // 2))
    assert smaller.increase < 0.75 * size, "the peak of before is forgotten"


def test_pages_that_the_system_takes_away_do_not_hide_memory(monkeypatch):
    before, lost = iter([100, 100, 100]), iter([50, 45, 0])  # MB
    state = {}

    def status(path, field):
        if field == "VmRSS":
            state.update(files=50, rss=next(before))
        if field == "VmHWM":
            return (state["rss"] + 20 - state["lost"]) * 10**6
        value = {"VmRSS": state["rss"], "RssFile": state["files"]}[field]
        return value * 10**6

    def step():
        state["lost"] = next(lost)
        state["files"] -= state["lost"]

    monkeypatch.setattr(measure, "_status_bytes", status)
    memory, timing = measure.peak_memory(step)
    assert memory.increase == 20_000_000
    assert len(timing.seconds) == 3, "two were disturbed"


def test_a_child_that_fails_gives_its_last_line():
    assert measure.run_child("benchmarks.no_such_module", [], threads=1).endswith(
        "No module named benchmarks.no_such_module"
    )
    assert measure.run_child(
        "timeit", ["-n", "1", "-r", "1", "import time; time.sleep(60)"], threads=1, timeout=0.5
    ) == ("ended after 0 s")


def test_machine_names_what_figures_depend_on():
    described = measure.machine("torch", "no-such-package")
    assert described["torch"] == torch.__version__.partition("+")[0] or described["torch"] == torch.__version__
    assert described["no-such-package"] == "not installed"
    assert described["cores"] >= 1
    assert described["memory_bytes"] > 1e8
    assert described["processor"]


def test_require_says_how_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "mmcv" else find(name))
    with pytest.raises(SystemExit, match=r"Not installed: mmcv.*\. .*pip install .* -e '\.\[bench\]'"):
        attention.main(["--cases", "16x4x6s2"])


# attention.py


def test_case_names():
    assert Shape.parse("256x50x84s2") == Shape(1, 256, (50, 84), 2)
    assert Shape.parse("4x8x3x5-bf16") == Shape(4, 8, (3, 5), 1, bfloat16=True)
    assert Shape.parse("sentences:64x25x512") == Shape(64, 512, (25,))
    for name in ("8x3x4s1", "256x50x84s2", "4x8x3x5s2-bf16", "sentences:64x25x512", "sentences:2x9x16s2-bf16"):
        assert str(Shape.parse(name)) == name
    assert str(Shape.parse("8x3x4")) == "8x3x4s1"
    assert Shape(1, 256, (25, 42), 2).scaled(2) == Shape(1, 256, (50, 84), 2)
    # 13 x 21 keys for 25 x 42 queries, 8 heads, 4 bytes, of each of 3 maps
    assert Shape(3, 256, (25, 42), 2).energy_bytes == 3 * 25 * 42 * 13 * 21 * 8 * 4
    assert Shape.parse("4x8x3x5").tensor().shape == (4, 8, 3, 5)
    assert Shape.parse("sentences:2x9x16").tensor().shape == (2, 9, 16)
    assert title("256x50x84s2") == "256 channels, 50x84, kv stride 2"
    assert title("8x384x14x14-bf16") == "384 channels, 14x14, batch 8, kv stride 1, bfloat16"
    assert title("sentences:64x25x512") == "64 sentences of 25, 512 channels"


@pytest.mark.parametrize("case", ["3x16x5x4s2", "sentences:3x7x16", "sentences:3x7x16s2"])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_the_naive_side_computes_the_same(case, terms):
    assert attention.compare(Shape.parse(case), terms, "naive") < 1e-5


def test_the_sides_have_the_same_weights():
    shape = Shape.parse("16x4x6s2")
    ours, naive = build("ours", shape, "1111"), build("naive", shape, "1111")
    assert [tensor.tolist() for tensor in ours.parameters()] == [tensor.tolist() for tensor in naive.parameters()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "256x50"], "case '256x50' is neither"),
        (["--cases", "256x0x4s1"], "case '256x0x4s1' is neither"),
        (["--cases", "sentences:8x16"], "case 'sentences:8x16' is neither"),
        (["--cases", "1x2x3x4x5"], "case '1x2x3x4x5' is neither"),
        (["--sets", "11"], "terms must be four bits"),
        (["--repetitions", "0"], "0 is less than 1"),
        (["--report", "no/such/file.json"], "no/such/file.json"),
    ],
)
def test_bad_arguments_are_named(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(attention, "require", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        attention.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_default_cases_are_every_set_at_every_size():
    every = ["1111", "1110", "1101", "1100", "1011", "1010", "1001", "1000"]
    every += ["0111", "0110", "0101", "0100", "0011", "0010", "0001"]
    for case in ("256x50x84s2", "512x25x42s2", "256x50x84s1", "512x96x96s1"):
        assert [terms for _, _, terms in attention.plan(case, None)] == every
    assert {str(shape) for _, shape, _ in attention.plan("growth", None)} == {
        "256x25x42s2",
        "256x50x84s2",
        "256x100x168s2",
    }


def test_targets_of_the_speed_table():
    def targets(kind, ours, peer, group="256x50x84s2", naive=2.0):
        judged = row(kind, group, ours=side(ours), mmcv=side(peer), naive=side(naive), floor=side(1.0))
        attention.judge([judged])
        return [(target.name, target.value, target.bound, target.verdict) for target in judged.targets]

    assert targets("1111", 2.0, 6.0) == [
        ("mmcv / ours", 3.0, 3.0, "met"),
        ("naive / ours", 1.0, 0.95, "met"),
        ("ours / floor", 2.0, 1.4, "not met"),
    ]
    naive = ("naive / ours", 2.0, 0.95, "met")
    assert targets("0011", 1.0, 8.0) == [("mmcv / ours", 8.0, 9.0, "not met"), naive]
    assert targets("0010", 1.0, 0.94) == [("mmcv / ours", 0.94, 0.95, "not met"), naive]
    assert targets("1010", 1.0, 2.5) == [("mmcv / ours", 2.5, 2.5, "met"), naive]
    assert targets("1010", 1.0, 0.95, group="512x7x7s1") == [("mmcv / ours", 0.95, 0.95, "met"), naive]
    assert targets("1000", 2.5, 2.5, group="8x384x14x14s1-bf16")[1] == ("naive / ours", 0.8, 0.95, "not met")
    assert targets("1010", 1.0, 1.0, group="16x4x6s2") == [], "no target is known for other sizes"


def test_sentences_have_the_naive_way_as_their_peer():
    judged = row("1010", "sentences:64x25x512", ours=side(1.0), naive=side(0.9), floor=side(1.0))
    judged.peer = "naive"
    attention.judge([judged])
    assert [(target.name, target.verdict) for target in judged.targets] == [("naive / ours", "not met")]
    header, _ = table([judged])
    assert header == ["set", "ours ms", "naive ms", "floor ms", "naive / ours", "ours / floor", "targets"]


@pytest.mark.parametrize(("kind", "other"), [("0100", "0101"), ("0110", "0111"), ("1100", "1101"), ("1110", "1111")])
def test_where_the_peer_fails_the_set_with_e4_is_the_measure(kind, other):
    judged = row(kind, ours=side(2.0), mmcv=Side(error="fails: RuntimeError"), twin=side(4.0), floor=side(1.0))
    attention.judge([judged])
    assert [(target.name, target.value) for target in judged.targets] == [(f"ours {other} / ours", 2.0)]
    assert attention.twin(other) is None


def test_memory_targets():
    judged = row("1111", "256x50x84s1", ours=side(1.0, increase=100), mmcv=side(3.0, increase=700))
    attention.judge([judged])
    assert str(judged.targets[-1]) == "memory mmcv / ours 7.00 (>= 8): not met"
    judged = row("0100", "512x96x96s1", ours=side(1.0, increase=3_000_000_000))
    attention.judge([judged])
    assert str(judged.targets[0]) == "GB in all 3.50 (<= 4): met"


def test_growth_is_from_each_size_to_the_next():
    rows = [
        row("0011", "growth", case, ours=side(seconds, increase=increase))
        for case, seconds, increase in (("8x2x2s1", 1.0, 10), ("8x4x4s1", 4.0, 40), ("8x8x8s1", 40.0, 400))
    ]
    attention.judge(rows)
    assert rows[0].targets == []
    assert [(target.value, target.verdict) for target in rows[1].targets] == [(4.0, "met"), (4.0, "met")]
    assert [(target.value, target.verdict) for target in rows[2].targets] == [(10.0, "not met"), (10.0, "not met")]


@pytest.fixture
def peer(monkeypatch):
    """Puts another module in the place of mmcv's, which need not be installed then."""
    original = attention.build

    def replace(make):
        monkeypatch.setattr(attention, "require", lambda *_: None)
        monkeypatch.setattr(attention, "build", lambda side, *rest: make() if side == "mmcv" else original(side, *rest))

    return replace


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("the sizes 4 and 6 do not match")


def run(folder, *arguments):
    attention.main([*arguments, "--repetitions", "2", "--threads", "1", "--output", str(folder)])
    return read_run(folder / "attention.json")


def test_a_peer_that_fails_is_reported_with_its_error(peer, tmp_path, capsys):
    peer(Fails)
    result = run(tmp_path, "--cases", "16x4x6s2", "--sets", "0100,0011", "--no-memory")
    assert [found.kind for found in result.rows] == ["0100", "0011"]
    for found in result.rows:
        assert found.sides["mmcv"] == Side(error="fails: RuntimeError: the sizes 4 and 6 do not match")
        assert found.difference < 1e-4, "the naive side's"
        assert len(found.sides["ours"].timing.seconds) == len(found.sides["floor"].timing.seconds) == 2
    assert "twin" in result.rows[0].sides
    text = (tmp_path / "attention.md").read_text()
    assert "| fails |" in text
    assert "0100, 0011: mmcv fails: RuntimeError: the sizes 4 and 6 do not match" in text
    assert "0100, 0011: mmcv fails: RuntimeError" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_is_not_timed(peer, tmp_path):
    peer(lambda: nn.Conv2d(16, 16, 1))
    result = run(tmp_path, "--cases", "16x4x6s2", "--sets", "0011", "--no-memory")
    found = result.rows[0].sides["mmcv"]
    assert found.timing is None
    assert found.error.startswith("wrong: ")


def test_a_peer_that_computes_the_same_is_timed(peer, tmp_path):
    shape = Shape(1, 16, (4, 6), 2)
    same = build("ours", shape, "0011")
    peer(lambda: same)
    (found,) = run(tmp_path, "--cases", "16x4x6s2", "--sets", "0011", "--no-memory").rows
    assert found.difference < 1e-6
    assert len(found.sides["mmcv"].timing.seconds) == 2


def test_a_peer_too_large_runs_alone_or_not_at_all(peer, monkeypatch):
    pytest.importorskip("psutil")
    shape = Shape(1, 16, (4, 6), 2)
    same = build("ours", shape, "0011")
    peer(lambda: same)
    monkeypatch.setattr(attention, "needed_by_peer", lambda *_: 10**18)
    options = attention.Options(repetitions=1, threads=1)
    found = attention.measure("16x4x6s2", shape, "0011", options)
    assert found.sides["mmcv"].error.startswith("does not fit: needs about 1000000000 GB of ")
    found = attention.measure("16x4x6s2", shape, "0011", dataclasses.replace(options, large_peers=False))
    assert found.sides["mmcv"].error == "not run: left out of a quick run"
    assert found.sides["ours"].timing is not None
    again = attention.measure("16x4x6s2", shape, "0001", options, floor=found.sides["floor"])
    assert again.sides["floor"] == found.sides["floor"], "measured once"
    assert again.sides["ours"].timing is not None

    monkeypatch.setattr(attention, "needed_by_peer", lambda *_: 3_000_000_000)
    asked = []

    def memory_of(side, shape, kinds, threads, limit):
        asked.append((side, kinds, limit > 3_000_000_000))
        return {"0011": Side(error="RuntimeError: not enough memory")}

    monkeypatch.setattr(attention, "memory_of", memory_of)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 8_000_000_000}))
    found = attention.measure("16x4x6s2", shape, "0011", options)
    assert asked == [("mmcv", ["0011"], True)]
    assert found.sides["mmcv"].error == "fails: RuntimeError: not enough memory"


def test_against_mmcv_itself(monkeypatch, tmp_path):
    pytest.importorskip("mmcv")

    def here(module, arguments, *, threads, limit):
        """What the fresh process would answer."""
        assert (module, arguments[0], threads, limit) == ("benchmarks.attention", "--child", 1, None)
        return attention.answer(json.loads(arguments[1]))

    monkeypatch.setattr(attention, "run_child", here)
    right, failing = run(tmp_path, "--cases", "16x34x32s1", "--sets", "1111,0100").rows
    assert right.difference < 1e-4
    assert right.sides.keys() == {"ours", "mmcv", "naive", "floor"}
    assert all(side.timing is not None for side in right.sides.values())
    assert all(right.sides[name].memory is not None for name in ("ours", "mmcv", "floor"))
    # mmcv keeps at least two maps of all queries and keys, too large to fit in memory that was free.
    assert right.sides["mmcv"].memory.increase > 1.9 * Shape(1, 16, (34, 32)).energy_bytes
    assert failing.sides["mmcv"].error.startswith("fails: RuntimeError: The size of tensor a")
    assert failing.sides["ours"].memory is not None


def test_memory_in_a_fresh_process():
    shape = Shape(1, 64, (24, 20))
    found = attention.memory_of("floor", shape, ["1000"], threads=1)["1000"]
    assert found.error is None
    # Query, key, value, what they attend to, output and more: at least five maps of this size.
    assert 5 * 4 * 64 * 24 * 20 < found.memory.increase < found.memory.before
    assert len(found.timing.seconds) >= 2


def test_the_deformable_convolution_beside_torchvision(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "require", lambda *_: None)
    (found,) = run(tmp_path, "--cases", "deformable:8x5x7", "--no-memory").rows
    assert found.difference < 1e-4
    assert found.sides.keys() == {"ours", "torchvision", "floor"}
    default = dataclasses.replace(found, group="deformable")
    attention.judge([default])
    assert [target.name for target in default.targets] == ["torchvision / ours"]


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path):
    def rows(*_):
        yield row("0011", "16x4x6s2", ours=side(1.0), mmcv=side(2.0), floor=side(3.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "require", lambda *_: None)
    monkeypatch.setattr(attention, "run_case", rows)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--cases", "16x4x6s2")
    assert [found.kind for found in read_run(tmp_path / "attention.json").rows] == ["0011"]


# attention_report.py


def example() -> Run:
    rows = [
        row("1111", ours=side(0.5, increase=20_000_000), mmcv=side(1.5, increase=400_000_000), floor=side(0.25)),
        row("0100", ours=side(0.02), mmcv=Side(error="fails: RuntimeError: x"), twin=side(0.03), floor=side(0.25)),
    ]
    rows[0].difference = 2e-6
    growth = [
        row("0011", "growth", f"256x{size}s2", ours=side(s, increase=i), mmcv=side(5 * s), floor=side(s, increase=i))
        for size, s, i in (("25x42", 1.0, 10**7), ("50x84", 4.0, 4 * 10**7), ("100x168", 16.0, 16 * 10**7))
    ]
    attention.judge(rows + growth)
    return Run(measure.machine(), {"threads": 1}, rows + growth)


def test_cells():
    header, cells = table(example().rows[:2])
    first, second = (dict(zip(header, line, strict=True)) for line in cells)
    assert first["ours ms"] == "500 (once)"
    assert (first["mmcv / ours"], first["ours / floor"]) == ("3.00", "2.00")
    assert (first["ours MB"], first["mmcv MB"], first["mmcv / ours MB"]) == ("20", "400", "20.00")
    assert first["targets"] == "mmcv / ours 3.00 (>= 3): met; ours / floor 2.00 (<= 1.4): not met"
    assert (second["mmcv ms"], second["mmcv / ours"], second["mmcv MB"]) == ("fails", "", "")
    assert second["targets"] == "ours 0101 / ours 1.50 (>= 1): met"
    _, ((_, timed, *_),) = table([row("1000", ours=side(0.0012, 0.0013, 0.0014))])
    assert timed == "1.30 (1.25-1.35)"


def test_a_run_reads_back_as_it_was_written(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(example().as_dict()))
    read = read_run(file)
    assert read.rows == example().rows
    verdicts = [target["verdict"] for target in json.loads(file.read_text())["rows"][0]["targets"]]
    assert verdicts == ["met", "not met"]


def test_several_files_become_one_report(tmp_path, capsys):
    whole = example()
    for index, rows in enumerate((whole.rows[:2], whole.rows[2:])):
        part = dataclasses.replace(whole, rows=rows)
        (tmp_path / f"{index}.json").write_text(json.dumps(part.as_dict()))
    files = [str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    attention.main(["--report", *files, "--output", str(tmp_path / "out")])
    attention.main(["--report", *files, "--output", str(tmp_path / "out")])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    stems = ("attention-report", "attention-report-2")
    assert written == sorted(f"{stem}.{ending}" for stem in stems for ending in ("md", "png"))
    text = (tmp_path / "out" / "attention-report.md").read_text()
    assert "## 256 channels, 50x84, kv stride 2" in text
    assert "| 0011 at 256x100x168s2 |" in text
    assert (tmp_path / "out" / "attention-report.png").read_bytes().startswith(b"\x89PNG")
    assert "time for 4x the tokens 4.00" in capsys.readouterr().out


def test_of_a_row_measured_twice_the_later_counts():
    early, late = example(), example()
    late.rows[0].sides["ours"] = side(0.25)
    assert "| 1111 | 250 (once) |" in markdown([early, late])
    assert "| 1111 | 500 (once) |" not in markdown([early, late])


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"rows": []}')
    with pytest.raises(SystemExit):
        attention.main(["--report", str(file)])
    assert "other.json is not a result of benchmarks.attention (KeyError: 'machine')" in capsys.readouterr().err
