"""The parser's messages: without what says nothing about the mistake, and with the fix of common ones."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from lightning_attn.cli.run_options import RunOptions
from lightning_attn.configurations import complete_configurations
from lightning_attn.tasks import BaseTask

_NOISE = re.compile(
    r"^\s*(-\s*)?(Does not validate against any of the Union subtypes|Subtypes: |Errors:|Given value type: "
    r"|Given value: |Expected a <class 'NoneType'>)"
)
_CLASSES: dict[str, tuple[type, str]] = {
    "model": (BaseTask, "mypackage.tasks.MyTask"),
    "data": (pl.LightningDataModule, "mypackage.data.MyDataModule"),
    "trainer.callbacks": (pl.Callback, "mypackage.callbacks.MyCallback"),
    "trainer.logger": (Logger, "mypackage.loggers.MyLogger"),
}
"""By option: the base of the classes that it takes, and how the path of one's own looks."""


def clean_parser_message(message: str) -> str:
    """A message that can be shown; others than the parser's stay as they are."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip() and not _NOISE.match(line)]
    text = re.sub(r"^\s*-\s*", "", "\n".join(lines))
    text = re.sub(r'^Parser key "config": (?=(model|data)\.)', "", text)  # of one given as text, whose key is said
    if 'Parser key "trainer.precision"' in text:
        return "trainer.precision: give 32-true, bf16-mixed, 16-mixed or, for translation, 64-true."
    replaced = _unknown_class(text) or _not_a_section(text)
    if replaced:
        return replaced
    if re.search(r"Expected a <class 'str'>. Got value: -?[0-9.]+$", text, re.MULTILINE):
        text += (
            '\nA text is expected. Quote it in YAML, as in terms: "0010": '
            "unquoted, 0010 is the number 8 and 1111 an integer."
        )
    if re.search(r"Expected a <class 'tuple'>", text):
        text += '\nA list is expected, such as "[0.8, 1.0]"; "[]" is an empty one.'
    literal = re.search(r"Expected a typing.Literal\[(.*?)\]", text)
    if literal:
        text += f"\nOne of {literal.group(1)} is expected."
    missing = re.search(r"arguments are required: (.*)", text)
    if missing and re.search(r"\b\w+\.(model|data)\b", missing.group(1)):
        text += (
            "\nGive a complete configuration, such as -c detection/own_images, and yours after it; or a checkpoint, "
            f"which holds one (--ckpt_path FILE). Those of the package are {', '.join(complete_configurations())}."
        )
    elif missing and (key := re.search(r'Parser key "([\w.]+)"', text)):
        names = [name for name in re.split(r"[,\s]+", missing.group(1)) if name]
        text += f"\nGive {' and '.join(f'--{key.group(1)}.{name} VALUE' for name in names)} after it."
    return _with_path(text + _suggestion(text))


def _with_path(text: str) -> str:
    """A message whose beginning is the whole path of an option, instead of a line for each of its parts."""
    path = ""
    while found := re.match(r'\s*(?:-\s*)?Parser key "([\w.]+)":\s*', text):
        path = found[1] if not path or found[1].startswith(f"{path}.") else f"{path}.{found[1]}"
        text = text[found.end() :]
    return f"{path}: {text.removeprefix('- ')}" if path else text


def _unknown_class(text: str) -> str | None:
    """The message for a class that cannot be imported, instead of the attempts to read it as something else."""
    key = re.search(r'^Parser key "([\w.]+)"', text)
    name = re.search(r"Expected a dot import path string: ?(\S*)", text)
    failed = re.search(r"Problem with given class_path '(.*?)':\s*(.*)", text)
    found = name or failed
    if key is None or found is None or key.group(1) not in _CLASSES:
        return None
    base, own = _CLASSES[key.group(1)]
    wanted = found.group(1)
    names = sorted({one.__name__ for one in _subclasses(base) if not inspect.isabstract(one)})
    close = difflib.get_close_matches(wanted.rpartition(".")[2], names, n=1, cutoff=0.75)
    reason = f" ({failed.group(2).strip().rstrip('.')})" if failed else ""
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"{key.group(1)}: there is no class {wanted!r}{reason}.{hint} Give a class of this project by its name, or "
        f"your own by its import path, such as {own}."
    )


def _not_a_section(text: str) -> str | None:
    """The message for one word where a section of options is expected, such as `--model.optimizer adamw`."""
    found = re.search(r'Parser key "([\w.]+)":\s+Unable to load config [\'"](.*?)[\'"]', text)
    outer = re.search(r'^Parser key "([\w.]+)"', text)
    if found is None or outer is None:
        return None
    key = found.group(1) if found.group(1).startswith(outer.group(1)) else f"{outer.group(1)}.{found.group(1)}"
    fields = _fields_of(key.rpartition(".")[2])
    if not fields:
        return None
    takes_word = next((name for name in ("name", "mechanism", "head") if name in fields), fields[0])
    return (
        f"{key}: {found.group(2)!r} is neither a section of options nor a YAML file of one. Give its options one by "
        f"one, such as --{key}.{takes_word} VALUE; it has {', '.join(fields)}."
    )


def _suggestion(text: str) -> str:
    """What an unknown option may have meant, as the end of a message."""
    unknown = re.search(r"(?:not accept(?:ed)? option|Option|unrecognized arguments:) '?-*([\w.]+)", text)
    if not unknown:
        return ""
    wrong = unknown.group(1).split(".")
    close = [name for part in wrong for name in difflib.get_close_matches(part, _known_options(), n=1, cutoff=0.75)]
    close = [name for name in close if name not in wrong]
    if close:
        return f"\nDid you mean {close[-1]!r}?"
    bases: dict[str, type] = {"model": BaseTask, "data": pl.LightningDataModule, "trainer": pl.Trainer}
    for section, base in bases.items():
        if text.startswith("unrecognized") and any(
            wrong[0] in inspect.signature(one).parameters for one in (base, *_subclasses(base))
        ):
            return f"\nDid you mean --{section}.{'.'.join(wrong)}?"
    group = re.search(r"Group '([\w.]+)' does not accept", text)
    fields = _fields_of(group.group(1).rpartition(".")[2] if group else wrong[-2] if len(wrong) > 1 else "")
    return f"\nThere are {', '.join(fields)}." if fields else ""


def _subclasses(base: type) -> Iterator[type]:
    classes: list[type] = base.__subclasses__()
    for one in classes:
        yield one
        yield from _subclasses(one)


def _sections() -> Iterator[tuple[str, object]]:
    """Name and default of every argument of everything that can be configured."""
    bases: tuple[type, ...] = (pl.Trainer, BaseTask, pl.LightningDataModule, RunOptions)
    for base in bases:
        for one in (base, *_subclasses(base)):
            for parameter in inspect.signature(one).parameters.values():
                yield parameter.name, parameter.default


def _fields_of(name: str) -> list[str]:
    """The options in the section of this name, if it is one."""
    for section, default in _sections():
        if section == name and dataclasses.is_dataclass(default):
            return [field.name for field in dataclasses.fields(default)]
    return []


def _known_options() -> set[str]:
    """Names of the arguments of everything that can be configured."""
    names = {"model", "data", "trainer", "run", "seed_everything", "ckpt_path", "class_path", "init_args"}
    names |= {"format", "output", "size", "trust", "weights"}  # of the subcommands that run no Trainer
    for name, default in _sections():
        names.add(name)
        if dataclasses.is_dataclass(default):
            names |= {field.name for field in dataclasses.fields(default)}
    return names
