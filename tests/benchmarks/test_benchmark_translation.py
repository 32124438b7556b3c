"""The translation benchmark runs, compares like with like, and reports what it measured."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from benchmarks.case import Run, cost_in_process
from benchmarks.report import tabulate
from benchmarks.results import Comparison, Memory, Result, Side, Timing
from benchmarks.runner import main
from benchmarks.translation import (
    BENCHMARK,
    EOS,
    PAD,
    Problem,
    decoding_steps,
    our_network,
    torch_network,
    training_steps,
)
from lightning_attn.networks.translation.dropout import Dropout

SMALL = Problem(16, 2, 32, 1, 0.1, 40, sentences=3, shortest=3, longest=5, decoded_sentences=2, tokens=4, beam=2)
TRAINING, DECODING = (dataclasses.replace(case, problem=SMALL) for case in BENCHMARK.cases)


def test_batch_has_padding_and_the_sizes_asked_for():
    source, target = SMALL.batch()
    assert source.shape == (3, 5)
    assert target.shape == (3, 6)
    assert ((source != PAD).sum(dim=1) >= 3).all()
    assert (source != PAD)[0].all()
    assert (source == PAD).any()
    assert SMALL.sources().shape == (2, 4)
    assert (SMALL.sources() > EOS).all()


@pytest.mark.parametrize("side", ["torch", "torch+dropout", "1111", "0010"])
def test_a_step_trains(side, monkeypatch):
    networks = []
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr: networks.append(list(p)) or adam(networks[-1], lr=lr))
    step = training_steps(SMALL, [side])[side]
    before = [parameter.detach().clone() for parameter in networks[0]]
    step()
    changed = [not torch.equal(a, b) for a, b in zip(before, networks[0], strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_torchs_side_hides_padding_and_later_tokens():
    network = torch_network(SMALL).eval()
    source, target = SMALL.batch()
    loss, _, number = network.loss(source, target, 0.0)
    assert int(number) == int((target[:, 1:] != PAD).sum())
    alone = [network.loss(s[s != PAD][None], t[t != PAD][None], 0.0)[0] for s, t in zip(source, target, strict=True)]
    torch.testing.assert_close(loss, torch.stack(alone).sum(), rtol=1e-4, atol=1e-4)


def test_the_sides_drop_alike():
    ours, theirs = our_network(SMALL, "1000"), torch_network(SMALL)
    assert {module.p for module in ours.modules() if isinstance(module, Dropout)} == {0.1}
    assert {module.p for module in theirs.modules() if isinstance(module, nn.Dropout)} == {0.1}
    attentions = [module for module in theirs.modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attentions) == 3
    assert {module.dropout for module in attentions} == {0.0}


@pytest.mark.parametrize("side", ["marian", "1111"])
def test_all_translations_have_the_length_asked_for(side):
    if side == "marian":
        pytest.importorskip("transformers")
    found = decoding_steps(SMALL, [side])[side]()
    assert found.shape == (2, 4)
    assert (found[:, -1] == EOS).all()
    assert (found[:, :-1] != EOS).all()


def judged(case, sides):
    result = Result(case.name, case.title, problem=dataclasses.asdict(SMALL), comparisons=[Comparison(sides=sides)])
    case.set_targets(result)
    return result, [(target.value, target.verdict) for target in result.comparisons[0].targets]


def test_targets():
    def side(seconds):
        return Side(timing=Timing((seconds,)))

    sides = {"torch": side(2.0), "1111": side(2.4), "1000": side(2.1), "0010": side(9.0)}
    assert judged(TRAINING, sides)[1] == [(1.2, "met"), (1.05, "not met")]
    assert judged(DECODING, {"marian": side(3.0), "1111": side(2.0)})[1] == [(1.5, "met")]
    assert judged(DECODING, {"marian": Side(error="ImportError"), "1111": side(2.0)})[1] == [(None, "not measured")]


def test_table():
    sides = {
        "marian": Side(timing=Timing((2.0, 4.0, 3.0)), memory=Memory(0, 5_000_000)),
        "1111": Side(timing=Timing((0.5, 0.5, 0.5)), error="ended by signal 9"),
        "0010": Side(error="RuntimeError: no"),
    }
    table = tabulate(DECODING, judged(DECODING, sides)[0])
    assert table.header == [
        *("side", "ms", "quartiles", "ms a token", "sentences/s", "time / marian", "GB in all", "MB added")
    ]
    assert table.cells == [
        ["marian", "3000", "2500-3500", "750.0", "0.7", "1.000", "0.01", "5"],
        ["1111", "500", "500-500", "125.0", "4.0", "0.167", "ended by signal 9", ""],
        ["0010", "RuntimeError: no", "", "", "", "", "", ""],
    ]


def test_a_run_leaves_its_files(tmp_path, capsys):
    arguments = ["--cases", "training", "--sides", "torch+dropout,1000", "--repetitions", "2", "--no-memory"]
    benchmark = dataclasses.replace(BENCHMARK, cases=(TRAINING, DECODING))
    main(benchmark, [*arguments, "--threads", "1", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"translation.{kind}" for kind in ("json", "md", "png")}
    [result] = json.loads((tmp_path / "translation.json").read_text(encoding="utf-8"))["results"]
    assert result["problem"]["vocabulary"] == 40
    [part] = result["comparisons"]
    assert set(part["sides"]) == {"torch", "torch+dropout", "1000"}
    assert len(part["sides"]["1000"]["timing"]["seconds"]) == 2
    assert [target["name"] for target in part["targets"]] == ["1000 / torch"]
    assert "| torch+dropout |" in (tmp_path / "translation.md").read_text(encoding="utf-8")
    assert "1000 / torch" in capsys.readouterr().out


@pytest.mark.parametrize("case", [TRAINING, DECODING], ids=["training", "decoding"])
def test_memory_is_measured_of_each_side(case, here):
    cost = cost_in_process(case, "1000", Run(threads=1, isolate=here))
    assert cost.memory.peak >= cost.memory.before > 50_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "decode"], "translation has no case decode: there are training,decoding"),
        (["--sides", "11"], "--sides 11: there are torch+dropout,1111"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(BENCHMARK, arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
