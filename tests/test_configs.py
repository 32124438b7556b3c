"""Every shipped YAML is parsed and run for two steps through the real command."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_layouts import write_yolo
from PIL import Image
from small_sizes import (
    ONE_PROCESS,
    QUICK,
    SMALL_DETECTION,
    SMALL_MULTITASK,
    SMALL_SEGMENTATION,
    SMALL_TRANSLATION,
    small_miniature_writers,
)

from lightning_attn.attention import AttentionSpec
from lightning_attn.attention.spec import TERM_SETS
from lightning_attn.study.grid import Study

CONFIGS = Path(__file__).parents[1] / "configs"


def paths(folder: str) -> list[Path]:
    return [path for path in sorted((CONFIGS / folder).glob("*.yaml")) if path.stem != "own_images"]


@pytest.mark.parametrize("path", [*paths("translation"), CONFIGS / "miniature/translation.yaml"], ids=lambda p: p.stem)
def test_translation_configurations(run, corpus, path):
    download = ["--data.download", "false"] if "wmt14" in path.stem else []
    root = corpus if "miniature" not in str(path) else "small"
    run("fit", "-c", path, *SMALL_TRANSLATION, *QUICK, *ONE_PROCESS, "--data.root", root, *download)
    assert list(Path("checkpoints/translation").glob("*/last.ckpt"))


def test_detector_overlay(run, coco):
    """Any configuration of detection can be that of a RetinaNet."""
    base = ["-c", CONFIGS / "detection/bccd.yaml", "-c", CONFIGS / "detector/retinanet.yaml"]
    small = [option for option in SMALL_DETECTION if option not in ("--model.detector.fc_dim", 16)]
    run("fit", *base, *small, *QUICK, *ONE_PROCESS, "--data.root", coco)
    (checkpoint,) = Path("checkpoints/detection").glob("*/last.ckpt")
    run("test", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")
    assert (checkpoint.parent / "test_metrics.json").is_file()


@pytest.mark.parametrize("path", [*paths("detection"), CONFIGS / "miniature/detection.yaml"], ids=lambda p: p.stem)
def test_detection_configurations(run, coco, path):
    root = coco if "miniature" not in str(path) else "small"
    run("fit", "-c", path, *SMALL_DETECTION, *QUICK, *ONE_PROCESS, "--data.root", root)
    (checkpoint,) = Path("checkpoints/detection").glob("*/last.ckpt")
    run("test", "-c", checkpoint.with_name("config_fit.yaml"), "--ckpt_path", checkpoint)
    assert (checkpoint.parent / "test_metrics.json").is_file()


@pytest.mark.parametrize(
    "path", [*paths("segmentation"), CONFIGS / "miniature/segmentation.yaml"], ids=lambda p: p.stem
)
def test_segmentation_configurations(run, cityscapes, path):
    root = cityscapes if "miniature" not in str(path) else "small"
    run("fit", "-c", path, *SMALL_SEGMENTATION, *QUICK, *ONE_PROCESS, "--data.root", root)
    (checkpoint,) = Path("checkpoints/segmentation").glob("*/last.ckpt")
    run("test", "-c", checkpoint.with_name("config_fit.yaml"), "--ckpt_path", checkpoint)
    assert (checkpoint.parent / "test_metrics.json").is_file()


JOINT = [*(path for path in paths("multitask") if "alone" not in path.stem), CONFIGS / "miniature/multitask.yaml"]


@pytest.mark.parametrize("path", JOINT, ids=lambda path: path.stem)
def test_multitask_configurations(run, coco, cityscapes, path):
    roots = {"detection": coco, "segmentation": cityscapes}
    if "miniature" in str(path):
        roots = {"detection": "boxes", "segmentation": "labels"}
    data = [option for name, root in roots.items() for option in (f"--data.members.{name}.init_args.root", root)]
    run("fit", "-c", path, *SMALL_MULTITASK, *QUICK, *ONE_PROCESS, *data)
    (checkpoint,) = Path("checkpoints/multitask").glob("*/last.ckpt")
    run("test", "-c", checkpoint.with_name("config_fit.yaml"), "--ckpt_path", checkpoint)
    scores = json.loads((checkpoint.parent / "test_metrics.json").read_text())
    assert {"test/detection/ap", "test/segmentation/miou"} <= scores.keys()
    overlay = ["-c", CONFIGS / "attention/attention_0001.yaml"]
    printed = run("fit", "-c", path, *overlay, *data, "--print_config")
    resolved = yaml.safe_load(printed[printed.index("seed_everything:") :])
    assert resolved["model"]["init_args"]["attention"]["terms"] == "0001"


def test_the_beginnings_for_own_images(run, coco, tmp_path):
    yolo = write_yolo(coco, tmp_path / "yolo", {"train2017": "train", "val2017": "val"})
    run("fit", "-c", CONFIGS / "detection/own_images.yaml", *SMALL_DETECTION, *QUICK, "--data.root", yolo)
    assert "There is no test split" in run("test", "--ckpt_path", "checkpoints/detection/own_images/last.ckpt")
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "folders" / kind / split).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "folders/images" / split / f"{number}.jpg")
            mask = np.where(pixels[..., 0] > 128, 255, 0).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / "folders/masks" / split / f"{number}.png")
    own = ["--data.root", tmp_path / "folders"]
    run("fit", "-c", CONFIGS / "segmentation/own_images.yaml", *SMALL_SEGMENTATION, *QUICK, *own)
    run("predict", "--ckpt_path", "checkpoints/segmentation/own_images/last.ckpt")
    folder = Path("checkpoints/segmentation/own_images/predictions")
    assert (folder / "classes.csv").read_text().split() == [
        "id,class,red,green,blue",
        "0,background,31,119,180",
        "255,thing,255,127,14",
    ]
    values = {value for path in (folder / "labels").iterdir() for value in np.unique(Image.open(path)).tolist()}
    assert values <= {0, 255}


@pytest.fixture(autouse=True)
def small_miniature(monkeypatch):
    """The miniature DataModules write small sets."""
    for place, write in small_miniature_writers().items():
        monkeypatch.setattr(place, write)


def promised(name: str) -> tuple[str, dict[str, object]]:
    """The slot and the fields that an overlay's file name promises."""
    slot, *words = name.split("_")
    match words:
        case ["dynamic", size]:
            return slot, {"mechanism": "dynamic", "kernel_size": int(size), "convolution": "regular", "window": None}
        case ["deformable" | "modulated" as kind, *rest]:
            convolution = {"deformable": "deformable", "modulated": "modulated_deformable"}[kind]
            return slot, promised("_".join([slot, *rest]))[1] | {"convolution": convolution}
        case ["none"]:
            return slot, {"mechanism": "none", "convolution": "regular", "window": None}
        case [terms, "window", size]:
            return slot, promised(f"{slot}_{terms}")[1] | {"window": int(size)}
        case [terms]:
            return slot, {"mechanism": "transformer", "terms": terms, "convolution": "regular", "window": None}
    raise AssertionError(f"{name}.yaml: what does the name promise?")


@pytest.mark.parametrize("path", paths("attention"), ids=lambda path: path.stem)
def test_attention_overlays(run, tiny_config, detection_config, path):
    """Each is the whole of its row, whatever the configuration before it says."""
    slot, fields = promised(path.stem)
    config = detection_config if slot == "attention" else tiny_config
    field = "attention" if slot == "attention" else f"{slot}_attention"
    other = {"mechanism": "transformer", "terms": "0110", "convolution": "deformable", "window": 5}
    Path("other.yaml").write_text(yaml.safe_dump({"model": {"init_args": {field: other}}}))
    quick = ["--trainer.limit_val_batches", 0, "--trainer.logger", "false", "--trainer.max_steps", 2]
    run("fit", "-c", config, "-c", "other.yaml", "-c", path, *quick, "--run.name", "tiny")
    (folder,) = Path("checkpoints").glob("*/tiny")
    stored = yaml.safe_load((folder / "config_fit.yaml").read_text())
    spec = stored["model"]["init_args"][field]
    assert {name: spec[name] for name in fields} == fields
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("slot", ["self", "attention"])
def test_there_is_an_overlay_for_every_row_of_the_paper_s_tables(slot):
    """Fig. 3a to 3c, and both columns of Table 2 and of Table 3."""
    with_deformable = ["1111", "1011", "1010", "1001", "1000", "0011", "0010", "0001", "none"]
    rows = [*TERM_SETS, "none", *(f"deformable_{row}" for row in with_deformable)]
    rows += [f"{kind}_{size}" for kind in ("0100_window", "dynamic") for size in (31, 25, 19, 13)]
    assert {f"{slot}_{row}" for row in rows} <= {path.stem for path in paths("attention")}


@pytest.mark.parametrize("slot", ["attention", "self", "cross"])
def test_an_overlay_replaces_any_other_of_its_slot(slot):
    """Whatever the first one sets, the second one is valid and decides every field of the attention."""
    overlays = []
    for path in sorted((CONFIGS / "attention").glob(f"{slot}_*.yaml")):
        (fields,) = yaml.safe_load(path.read_text())["model"]["init_args"].values()
        overlays.append(fields)
    for first, second in itertools.permutations(overlays, 2):
        assert AttentionSpec(**first | second) == AttentionSpec(**second)


def trainer_of(name: str) -> dict[str, object]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]


def test_an_overlay_of_a_machine_replaces_any_other():
    """Each decides where processes run; what a check that everything runs decides is another matter."""
    machines = {path.stem: trainer_of(f"trainer/{path.stem}") for path in paths("trainer") if path.stem != "debug"}
    assert {frozenset(fields) for fields in machines.values()} == {
        frozenset(("accelerator", "devices", "num_nodes", "strategy"))
    }
    assert machines["cpu"]["accelerator"] == "cpu"


@pytest.mark.parametrize("task", ["translation", "detection", "segmentation", "multitask"])
def test_the_miniature_configurations_run_on_whatever_is_there(task):
    """On one GPU if there is one: the same experiment on every machine."""
    fields = trainer_of(f"miniature/{task}")
    assert (fields["accelerator"], fields["devices"]) == ("auto", 1)


@pytest.mark.parametrize("path", paths("trainer"), ids=lambda path: path.stem)
def test_trainer_overlays(run, tiny_config, path):
    """On one CPU process: what differs from host to host is taken back."""
    run("fit", "-c", tiny_config, "-c", path, *ONE_PROCESS, "--trainer.max_steps", 2)
    assert Path("checkpoints/translation/tiny/last.ckpt").is_file()


@pytest.mark.parametrize(
    "path",
    [path for path in paths("studies") if path.stem.endswith("_miniature") and "joint" not in path.stem],
    ids=lambda path: path.stem,
)
def test_every_cell_of_a_study_is_a_configuration(run, path):
    """The parser of the command resolves each, to the attention that its label promises."""
    study = Study.read(path)
    ((axis, levels),) = study.axes.items()
    slot = axis.removesuffix("_attention")
    assert [cell.group for cell in study.cells if cell.seed == 0] == [(level.label,) for level in levels]
    assert study.reference.keys() == set(study.groups)
    for cell in study.cells:
        if cell.seed == study.seeds[-1]:
            printed = run(*cell.arguments("fit", Path("cell")), "--print_config")
            resolved = yaml.safe_load(printed[printed.index("seed_everything:") :])
            spec = resolved["model"]["init_args"][axis]
            fields = promised(f"{slot}_{cell.group[0]}")[1]
            assert {name: spec[name] for name in fields} == fields
            AttentionSpec(**spec)
            assert resolved["seed_everything"] == study.seeds[-1]
            assert resolved["trainer"]["max_steps"] == cell.total_steps


@pytest.mark.parametrize(("task", "other"), [("detection", "segmentation"), ("segmentation", "detection")])
def test_joint_against_single_at_equal_images_and_at_equal_multiply_adds(run, task, other):
    study, twin = (Study.read(CONFIGS / f"studies/joint_{name}_miniature.yaml") for name in (task, other))
    assert study.groups == [("joint",), (f"{task}_equal_images",), (f"{task}_equal_work",)]
    joint = {cell.name for cell in study.cells if cell.group == ("joint",)}
    assert joint == {cell.name for cell in twin.cells if cell.group == ("joint",)}
    assert study.folder == twin.folder
    work = {}
    for cell in study.cells[:: len(study.seeds)]:
        printed = run(*cell.arguments("fit", Path("cell")), "--print_config")
        resolved = yaml.safe_load(printed[printed.index("seed_everything:") :])
        tasks = {name for name, one in resolved["model"]["init_args"]["tasks"].items() if one is not None}
        members = {name for name, one in resolved["data"]["init_args"]["members"].items() if one is not None}
        assert tasks == members == ({task, other} if cell.group == ("joint",) else {task})
        trainer = resolved["trainer"]
        assert trainer["max_steps"] % trainer["val_check_interval"] == 0, "the last step is validated"
        run(*cell.profile_arguments(Path(f"{cell.group[0]}.json")), "--device", "meta")
        counted = json.loads(Path(f"{cell.group[0]}.json").read_text())["forward"]["multiply_adds"]
        work[cell.group[0]] = counted * trainer["max_steps"]
    assert work[f"{task}_equal_work"] == pytest.approx(work["joint"], rel=2e-3)
    assert work[f"{task}_equal_images"] < 0.6 * work["joint"]


def test_there_is_a_study_for_every_table_of_the_paper():
    """Fig. 3a to 3d; each column of Tables 2 and 3 is a task."""
    columns = [f"table_{number}_{task}" for number in (2, 3) for task in ("detection", "segmentation", "translation")]
    wanted = {*(f"figure_3{letter}" for letter in "abcd"), *columns}
    assert {f"{name}_{size}" for name in wanted for size in ("miniature", "small")} <= {
        path.stem for path in paths("studies")
    }


@pytest.mark.parametrize(
    "path", [path for path in paths("studies") if path.stem.endswith("_small")], ids=lambda path: path.stem
)
def test_a_small_study_is_the_miniature_one_on_real_data(run, path):
    """Every option of its cells is one, and the schedule fits the shorter training."""
    small, miniature = Study.read(path), Study.read(path.with_stem(path.stem.replace("_small", "_miniature")))
    for name in ("axes", "seeds", "metric", "scale", "reference", "findings"):
        assert getattr(small, name) == getattr(miniature, name)
    cell = small.cells[0]
    printed = run(*cell.arguments("fit", Path("cell")), "--print_config")
    resolved = yaml.safe_load(printed[printed.index("seed_everything:") :])
    steps = resolved["trainer"]["max_steps"]
    assert steps == cell.total_steps
    assert steps % resolved["trainer"]["val_check_interval"] == 0, "the last weights are validated"
    assert resolved["model"]["init_args"]["schedule"]["warmup_steps"] < steps / 2
    assert "miniature" not in resolved["data"]["class_path"].lower()
