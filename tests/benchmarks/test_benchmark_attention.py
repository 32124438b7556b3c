"""Every side of the attention benchmark computes the same, and its figures become the right rows and targets."""

import dataclasses
import json

import pytest
from torch import nn

from benchmarks.attention import (
    BENCHMARK,
    QUICK_SETS,
    Plan,
    Problem,
    build_steps,
    compare,
    judge,
    make_case,
    measure_time,
    table,
    training_step,
)
from benchmarks.attention_shape import Shape
from benchmarks.case import Run, costs_in_process
from benchmarks.fresh_process import FreshProcessError
from benchmarks.peers.attention import build_module
from benchmarks.report import Report, machine, markdown, read_report
from benchmarks.results import Comparison, Memory, Result, Side, Timing
from benchmarks.runner import main
from lightning_attn.attention.spec import TERM_SETS


def side(*seconds: float, increase: int | None = None) -> Side:
    memory = None if increase is None else Memory(before=500_000_000, peak=500_000_000 + increase)
    return Side(timing=Timing(seconds), memory=memory)


def judged(name: str, case: str = "256x50x84s2", **sides: Side) -> Comparison:
    comparison = Comparison(name, sides)
    judge(Result(f"attention.{case}", "", comparisons=[comparison]))
    return comparison


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
    assert make_case("256x50x84s2").title == "256 channels, 50x84, kv stride 2"
    assert make_case("8x384x14x14-bf16").title == "384 channels, 14x14, batch 8, kv stride 1, bfloat16"
    assert make_case("sentences:64x25x512").title == "64 sentences of 25, 512 channels"


@pytest.mark.parametrize("case", ["3x16x5x4s2", "sentences:3x7x16", "sentences:3x7x16s2"])
@pytest.mark.parametrize("terms", TERM_SETS)
def test_the_naive_side_computes_the_same(case, terms):
    assert compare(build_steps, Problem(Shape.parse(case), terms), "naive") < 1e-5


def test_the_sides_have_the_same_weights():
    shape = Shape.parse("16x4x6s2")
    ours, naive = build_module("ours", shape, "1111"), build_module("naive", shape, "1111")
    assert [tensor.tolist() for tensor in ours.parameters()] == [tensor.tolist() for tensor in naive.parameters()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "256x50"], "case '256x50' is neither"),
        (["--cases", "256x0x4s1"], "case '256x0x4s1' is neither"),
        (["--cases", "sentences:8x16"], "case 'sentences:8x16' is neither"),
        (["--cases", "1x2x3x4x5"], "case '1x2x3x4x5' is neither"),
        (["--sets", "11"], "terms must be four bits"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(BENCHMARK, arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_default_cases_are_every_set_at_every_size():
    every = ["1111", "1110", "1101", "1100", "1011", "1010", "1001", "1000"]
    every += ["0111", "0110", "0101", "0100", "0011", "0010", "0001"]
    plans = {case.name.removeprefix("attention."): case.problem for case in BENCHMARK.cases}
    for case in ("256x50x84s2", "512x25x42s2", "256x50x84s1", "512x96x96s1", "8x384x14x14s1-bf16"):
        assert [problem.terms for problem in plans[case].problems().values()] == every
    growth = plans["growth"].problems()
    assert list(growth)[:2] == ["1111 at 256x25x42s2", "1111 at 256x50x84s2"]
    assert {str(problem.shape) for problem in growth.values()} == {"256x25x42s2", "256x50x84s2", "256x100x168s2"}
    assert {problem.terms for problem in growth.values()} == {"1111", "0011", "0010"}
    quick = dataclasses.replace(plans["growth"], sets=QUICK_SETS)
    assert {problem.terms for problem in quick.problems().values()} == {"1111", "0011", "0010"}
    assert list(dataclasses.replace(plans["deformable"], sets=QUICK_SETS).problems()) == ["deformable"]
    assert [case.name for case in BENCHMARK.cases_named("small")] == [case.name for case in BENCHMARK.cases[6:]]


def test_targets_of_the_speed_table():
    def targets(kind, ours, peer, case="256x50x84s2", naive=2.0):
        found = judged(kind, case, ours=side(ours), mmcv=side(peer), naive=side(naive), floor=side(1.0))
        return [(target.name, target.value, target.bound, target.verdict) for target in found.targets]

    assert targets("1111", 2.0, 6.0) == [
        ("mmcv / ours", 3.0, 3.0, "met"),
        ("naive / ours", 1.0, 0.95, "met"),
        ("ours / floor", 2.0, 1.4, "not met"),
    ]
    naive = ("naive / ours", 2.0, 0.95, "met")
    assert targets("0011", 1.0, 8.0) == [("mmcv / ours", 8.0, 9.0, "not met"), naive]
    assert targets("0010", 1.0, 0.94) == [("mmcv / ours", 0.94, 0.95, "not met"), naive]
    assert targets("1010", 1.0, 2.5) == [("mmcv / ours", 2.5, 2.5, "met"), naive]
    assert targets("1010", 1.0, 0.95, case="512x7x7s1") == [("mmcv / ours", 0.95, 0.95, "met"), naive]
    assert targets("1000", 2.5, 2.5, case="8x384x14x14s1-bf16")[1] == ("naive / ours", 0.8, 0.95, "not met")
    assert targets("1010", 1.0, 1.0, case="16x4x6s2") == [], "no target is known for other sizes"


def test_sentences_have_the_naive_way_as_their_peer():
    found = judged("1010", "sentences:64x25x512", ours=side(1.0), naive=side(0.9), floor=side(1.0))
    assert [(target.name, target.verdict) for target in found.targets] == [("naive / ours", "not met")]
    assert table(Result("", "", comparisons=[found])).header == [
        *("set", "ours ms", "naive ms", "floor ms", "naive / ours", "ours / floor", "targets")
    ]


@pytest.mark.parametrize(("kind", "other"), [("0100", "0101"), ("0110", "0111"), ("1100", "1101"), ("1110", "1111")])
def test_where_the_peer_fails_the_set_with_e4_is_the_measure(kind, other):
    found = judged(kind, ours=side(2.0), mmcv=Side(error="fails: RuntimeError"), twin=side(4.0), floor=side(1.0))
    assert [(target.name, target.value) for target in found.targets] == [(f"ours {other} / ours", 2.0)]
    assert Problem(Shape.parse("8x3x4"), other).twin is None


def test_memory_targets():
    found = judged("1111", "256x50x84s1", ours=side(1.0, increase=100), mmcv=side(3.0, increase=700))
    assert str(found.targets[-1]) == "memory mmcv / ours 7.00 (>= 8): not met"
    found = judged("0100", "512x96x96s1", ours=side(1.0, increase=3_000_000_000))
    assert str(found.targets[0]) == "GB in all 3.50 (<= 4): met"


def test_growth_is_from_each_size_to_the_next():
    rows = [
        Comparison(f"{terms} at {size}", {"ours": side(seconds, increase=increase)})
        for terms in ("0011", "0010")
        for size, seconds, increase in (("8x2x2s1", 1.0, 10), ("8x4x4s1", 4.0, 40), ("8x8x8s1", 40.0, 400))
    ]
    judge(Result("attention.growth", "", comparisons=rows))
    assert rows[0].targets == rows[3].targets == []
    assert [(target.value, target.verdict) for target in rows[1].targets] == [(4.0, "met"), (4.0, "met")]
    assert [(target.value, target.verdict) for target in rows[2].targets] == [(10.0, "not met"), (10.0, "not met")]


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("the sizes 4 and 6 do not match")


def with_peer(name, module):
    """The benchmark with one case, and this module in the place of mmcv's, which need not be installed."""

    def build(problem, sides):
        steps = dict(build_steps(problem, [side for side in sides if side != "mmcv"]))
        if "mmcv" in sides:
            x = gradient = problem.shape.tensor()
            if isinstance(module, str):
                steps["mmcv"] = build_steps(problem, [module])[module]
            else:
                steps["mmcv"] = training_step(module, x, gradient, bfloat16=False)
        return steps

    case = dataclasses.replace(make_case(name), build=build, needs=())
    return dataclasses.replace(BENCHMARK, cases=(case,))


def run(benchmark, folder, *arguments, **settings):
    main(benchmark, [*arguments, "--repetitions", "2", "--threads", "1", "--output", str(folder)], **settings)
    [result] = read_report(folder / "attention.json").results
    return result.comparisons


def test_a_peer_that_fails_is_reported_with_its_error(tmp_path, capsys):
    rows = run(with_peer("16x4x6s2", Fails()), tmp_path, "--sets", "0100,0011", "--no-memory")
    assert [found.name for found in rows] == ["0100", "0011"]
    for found in rows:
        assert found.sides["mmcv"] == Side(error="fails: RuntimeError: the sizes 4 and 6 do not match")
        assert found.difference < 1e-4, "the naive side's"
        assert len(found.sides["ours"].timing.seconds) == len(found.sides["floor"].timing.seconds) == 2
    assert "twin" in rows[0].sides
    text = (tmp_path / "attention.md").read_text()
    assert "| fails |" in text
    assert "0100, 0011: mmcv fails: RuntimeError: the sizes 4 and 6 do not match" in text
    assert "0100, 0011: mmcv fails: RuntimeError" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_is_not_timed(tmp_path):
    benchmark = with_peer("16x4x6s2", nn.Conv2d(16, 16, 1))
    [found] = run(benchmark, tmp_path, "--sets", "0011", "--no-memory")
    assert found.sides["mmcv"].timing is None
    assert found.sides["mmcv"].error.startswith("wrong: ")


def test_a_peer_that_computes_the_same_is_timed(tmp_path):
    [found] = run(with_peer("16x4x6s2", "ours"), tmp_path, "--sets", "0011", "--no-memory")
    assert found.difference < 1e-6
    assert len(found.sides["mmcv"].timing.seconds) == 2


def test_a_peer_too_large_runs_alone_or_not_at_all():
    pytest.importorskip("psutil")
    [case] = with_peer("16x4x6s2", "ours").cases
    case = dataclasses.replace(case, repetitions=1)
    asked = []

    def isolate(function, build, problems, side, *, threads, limit, timeout):
        [(problem, steps, _)] = problems
        asked.append((side, problem.terms, steps, limit))
        raise FreshProcessError("RuntimeError: not enough memory")

    def measured(terms, floor=None, **plan):
        changed = dataclasses.replace(case, problem=Plan(("16x4x6s2",), alone_bytes=0, **plan))
        problem = Problem(Shape.parse("16x4x6s2"), terms)
        return measure_time(changed, terms, problem, Run(isolate=isolate), floor).sides

    needed = Problem(Shape.parse("16x4x6s2"), "0011").needed_by_peer
    found = measured("0011", free_bytes=needed - 1)
    assert found["mmcv"].error.startswith("does not fit: needs about 0 GB of ")
    assert not asked
    found = measured("0011", large_peers=False)
    assert found["mmcv"].error == "not run: left out of a quick run"
    assert found["ours"].timing is not None
    again = measured("0001", floor=found["floor"], large_peers=False)
    assert again["floor"] == found["floor"], "measured once"
    assert again["ours"].timing is not None
    found = measured("0011", free_bytes=needed)
    assert asked == [("mmcv", "0011", 1, needed)]
    assert found["mmcv"].error == "fails: RuntimeError: not enough memory"


def test_against_mmcv_itself(tmp_path, here):
    pytest.importorskip("mmcv")
    right, failing = run(BENCHMARK, tmp_path, "--cases", "16x34x32s1", "--sets", "1111,0100", isolate=here)
    assert right.difference < 1e-4
    assert right.sides.keys() == {"ours", "mmcv", "naive", "floor"}
    assert all(side.timing is not None for side in right.sides.values())
    assert all(right.sides[name].memory is not None for name in ("ours", "mmcv", "floor"))
    # mmcv keeps at least two maps of all queries and keys, too large to fit in memory that was free.
    assert right.sides["mmcv"].memory.increase > 1.9 * Shape(1, 16, (34, 32)).energy_bytes
    assert failing.sides["mmcv"].error.startswith("fails: RuntimeError: The size of tensor a")
    assert failing.sides["ours"].memory is not None


def test_memory_in_a_fresh_process():
    case = make_case("64x24x20s1")
    problem = Problem(Shape(1, 64, (24, 20)), "1000")
    [found] = costs_in_process(case, [(problem, 2, problem)], "floor", Run(threads=1))
    assert found.error is None
    # Query, key, value, what they attend to, output and more: at least five maps of this size.
    assert 5 * 4 * 64 * 24 * 20 < found.memory.increase < found.memory.before
    assert len(found.timing.seconds) >= 2


def test_the_deformable_convolution_beside_torchvision(tmp_path):
    [found] = run(BENCHMARK, tmp_path, "--cases", "deformable:8x5x7", "--no-memory")
    assert found.difference < 1e-4
    assert found.sides.keys() == {"ours", "torchvision", "floor"}
    judge(Result("attention.deformable", "", comparisons=[found]))
    assert [target.name for target in found.targets] == ["torchvision / ours"]


# Tables and figure


def example() -> list[Result]:
    rows = [
        Comparison(
            "1111",
            {"ours": side(0.5, increase=20_000_000), "mmcv": side(1.5, increase=400_000_000), "floor": side(0.25)},
            2e-6,
        ),
        Comparison(
            "0100",
            {"ours": side(0.02), "mmcv": Side(error="fails: RuntimeError: x"), "twin": side(0.03), "floor": side(0.25)},
        ),
    ]
    growth = [
        Comparison(
            f"0011 at 256x{size}s2",
            {"ours": side(s, increase=i), "mmcv": side(5 * s), "floor": side(s, increase=i)},
        )
        for size, s, i in (("25x42", 1.0, 10**7), ("50x84", 4.0, 4 * 10**7), ("100x168", 16.0, 16 * 10**7))
    ]
    results = [
        Result(f"attention.{name}", make_case(name).title, str(make_case(name).problem), {}, found)
        for name, found in (("256x50x84s2", rows), ("growth", growth))
    ]
    for result in results:
        judge(result)
    return results


def test_cells():
    found = table(example()[0])
    first, second = (dict(zip(found.header, line, strict=True)) for line in found.cells)
    assert first["ours ms"] == "500 (once)"
    assert (first["mmcv / ours"], first["ours / floor"]) == ("3.00", "2.00")
    assert (first["ours MB"], first["mmcv MB"], first["mmcv / ours MB"]) == ("20", "400", "20.00")
    assert first["targets"] == "mmcv / ours 3.00 (>= 3): met; ours / floor 2.00 (<= 1.4): not met"
    assert (second["mmcv ms"], second["mmcv / ours"], second["mmcv MB"]) == ("fails", "", "")
    assert second["targets"] == "ours 0101 / ours 1.50 (>= 1): met"
    assert found.missed == {0}
    [(_, timed, *_)] = table(Result("", "", comparisons=[judged("1000", ours=side(0.0012, 0.0013, 0.0014))])).cells
    assert timed == "1.30 (1.25-1.35)"


def test_reports_have_tables_and_a_figure(tmp_path, capsys):
    for index, result in enumerate(example()):
        values = {"machine": machine(), "options": {}, "results": [dataclasses.asdict(result)]}
        (tmp_path / f"{index}.json").write_text(json.dumps(values))
    files = [str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    main(BENCHMARK, ["--report", *files, "--output", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"attention-report.md", "attention-report.png"}
    text = (tmp_path / "out" / "attention-report.md").read_text()
    assert "## attention.256x50x84s2: 256 channels, 50x84, kv stride 2" in text
    assert "| 0011 at 256x100x168s2 |" in text
    assert (tmp_path / "out" / "attention-report.png").read_bytes().startswith(b"\x89PNG")
    assert "time for 4x the tokens 4.00" in capsys.readouterr().out


def test_of_a_row_measured_twice_the_later_counts():
    early, late = (Report({}, {}, example()) for _ in range(2))
    late.results[0].comparisons[0].sides["ours"] = side(0.25)
    assert "| 1111 | 250 (once) |" in markdown(BENCHMARK, [early, late])
    assert "| 1111 | 500 (once) |" not in markdown(BENCHMARK, [early, late])
