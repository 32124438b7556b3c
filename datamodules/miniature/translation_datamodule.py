"""The miniature corpus as a DataModule."""

from collections.abc import Sequence

from typing_extensions import override

from lightning_attn.datamodules.machine import user_cache_folder
from lightning_attn.datamodules.miniature.translation import write_miniature_corpus
from lightning_attn.datamodules.translation.batches import LongLinePolicy
from lightning_attn.datamodules.translation.parallel_text import Cleaning
from lightning_attn.datamodules.translation.wmt14 import WMT14DataModule

__all__ = ["MiniatureTranslationDataModule"]


class MiniatureTranslationDataModule(WMT14DataModule):
    """A small English-German corpus that is generated, without downloads.

    It is written in the official layout into ``root``, by default a folder of the user's cache, and read like any
    other. See `WMT14DataModule` for the arguments.
    """

    def __init__(
        self,
        root: str = "",
        max_tokens: int = 4096,
        num_workers: int = 0,
        vocabulary_size: int = 2000,
        cleaning: Cleaning = Cleaning(),  # noqa: B008 (frozen)
        seed: int = 0,
        eval_max_tokens: int = 0,
        cache_dir: str = "",
        preparation_processes: int = 0,
        predict_file: str = "",
        on_long_line: LongLinePolicy = "crop",
        skip_done: bool = False,
    ) -> None:
        super().__init__(
            root=root or str(user_cache_folder() / "miniature_translation"),
            max_tokens=max_tokens,
            num_workers=num_workers,
            vocabulary_size=vocabulary_size,
            cleaning=cleaning,
            seed=seed,
            eval_max_tokens=eval_max_tokens,
            cache_dir=cache_dir,
            preparation_processes=preparation_processes,
            predict_file=predict_file,
            on_long_line=on_long_line,
            skip_done=skip_done,
        )

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        write_miniature_corpus(self.root)
