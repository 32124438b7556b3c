"""Example of a custom task and DataModule: digits of scikit-learn (pip install it), by a ResNet with attention."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attn.attention import AttentionSpec
from lightning_attn.datamodules.sampling.sample_batches import sample_loader
from lightning_attn.errors import MissingPackageError
from lightning_attn.networks.images.backbone import ResNetSpec, build_resnet
from lightning_attn.tasks import BaseTask, OptimizerSpec, ScheduleSpec


class DigitsDataModule(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingPackageError("The digits are scikit-learn's: pip install scikit-learn.") from error
        digits = load_digits()
        images = torch.from_numpy(digits.images / 8 - 1).float()
        images = F.interpolate(images[:, None].expand(-1, 3, -1, -1), scale_factor=4)
        self.samples = [{"ids": i, "image": images[i], "label": label} for i, label in enumerate(digits.target)]

    def train_dataloader(self):
        return sample_loader(self, [s for s in self.samples if s["ids"] % 5 > 1], batch_size=64, shuffle=True)

    def val_dataloader(self):
        return sample_loader(self, self.samples[1::5], batch_size=64, shuffle=False)

    def test_dataloader(self):
        return sample_loader(self, self.samples[::5], batch_size=64, shuffle=False)


class DigitsTask(BaseTask):
    task_name, monitor, monitor_mode = "classification", "val/accuracy", "max"
    backbone_name = "network"  # what a joint training shares: docs/multitask.md

    def __init__(
        self, attention: AttentionSpec, backbone: ResNetSpec, optimizer: OptimizerSpec, schedule: ScheduleSpec
    ) -> None:
        super().__init__(optimizer, schedule)
        self.network = build_resnet(backbone, attention, output_stride=8)
        self.classifier = nn.Linear(self.network.channels["c5"], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.network(images)["c5"].mean((2, 3)))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch["image"]), batch["label"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        found = self(batch["image"]).argmax(1)
        return {"accuracy": found == batch["label"]}

    test_step = validation_step
