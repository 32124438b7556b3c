import contextlib
from pathlib import Path

import pytest

from lightning_attn.cli import main


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory) -> Path:
    """The directory of a run."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        main(["fit", "-c", str(tiny_config)])
    return folder / "checkpoints/translation/tiny"
