"""A folder in which a page's commands run as its reader calls them, with stand-ins for what the page names."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jsonargparse
import numpy as np
import small_commands
from data_layouts import write_voc, write_yolo
from doc_pages import REPOSITORY, Block, Command, blocks
from PIL import Image
from shell_commands import Call, calls, is_simple

from lightning_attn.cli import main
from lightning_attn.configurations import located
from lightning_attn.study.grid import Study

SPLITS = {"train2017": "train", "val2017": "val", "test2017": "test"}
PAIRS = [
    ("Two men are in a park.", "Zwei Männer sind in einem Park."),
    ("The woman reads a book.", "Die Frau liest ein Buch."),
]
CALLBACK = """
import pytorch_lightning as pl


class Shout(pl.Callback):
    def __init__(self, volume: int = 1) -> None:
        self.volume = volume
"""


def _pictures(folder: Path, names: Sequence[str] = ("a.jpg", "b.jpg"), size: tuple[int, int] = (120, 160)) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def _masks(folder: Path) -> Path:
    """Images and masks in the folders that configs/segmentation/own_images.yaml expects, with its values."""
    for split in ("train", "val"):
        _pictures(folder / "images" / split, [f"{number}.png" for number in range(4)], (40, 50))
        (folder / "masks" / split).mkdir(parents=True)
        for path in (folder / "images" / split).iterdir():
            mask = np.where(np.array(Image.open(path))[..., 0] > 128, 255, 0).astype(np.uint8)
            Image.fromarray(mask).save(folder / "masks" / split / path.name)
    return folder


def _text(corpus: Path, folder: Path, source: str, target: str) -> Path:
    """The generated corpus with sentences of the pages, in training so often that the vocabulary has their words."""
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        for side, (language, name) in enumerate((("en", source), ("de", target))):
            text = (corpus / f"{split}.{language}").read_text(encoding="utf-8")
            more = "".join(f"{pair[side]}\n" for pair in PAIRS * 50) if split == "train" else ""
            _written(folder / f"{split}.{name}", text + more)
    return folder


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


STAND_INS: dict[str, Callable[["Stock", Path], Path]] = {
    # Data, by the layout that the configuration reads. The first argument has the generated sets, the second is the
    # place for what is made.
    **dict.fromkeys(
        ("my/bccd", "data/coco-bccd", "data/coco-mini", "data/coco", "elsewhere/coco"),
        lambda stock, _: stock.fixture("coco"),
    ),
    **dict.fromkeys(
        ("my/camvid", "data/cityscapes-camvid", "data/cityscapes"), lambda stock, _: stock.fixture("cityscapes")
    ),
    **dict.fromkeys(
        ("my/multi30k", "my/law", "data/multi30k-ende", "data/wmt14"),
        lambda stock, path: _text(stock.fixture("corpus"), path, "en", "de"),
    ),
    "my/fr-cs": lambda stock, path: _text(stock.fixture("corpus"), path, "fr", "cs"),
    **dict.fromkeys(
        ("my/yolo", "data/my_objects"), lambda stock, path: write_yolo(stock.fixture("coco"), path, SPLITS)
    ),
    "my/voc": lambda stock, path: write_voc(stock.fixture("coco"), path, SPLITS),
    **dict.fromkeys(("my/masks", "data/my_masks"), lambda _, path: _masks(path)),
    **dict.fromkeys(("my/pictures", "large/images"), lambda _, path: _pictures(path)),
    **dict.fromkeys(("street.png", "blood.jpg"), lambda _, path: _pictures(path.parent, [path.name]) / path.name),
    **dict.fromkeys(
        ("input.en", "input.fr"), lambda _, path: _written(path, "".join(f"{pair[0]}\n" for pair in PAIRS))
    ),
    # Configurations and code of the reader's own.
    "my.yaml": lambda stock, path: _written(
        path, Path(located(OWN_CONFIGURATION.get(stock.page, "detection/bccd"))).read_text(encoding="utf-8")
    ),
    "my_callbacks.py": lambda _, path: _written(path, CALLBACK),
    "my_callbacks": lambda stock, _: stock.stand_in("my_callbacks.py"),
    # Results from elsewhere.
    "copied/cells": lambda _, path: path.mkdir(parents=True) or path,
}
"""What pages and configurations name, by its path: a function that makes it, or says where it is."""

OWN_CONFIGURATION = {"docs/translation.md": "translation/multi30k"}
"""What my.yaml is on a page."""

RUNS = {
    "translation": ["-c", "configs/translation/multi30k.yaml"],
    "translation/fr-cs": [
        *("-c", "configs/translation/multi30k.yaml", "--data.root", "my/fr-cs"),
        *("--data.source_language", "fr", "--data.target_language", "cs"),
    ],
    "detection": ["-c", "configs/detection/bccd.yaml"],
    "segmentation": ["-c", "configs/miniature/segmentation.yaml"],
    "segmentation/camvid": ["-c", "configs/segmentation/camvid.yaml"],
    "multitask": ["-c", "configs/miniature/multitask.yaml"],
    "classification": ["-c", "examples/digits.yaml"],
}
"""Trainings whose runs stand in for checkpoints/TASK/NAME, by TASK or TASK/NAME."""

CHECKPOINTS = [
    # (page, a part of the command or of its comment, the run of RUNS)
    ("docs/translation.md", "", "translation"),
    ("docs/segmentation.md", "", "segmentation"),
    ("docs/multitask.md", "", "multitask"),
    ("docs/resuming.md", "--task detection", "multitask"),
    ("docs/resuming.md", "# segmentation", "segmentation"),
    ("", "", "detection"),
]
"""What a checkpoint without a folder is of, such as best.ckpt: the first row that fits."""

OUTPUTS = {
    "fit": r"^checkpoints/.*/(last\.ckpt|metrics\.csv)$",
    "validate": r"/config_validate\.yaml$",
    "test": r"/test_metrics(-\d+)?\.json$",
    "predict": r"/predictions/|/hypotheses",
    "average": r"(^|/)average(-\d+)?\.ckpt$",
    "export": r"/model\.safetensors$",
    "attention-map": r"/attention/.*/index\.html$",
    "study report": r"/index\.html$",
}
"""Files that a subcommand writes, of which one must be new; what `--output` and `>` name must be there, too."""

ABSOLUTE = {"/elsewhere/": "elsewhere/"}
"""Paths outside of a reader's folder, and where they are in the playground."""

SHELL_VARIABLES = {"SLURM_ARRAY_TASK_ID": "0"}
"""What a scheduler sets for its jobs."""

PROGRAMS = {
    # `python -m lightning_attn` is train.py; everything else is Python's.
    "python": (
        'if [ "$1" = -m ] && [ "$2" = lightning_attn ]; then shift 2; set -- "{folder}/train.py" "$@"; fi\n'
        'exec "{python}" "$@"'
    ),
    "lightning-attn": 'exec "{python}" "{folder}/train.py" "$@"',
    "srun": 'exec "$@"',
    "sbatch": "echo 17",
    "torchrun": 'exec "{python}" -c "import os, sys, torch.distributed.run as run; '
    "given = run.parse_args(sys.argv[1:]); "
    "script = ['-m'] * given.module + [given.training_script]; "
    "script = ['{folder}/train.py'] if script == ['-m', 'lightning_attn'] else script; "
    'os.execv(sys.executable, [sys.executable, *script, *given.training_script_args])" "$@"',
}
"""Programs that a test's machine lacks, or that must be small: each starts one process."""

TRAIN = """import sys

sys.path[:0] = {path}

if __name__ == "__main__":
    from small_commands import run

    run(sys.argv[1:])
"""


class CommandError(AssertionError):
    """A command that cannot be parsed, or fails."""


class _Parsed(BaseException):
    """Ends a command whose options have been parsed; they are its argument."""


class Stock:
    """What all pages share: data, and trained networks. Each is made when it is first named.

    Args:
        folder: Of everything.
        fixture: Returns a session fixture by its name.
    """

    def __init__(self, folder: Path, fixture: Callable[[str], Path]) -> None:
        self.folder, self.fixture, self.page = folder, fixture, ""
        self._made: dict[str, Path] = {}
        self._playgrounds: dict[tuple[str, str], Playground] = {}

    def stand_in(self, name: str) -> Path:
        """Where a stand-in is."""
        key = f"{name} of {self.page}" if name in ("my.yaml",) else name
        if key not in self._made:
            place = self.folder / "made" / str(len(self._made)) / name
            self._made[key] = STAND_INS[name](self, place)
        return self._made[key]

    def run_of(self, name: str) -> Path:
        """The folder of a trained network, by TASK or TASK/NAME."""
        key = name if name in RUNS else name.partition("/")[0]
        if key not in RUNS:
            raise CommandError(
                f"there is no stand-in for a run of {name}: add how one is trained to RUNS of tests/docs/playground.py"
            )
        if key not in self._made:
            page, self.page = self.page, f"a run of {key}"
            training = Command(self.page, 0, "python train.py fit " + " ".join(RUNS[key]))
            self.playground(self.page).run(training)
            (checkpoint,) = (self.playground(self.page).folder / "checkpoints").glob("*/*/best.ckpt")
            self._made[key] = checkpoint.parent
            self.page = page
        return self._made[key]

    def playground(self, page: str, use: str = "") -> "Playground":
        """The folder of a page; one for each use."""
        key = (page, use)
        if key not in self._playgrounds:
            self._playgrounds[key] = Playground(page, self.folder / f"page {len(self._playgrounds)}", self)
        return self._playgrounds[key]


class Playground:
    """The folder that the reader of a page is in.

    Args:
        page: Path of the page.
        folder: To be made; the root of a checkout, as far as readers use it.
        stock: Where stand-ins come from.
    """

    def __init__(self, page: str, folder: Path, stock: Stock) -> None:
        self.page, self.folder, self.stock = page, folder.resolve(), stock
        self.variables: dict[str, str] = {}
        self.names: dict[str, object] = {"__name__": "__page__", "trained": stock.run_of}
        self._placed: set[str] = set()  # checkpoints, whose task may be another with each command
        self.folder.mkdir(parents=True)
        for name in ("configs", "benchmarks"):
            (self.folder / name).symlink_to(REPOSITORY / name)
        shutil.copytree(REPOSITORY / "examples", self.folder / "examples")  # pages say how to change it
        tests = [str(path) for path in (REPOSITORY / "tests/docs", REPOSITORY / "tests", REPOSITORY)]
        _written(self.folder / "train.py", TRAIN.format(path=tests))
        for name, text in PROGRAMS.items():
            path = _written(self.folder.with_name(f"{self.folder.name} bin") / name, "#!/bin/sh\n")
            path.write_text(f"#!/bin/sh\n{text.format(python=sys.executable, folder=self.folder)}\n")
            path.chmod(0o755)
        self.programs = path.parent
        if (REPOSITORY / page).is_file():
            for block in blocks(page):
                if block.saved_as:
                    _written(self.folder / block.saved_as, block.text)

    # What is there

    def provide(self, text: str, remark: str = "") -> None:
        """Makes the stand-ins that a text names, and what these name; a remark may say more about checkpoints."""
        self.stock.page = self.page
        for name in STAND_INS:
            if re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w-])", text) and not (self.folder / name).exists():
                source = self.stock.stand_in(name)
                target = self.folder / (source.name if name == "my_callbacks" else name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    continue
                if source.is_dir():
                    target.symlink_to(source)
                else:
                    shutil.copy(source, target)
        for configuration in re.findall(r"(?:-c|--config|study \w+) ([\w./-]+)", text):
            self._provide_for_configuration(configuration)
        for task, name in re.findall(r"(?<![\w/.-])checkpoints/(\w+)/([\w-]+)", text):
            run = self.folder / "checkpoints" / task / name
            if task != "studies" and not (run / "best.ckpt").exists():
                source = self.stock.run_of(f"{task}/{name}")
                self.provide((source / "config_fit.yaml").read_text(encoding="utf-8"))
                shutil.copytree(source, run, dirs_exist_ok=True)
        for name in re.findall(r"(?<![\w/.$}-])\w+\.ckpt\b", text):
            self._provide_checkpoint(name, f"{text} {remark}")

    @functools.cache  # noqa: B019 - a playground lives as long as the tests
    def _provide_for_configuration(self, name: str) -> None:
        path = self.folder / name if (self.folder / name).is_file() else Path(located(name))
        if path.is_file():
            content = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
            for mentioned in re.findall(r"(?<![\w/.-])(?:data|my)/[\w/-]+", content):
                self.provide(mentioned)
            for base in re.findall(r"^(?:base:|-)\s*(\S+\.yaml)", content, re.MULTILINE):  # of a study
                self._provide_for_configuration(base.removeprefix("../"))

    def _provide_checkpoint(self, name: str, text: str) -> None:
        if (self.folder / name).exists() and name not in self._placed:
            return  # a command of the page has written it
        self._placed.add(name)
        run = next(run for page, part, run in CHECKPOINTS if page in ("", self.page) and part in text)
        source = self.stock.run_of(run)
        self.provide((source / "config_fit.yaml").read_text(encoding="utf-8"))
        shutil.copy(source / ("last.ckpt" if name == "last.ckpt" else "best.ckpt"), self.folder / name)

    # Parsing

    def parse(self, command: Command) -> None:
        """Has the real parsers read all that a command gives them; nothing is run.

        Raises:
            CommandError: If one refuses it, with what it says.
        """
        with _failures_of(command):
            for call in calls(self._inside(command.text), self._with_defaults(), self.folder):
                self.provide(" ".join(call.words), command.text)
                self._parse_call(call.words)
            for name, file in re.findall(r"configs (\S+) > (\S+)", command.text):
                shutil.copy(located(name), self.folder / file)
            self._keep_variables(command)

    def parse_arguments(self, arguments: Sequence[str]) -> None:
        """Has the command's parser read arguments, as `parse` does.

        Raises:
            CommandError: If it refuses them.
        """
        self.provide(" ".join(arguments))
        self._parse_main(arguments)

    def _parse_call(self, words: Sequence[str]) -> None:
        program, *arguments = words
        if program.rpartition("/")[2].startswith("python") and arguments[:1] == ["train.py"]:
            self._parse_main(arguments[1:])
        elif program == "lightning-attn":
            self._parse_main(arguments)
        elif program == "python" and arguments[:1] == ["-m"]:
            self._parse_module(arguments[1], arguments[2:])
        elif program == "python" and arguments[:1] == ["-c"]:
            compile(arguments[1], "python -c", "exec")
        elif program == "python" and arguments and not arguments[0].startswith("-"):
            if not (self.folder / arguments[0]).exists() and not (REPOSITORY / arguments[0]).exists():
                raise CommandError(f"there is no {arguments[0]}")
        elif program == "srun":
            self._parse_call(list(itertools.dropwhile(lambda word: word.startswith("-"), arguments)))
        elif program == "torchrun":
            run = importlib.import_module("torch.distributed.run")
            given = self._quietly(lambda: run.parse_args(arguments))
            module = ["-m"] if given.module else []
            self._parse_call(["python", *module, given.training_script, *given.training_script_args])
        elif program == "make":
            done = subprocess.run(
                ["make", "-n", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise CommandError(done.stderr)
        elif program == "pip":
            _check_pip(arguments)
        elif program not in ("cd", "export", "source", "for", "if", "while", "done", "fi", "do") and not (
            shutil.which(program) or program in PROGRAMS
        ):
            raise CommandError(f"there is no program {program}")

    def _parse_main(self, arguments: Sequence[str]) -> None:
        options = self._quietly(lambda: main(arguments), parse_only=True)
        if arguments[:1] == ["study"]:
            with contextlib.chdir(self.folder):
                for file in options.files if options.what == "report" else [options.file]:
                    Study.read(file).select([] if options.what == "report" else options.only)

    def _parse_module(self, name: str, arguments: list[str]) -> None:
        if name == "lightning_attn":
            self._parse_main(arguments)
        elif name == "benchmarks" or name.startswith("benchmarks."):
            self._quietly(lambda: _check_benchmark(name.partition(".")[2], arguments))
        elif hasattr(module := _module(name), "main") and name.startswith(("lightning_attn.", "datamodules.")):
            self._quietly(lambda: module.main(arguments), parse_only=True)

    # Running

    def run(self, command: Command) -> str:
        """Runs a command as the reader's shell does, at the size of a test.

        Returns:
            What it prints.

        Raises:
            CommandError: If it fails, leaves a traceback, or lacks what it should have written.
        """
        with _failures_of(command):
            text = self._inside(command.text)
            found = calls(text, self._with_defaults(), self.folder)
            self._keep_variables(command)
            for call in found:
                self.provide(" ".join(call.words), command.text)
            if not found:
                return ""
            before = self._files()
            program = self._in_process(found[0]) if len(found) == 1 and is_simple(text) else None
            printed = self._bash(text) if program is None else self._quietly(program) or ""
            if "Traceback (most recent call last)" in printed:
                raise CommandError(printed)
            self._check_outputs(found, before)
            return str(printed)

    def execute(self, block: Block, given: str = "") -> None:
        """Runs a block of Python behind those before it on the page.

        Args:
            block: The block.
            given: Python that makes what the page takes for granted.

        Raises:
            CommandError: If it fails.
        """
        command = Command(block.page, block.line, block.lines[0])
        code = "\n" * block.line + block.text  # so that a traceback has the page's lines
        with _failures_of(command):
            self.provide(block.text)

            def run() -> None:
                exec(given, self.names)
                with small_commands.small_sets():
                    exec(compile(code, block.page, "exec"), self.names)

            self._quietly(run)

    def _in_process(self, call: Call) -> Callable[[], object] | None:
        """The function that the program is, if it is one of this project's, which saves seconds of imports."""
        program, *arguments = call.words
        several = any(
            word.startswith("--trainer.devices") and arguments[place + 1 : place + 2] != ["1"]
            for place, word in enumerate(arguments)
        )
        if several or call.variables or "--slurm" in arguments:
            return None
        if program == "lightning-attn":
            return lambda: small_commands.run(arguments)
        if program == "python" and arguments[:1] == ["train.py"]:
            return lambda: small_commands.run(arguments[1:])
        if program == "python" and arguments[:2] == ["-m", "lightning_attn"]:
            return lambda: small_commands.run(arguments[2:])
        if program == "python" and arguments[:2] == ["-m", "benchmarks"]:
            return lambda: importlib.import_module("benchmarks.runner").run_named(arguments[2:])
        if program == "python" and arguments[:1] == ["-m"] and "lightning_attn." in arguments[1]:
            return lambda: _module(arguments[1]).main(arguments[2:])
        return None

    def _bash(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env={
                **{**os.environ, **SHELL_VARIABLES, **self.variables, **self._environment()},
                "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            timeout=1500,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise CommandError(f"exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def _environment(self) -> Mapping[str, str]:
        cache = self.stock.folder / "cache"
        return {
            "XDG_CACHE_HOME": str(cache),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        }

    def _check_outputs(self, found: Sequence[Call], before: Mapping[Path, int]) -> None:
        words = [word for call in found for word in call.words]
        after = self._files()
        new = {path for path, time in after.items() if before.get(path) != time}
        elsewhere = {"--help", "--slurm", "--output", "--print_config", "-"} & set(words)
        for subcommand in () if elsewhere else map(_subcommand, found):
            pattern = OUTPUTS.get(subcommand)
            if pattern and not any(re.search(pattern, path.as_posix()) for path in new):
                listed = ", ".join(sorted(path.as_posix() for path in new)) or "nothing"
                raise CommandError(f"{subcommand} has written no {pattern}; it wrote {listed}")
        for option, value in itertools.pairwise(words):
            if option == "--output" and not (self.folder / value).exists():
                raise CommandError(f"--output {value}: it is not there")

    def _files(self) -> dict[Path, int]:
        return {
            path.relative_to(self.folder): path.stat().st_mtime_ns
            for path in self.folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        }

    def _quietly(self, function: Callable[[], object], *, parse_only: bool = False) -> object:
        """Calls a function as a program in the folder; with `parse_only` it ends with the options it has parsed."""
        printed = io.StringIO()
        path, modules = list(sys.path), set(sys.modules)
        ending = _parsing_only() if parse_only else contextlib.nullcontext()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            _changed_environment(self._environment()),
        ):
            argv, sys.argv = sys.argv, ["train.py"]
            try:
                with ending:
                    result = function()
            except _Parsed as parsed:
                result = parsed.args[0]
            except SystemExit as stop:
                if stop.code not in (0, None):
                    raise CommandError(f"exit status {stop.code}\n{printed.getvalue()}") from stop
                result = None
            except Exception as error:
                raise CommandError("".join(traceback.format_exception(error))) from error
            finally:
                sys.argv, sys.path[:] = argv, path
                for name in set(sys.modules) - modules:
                    file = getattr(sys.modules[name], "__file__", None)
                    if file and Path(file).is_relative_to(self.folder) and "examples" not in file:
                        del sys.modules[name]  # another page may have one of that name
        return printed.getvalue() if result is None else result

    def _with_defaults(self) -> dict[str, str]:
        return {**SHELL_VARIABLES, **self.variables}

    def _keep_variables(self, command: Command) -> None:
        """What an assignment of the reader's shell sets is there for the rest of the page."""
        variables = self._with_defaults()
        calls(self._inside(command.text), variables, self.folder)
        self.variables = variables

    def _inside(self, text: str) -> str:
        for outside, inside in ABSOLUTE.items():
            text = text.replace(outside, inside)
        return text


def _subcommand(call: Call) -> str:
    """Of this project's command: its name, as OUTPUTS has it; or ""."""
    for program in (["lightning-attn"], ["python", "train.py"], ["python", "-m", "lightning_attn"]):
        if list(call.words[: len(program)]) == program:
            first, *others = [*call.words[len(program) :], "", ""]
            return f"study {others[0]}" if first == "study" else first
    return ""


@contextlib.contextmanager
def _failures_of(command: Command) -> Iterator[None]:
    """Has errors name the page, the line and the command."""
    try:
        yield
    except (CommandError, ValueError, OSError) as error:
        raise CommandError(f"{command}\n{error}") from error


@contextlib.contextmanager
def _parsing_only() -> Iterator[None]:
    """Has every program end when its command line has been parsed; parsers may call others meanwhile."""
    depth = 0

    def ending(parse: Callable[..., object]) -> Callable[..., object]:
        def parse_args(*arguments: object, **options: object) -> object:
            nonlocal depth
            depth += 1
            try:
                parsed = parse(*arguments, **options)
            finally:
                depth -= 1
            if depth == 0:
                raise _Parsed(parsed)
            return parsed

        return parse_args

    kinds = (argparse.ArgumentParser, jsonargparse.ArgumentParser)
    before = [kind.parse_args for kind in kinds]
    for kind, parse in zip(kinds, before, strict=True):
        kind.parse_args = ending(parse)
    try:
        yield
    finally:
        for kind, parse in zip(kinds, before, strict=True):
            kind.parse_args = parse


@contextlib.contextmanager
def _changed_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _module(name: str) -> object:
    if importlib.util.find_spec(name) is None:
        raise CommandError(f"there is no module {name}")
    return importlib.import_module(name) if "." in name else None


def _check_benchmark(name: str, arguments: list[str]) -> None:
    """Options and cases of a benchmark."""
    registry = importlib.import_module("benchmarks.registry")
    runner = importlib.import_module("benchmarks.runner")
    cases = []
    if not name:
        while arguments and not arguments[0].startswith("-"):
            cases.append(arguments.pop(0))
        if not cases:
            return
        name = cases[0].partition(".")[0]
    benchmark = registry.load(name)
    for case in cases:
        if case != name:
            registry.load(case).cases_named(case)
    if name == "device_check":
        check = importlib.import_module("benchmarks.device_check")
        check.chosen_cases(check.argument_parser().parse_args(arguments).only, small=True)
    else:
        runner.choose_cases(benchmark, runner.argument_parser(benchmark).parse_args(arguments))


def _check_pip(arguments: Sequence[str]) -> None:
    """What is installed is this project, with extras that it has."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
        unknown = set(extra.split(",")) - set(project["optional-dependencies"])
        if unknown:
            raise CommandError(f"pyproject.toml has no extra {', '.join(sorted(unknown))}")
    for name in re.findall(r"([\w-]+)\[", " ".join(arguments)):
        if name != project["name"]:
            raise CommandError(f"the project's name is {project['name']}, not {name}")
    for wheel in re.findall(r"(\w+)-\S*\.whl", " ".join(arguments)):
        if wheel != project["name"].replace("-", "_"):
            raise CommandError(f"the wheel's name begins with {project['name'].replace('-', '_')}, not {wheel}")
