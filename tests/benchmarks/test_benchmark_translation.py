"""The translation benchmark runs, compares like with like, and reports what it measured."""

import json

import pytest
import torch
from torch import nn

from benchmarks import translation
from benchmarks.measure import Memory, Side, Timing
from benchmarks.translation import EOS, PAD, Part, Problem, TorchTransformer, decoding, table, training_step
from lightning_attn.networks.translation.dropout import Dropout

SMALL = Problem(16, 2, 32, 1, 0.1, 40, sentences=3, shortest=3, longest=5, decoded_sentences=2, tokens=4, beam=2)


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
    step = training_step(side, SMALL)
    before = [parameter.detach().clone() for parameter in networks[0]]
    step()
    changed = [not torch.equal(a, b) for a, b in zip(before, networks[0], strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_torchs_side_hides_padding_and_later_tokens():
    network = TorchTransformer(SMALL).eval()
    source, target = SMALL.batch()
    loss, _, number = network.loss(source, target, 0.0)
    assert int(number) == int((target[:, 1:] != PAD).sum())
    alone = [network.loss(s[s != PAD][None], t[t != PAD][None], 0.0)[0] for s, t in zip(source, target, strict=True)]
    torch.testing.assert_close(loss, torch.stack(alone).sum(), rtol=1e-4, atol=1e-4)


def test_the_sides_drop_alike():
    ours, theirs = translation.our_network(SMALL, "1000"), TorchTransformer(SMALL)
    assert {module.p for module in ours.modules() if isinstance(module, Dropout)} == {0.1}
    assert {module.p for module in theirs.modules() if isinstance(module, nn.Dropout)} == {0.1}
    attentions = [module for module in theirs.modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attentions) == 3
    assert {module.dropout for module in attentions} == {0.0}


@pytest.mark.parametrize("side", ["marian", "1111"])
def test_all_translations_have_the_length_asked_for(side):
    if side == "marian":
        pytest.importorskip("transformers")
    found = decoding(side, SMALL)()
    assert found.shape == (2, 4)
    assert (found[:, -1] == EOS).all()
    assert (found[:, :-1] != EOS).all()


def test_targets():
    def side(seconds):
        return Side(timing=Timing((seconds,)))

    part = Part("training", {"torch": side(2.0), "1111": side(2.4), "1000": side(2.1), "0010": side(9.0)})
    part.judge()
    assert [(target.value, target.verdict) for target in part.targets] == [(1.2, "met"), (1.05, "not met")]
    part = Part("decoding", {"marian": side(3.0), "1111": side(2.0)})
    part.judge()
    assert [(target.value, target.verdict) for target in part.targets] == [(1.5, "met")]
    part = Part("decoding", {"marian": Side(error="ImportError"), "1111": side(2.0)})
    part.judge()
    assert [target.verdict for target in part.targets] == ["not measured"]


def test_table():
    sides = {
        "marian": Side(timing=Timing((2.0, 4.0, 3.0)), memory=Memory(0, 5_000_000)),
        "1111": Side(timing=Timing((1.5, 1.5, 1.5)), error="ended by signal 9"),
        "0010": Side(error="RuntimeError: no"),
    }
    header, cells = table(Part("decoding", sides), SMALL)
    assert header == ["side", "ms", "quartiles", "ms a token", "sentences/s", "time / marian", "MB at the peak"]
    assert cells == [
        ["marian", "3000", "2500-3500", "750.0", "0.7", "1.00", "5"],
        ["1111", "1500", "1500-1500", "375.0", "1.3", "0.50", "ended by signal 9"],
        ["0010", "RuntimeError: no", "", "", "", "", ""],
    ]


def test_a_run_leaves_its_files(tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--parts", "training", "--sets", "1000", "--repetitions", "2", "--no-memory", "--threads", "1"]
    try:
        translation.main([*arguments, "--output", str(tmp_path)], SMALL)
    finally:
        torch.set_num_threads(threads)
    assert {path.name for path in tmp_path.iterdir()} == {f"translation.{kind}" for kind in ("json", "md", "png")}
    figures = json.loads((tmp_path / "translation.json").read_text(encoding="utf-8"))
    assert figures["problem"]["vocabulary"] == 40
    [part] = figures["parts"]
    assert set(part["sides"]) == {"torch", "torch+dropout", "1000"}
    assert len(part["sides"]["1000"]["timing"]["seconds"]) == 2
    assert [target["name"] for target in part["targets"]] == ["1000 / torch"]
    assert "| torch+dropout |" in (tmp_path / "translation.md").read_text(encoding="utf-8")
    assert "1000 / torch" in capsys.readouterr().out


def test_memory_is_measured_in_a_fresh_process():
    memory = translation.memory_of("training", "1000", SMALL, threads=1)
    assert isinstance(memory, Memory)
    assert memory.peak >= memory.before > 50_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "decode"], "--parts decode: there are training,decoding"),
        (["--sets", "11"], "--sets: terms must be four bits"),
        (["--repetitions", "0"], "0 is less than 1"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        translation.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
