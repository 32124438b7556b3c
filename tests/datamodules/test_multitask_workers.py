"""Workers of a joint training's loaders end when Lightning is done with them."""

import multiprocessing

import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from lightning_attn.datamodules.multitask import TaggedLoader


def test_workers_end_with_the_loop():
    samples = TensorDataset(torch.arange(4))
    loader = DataLoader(samples, num_workers=1, persistent_workers=True)
    combined = CombinedLoader([TaggedLoader("one", loader)], "sequential")
    before = set(multiprocessing.active_children())
    assert len(list(combined)) == 4
    assert set(multiprocessing.active_children()) > before
    combined.reset()  # as Lightning does at the end of a training
    assert set(multiprocessing.active_children()) <= before
    assert len(list(combined)) == 4  # workers start anew
    combined.reset()
