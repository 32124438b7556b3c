"""Which version of the code trains: a digest of its sources, known without importing torch."""

import functools
import hashlib
from pathlib import Path

__all__ = ["code_version"]

_PACKAGE = Path(__file__).parents[1]
# They neither train nor test.
_WITHOUT_EFFECT = ("study/", "cli/study.py", "export/")


@functools.cache
def code_version() -> str:
    """Twelve hexadecimal digits of all sources that training and testing may run."""
    digest = hashlib.sha256()
    linked = _PACKAGE / "datamodules"  # in a checkout, beside the package
    data = linked.resolve() if linked.is_dir() else _PACKAGE.with_name("datamodules")
    sources = {f"datamodules/{path.relative_to(data).as_posix()}": path for path in data.rglob("*.py")}
    sources |= {path.relative_to(_PACKAGE).as_posix(): path for path in _PACKAGE.rglob("*.py")}
    for name, path in sorted(sources.items()):
        if not name.startswith(_WITHOUT_EFFECT):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
