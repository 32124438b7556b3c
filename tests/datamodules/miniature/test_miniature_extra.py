"""What the miniature sets say without the packages that generate them."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from lightning_attn.datamodules.miniature import files
from lightning_attn.datamodules.miniature.detection import write_miniature_detection
from lightning_attn.datamodules.miniature.segmentation import write_miniature_segmentation
from lightning_attn.datamodules.miniature.translation import write_miniature_corpus
from lightning_attn.errors import MissingPackageError

ADVICE = r'pip install "generalized-attention\[miniature\]"'


@pytest.mark.parametrize(
    ("write", "module", "package"),
    [
        (write_miniature_corpus, "babel", "babel"),
        (write_miniature_corpus, "num2words", "num2words"),
        (write_miniature_detection, "skimage", "scikit-image"),
        (write_miniature_segmentation, "skimage", "scikit-image"),
    ],
)
def test_a_package_that_is_not_installed_is_named(write, module, package, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, module, None)
        with pytest.raises(MissingPackageError, match=f"generated with {package}, which is not installed: {ADVICE}"):
            write(tmp_path / "set")

    def version(name):
        if name == package:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(files, "version", version)
    with pytest.raises(MissingPackageError, match=f"generated with {package}, which is not installed: {ADVICE}"):
        write(tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("task", "module"), [("translation", "babel"), ("segmentation", "skimage")])
def test_the_command_ends_with_that_message(task, module, tmp_path):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from lightning_attn.cli import main\n"
        f"sys.argv[1:] = ['fit', '-c', 'miniature/{task}', '--data.root', 'set', '--trainer.max_steps', '1']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert 'pip install "generalized-attention[miniature]"' in done.stderr
    assert "Traceback" not in done.stderr
