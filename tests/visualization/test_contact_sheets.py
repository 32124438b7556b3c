import numpy as np
import pytest
import pytorch_lightning as pl
from cityscapes_data import name_of, write_cityscapes
from coco_data import CATEGORIES, FIRST_IDS, write_coco
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from parallel_corpus import write_corpus
from PIL import Image

from datamodules import CityscapesDataModule, COCODataModule, WMT14DataModule
from datamodules.translation.vocabulary import PAD_ID
from lightning_attn.io import write_figure
from lightning_attn.visualization.contact_sheets import browse_figure, main
from lightning_attn.visualization.detection import draw_detections


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "data")


def coco(root, **changes):
    return COCODataModule(str(root), **{"min_size": 0, "max_size": 0, **changes})


def rectangles(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


@pytest.fixture
def config(coco_root, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"seed_everything: 3\nmodel:\n  class_path: DetectionTask\n  init_args: {{anything: 5}}\n"
        f"data:\n  class_path: COCODataModule\n  init_args: {{root: {coco_root}, min_size: 0}}\n"
        "trainer: {max_steps: 5, devices: 1}\nrun: {name: x}\n"
    )
    return path


@pytest.mark.parametrize(("split", "number"), [("train", 10), ("val", 5), ("test", 5), ("predict", 5)])
def test_a_sheet_shows_every_image_with_its_boxes(coco_root, split, number):
    figure = browse_figure(coco(coco_root), split, 100)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == number
    module = coco(coco_root)
    module.setup({"train": "fit", "val": "validate"}.get(split, split))
    loader = module.train_dataloader() if split == "train" else module.val_dataloader() if split == "val" else None
    if loader is None:
        return
    batches = list(loader)
    images = [image for batch in batches for image in batch.images]
    targets = [target for batch in batches for target in batch.targets]
    for axes, image, target in zip(shown, images, targets, strict=True):
        names = [list(CATEGORIES.values())[label - 1] for label in target["labels"].tolist()]
        drawn = draw_detections(image, target["boxes"], names, categories=list(CATEGORIES.values()), longest_side=440)
        assert (axes.images[0].get_array() == drawn).all()
        assert f"{len(names)} boxes" in axes.get_title()


def test_a_sheet_is_not_larger_than_asked(coco_root):
    figure = browse_figure(coco(coco_root), "val", 3)
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(titles) == 3
    assert f"(id {FIRST_IDS['val2017']})" in "".join(titles)
    assert not any(axes.axison for axes in figure.axes if not axes.images)


@pytest.fixture(scope="module")
def cityscapes_root(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("cityscapes") / "data", {"train": 3, "val": 2})


@pytest.mark.parametrize("crop_size", [(20, 30), (30, 20)])
def test_a_sheet_shows_labels_in_their_colours(cityscapes_root, crop_size):
    def module():
        return CityscapesDataModule(str(cityscapes_root), crop_size=crop_size)

    figure = browse_figure(module(), "train", 9)
    expected = module()
    expected.setup("fit")
    batches = list(expected.train_dataloader())
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == len(batches) == 3
    occurring = set()
    for axes, batch in zip(shown, batches, strict=True):
        image, labels = batch.images[0].permute(1, 2, 0).numpy(), batch.labels[0].numpy()
        colours = np.array([*expected.classes.colours] + [(255, 255, 255)] * (256 - 19), dtype=np.uint8)
        axis = 0 if crop_size == (20, 30) else 1
        assert (axes.images[0].get_array() == np.concatenate((image, colours[labels]), axis=axis)).all()
        assert axes.get_title().startswith(f"{batch.names[0]} (id {batch.ids[0]})\n{crop_size[1]} x {crop_size[0]}, ")
        occurring |= set(labels.ravel().tolist())
    keys = {text.get_text(): key for text, key in zip(figure.legends[0].texts, figure.legends[0].get_patches())}  # noqa: B905
    assert set(keys) == {(*expected.classes.names, *["ignored"] * 237)[label] for label in occurring}
    for name, colour in zip(expected.classes.names, expected.classes.colours, strict=True):
        assert name not in keys or np.array(keys[name].get_facecolor()[:3]) * 255 == pytest.approx(colour)


def test_a_sheet_of_images_without_labels(cityscapes_root):
    module = CityscapesDataModule(str(cityscapes_root))
    figure = browse_figure(module, "predict", 1)
    (axes,) = [axes for axes in figure.axes if axes.images]
    assert axes.images[0].get_array().shape == (40, 64, 3)
    assert axes.get_title() == f"{name_of('val', 0)} (id 0)\n64 x 40, no labels"
    assert not figure.legends


def test_a_sheet_of_sentences_shows_pieces_and_padding(tmp_path):
    module = WMT14DataModule(str(write_corpus(tmp_path / "corpus")), vocabulary_size=60, max_tokens=400)
    figure = browse_figure(module, "train", 6)
    (axes,) = figure.axes
    batch = next(iter(module.train_dataloader()))
    rows = [row for pair in zip(batch.source, batch.target, strict=True) for row in pair][:12]
    texts = [text.get_text() for text in axes.texts]
    assert texts == [piece.replace("\u2581", "_") for row in rows for piece in module.vocabulary.pieces(row.tolist())]
    grey = sum(cell.get_facecolor()[0] < 0.9 for cell in rectangles(axes))
    assert grey == sum(int((row == PAD_ID).sum()) for row in rows)
    assert len(axes.get_yticklabels()) == 12
    assert len(browse_figure(module, "predict", 2).axes[0].get_yticklabels()) == 2, "there are no targets"


def test_the_command_writes_a_sheet_and_keeps_what_is_there(config, tmp_path, capsys):
    for name in ("sheet.png", "sheet-2.png"):
        main(["-c", str(config), "--num", "2", "--output", str(tmp_path / "sheets" / "sheet.png")])
        assert capsys.readouterr().out == f"Contact sheet written to {tmp_path / 'sheets' / name}\n"
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["sheet-2.png", "sheet.png"]
    with Image.open(tmp_path / "sheets" / "sheet.png") as image:
        assert image.width > 200


@pytest.mark.filterwarnings("error")
def test_the_command_makes_nothing_but_the_data(config, tmp_path):
    config.write_text(config.read_text().replace("DetectionTask", "torch.nn.Linear"))
    main(["-c", str(config), "--num", "1", "--output", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").is_file()


def test_the_command_takes_options_and_overlays(config, tmp_path, monkeypatch):
    shown = {}

    def browse(module, split, num):
        shown.update(module=module, split=split, num=num)
        return Figure()

    monkeypatch.setattr("lightning_attn.visualization.contact_sheets.browse_figure", browse)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {batch_size: 3}}\nmodel: {init_args: {more: 1}}\n")
    command = ["-c", str(config), "-c", str(overlay), "--data.max_size", "77", "--split", "val"]
    main([*command, "--output", str(tmp_path / "a.pdf")])
    module = shown["module"]
    assert isinstance(module, COCODataModule)
    assert (module.batch_size, module.max_size, module.min_size) == (3, 77, 0)
    assert (shown["split"], shown["num"]) == ("val", 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "dev"], "error: split: 'dev' is unknown; use one of train, val, test, predict"),
        (["--num", "0"], "error: num: 0 is too small"),
        (["--data.root", "nowhere"], "error: root: the folder nowhere does not exist"),
        (["--data.batch_size", "0"], "batch_size: 0 is too small"),
        (["--output", "sheet.doc"], "error: output: sheet.doc has no suffix of a figure format; use one of ."),
        (["--data.batchsize", "3"], "batchsize"),
    ],
)
def test_mistakes_are_said_in_one_line(config, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["-c", str(config), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_data_of_one_task_of_a_joint_training(multitask_config, tmp_path, capsys):
    call = ["-c", str(multitask_config), "--output", str(tmp_path / "sheet.png"), "--num", "2"]
    for options, message in (
        ([], "member: '' is none of the members; give --member with one of detection, segmentation."),
        (["--member", "boxes"], "member: 'boxes' is none of the members"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*call, *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    main([*call, "--member", "detection"])
    assert (tmp_path / "sheet.png").is_file()


def test_a_module_of_ones_own():
    class Bare(pl.LightningDataModule):
        pass

    class Own(pl.LightningDataModule):
        def browse_figure(self, split, num):
            return f"{split} {num}"

    assert browse_figure(Own(), "val", 3) == "val 3"
    with pytest.raises(ValueError, match=r"Bare has no contact sheet; define a method browse_figure\(split, num\)"):
        browse_figure(Bare(), "val", 3)


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    figure = Figure()
    figure.savefig = lambda path, **_: (_ for _ in ()).throw(OSError("full"))
    with pytest.raises(OSError, match="full"):
        write_figure(tmp_path / "a.png", figure)
    assert list(tmp_path.iterdir()) == []


def test_text_of_a_data_set_is_no_formula(tmp_path, coco_root):
    module = coco(coco_root)
    module.setup("fit")
    figure = browse_figure(module, "val", 2)
    figure.axes[0].set_title("$\\frac")
    write_figure(tmp_path / "a.png", figure)
