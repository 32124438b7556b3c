"""How commands are found and taken apart, and that wrong ones are found out, with their page and line."""

import re

import pytest
from doc_pages import Block, Command
from playground import CommandError
from shell_commands import UnknownVariableError, calls, is_simple

PAGE = "docs/page.md"


def test_lines_of_a_block_that_are_one_command():
    lines = (
        "#!/bin/bash",
        "run=checkpoints/a   # a remark",
        "",
        "python train.py fit \\",
        "    -c my.yaml",
        "cat > my.yaml <<EOF",
        "model: {}",
        "EOF",
        "for name in a b; do",
        "  echo $name",
        "done",
    )
    found = Block(PAGE, 10, "bash", lines).commands()
    assert [command.line for command in found] == [12, 14, 16, 19]
    assert found[1].text == "python train.py fit \\\n    -c my.yaml"
    assert found[2].text.splitlines() == ["cat > my.yaml <<EOF", "model: {}", "EOF"]
    assert found[3].text.endswith("done")


def test_lines_with_a_prompt_are_commands_and_others_are_printed():
    block = Block(PAGE, 1, "", ("$ python train.py profile -c a.yaml \\", "      --device meta", "parameters  1 M"))
    assert [command.text for command in block.commands()] == [
        "python train.py profile -c a.yaml \\\n      --device meta"
    ]
    assert Block(PAGE, 1, "", ("some/", "  tree.py")).commands() == []
    assert Block(PAGE, 1, "python", ("import torch",)).commands() == []


def test_variables_globs_and_programs(tmp_path):
    for name in ("a_1.yaml", "a_2.yaml"):
        (tmp_path / name).touch()
    variables = {}
    assert calls("run=checkpoints/a", variables, tmp_path) == []
    found = calls(
        'X=1 python train.py test $run/best.ckpt "[0.8, 1]" a_?.yaml | sort > b && ls # c', variables, tmp_path
    )
    assert [call.words for call in found] == [
        ("python", "train.py", "test", "checkpoints/a/best.ckpt", "[0.8, 1]", "a_1.yaml", "a_2.yaml"),
        ("sort",),
        ("ls",),
    ]
    assert found[0].variables == {"X": "1"}
    assert is_simple('python train.py test --scales "[0.8, 1]" # | sort')
    assert not any(map(is_simple, ("a | b", "a && b", "a > b", "a $(b)", "a; b")))
    with pytest.raises(UnknownVariableError, match=r"\$folder has no value: no command before it"):
        calls("ls $folder", variables, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python train.py fit -c configs/miniature/translation.yaml --trainer.max_step 3", "max_step"),
        ("python train.py fit -c configs/miniature/translations.yaml", "translations.yaml is not there"),
        ("lightning-attn tets --ckpt_path best.ckpt", "Did you mean 'test'"),
        ("lightning-attn export --ckpt_path best.ckpt --fromat onnx", "fromat"),
        ("lightning-attn profile -c miniature/detection --model.optimizer.name adamm", "adamm"),
        (
            "python train.py study run configs/studies/figure_3c_miniature.yaml --only attention=0110",
            "no|not AXIS=LABEL",
        ),
        ("python train.py test --ckpt_path $run/best.ckpt", r"\$run has no value"),
        ("echo a | python train.py predict --ckpt_path best.ckpt --data.predict_fil -", "predict_fil"),
        ("srun --ntasks=2 python train.py fit -c miniature/detection --trainer.device 2", "trainer.device"),
        ("torchrun --nproc-per-nodes 2 train.py fit -c miniature/detection", "nproc-per-nodes"),
        (
            "lightning-attn test --ckpt_path checkpoints/clasification/digits/best.ckpt",
            "add how one is trained to RUNS",
        ),
        ("python -m benchmarks translation.decodign", "decodign"),
        ("python -m benchmarks.attention --quik", "quik"),
        ("python -m lightning_attn.datamodules.check -c miniature/detection --outptu data.png", "outptu"),
        ("python -m lightning_attn.datamodules.chek -c miniature/detection", "no module"),
        ('pip install "generalized-attention[onyx]"', "no extra onyx"),
        ("make quickstat", "quickstat"),
        ("lightning-atn --help", "there is no program lightning-atn"),
    ],
)
def test_wrong_commands_are_found_with_their_place(stock, text, message):
    with pytest.raises(CommandError, match=rf"^{re.escape(PAGE)}:7: (.|\n)*({message})"):
        stock.playground(PAGE).parse(Command(PAGE, 7, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lightning-attn attention-map --ckpt_path best.ckpt --image nothing.png", "nothing.png"),
        ("python train.py fit -c miniature/translation --model.self_attention.terms 0210", "0210"),
        ("cat nothing.txt | sort", "exit status 1(.|\n)*nothing.txt"),
    ],
)
def test_commands_that_fail_are_found_with_their_place(stock, text, message):
    with pytest.raises(CommandError, match=rf"^{re.escape(PAGE)}:7: (.|\n)*({message})"):
        stock.playground(PAGE).run(Command(PAGE, 7, text))
