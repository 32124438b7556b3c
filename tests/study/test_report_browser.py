"""The report in a real browser: nothing on its console, no request, and what a reader does by mouse and keyboard."""

import pytest
from browser import chromium, find_chromium
from report_cells import GROUPS, fill, write_study

from lightning_attn.study.grid import Study
from lightning_attn.study.report.writing import write_report

PROGRAM = find_chromium()

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome is installed")

LABELS = "[...document.querySelectorAll('#s0-groups tbody th')].map(one => one.firstChild.textContent)"
COLUMN = "[...document.querySelectorAll('#s0-groups tbody tr')].map(one => one.cells[{}].textContent)"
TIP = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
# Texts that lie on each other in a plot that is shown.
OVERLAPS = """
[...document.querySelectorAll('svg.chart')].filter(one => one.getClientRects().length).flatMap(plot => {
  const texts = [...plot.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]);
  return texts.flatMap(([name, a], place) => texts.slice(place + 1)
    .filter(([, b]) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
    .map(([other]) => name + ' on ' + other));
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A tab, and the addresses of a report of a study and of one of several."""
    base = tmp_path_factory.mktemp("report")
    study = write_study(base)
    fill(study, base / "cells")
    images = write_study(base, "images", metric="test/ap", scale=100)
    fill(images, base / "cells", parts=("profile", "curves", "maps", "pictures"), task="detection")
    new = write_study(base, "new")
    runs = write_study(base, "single", seeds=(0,))
    fill(runs, base / "cells", parts=("profile", "bootstrap"))
    single = write_report([runs], base / "cells", base / "single", "python train.py")
    one = write_report([study], base / "cells", base / "one", "python train.py")
    several = write_report([Study.read(study.path), images, new], base / "cells", base / "several", "python train.py")
    with chromium(PROGRAM, tmp_path_factory.mktemp("profile")) as tab:
        tab.one, tab.several, tab.single = one.as_uri(), several.as_uri(), single.as_uri()
        yield tab


@pytest.fixture
def tab(page):
    """The tab with the report freshly opened, wide and in the light theme."""
    page.prefer(scheme="light")
    page.resize(1600)
    page.problems.clear()
    page.requests.clear()
    page.open(page.one)
    page.evaluate("localStorage.clear()")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("which", ["one", "several"])
def test_console_requests_and_width(page, scheme, width, which):
    page.prefer(scheme=scheme)
    page.resize(width)
    page.problems.clear()
    page.requests.clear()
    page.open(getattr(page, which))
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate(OVERLAPS) == []
    assert page.problems == []
    assert [one for one in page.requests if not one.startswith("data:")] == [getattr(page, which)]


def test_all_pictures_are_decoded(page):
    page.open(page.several)
    page.wait(lambda: page.evaluate("[...document.images].every(one => one.complete)"))
    assert page.evaluate("document.images.length") > 100
    assert page.evaluate("[...document.images].every(one => one.naturalWidth > 0)")


def test_tables_are_sorted_by_any_column(tab):
    assert tab.evaluate(LABELS) == list(GROUPS)
    columns = tab.evaluate("document.querySelector('#s0-groups thead tr').cells.length")
    for column in range(columns):
        button = f"#s0-groups thead th:nth-child({column + 1}) button"
        for direction in ("ascending", "descending"):
            tab.click(button)
            head = f"document.querySelectorAll('#s0-groups thead th')[{column}].ariaSort"
            assert tab.evaluate(head) == direction
        assert tab.evaluate("document.querySelectorAll('#s0-groups [aria-sort$=ending]').length") == 1
    tab.click("#s0-groups thead th:nth-child(3) button")
    means = [float(text) for text in tab.evaluate(COLUMN.format(2))]
    assert means == sorted(means)
    assert tab.evaluate(LABELS) != list(GROUPS)
    tab.evaluate("document.querySelector('#s0-groups thead th:nth-child(3) button').focus()")
    tab.press("Enter", 13, "\r")
    assert [float(text) for text in tab.evaluate(COLUMN.format(2))] == means[::-1]
    assert tab.problems == []


def test_details_of_a_cell_stay_with_it_when_sorted(tab):
    tab.click("#s0-cells button.more")
    shown = "[...document.querySelectorAll('tr.more:not([hidden])')].map(one => one.previousElementSibling.innerText)"
    before = tab.evaluate(shown)
    assert len(before) == 1
    tab.click("#s0-cells thead th:nth-child(4) button")
    assert tab.evaluate(shown) == before
    assert "--seed_everything 0" in tab.evaluate("document.querySelector('tr.more:not([hidden]) .command').innerText")


def test_cells_are_filtered(tab):
    tab.evaluate("document.querySelector('[data-filter]').focus()")
    for letter in "deformable":
        tab.press(letter, text=letter)
    assert tab.evaluate("[...document.querySelectorAll('#s0-cells tbody')].filter(one => !one.hidden).length") == 3
    assert tab.evaluate("document.querySelector('.tools').lastElementChild.textContent") == "3 of 51"


def test_points_tell_what_they_are(tab):
    assert tab.evaluate(TIP) == ""
    tab.hover('#s0-accuracy .v1 .wide [data-g="16"] .mark')
    lines = tab.evaluate(TIP).splitlines()
    assert lines[0].startswith("deformable_0010")
    assert lines[1].startswith("BLEU ")
    assert "(95 %, 3 seeds)" in lines[1]
    assert lines[2].startswith("seeds ")
    assert lines[4] == "1.87 G multiply-adds per pair, as the paper counts"
    # Its row, and the paper's point, are marked.
    assert tab.evaluate("document.querySelectorAll('.hot').length") > 3
    assert tab.evaluate("document.querySelector('#s0-groups tr.hot th').innerText").startswith("deformable_0010")
    tab.press("Escape", 27)
    assert tab.evaluate(TIP) == ""


def test_points_are_reached_by_keyboard(tab):
    tab.evaluate("document.querySelector('#s0-accuracy .v1 .wide .pt[tabindex=\"0\"]').focus()")
    seen = []
    for _ in GROUPS:
        seen.append(tab.evaluate(TIP).splitlines()[0].removesuffix(" (on the envelope)"))
        tab.press("ArrowRight", 39)
    assert sorted(seen) == sorted(GROUPS)  # each once
    assert tab.evaluate("document.querySelectorAll('#s0-accuracy .v1 .wide .pt[tabindex=\"0\"]').length") == 1


def test_axes_are_switched(tab):
    def shown():
        return tab.evaluate(
            "[...document.querySelectorAll('#s0-accuracy .view .wide svg')].filter(one => one.getClientRects().length)"
            ".map(one => [...one.querySelectorAll('.axis')].map(text => text.textContent).join('|'))"
        )

    assert shown() == ["G multiply-adds per pair, as the paper counts|BLEU"]
    tab.click("#s0-accuracy .tabs label:nth-child(2)")
    assert shown() == ["G multiply-adds per pair, done here|BLEU"]
    assert tab.evaluate(OVERLAPS) == []
    tab.press("ArrowRight", 39)
    assert shown() == ["ms per pair, forward pass|BLEU"]
    assert tab.evaluate(OVERLAPS) == []


def test_maps_are_enlarged_with_their_words(tab):
    tab.click("#s0-attention .zoom")
    assert tab.evaluate("document.getElementById('big').open")
    assert tab.evaluate("document.querySelectorAll('#big .keys span').length") == 18
    assert tab.evaluate("document.querySelector('#big .queries').innerText").split()[:3] == [
        "_the",
        "_children",
        "_have",
    ]
    tab.press("Escape", 27)
    assert not tab.evaluate("document.getElementById('big').open")


def test_theme_is_that_of_the_system_until_one_is_chosen(tab):
    light = tab.evaluate(BACKGROUND)
    tab.prefer(scheme="dark")
    dark = tab.evaluate(BACKGROUND)
    assert sum(map(int, light[4:-1].split(","))) > 600 > 150 > sum(map(int, dark[4:-1].split(",")))
    tab.click("#theme")  # light
    assert tab.evaluate(BACKGROUND) == light
    tab.click("#theme")  # dark
    tab.prefer(scheme="light")
    assert tab.evaluate(BACKGROUND) == dark
    tab.prefer(scheme="light", media="print")
    assert tab.evaluate(BACKGROUND) == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(27, 33, 40)"


def test_texts_have_enough_contrast(tab):
    """WCAG 2.1, 1.4.3: 4.5 for text."""
    script = """
    (() => {
      const parse = text => text.match(/[\\d.]+/g).map(Number);
      const light = colour => colour.slice(0, 3).map(one => one / 255)
        .map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
        .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
      const behind = element => {
        const colour = parse(getComputedStyle(element).backgroundColor);
        return colour.length > 3 && colour[3] < 1 ? behind(element.parentElement) : colour;
      };
      const found = [];
      const names = ".chip, .quiet, .meta, .caption, .tick, .axis, .label, .tag, .formula, td, th, dt, dd, small, a";
      for (const one of document.querySelectorAll(names)) {
        const style = getComputedStyle(one);
        const both = [light(parse(one instanceof SVGElement ? style.fill : style.color)), light(behind(one))];
        const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        if (ratio < 4.5) found.push([one.tagName, one.className.baseVal ?? one.className, ratio.toFixed(2)].join(" "));
      }
      return [...new Set(found)];
    })()
    """
    for scheme in ("light", "dark"):
        tab.prefer(scheme=scheme)
        assert tab.evaluate(script) == [], scheme


def test_two_groups_of_the_readers_choice_are_compared(tab):
    choose = "(() => {{ const one = document.querySelectorAll('.compare select')[{}]; one.value = '{}';"
    choose += " one.dispatchEvent(new Event('change', {{ bubbles: true }})); }})()"
    shown = "[...document.querySelectorAll('.compare p')[1].children].map(one => one.textContent)"
    for place, group in enumerate(("0110", "0100")):
        tab.evaluate(choose.format(place, GROUPS.index(group)))
    # The same as the study's first finding, 0110 minus 0100.
    row = "[...document.querySelectorAll('#s0-findings tbody tr')[0].cells].map(one => one.textContent)"
    cells = tab.evaluate(row)
    parts = tab.evaluate(shown)
    assert parts[0] == f"{cells[3]} BLEU"
    assert parts[1] == f"95 % interval over 3 shared seeds: {cells[5]}"
    assert parts[2] == f"of the test set: {cells[6]}"
    assert parts[3:] == ["paper's count: 1.05 times", "done here: 1.01 times", "measured time: 1.21 times"]
    tab.evaluate(choose.format(1, GROUPS.index("0110")))
    assert tab.evaluate(shown) == ["The same group."]
    assert tab.problems == []


@pytest.mark.parametrize("width", [1200, 1600])
@pytest.mark.parametrize("which", ["one", "single"])
def test_tables_fit(page, which, width):
    page.resize(width)
    page.open(getattr(page, which))
    cut = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert page.evaluate(cut) == 0


def test_maps_of_a_row_are_of_one_size(tab):
    tab.resize(1200)
    widths = (
        "[...document.querySelectorAll('#s0-attention .map')].map(one => Math.round(one.getBoundingClientRect().width))"
    )
    assert len(set(tab.evaluate(widths))) == 1
