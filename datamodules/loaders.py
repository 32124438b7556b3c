"""Which loaders a DataModule defines."""

import pytorch_lightning as pl

from lightning_attn.errors import MissingMethodError

__all__ = ["LOADERS", "defines_loader", "require_loader"]

LOADERS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
"""By stage: the method that it cannot do without."""


def defines_loader(datamodule: pl.LightningDataModule, method: str) -> bool:
    """Whether a DataModule has a method of its own that makes a loader; Lightning's raises an error."""
    return method in vars(datamodule) or getattr(type(datamodule), method) is not getattr(
        pl.LightningDataModule, method
    )


def require_loader(datamodule: pl.LightningDataModule, method: str) -> None:
    """Refuses a DataModule without a loader that is needed.

    Raises:
        NotImplementedError: Says what to write.
    """
    if not defines_loader(datamodule, method):
        samples = {"train_dataloader": "training samples", "predict_dataloader": "inputs"}.get(method, "samples")
        shuffle = method == "train_dataloader"
        raise MissingMethodError(
            f"{type(datamodule).__name__} must define {method}(self), and return a DataLoader of the {samples}, such "
            f"as lightning_attn.datamodules.sampling.sample_batches.sample_loader(self, samples, batch_size=8, "
            f"shuffle={shuffle})."
        )
