"""What the command answers at once, without importing torch or Lightning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_attn import configurations
from lightning_attn.cli import main
from lightning_attn.cli.front import SUBCOMMANDS, answer, explain_torchvision
from lightning_attn.configurations import bundled_configurations, located, shown


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "bccd.yaml").write_text("trainer: {max_steps: 1}\n")
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    (tmp_path / "broken.yaml").write_text("trainer: {max_steps: 3\n")
    (tmp_path / "last.ckpt").touch()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no subcommand: give one of those above"),
        (["fitt"], "there is no subcommand 'fitt'; give one of fit, .*Did you mean 'fit'"),
        (["fit", "-c"], "config: -c needs a file"),
        (["bogus", "fit"], "there is no subcommand 'bogus'"),
        (["-c", "x.yaml"], "no subcommand before -c"),
        (["fit", "-c", "configs/bcd.yaml"], "configs/bcd.yaml is not there.*Did you mean configs/bccd.yaml"),
        (["fit", "--config=nothing/a.yaml"], "nothing/a.yaml is not there. There is no folder nothing"),
        (["fit", "-c", "configs"], "configs is a folder"),
        (["fit", "-c", "configs/bccd.yaml", "-c", "broken.yaml"], "broken.yaml is no YAML file: .*line 1"),
        (["fit", "-c", "list.yaml"], "list.yaml holds a list, not options"),
        (
            ["test", "--ckpt_path", "best.ckpt"],
            "no checkpoint at best.ckpt. The current folder holds last.ckpt.* best.ckpt is written after",
        ),
        (["test", "--ckpt_path=none/x.ckpt"], "no checkpoint at none/x.ckpt. There is no folder none"),
    ],
)
def test_mistakes_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_has_to_be_parsed_goes_on():
    assert not answer(["fit", "-c", "configs/bccd.yaml", "--ckpt_path", "last"])
    assert not answer(["test", "--ckpt_path", "last.ckpt"])
    assert not answer(["fit", "--help"])


def test_help_and_version(capsys):
    assert answer(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in SUBCOMMANDS)
    assert answer(["--version"])
    assert capsys.readouterr().out.startswith("lightning_attn ")


def test_nothing_heavy_is_imported():
    code = (
        "import sys\n"
        "from lightning_attn.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['fitt'], ['fit', '-c', 'no.yaml']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'torchmetrics') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]"


def test_torch_and_torchvision_of_different_releases(monkeypatch, capsys):
    """What importing torchvision raises beside another torch."""
    versions = {"torch": "2.11.0", "torchvision": "0.29.1"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    with pytest.raises(SystemExit) as ended:
        explain_torchvision(RuntimeError("operator torchvision::nms does not exist"))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "torch 2.11.0 and torchvision 0.29.1 do not match" in message
    assert "pip install --upgrade torch torchvision" in message
    explain_torchvision(RuntimeError("operator aten::other does not exist"))  # is nobody's mistake: raised further


def test_a_list_can_be_cut_by_another_program():
    """As by `lightning-attn configs | head -1`."""
    code = "from lightning_attn.cli import main; main(['configs'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listing:
        listing.stdout.close()  # long before Python has started
        errors = listing.stderr.read()
        assert (listing.wait(), errors) == (141, b"")


def test_what_the_user_has_does_not_hide_what_the_package_has(tmp_path, capsys):
    (tmp_path / "miniature" / "segmentation").mkdir(parents=True)
    (tmp_path / "miniature" / "detection").write_text("mine: 1\n")
    main(["configs", "miniature/detection"])
    main(["configs", "miniature/segmentation"])
    printed = capsys.readouterr().out
    assert "DetectionTask" in printed
    assert "SegmentationTask" in printed
    assert located("miniature/segmentation").endswith("segmentation.yaml"), "a folder is no configuration"
    assert located("miniature/detection") == "miniature/detection", "a file is"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["configs"], ["configs", "miniature/detection"], ["--help"]])
def test_output_that_cannot_be_written(arguments):
    with Path("/dev/full").open("w") as full:
        called = [sys.executable, "-m", "lightning_attn", *arguments]
        done = subprocess.run(called, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Writing to the standard output: No space left on device.\n")


def test_a_file_of_an_installed_package_is_shown_by_its_name(tmp_path, monkeypatch):
    assert shown(tmp_path / "mine.yaml") == str(tmp_path / "mine.yaml")
    monkeypatch.setattr(configurations, "_PACKAGE", tmp_path)  # as installed: a checkout has the folder beside it
    (tmp_path / "configs" / "studies").mkdir()
    file = tmp_path / "configs" / "studies" / "one.yaml"
    file.write_text("")
    assert shown(file) == "studies/one"
    assert bundled_configurations()["studies/one"] == file
