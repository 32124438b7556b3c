"""Relative links and images of the documentation lead to files of the repository, and their anchors to headings."""

from urllib.parse import unquote

import pytest
from doc_pages import REPOSITORY, anchors, links, pages, slug


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    wrong = []
    for line, target in links(page):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / page).parent / unquote(path) if path else REPOSITORY / page
        if not file.exists():
            wrong.append(f"{page}:{line}: {target}: there is no {path}")
        elif not file.resolve().is_relative_to(REPOSITORY):
            wrong.append(f"{page}:{line}: {target} is outside of the repository")
        elif anchor and file.suffix == ".md":
            known = anchors(file.resolve().relative_to(REPOSITORY).as_posix())
            if anchor not in known:
                wrong.append(f"{page}:{line}: {target}: no heading is #{anchor}; there are {', '.join(sorted(known))}")
    assert not wrong, "\n".join(wrong)


def test_there_are_links():
    assert sum(len(links(page)) for page in pages()) > 100


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("Where things live", "where-things-live"),
        ("torch.export and ONNX", "torchexport-and-onnx"),
        ("`terms`, in `YAML`: E1 & E2", "terms-in-yaml-e1--e2"),
        ("[A link](page.md) and more", "a-link-and-more"),
        ("Größe: 3 x 3", "größe-3-x-3"),
    ],
)
def test_names_of_headings_are_github_s(heading, expected):
    assert slug(heading) == expected
