"""YAML of the documentation is YAML, and what is a configuration, an overlay or a study is read as one.

An overlay is added to the configuration that BASES names.
"""

import pytest
import yaml
from doc_pages import blocks, pages
from playground import CommandError

SECTIONS = {"model", "data", "trainer", "run", "seed_everything"}
BASES = [
    # (page, a part of the block, the configuration)
    ("docs/extending.md", "TabSeparatedDataModule", "translation/multi30k"),
    ("docs/extending.md", "", "miniature/segmentation"),
    ("docs/how_to/loggers_and_callbacks.md", "", "miniature/translation"),
    ("docs/multitask.md", "", "miniature/multitask"),
    ("docs/own_images.md", "Detection", "detection/own_images"),
    ("docs/own_images.md", "", "segmentation/own_images"),
    ("docs/reference/data_sets.md", "", "segmentation/camvid"),
    ("docs/translation.md", "", "translation/multi30k"),
]
"""What overlays are added to: the first row that fits."""

NOT_PARSED = {
    ("docs/how_to/loggers_and_callbacks.md", "class_path: WandbLogger"): "wandb is not among the packages of the tests",
}
"""Blocks that are YAML only, by page and a part of them, and why."""

BLOCKS = [block for page in pages() for block in blocks(page) if block.language in ("yaml", "yml")]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_yaml_is_read_by_what_it_is_for(stock, block):
    content = yaml.safe_load(block.text)
    assert content is not None, block.place
    if block.reason or any(block.page == page and part in block.text for page, part in NOT_PARSED):
        return
    playground = stock.playground(block.page, "YAML")
    path = playground.folder / f"block_{block.line}.yaml"
    path.write_text(block.text, encoding="utf-8")
    try:
        if "axes" in content:
            playground.parse_arguments(["study", "status", path.name])
        elif content.keys() <= SECTIONS:
            complete = all("class_path" in content.get(section, {}) for section in ("model", "data"))
            bases = [base for page, part, base in BASES if page == block.page and part in block.text]
            assert complete or bases, (
                f"{block.place}: add what this is an overlay of to BASES of tests/docs/test_yaml_blocks.py"
            )
            base = [] if complete else ["-c", bases[0]]
            playground.parse_arguments(["fit", *base, "-c", path.name])
    except CommandError as error:
        raise AssertionError(f"{block.place}: {error}") from error


def test_tables_are_of_blocks():
    """An entry that no block needs is removed."""
    for page, part, *_ in [*BASES, *NOT_PARSED]:
        assert any(block.page == page and part in block.text for block in BLOCKS), (page, part)
