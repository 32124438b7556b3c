"""constraints-oldest.txt, constraints.txt, the Dockerfile and CITATION.cff agree with what they are made from."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import lightning_attn

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    line
    for lines in (
        PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][name] for name in ("dev", "miniature", "onnx", "torchjd")),
    )
    for line in lines
    if not line.startswith(PROJECT["name"])
]
RAISED = ("typing-extensions",)  # the newest releases of what others depend on need a newer one


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def release(version):
    numbers = [int(number) for number in version.split(".")]
    return tuple(numbers + [0] * (4 - len(numbers)))


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_the_oldest_versions_are_the_lower_bounds(line):
    name, bound = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?(?:>=([\d.]+))?(?:,<[\d.]+)?", line).groups()
    pinned = pins("constraints-oldest.txt")[normal(name)]
    if name in RAISED:
        assert release(pinned) > release(bound)
    elif bound is not None:
        assert release(pinned) == release(bound), f"{line}, but constraints-oldest.txt has {pinned}"
    if bound is not None:
        latest = pins("constraints.txt").get(normal(name))
        assert latest is None or release(latest) >= release(bound)


def test_the_commands_of_the_image_name_what_exists():
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert "make .venv/installed\n" in text
    assert 'CMD ["make", "quickstart"]' in text
    for target in ("quickstart", ".venv/installed", ".venv/created"):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    assert (REPOSITORY / "constraints.txt").is_file()
    assert text.index("USER user") < text.index("CMD")
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    needed = (
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "datamodules",
        "configs",
        "lightning_attn",
        "examples",
        "Makefile",
    )
    assert not set(ignored) & set(needed)


def test_the_version_is_one():
    stored = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert stored["version"] == lightning_attn.__version__
