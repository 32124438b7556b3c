"""Every command of the documentation is parsed and run.

In the default suite:

- `test_commands_are_parsed`: the real parsers read each command of each page, with the files that it names;
- `test_the_first_command_of_each_subcommand` runs one command a subcommand.

Marked as slow: `test_commands_run` runs all other commands, block after block, on small data and networks.

A page is found by itself. What its commands name must be in a table of playground.py: data and files in STAND_INS,
runs in RUNS. A command that cannot be run in a test is in NOT_RUN below with the reason, or in a block behind
`<!-- not run in tests: REASON -->`; it is parsed all the same. `<!-- saved as NAME -->` before a block has its content
in a file of that name.
"""

import pytest
from doc_pages import Block, Command, blocks, commands, pages
from playground import CommandError

from lightning_attn.cli.front import SUBCOMMANDS

NOT_RUN = {
    "source .venv": "a test runs in an environment already",
    "make": "its targets install, and call trainings and tests that other tests run",
    "pip install": "needs a package index; tests/test_package.py installs the wheel",
    "WANDB_MODE=offline lightning-attn": "wandb is not among the packages of the tests",
    'python -c "import lightning_attn, pathlib, shutil': "for an installed wheel; a checkout has the folder",
    "python -m benchmarks.": "measures for minutes; tests/benchmarks runs cases at small sizes",
    "python -m benchmarks translation": "measures for minutes; tests/benchmarks runs cases at small sizes",
    "lightning-attn fit -c configs/detection/faster_rcnn_r50_fpn_coco.yaml --run.initial_weights COCO_V1": (
        "downloads weights"
    ),
}
"""Commands that are parsed only, by how they begin, and why."""

PYTHON_NOT_RUN = {
    ("docs/extending.md", "class Detector"): "a sketch: the network is the reader's",
    ("docs/extending.md", "self.scores ="): "a part of the class before it",
    ("docs/how_to/export.md", "# serve.py"): "FastAPI is not among the packages of the tests",
    ("docs/tutorials/own_task.md", "class DigitsTask"): "a sketch; examples/digits.py is the whole",
}
"""Blocks of Python that are compiled only, by page and how they begin, and why."""

GIVEN = {
    "docs/attention.md": (
        "from lightning_attn.attention import AttentionSpec, build_attention\n"
        "from lightning_attn.attention.algorithms.base import Algorithm\n"
        "from lightning_attn.networks.weights.mmcv import to_mmcv\n"
        "state = to_mmcv(build_attention(AttentionSpec(num_heads=8, kv_stride=2), 64, 2, role='head'))"
    ),
    "docs/attention_maps.md": "import numpy\npixels = numpy.zeros((120, 160, 3), numpy.uint8)",
    "docs/resuming.md": (
        "import shutil\nfrom lightning_attn.export.checkpoint import export_checkpoint\n"
        "shutil.rmtree('export', ignore_errors=True)\n"
        "export_checkpoint(trained('translation') / 'best.ckpt', 'export', format='program')"
    ),
    "docs/multitask.md": (
        "import numpy\nfrom lightning_attn.tasks import DetectionTask, MultitaskTask\n"
        "images = [numpy.zeros((120, 160, 3), numpy.uint8)]"
    ),
}
"""What the Python of a page takes for granted; `trained` is the folder of a run of RUNS."""

PAGES = [page for page in pages() if commands(page)]
BLOCKS = [block for page in pages() for block in blocks(page) if block.commands() or block.language == "python"]


def reason_not_to_run(command: Command) -> str:
    return command.reason or next((why for start, why in NOT_RUN.items() if command.text.startswith(start)), "")


def reason_not_to_execute(block: Block) -> str:
    found = (
        why for (page, start), why in PYTHON_NOT_RUN.items() if page == block.page and block.text.startswith(start)
    )
    return block.reason or next(found, "")


def subcommand_of(command: Command) -> str:
    words = command.text.split()
    called = words[:1] == ["lightning-attn"] or words[:2] == ["python", "train.py"]
    return next((word for word in words[1:3] if word in SUBCOMMANDS), "") if called and "|" not in words else ""


def first_commands() -> dict[str, Command]:
    """The first command of each subcommand that is one line of its own."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for command in commands(page):
            name = subcommand_of(command)
            if name and name not in found and not reason_not_to_run(command):
                found[name] = command
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_parsed(stock, page):
    failures = []
    for command in commands(page):
        try:
            stock.playground(page).parse(command)
        except CommandError as error:
            failures.append(str(error))
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("subcommand", first_commands())
def test_the_first_command_of_each_subcommand(stock, subcommand):
    command = first_commands()[subcommand]
    playground = stock.playground(command.page, subcommand)
    for before in commands(command.page):  # for the variables
        if before.text == command.text:
            break
        if "=" in before.text.split()[0]:
            playground.run(before)
    playground.run(command)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_commands_run(stock, block):
    playground = stock.playground(block.page, "run")
    if block.language == "python":
        if not reason_not_to_execute(block):
            playground.execute(block, GIVEN.get(block.page, ""))
        return
    failures = []
    for command in block.commands():
        if reason_not_to_run(command):
            continue
        try:
            playground.run(command)
        except CommandError as error:
            failures.append(str(error))
    assert not failures, "\n\n".join(failures)


def test_reasons_are_of_commands():
    """An entry that fits no command is removed."""
    texts = [command.text for page in PAGES for command in commands(page)]
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)] == []
    begun = [(block.page, block.text) for block in BLOCKS if block.language == "python"]
    for page, start in PYTHON_NOT_RUN:
        assert any(text.startswith(start) for one, text in begun if one == page), (page, start)
    assert {page for page, _ in begun} >= GIVEN.keys()


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "python"], ids=lambda block: block.place)
def test_python_is_python(block):
    compile("\n" * block.line + block.text, block.page, "exec")
