"""What the command answers without importing torch and Lightning, which takes seconds: help, and common mistakes."""

import difflib
import importlib.metadata
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from lightning_attn.configurations import bundled_configurations, close_names, described, packaged
from lightning_attn.io import missing_checkpoint, neighbours

SUBCOMMANDS = {
    "fit": "train, or resume a training (--ckpt_path last)",
    "validate": "score the validation data",
    "test": "score the test data, and write results and errors",
    "predict": "run a trained network on images or text",
    "average": "make one checkpoint of the mean of several",
    "export": "write a model as safetensors and JSON, torch.export program or ONNX",
    "profile": "what a network costs: parameters, multiply-adds, time, memory",
    "attention-map": "where chosen queries look: figures and a page, for an image or a sentence",
    "study": "train and test the cells of a study, show their states, judge its findings, write a report",
    "compare": "what differs between runs: configuration, scores, cost, curves",
    "configs": "list the configurations of the package, or print one (configs miniature/detection)",
}
CHECKPOINT_WORDS = ("auto", "last", "best")  # of the newest run of that name


def answer(arguments: Sequence[str]) -> bool:
    """Answers what can be answered at once.

    Args:
        arguments: Of the command line.

    Returns:
        Whether that was all.

    Raises:
        SystemExit: With status 2 and a message on the standard error, if a subcommand or a file is wrong.
    """
    if arguments and arguments[0] == "--version":
        from lightning_attn import __version__

        print(f"lightning_attn {__version__}")
        return True
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        if not arguments:
            _fail("no subcommand: give one of those above.")
        return True
    first = next((argument for argument in arguments if argument in SUBCOMMANDS), None)
    if first is None or (arguments[0] not in SUBCOMMANDS and not arguments[0].startswith("-")):
        _fail(_unknown(arguments[0]))
    if first == "configs":
        _configs(arguments[1:])
        return True
    try:
        _check_files(arguments)
    except OSError as error:  # such as a name that is too long
        _fail(f"{str(error.filename)[:100]}: {error.strerror}.")
    _check_temporary_folder()
    return False


def _configs(arguments: Sequence[str]) -> None:
    """Lists the configurations of the package, or prints one of them."""
    known = bundled_configurations()
    if not arguments:
        width = max(map(len, known))
        for name, path in known.items():
            print(f"{name:<{width}}  {textwrap.shorten(described(path), 100, placeholder=' ...')}".rstrip())
        return
    if arguments[0] in ("-h", "--help"):
        print(f"usage: {command_name()} configs [NAME]\n\n{SUBCOMMANDS['configs']}.")
        print("-c NAME takes it, unless there is a file of that name.")
        return
    if len(arguments) > 1:
        _fail(f"configs: {arguments[1]} is one name too many; give one, or none for a list.")
    found = packaged(arguments[0])
    if found is None:
        _fail(f"configs: {arguments[0]!r} is no configuration of the package. {_meant(arguments[0])}")
    print(found.read_text(encoding="utf-8"), end="")


def _meant(given: str) -> str:
    close = close_names(given)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}To list them: {command_name()} configs"


def _check_temporary_folder() -> None:
    """Torch asks for it when it is imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        _fail(
            f"{error.strerror}: their disks are full, or none of them can be written to. Make room, or "
            "name another folder in the variable TMPDIR."
        )


def explain_torchvision(error: Exception) -> None:
    """Ends with a message if importing failed because torch and torchvision are not of one release.

    Each torchvision is built for one torch; with another, its operators are missing, or its library does not load.
    """
    if not re.search(r"operator torchvision::|torchvision.*undefined symbol|torchvision/_C", str(error)):
        return
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    _fail(
        f"torch {versions['torch']} and torchvision {versions['torchvision']} do not match: {error}. Install both "
        "again, together: pip install --upgrade torch torchvision"
    )


def _check_files(arguments: Sequence[str]) -> None:
    """Refuses files that are not there, or are something else."""
    for path in option_values(arguments, "-c", "--config"):
        _check_configuration(path)
    for path in option_values(arguments, "--ckpt_path"):
        if path and path not in CHECKPOINT_WORDS:
            _check_checkpoint("ckpt_path", path)
    for path in option_values(arguments, "--run.initial_weights"):
        if path.endswith((".ckpt", ".safetensors", ".pth")):
            _check_checkpoint("run.initial_weights", path)


def command_name() -> str:
    """How the command was called, to be shown."""
    name = Path(sys.argv[0]).name
    if name in ("", "-c"):  # of Python: the command's function was called by other code
        return "lightning-attn"
    if name == "__main__.py":
        return "python -m lightning_attn"
    return f"python {name}" if name.endswith(".py") else name


def _help() -> str:
    name = command_name()
    lines = [f"  {subcommand:<15}{what}" for subcommand, what in SUBCOMMANDS.items()]
    return "\n".join(
        [
            f"usage: {name} SUBCOMMAND [-c FILE ...] [--OPTION VALUE ...]",
            "",
            "The attention of Zhu et al. (ICCV 2019) in detection, segmentation and translation.",
            "",
            *lines,
            "",
            f"{name} SUBCOMMAND --help lists the options of one, fit --model.help TranslationTask and",
            "fit --data.help WMT14DataModule those of a task and its data; --version says which version this is.",
            "LIGHTNING_ATTN_TRACEBACK=1 in the environment shows where an error was raised, beside its message.",
            f"A first result: {name} fit -c configs/miniature/translation.yaml",
        ]
    )


def _unknown(given: str) -> str:
    if given.startswith("-"):
        return f"no subcommand before {given}: give one of {', '.join(SUBCOMMANDS)}."
    close = difflib.get_close_matches(given, SUBCOMMANDS, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no subcommand {given!r}; give one of {', '.join(SUBCOMMANDS)}.{hint}"


def option_values(arguments: Sequence[str], *options: str) -> Iterator[str]:
    """What some options are given."""
    for place, argument in enumerate(arguments):
        if argument in options:
            yield "".join(arguments[place + 1 : place + 2])
        for option in options:
            if argument.startswith(f"{option}="):
                yield argument.removeprefix(f"{option}=")


def _check_configuration(given: str) -> None:
    """Refuses a configuration file that is not there or no YAML."""
    if not given or given.startswith("--"):
        _fail("config: -c needs a file, such as -c configs/miniature/translation.yaml.")
    path = Path(given).expanduser()
    if not path.is_file():
        if "\n" in given or given.lstrip().startswith("{"):
            return  # YAML itself
        what = "a folder" if path.is_dir() else "not there"
        also = f"The package has no configuration of that name either. {_meant(given)}"
        _fail(f"config: {given} is {what}. {neighbours(path, '*.yaml')} {also}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        _fail(f"config: {given} is no YAML file: {what}. Correct it.")
    if content is not None and not isinstance(content, dict):
        _fail(f"config: {given} holds a {type(content).__name__}, not options such as 'trainer: {{max_steps: 100}}'.")


def _check_checkpoint(option: str, path: str) -> None:
    message = missing_checkpoint(Path(path))
    if message:
        _fail(f"{option}: {message}")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
