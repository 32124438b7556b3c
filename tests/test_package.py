"""The wheel and the source archive: what is in them, and that users find it outside of this repository."""

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
TASKS = ("detection", "segmentation", "translation", "multitask")
SHORT = [
    *("--trainer.max_steps", 3, "--trainer.val_check_interval", 3, "--trainer.limit_val_batches", 1),
    *("--trainer.num_sanity_val_steps", 0, "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
]


def build(folder: Path, kind: str, source: Path = REPOSITORY) -> Path:
    """Builds a distribution without the network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    return build(tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of the programs of an environment with the wheel, which borrows all other packages from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "-q", "--no-deps", wheel],
        timeout=300, check=True,
    )  # fmt: skip
    # Behind its own packages, and without the links to this repository that are beside them.
    borrowed = [path for path in sys.path if path.endswith("-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin"


def called(program: Path | str, *arguments: object, folder: Path, status: int = 0) -> str:
    done = subprocess.run(
        [program, *map(str, arguments)], cwd=folder, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_the_package_its_data_its_configurations_and_examples(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(set(names)) == len(names)
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("no repository")
    expected = {"datamodules/__init__.py"}
    for name in tracked.stdout.splitlines():
        if name.startswith("lightning_attn/") and (REPOSITORY / name).is_file():
            expected.add(name)
        elif name.startswith(("datamodules/", "configs/", "examples/")):
            expected.add(f"lightning_attn/{name}")
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_source_archive_is_whole_and_makes_the_same_wheel(wheel, tmp_path):
    archive = build(tmp_path, "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    for name in ("CHANGELOG.md", "constraints.txt", "docs/index.md", "tests/conftest.py", "train.py", "Makefile"):
        assert (source / name).is_file(), name
    again = build(tmp_path / "again", "wheel", source)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {name: one.read(name) for name in one.namelist() if "RECORD" not in name} == {
            name: other.read(name) for name in other.namelist() if "RECORD" not in name
        }


@pytest.mark.parametrize("task", TASKS)
def test_the_miniature_configurations_train_outside_of_the_repository(installed, task, tmp_path):
    """By the command of the documentation, in a folder that also has a package `datamodules` of the user's own."""
    own = tmp_path / "datamodules"
    own.mkdir()
    (own / "__init__.py").write_text("raise RuntimeError('this is not the package of the project')")
    name = f"configs/miniature/{task}.yaml" if task == "translation" else f"miniature/{task}"
    called(installed / "lightning-attn", "fit", "-c", name, *SHORT, folder=tmp_path)
    run = tmp_path / "checkpoints" / task / task
    assert (run / "last.ckpt").is_file()
    stored = yaml.safe_load((run / "config_fit.yaml").read_text())
    assert stored["data"]["class_path"].startswith("lightning_attn.datamodules.")
    printed = called(
        installed / "python", "-m", "lightning_attn", "test", "--ckpt_path", run / "last.ckpt",
        "--trainer.limit_test_batches", 1, folder=tmp_path,
    )  # fmt: skip
    assert "Scores written" in printed


def test_the_examples_run_where_they_are_copied_to(installed, tmp_path):
    """All of them: a task, a mechanism and data, from the folder of the installed package."""
    (source,) = installed.parent.glob("lib/python*/site-packages/lightning_attn/examples")
    examples = tmp_path / "examples"
    shutil.copytree(source, examples)
    tested = {"digits.py", "digits.yaml", "mean_attention.py", "mean_attention.yaml", "tab_separated.py"}
    assert {path.name for path in examples.iterdir() if path.is_file()} == tested | {"attention_maps.ipynb"}
    command = installed / "lightning-attn"
    called(command, "fit", "-c", "examples/digits.yaml", "--model.backbone.width", 8, *SHORT, folder=tmp_path)
    called(
        command, "test", "--ckpt_path", "checkpoints/classification/digits/last.ckpt", "--trust", "examples",
        folder=tmp_path,
    )  # fmt: skip
    called(
        command, "fit", "-c", "miniature/segmentation", "-c", "examples/mean_attention.yaml", *SHORT,
        "--data.batch_size", 1, folder=tmp_path,
    )  # fmt: skip
    pairs = "".join(f"The dog has {number} bones.\tDer Hund hat {number} Knochen.\n" for number in range(200))
    (tmp_path / "pairs.tsv").write_text(pairs)
    data = {
        "class_path": "examples.tab_separated.TabSeparatedDataModule",
        "init_args": {"pairs": "pairs.tsv", "root": "mine", "max_tokens": 500, "vocabulary_size": 60},
    }
    small = yaml.safe_load((REPOSITORY / "configs/miniature/translation.yaml").read_text()) | {"data": data}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    called(command, "fit", "-c", "small.yaml", *SHORT, folder=tmp_path)


def test_a_folder_called_datamodules_of_ones_own_has_classes_of_ones_own(installed, tmp_path):
    own = tmp_path / "datamodules"
    own.mkdir()
    (own / "__init__.py").write_text(
        "from lightning_attn.datamodules import MiniatureTranslationDataModule\n\n\n"
        "class Mine(MiniatureTranslationDataModule):\n    pass\n"
    )
    command = [installed / "python", "-m", "lightning_attn", "fit", "-c", "miniature/translation"]
    printed = called(*command, "--data", "datamodules.Mine", "--print_config", folder=tmp_path)
    assert "class_path: datamodules.Mine" in printed
    printed = called(*command, "--data", "datamodules.COCODataModule", folder=tmp_path, status=2)
    assert "COCODataModule" in printed


def test_configurations_are_listed_and_printed(installed, tmp_path):
    listed = called(installed / "lightning-attn", "configs", folder=tmp_path)
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == sorted(
        path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix()
        for path in (REPOSITORY / "configs").rglob("*.yaml")
    )
    printed = called(installed / "lightning-attn", "configs", "attention/attention_0010", folder=tmp_path)
    assert printed == (REPOSITORY / "configs/attention/attention_0010.yaml").read_text()
    error = called(installed / "lightning-attn", "configs", "attention/atention_0010", folder=tmp_path, status=2)
    assert "Did you mean attention/attention_0010" in error
    error = called(installed / "lightning-attn", "fit", folder=tmp_path, status=2)
    assert "Those of the package are detection/bccd, " in error
    for words in (["-c=miniature/nothing"], ["--config=miniature/nothing"], ["--config", "miniature/nothing"]):
        assert "nothing is not there" in called(installed / "lightning-attn", "fit", *words, folder=tmp_path, status=2)
        known = [word.replace("nothing", "detection") for word in words]
        printed = called(installed / "lightning-attn", "fit", *known, "--print_config", folder=tmp_path)
        assert "MiniatureDetectionDataModule" in printed
    study = "configs/studies/figure_3c_miniature.yaml"
    assert "waiting" in called(installed / "lightning-attn", "study", "run", study, "--dry-run", folder=tmp_path)


def test_a_file_of_ones_own_comes_before_a_configuration_of_the_package(installed, tmp_path):
    (tmp_path / "miniature").mkdir()
    (tmp_path / "miniature/detection").write_text("model: {class_path: NoSuchTask}\n")
    error = called(installed / "lightning-attn", "fit", "-c", "miniature/detection", folder=tmp_path, status=2)
    assert "NoSuchTask" in error


def test_both_names_of_the_data_are_one_package(installed, tmp_path):
    code = (
        "import datamodules.detection.coco as one, datamodules\n"
        "import lightning_attn.datamodules.detection.coco as other, lightning_attn\n"
        "from datamodules.images import files\n"
        "assert datamodules is lightning_attn.datamodules and one is other\n"
        "assert one.__spec__.name == one.__name__ == 'lightning_attn.datamodules.detection.coco'\n"
        "assert files.__name__.startswith('lightning_attn.')\n"
        "try:\n    import datamodules.nothing\nexcept ModuleNotFoundError as error:\n    print(error.name)\n"
    )
    assert called(installed / "python", "-c", code, folder=tmp_path).strip() == "datamodules.nothing"
    assert "usage" in called(installed / "python", "-m", "datamodules.check", "--help", folder=tmp_path)
