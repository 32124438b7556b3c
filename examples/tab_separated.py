"""Example of a custom DataModule: converts tab-separated sentence pairs to the layout of `WMT14DataModule`."""

from collections.abc import Sequence
from pathlib import Path

from lightning_attn.datamodules import WMT14DataModule
from lightning_attn.datamodules.translation.parallel_text import read_lines


class TabSeparatedDataModule(WMT14DataModule):
    """Writes `{train,valid,test}.{en,de}` in `root` from `pairs`: one in ten is for validation, and one for test."""

    def __init__(self, pairs: str, root: str, max_tokens: int = 4096, vocabulary_size: int = 8000) -> None:
        super().__init__(root, max_tokens=max_tokens, vocabulary_size=vocabulary_size)
        self.pairs = Path(pairs)

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Runs once per node, before the data is read."""
        lines = {"train": [], "valid": [], "test": []}
        for number, line in enumerate(read_lines(self.pairs)):  # splits at "\n" only, not at other separators
            pair = line.split("\t")
            if len(pair) < 2:
                raise ValueError(f"{self.pairs}, line {number + 1} has no tab. Correct the line.")
            lines[{0: "valid", 1: "test"}.get(number % 10, "train")].append(pair)
        self.root.mkdir(parents=True, exist_ok=True)
        for split, pairs in lines.items():
            for side, language in enumerate((self.source_language, self.target_language)):
                text = "".join(f"{pair[side]}\n" for pair in pairs)
                (self.root / f"{split}.{language}").write_text(text, encoding="utf-8")
