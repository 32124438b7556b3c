"""Compiles the network of a training, and says how long that took."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.networks.compilation import CompileBackend, compile_modules


class CompileModules(Callback):
    """Compiles modules in place when a training starts; see `compile_modules`.

    Args:
        modules: Returns the modules; called when the network is built and on its device.
        backend: Of `torch.compile`.
    """

    def __init__(self, modules: Callable[[], Sequence[nn.Module]], backend: CompileBackend) -> None:
        self.modules, self.backend = modules, backend
        self._number = 0  # of modules whose compilation was not reported yet
        self._since = 0.0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        modules = self.modules()
        if not modules:
            raise InputError(
                f"compile: {type(pl_module).__name__} does not say which of its modules are to be compiled: define "
                "modules_to_compile(self), or leave compile out."
            )
        compile_modules(modules, self.backend)
        self._number = len(modules)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports the time of the first step, once."""
        if self._number:
            seconds = time.perf_counter() - self._since
            rank_zero_info(f"Compiled {self._number} modules ({self.backend}): the first step took {seconds:.1f} s.")
            self._number = 0
