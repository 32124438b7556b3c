"""The configurations that come with the package, by names such as `miniature/detection`."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "bundled_configurations",
    "close_names",
    "complete_configurations",
    "described",
    "located",
    "packaged",
    "shown",
    "with_located_files",
]

_PACKAGE = Path(__file__).parent
_OPTIONS = ("-c", "--config")
_FOLDER = "configs"  # of a checkout, and what names may begin with


def bundled_configurations() -> dict[str, Path]:
    """All files, by their names without ending and folder of a checkout; overlays and studies too."""
    installed = _PACKAGE / _FOLDER
    root = installed if installed.is_dir() else _PACKAGE.with_name(_FOLDER)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def packaged(given: str) -> Path | None:
    """The package's configuration of a name, whose `configs/` and `.yaml` may be left out; None if there is none."""
    return bundled_configurations().get(_name(given))


def located(given: str) -> str:
    """A file, or if there is none of that name a configuration of the package: `configs/` and `.yaml` may be left out.

    Args:
        given: What the user calls it. It is returned if it is a file, or no name of a configuration either.
    """
    if not given or "\n" in given or len(given) > 200 or Path(given).expanduser().is_file():
        return given
    path = packaged(given)
    return given if path is None else str(path)


def shown(path: Path) -> str:
    """How to call a file in a command: by its name if it came with an installed package, whose folder is no one's."""
    installed = _PACKAGE / _FOLDER
    file = path.absolute()
    return file.relative_to(installed).with_suffix("").as_posix() if file.is_relative_to(installed) else str(path)


def complete_configurations() -> list[str]:
    """Names of those with a task and its data; the others are overlays and studies."""
    begun = re.compile(r"^model:.*?^data:", re.MULTILINE | re.DOTALL)
    found = bundled_configurations().items()
    return [name for name, path in found if begun.search(path.read_text(encoding="utf-8")) and "_alone" not in name]


def close_names(given: str) -> list[str]:
    """Names that may be meant by one that is none."""
    names = list(bundled_configurations())
    return difflib.get_close_matches(_name(given), names, n=3, cutoff=0.6)


def with_located_files(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line whose configuration files are `located`."""
    found: list[str] = []
    for argument in arguments:
        option, equals, file = argument.partition("=")
        if found and found[-1] in _OPTIONS:
            found.append(located(argument))
        elif equals and option in _OPTIONS:
            found.append(f"{option}={located(file)}")
        else:
            found.append(argument)
    return found


def described(path: Path) -> str:
    """What a configuration is for: a study's description, or the first sentence of the comment at the top."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("description:"):
            return line.removeprefix("description:").strip(' ".')
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif comment:
            break
    return re.split(r"(?<!Fig)\. ", " ".join(comment))[0].rstrip(".")


def _name(given: str) -> str:
    path = Path(given)
    plain = path.with_suffix("") if path.suffix in (".yaml", ".yml") else path
    return plain.as_posix().removeprefix(f"{_FOLDER}/")
