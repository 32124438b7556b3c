"""The page of a report: the template with its styles, script and pictures."""

import base64
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import lightning_attn
from lightning_attn.study.report.gallery import Gallery
from lightning_attn.study.report.images import gradient
from lightning_attn.study.report.svg import DARK, LIGHT, variables
from lightning_attn.study.report.view import View

__all__ = ["MARK", "document", "render"]

MARK = "lightning_attn study report"  # by which a page is known as ours

_LARGEST = 4_950_000  # bytes of the page
_PICTURES = 3_400_000  # bytes of all pictures at first
_FOLDER = Path(__file__).parent / "templates"


def render(views: Sequence[View], *, files: Sequence[str], generated: datetime.datetime) -> str:
    """The page as HTML, with as large pictures as it may have.

    Args:
        views: Of the studies.
        files: The tables beside the page, a folder for each study; empty for the page's own.
        generated: When.
    """
    room = _PICTURES
    while True:
        gallery = Gallery(room)
        galleries = [gallery.of(view.record, room // len(views)) for view in views]
        page = _page(views, galleries, gallery.classes(), files, generated)
        size = len(page.encode(errors="replace"))  # as it will be written
        if size <= _LARGEST or room < 1000:
            return page
        room = max(0, min(room // 2, room - (size - _LARGEST) - 50_000))


def _page(
    views: Sequence[View],
    galleries: Sequence[Mapping[str, Any]],
    classes: str,
    files: Sequence[str],
    generated: datetime.datetime,
) -> str:
    names = [view.record.study.name for view in views]
    return document(
        "report.html.j2",
        ("theme.js", "report.js"),
        ("report.css", "chart.css"),
        classes,
        mark=MARK,
        title=names[0] if len(names) == 1 else f"{len(names)} studies: {', '.join(names)}",
        studies=[
            dict(view.values) | {"gallery": gallery, "files": folder}
            for view, gallery, folder in zip(views, galleries, files, strict=True)
        ],
        generated=f"{generated:%Y-%m-%d %H:%M} UTC",
        ramps={kind: gradient(kind) for kind in ("sentence", "map")},
    )


def document(
    template: str, scripts: Sequence[str], styles: Sequence[str], further_styles: str = "", **values: Any
) -> str:
    """A page that is one file, runs its own script alone, and asks for nothing else; light and dark.

    Args:
        template: Its template, of this package's; it includes `head.html.j2` and ends with the `script`.
        scripts: Files of its script, in order.
        styles: Files of its styles.
        further_styles: CSS.
        values: What the template is given; `mark` and `title` among them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script = "\n".join((_FOLDER / name).read_text(encoding="utf-8").strip() for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    light, dark = variables(LIGHT), variables(DARK)
    themes = (
        f":root{{color-scheme:light;{light}}}\n:root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media print{{:root:root:root{{color-scheme:light;{light}}}}}\n"
    )
    rules = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in styles)
    return environment.get_template(template).render(
        version=lightning_attn.__version__,
        script=Markup(script),
        digest=digest,
        styles=Markup(themes + rules + further_styles),
        **values,
    )
