"""The page of attention maps: what it holds, how large it is, and what a reader does with it in a browser."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from browser import chromium, find_chromium
from PIL import Image

from lightning_attn.study.report.attention_page import fitting, render_attention
from lightning_attn.visualization.levels import LayerLevels

PROGRAM = find_chromium()


def layer_of(stride, map_size, inside, *, name="body.layer4.0", heads=("mean", "1", "2"), step=1, kv_stride=1, seed=0):
    """A layer whose query (i, j) looks at the key in the opposite corner, which is known without any formula."""
    rows, columns = (-(-one // step) for one in inside)
    key_rows, key_columns = (-(-one // kv_stride) for one in inside)
    random = np.random.default_rng(seed)
    levels = {}
    for term in ("E1", "E3", "whole"):
        for head in heads:
            found = random.integers(1, 40, (rows * columns, key_rows * key_columns), dtype=np.uint8)
            for query in range(len(found)):
                found[query, -1 - query % found.shape[1]] = 250
            levels[term, head] = found[:1] if term == "E3" else found
    facts = {
        **{"stride": stride, "kv_stride": kv_stride, "map_size": list(map_size), "key_size": [key_rows, key_columns]},
        **{"query_size": [rows, columns], "query_step": step},
    }
    outside = {key: np.full(rows * columns, 51, np.uint8) for key in levels}
    return LayerLevels(name, facts, ("log2", -2.0, 12.0), levels, outside)


def page_of(layers, size=(300, 451), **start):
    pixels = np.zeros((*size, 3), np.uint8) + np.linspace(0, 255, size[1]).astype(np.uint8)[:, None]
    return render_attention(
        layers,
        title="Where a query of <b>odd</b>.png looks",
        facts=[("picture", "odd.png")],
        notes=["A note & more."],
        start={"layer": layers[-1].name, "head": "mean", "term": "whole", "query": [150, 225], **start},
        image=Image.fromarray(pixels),
    )


def sentence_page():
    words = ["_Two", "_men", "</s>"]
    levels = np.array([[255, 1, 0], [1, 200, 100], [30, 30, 255]], np.uint8)
    found = {(term, head): levels for term in ("E1", "whole") for head in ("mean", "1")}
    layer = LayerLevels("decoder.0.cross_attention", {"queries": words, "keys": words}, ("sqrt", 0.0, 1.0), found, {})
    start = {"layer": layer.name, "head": "mean", "term": "whole", "query": 0}
    return render_attention([layer], title="Where a word looks", facts=[], notes=[], start=start)


def test_a_page_runs_its_own_script_alone_and_asks_for_nothing():
    text = page_of([layer_of(32, (10, 15), (10, 15))])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text
    assert "<b>odd</b>" not in text, "what users give is escaped"
    assert "prefers-color-scheme:dark" in text


def test_levels_fit_into_a_number_of_bytes():
    large = [
        layer_of(8, (40, 50), (40, 50), name=name, heads=("mean", "1", "2", "3", "4"), seed=seed)
        for seed, name in enumerate(("first", "second"))
    ]
    kept, notes = fitting(large, "2", 1e9)
    assert (kept, notes) == (large, [])
    sizes = []
    for most in (6_000_000, 1_000_000, 300_000, 60_000):
        kept, notes = fitting(large, "2", most)
        text = page_of(kept)
        sizes.append(len(text))
        assert len(text) < most + 450_000
        assert kept[-1].name == "second"
        assert {"mean", "2"} <= set(kept[-1].heads)
        if len(kept) == 1:
            assert notes == ["Layer first is left out, to keep the page small: give it alone (--layer)."]
        shown = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["layers"][-1]
        assert shown["query_size"] == [-(-40 // shown["query_step"]), -(-50 // shown["query_step"])]
    assert len(kept) == 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.fixture
def open_page(tmp_path):
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    with chromium(PROGRAM, tmp_path / "profile") as page:

        def show(text, width=1200):
            path = tmp_path / "index.html"
            path.write_text(text, encoding="utf-8")
            page.resize(width)
            page.open(path.as_uri())
            page.wait(lambda: page.evaluate("document.getElementById('readout').textContent") != "")
            return page

        yield show


def settled(page, name):
    """What the page says of its picture or sentence, once it is drawn."""
    page.evaluate("(async () => { for (let i = 0; i < 4; i++) await new Promise(requestAnimationFrame); })()")
    return page.evaluate(f"document.querySelector('#stage, #queries').dataset.{name}")


def move_to(page, y, x, size):
    """Moves the mouse to a pixel of the picture."""
    page.middle_of("#stage")
    left, top, width, height = page.evaluate(
        "(() => { const b = document.getElementById('stage').getBoundingClientRect(); "
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    place = {"x": left + (x + 0.5) / size[1] * width, "y": top + (y + 0.5) / size[0] * height}
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **place)


@pytest.mark.parametrize(
    ("stride", "map_size", "inside"), [(32, (10, 15), (10, 15)), (8, (39, 58), (38, 57)), (16, (20, 30), (19, 29))]
)
def test_the_query_follows_the_mouse(open_page, stride, map_size, inside):
    size = (300, 451)
    page = open_page(page_of([layer_of(stride, map_size, inside)], size))
    for y, x in ((0, 0), (37, 402), (293, 445), (150, 3)):
        move_to(page, y, x, size)
        expected = [min(round(pixel / stride + 1e-9), count - 1) for pixel, count in zip((y, x), inside, strict=True)]
        page.wait(lambda wanted=expected: settled(page, "query") == ",".join(map(str, wanted)))
        query = expected[0] * inside[1] + expected[1]
        key = inside[0] * inside[1] - 1 - query
        peak = key // inside[1] * stride, key % inside[1] * stride
        assert settled(page, "peak") == f"{peak[0]},{peak[1]}"
        # On the screen the middle of that key's square is on that pixel.
        off = page.evaluate(
            f"""(() => {{
              const box = one => one.getBoundingClientRect();
              const stage = box(document.getElementById("stage")), canvas = document.querySelector("#stage canvas");
              const drawn = box(canvas), row = {key // inside[1]}, column = {key % inside[1]};
              const x = drawn.left + (column + 0.5) / canvas.width * drawn.width - stage.left;
              const y = drawn.top + (row + 0.5) / canvas.height * drawn.height - stage.top;
              return [y / stage.height * {size[0]} - 0.5, x / stage.width * {size[1]} - 0.5];
            }})()"""
        )
        assert off == pytest.approx(peak, abs=1.0)
        opaque = page.evaluate(
            f"(() => {{ const c = document.querySelector('#stage canvas'); return c.getContext('2d').getImageData("
            f"{key % inside[1]}, {key // inside[1]}, 1, 1).data[3]; }})()"
        )
        assert opaque > 200, "the greatest weight is drawn"
    assert "20 % of the weight lies on the padding" in page.evaluate("document.getElementById('readout').textContent")
    # Chromium's advice on reading pixels is for this test, which reads them; the page does not.
    assert [one for one in page.problems if "willReadFrequently" not in one] == []
    assert all(one.startswith(("file:", "data:")) for one in page.requests)


def test_keyboard_and_choices(open_page):
    page = open_page(page_of([layer_of(16, (20, 30), (19, 29), name="first"), layer_of(32, (10, 15), (10, 15))]))
    page.evaluate("document.getElementById('stage').focus()")
    row, column = map(int, settled(page, "query").split(","))
    page.press("ArrowRight", 39)
    page.press("ArrowDown", 40)
    page.wait(lambda: settled(page, "query") == f"{row + 1},{column + 1}")
    assert page.evaluate("document.getElementById('hold').getAttribute('aria-pressed')") == "true"
    move_to(page, 0, 0, (300, 451))
    assert settled(page, "query") == f"{row + 1},{column + 1}", "held"
    page.press("Enter", 13)
    move_to(page, 1, 1, (300, 451))
    page.wait(lambda: settled(page, "query") == "0,0")
    for _ in range(3):
        page.press("ArrowLeft", 37)
    assert settled(page, "query") == "0,0", "not beyond the border"
    page.evaluate(
        "(() => { const s = document.getElementById('layer'); s.value = 'first'; s.onchange({ target: s }); })()"
    )
    page.wait(lambda: page.evaluate("document.querySelector('#stage canvas').width") == 29)
    page.click("#terms button[data-term=E3]")
    page.wait(lambda: "E3, mean over heads" in page.evaluate("document.getElementById('readout').textContent"))
    assert page.evaluate("document.getElementById('term').value") == "E3"
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.problems == []


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(open_page, width):
    page = open_page(page_of([layer_of(32, (10, 15), (10, 15))]), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page = open_page(sentence_page(), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_sentence(open_page):
    page = open_page(sentence_page())
    page.hover("#query-1")
    page.wait(lambda: settled(page, "query") == "1")
    assert settled(page, "peak") == "1"
    weights = page.evaluate("[...document.querySelectorAll('[data-term=whole] small')].map(one => one.textContent)")
    assert weights == [f"{((level - 1) / 254) ** 2:.2f}" for level in (1, 200, 100)]
    page.evaluate("document.getElementById('queries').focus()")
    page.press("ArrowLeft", 37)
    page.wait(lambda: settled(page, "query") == "0")
    weights = page.evaluate("[...document.querySelectorAll('[data-term=whole] small')].map(one => one.textContent)")
    assert weights == ["1.00", "0.00", "–"], "the last key is hidden from this query"
    assert page.problems == []
