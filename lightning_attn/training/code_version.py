"""Which version of the code trains: a digest of its sources, known without importing torch."""

import functools
import hashlib
from pathlib import Path

__all__ = ["code_version"]

_PACKAGES = Path(__file__).parents[2]
# They neither train nor test.
_WITHOUT_EFFECT = ("lightning_attn/study/", "lightning_attn/cli/study.py", "lightning_attn/export/")


@functools.cache
def code_version() -> str:
    """Twelve hexadecimal digits of all sources that training and testing may run."""
    digest = hashlib.sha256()
    for package in ("datamodules", "lightning_attn"):
        for path in sorted((_PACKAGES / package).rglob("*.py")):
            name = path.relative_to(_PACKAGES).as_posix()
            if not name.startswith(_WITHOUT_EFFECT):
                digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
