"""What other systems than Linux lack is not needed to import the package."""

import subprocess
import sys

IMPORT_ALL = """
import builtins, importlib, pkgutil, signal

LACKING = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}  # in Windows
original = builtins.__import__


def without_posix(name, globals=None, *others, **named):
    importer = (globals or {}).get("__name__", "")
    if name in LACKING and importer.startswith("lightning_attn"):  # others have their own ways around
        raise ImportError(f"{importer} imports {name}, which Windows lacks")
    return original(name, globals, *others, **named)


builtins.__import__ = without_posix
import lightning_attn

# Triton, a compiler for GPUs, need not be there.
left_out = ("lightning_attn.__main__", "lightning_attn.attention.kernels.")
names = [one.name for one in pkgutil.walk_packages(lightning_attn.__path__, "lightning_attn.")]
names = [name for name in names if not name.startswith(left_out)]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_is_imported_without_what_windows_lacks():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150
