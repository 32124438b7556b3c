"""`torchvision.datasets.Cityscapes` with torchvision's transforms of the second version."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from lightning_attn.datamodules.segmentation.classes import IGNORED, SegmentationClasses

_FILLING = (124, 116, 104)


class TorchvisionCityscapes(Dataset[tuple[Tensor, Tensor]]):
    """`torchvision.datasets.Cityscapes` with its transforms.

    Args:
        root: Folder of the data.
        size: Height and width of the images.
        scales: Smallest and largest factor by which they are scaled.
        crop: Height and width of the crops.
        tensors: Whether images become tensors first, instead of last.
    """

    def __init__(
        self, root: Path, *, size: tuple[int, int], scales: tuple[float, float], crop: int, tensors: bool
    ) -> None:
        filling = {ImageTensor: _FILLING, Image.Image: _FILLING, Mask: IGNORED}
        changes = [
            v2.ScaleJitter(size, scales),
            v2.RandomCrop(crop, pad_if_needed=True, fill=filling),
            v2.RandomHorizontalFlip(),
        ]
        steps = [v2.ToImage(), *changes] if tensors else [*changes, v2.ToImage()]
        found = datasets.Cityscapes(
            str(root), split="train", mode="fine", target_type="semantic", transforms=v2.Compose(steps)
        )
        self.dataset = datasets.wrap_dataset_for_transforms_v2(found)
        self.table = torch.from_numpy(SegmentationClasses.chosen().to_labels(np.arange(256, dtype=np.uint8)[None])[0])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[index]
        return image.as_subclass(Tensor), self.table[mask.as_subclass(Tensor).long().squeeze(0)]
