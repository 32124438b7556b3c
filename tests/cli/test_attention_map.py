"""The subcommand `attention-map`: for a detector, a segmenter, a translator, an export and a joint training."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_attn.cli import main
from lightning_attn.tasks import BaseTask, DetectionTask
from lightning_attn.visualization import record_image
from lightning_attn.visualization.levels import image_levels

REPOSITORY = Path(__file__).parents[2]
DETECTOR_LAYERS = ["backbone.body.layer3.0", "backbone.body.layer4.0"]


def train(folder, config, *options):
    with contextlib.chdir(folder):
        main([str(one) for one in ("fit", "-c", config, "--trainer.max_steps", 2, *options)])
    (path,) = folder.glob("checkpoints/*/*/last.ckpt")
    return path


@pytest.fixture(scope="module")
def detector(detection_config, tmp_path_factory):
    terms = ("--model.attention.terms", "1111")
    return train(tmp_path_factory.mktemp("detector"), detection_config, *terms)


@pytest.fixture(scope="module")
def segmenter(segmentation_config, tmp_path_factory):
    return train(tmp_path_factory.mktemp("segmenter"), segmentation_config, "--model.attention.terms", "0110")


@pytest.fixture(scope="module")
def translator(tiny_config, tmp_path_factory):
    return train(tmp_path_factory.mktemp("translator"), tiny_config)


@pytest.fixture(scope="module")
def joint(multitask_config, tmp_path_factory):
    return train(tmp_path_factory.mktemp("joint"), multitask_config)


@pytest.fixture
def image(in_folder):
    path = in_folder / "odd.png"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 451, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def content(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_a_detector(run, detector, image):
    printed = run("attention-map", "--ckpt_path", detector, "--image", image)
    folder = detector.parent / "attention" / "odd"
    assert f"1 figure, and a page to explore: {folder / 'index.html'}" in printed
    assert Image.open(folder / "attention.png").size[0] > 500
    data = content(folder / "index.html")
    assert data["original"] == [300, 451]
    assert data["size"] == [48, 72], "as the data was resized"
    (layer,) = data["layers"]
    assert layer["name"] == DETECTOR_LAYERS[-1]
    assert (layer["stride"], layer["map_size"], layer["key_size"]) == (32, [2, 3], [2, 3])
    assert layer["terms"] == ["E1", "E2", "E3", "E4", "whole"]
    assert layer["heads"] == ["mean", "1", "2"]
    assert layer["blocks"]["E3"]["mean"]["rows"] == 1, "E3 does not depend on the query, and is kept once"
    assert layer["blocks"]["E1"]["mean"]["rows"] == 6

    run("attention-map", "--ckpt_path", detector, "--image", image)
    assert (detector.parent / "attention" / "odd-2" / "index.html").is_file(), "nothing is overwritten"


def test_chosen_queries_layers_heads_and_terms(run, detector, image, in_folder):
    options = ("--layer", "layer3.0", "--layer", "layer4.0", "--head", 2, "--terms", "E1", "E4")
    queries = ("--query", 0, 0, "--query", 299, 450)
    run("attention-map", "--ckpt_path", detector, "--image", image, *options, *queries, "--output", "maps")
    expected = {f"{layer}_{place}.png" for layer in DETECTOR_LAYERS for place in ("0_0", "299_450")}
    assert {path.name for path in (in_folder / "maps").glob("*.png")} == expected
    data = content(in_folder / "maps" / "index.html")
    assert [one["name"] for one in data["layers"]] == DETECTOR_LAYERS
    assert data["layers"][0]["terms"] == ["E1", "E4", "whole"]
    assert data["start"] == {"layer": DETECTOR_LAYERS[1], "head": "2", "term": "whole", "query": [0, 0]}


def test_a_segmenter(run, segmenter, image):
    run("attention-map", "--ckpt_path", segmenter, "--image", image)
    data = content(segmenter.parent / "attention" / "odd" / "index.html")
    (layer,) = data["layers"]
    assert layer["name"] == "head", "the last layer is the head's"
    assert data["size"] == [300, 451]
    assert (layer["stride"], layer["map_size"], layer["key_size"]) == (8, [39, 58], [38, 57])
    assert layer["terms"] == ["E2", "E3", "whole"]
    size = (segmenter.parent / "attention" / "odd" / "index.html").stat().st_size
    assert size < 4_000_000


def test_a_translator(run, translator, in_folder):
    source = "Two men are in a park."
    printed = run("attention-map", "--ckpt_path", translator, "--source", source, "--target", "Ein Mann")
    page = Path(re.search(r"explore: (\S+)", printed)[1])
    assert page.parent == translator.parent / "attention" / "Two_men_are_in_a_park"
    (layer,) = content(page)["layers"]
    assert layer["name"] == "decoder.0.cross_attention"
    assert layer["queries"][-1] == "</s>"
    assert "".join(layer["keys"]).replace("_", " ").strip().startswith("Two men are in a park.")
    assert Image.open(page.parent / "attention.png").size[0] > 300

    options = ("--layer", "encoder.0.self_attention", "--query", "men", "--query", 1, "--output", "words")
    run("attention-map", "--ckpt_path", translator, "--source", source, "--target", "Ein Mann", *options)
    pictures = sorted(path.name for path in (in_folder / "words").glob("*.png"))
    (layer,) = content(in_folder / "words" / "index.html")["layers"]
    men = content(in_folder / "words" / "index.html")["start"]["query"]
    assert "".join(layer["queries"][men:]).startswith("_men")
    assert pictures == sorted(f"encoder.0.self_attention_{place}.png" for place in (men + 1, 1))


def test_an_export_and_a_joint_training(run, joint, image, in_folder):
    printed = run("attention-map", "--ckpt_path", joint, "--image", image, status=2)
    assert "of a joint training of detection and segmentation. Say which is meant: --task detection" in printed
    run("attention-map", "--ckpt_path", joint, "--image", image, "--task", "segmentation", "--output", "joint")
    assert content(in_folder / "joint" / "index.html")["layers"][0]["stride"] == 8
    run("export", "--ckpt_path", joint, "--task", "detection", "--output", "export")
    run("attention-map", "--ckpt_path", "export/model.safetensors", "--image", image)
    assert (in_folder / "export" / "attention" / "odd" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "image, source: neither is given. Give a picture (--image FILE) or a sentence"),
        (["--image", "odd.png", "--source", "a"], "image, source: both are given"),
        (["--image", "odd.png", "--target", "a"], "target: a picture has no translation"),
        (["--source", " "], "source: ' ' has no word"),
        (["--source", "Two men."], "is of images (detection). Give one: --image FILE"),
        (["--image", "none.png"], "none.png"),
        (["--image", "odd.png", "--layer", "layer9"], f"layer: 'layer9' is no layer with an attention map. Give one "
         f"of {', '.join(DETECTOR_LAYERS)}"),
        (["--image", "odd.png", "--layer", "0"], "layer: '0' may be backbone.body.layer3.0 or backbone.body.layer4.0"),
        (["--image", "odd.png", "--head", "3"], "head: 3 is none of the heads 1 to 2 of backbone.body.layer4.0"),
        (["--image", "odd.png", "--head", "all"], "head: 'all' is neither the number of a head, from 1 on, nor mean"),
        (["--image", "odd.png", "--terms", "E5"], "terms: 'E5' is none of E1 E2 E3 E4"),
        (["--image", "odd.png", "--query", "300", "0"], "query: '300 0' is not in the picture, whose rows are 0 to"),
        (["--image", "odd.png", "--query", "7"], "query: '7' is not the row and the column of a pixel, such as"),
        (["--image", "odd.png", "--output", "taken"], "taken/index.html is there, and is kept. Give another folder"),
        (["--image", "odd.png", "--output", "odd.png"], "odd.png is a file and is kept"),
    ],
)  # fmt: skip
def test_mistakes(run, detector, image, in_folder, arguments, message):
    (in_folder / "taken").mkdir()
    (in_folder / "taken" / "index.html").write_text("mine")
    printed = run("attention-map", "--ckpt_path", detector, *arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed
    assert (in_folder / "taken" / "index.html").read_text() == "mine"


def test_mistakes_of_sentences_and_terms(run, translator, segmenter, image, in_folder):
    given = ("attention-map", "--ckpt_path", translator)
    assert "translates, and takes no image. Give a sentence" in run(*given, "--image", image, status=2)
    words = (*given, "--source", "Two men.", "--target", "Ein", "--query", "Elefant")
    assert "query: 'Elefant' is no query of decoder.0.cross_attention. Give one of its tokens" in run(*words, status=2)
    off = run("attention-map", "--ckpt_path", segmenter, "--image", image, "--terms", "E1", status=2)
    assert "terms: E1 is off in head, which has E2 E3. Give some of these." in off


def test_a_network_without_terms(run, detection_config, tmp_path_factory, image):
    folder = tmp_path_factory.mktemp("none")
    none = train(folder, detection_config, "-c", REPOSITORY / "configs/attention/attention_none.yaml")
    printed = run("attention-map", "--ckpt_path", none, "--image", image, status=2)
    assert "has no attention with terms" in printed


def test_levels_are_the_weights_of_the_maps(detector):
    """To 8 bits, for every query, head and term."""
    task = DetectionTask.load(detector)
    assert isinstance(task, BaseTask)
    recorded = record_image(task.built_network, torch.randint(0, 255, (3, 90, 140), dtype=torch.uint8))
    layer = DETECTOR_LAYERS[0]
    for step in (1, 2):
        levels = image_levels(recorded, layer, None, heads=None, step=step)
        rows, columns = recorded.grid(layer).inside
        low, high = levels.scale[1:]
        positions = [(row, column) for row in range(0, rows, step) for column in range(0, columns, step)]
        assert levels.facts["query_size"] == [-(-rows // step), -(-columns // step)]
        for place, position in enumerate(positions):
            maps = recorded.maps(layer, position)
            for (term, head), found in levels.levels.items():
                weights = maps.whole if term == "whole" else maps.weights[term]
                weights = weights.double().mean(0) if head == "mean" else weights[int(head) - 1].double()
                shown = weights[:rows, :columns].reshape(-1) * weights.numel()
                expected = shown.log2().clamp(low, high)
                row = torch.tensor(found[0 if len(found) == 1 else place].astype(float))
                assert (row >= 1).all()
                decoded = low + (row - 1) / 254 * (high - low)
                assert (decoded - expected).abs().max() <= 0.51 * (high - low) / 254
                if head == "mean" and term == "whole":
                    outside = 1 - float(weights[:rows, :columns].sum())
                    assert levels.outside[term, head][place] == pytest.approx(255 * outside, abs=0.51)
