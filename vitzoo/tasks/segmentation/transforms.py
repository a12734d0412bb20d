"""From an image and its labels to tensors, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode

from vitzoo.tasks.segmentation.data import MaskPairs
from vitzoo.tasks.segmentation.options import MaskAugmentOptions, MaskDataOptions

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Preparation:
    """Resizing and normalisation that training and evaluation share.

    Attributes:
        mean, std: of the pixels, from 0 to 1.
        short_side, long_side: see `MaskDataOptions`.
    """

    mean: Sequence[float]
    std: Sequence[float]
    short_side: int | None = None
    long_side: int | None = None

    def size_of(self, height: int, width: int, *, scale: float = 1.0) -> tuple[int, int]:
        """Height and width after resizing."""
        factor = 1.0
        if self.short_side is not None:
            factor = self.short_side / min(height, width)
        if self.long_side is not None:
            factor = min(factor, self.long_side / max(height, width))
        factor *= scale
        return max(1, round(height * factor)), max(1, round(width * factor))

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) -> float32."""
        return TF.normalize(image.float() / 255, list(self.mean), list(self.std))

    def __call__(self, image: Image.Image) -> Tensor:
        """An image as evaluation sees it, (3, H', W')."""
        pixels = TF.pil_to_tensor(image)
        size = self.size_of(image.height, image.width)
        if size != tuple(pixels.shape[-2:]):
            pixels = TF.resize(pixels, list(size), antialias=True)
        return self.normalise(pixels)


class TrainingPairs(Dataset[tuple[Tensor, Tensor]]):
    """Random crops: `[index] -> (image (3, h, w), labels (h, w))`."""

    def __init__(
        self,
        pairs: MaskPairs,
        prepare: Preparation,
        data: MaskDataOptions,
        augment: MaskAugmentOptions,
    ) -> None:
        self.pairs, self.prepare, self.data, self.augment = pairs, prepare, data, augment
        self._photometric = v2.RandomPhotometricDistort(p=0.5)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.pairs.read(index)
        pixels, target = TF.pil_to_tensor(image), torch.from_numpy(labels)
        if not self.augment.enabled:
            size = self.prepare.size_of(image.height, image.width)
            pixels, target = _resized(pixels, target, size)
            return self.prepare.normalise(pixels), target
        low, high = self.augment.scale
        scale = low + (high - low) * torch.rand(()).item()
        size = self.prepare.size_of(image.height, image.width, scale=scale)
        pixels, target = _resized(pixels, target, size)
        height, width = self.data.size or (image.height, image.width)
        pixels, target = self._crop(pixels, target, height, width)
        if torch.rand(()).item() < self.augment.hflip:
            pixels, target = pixels.flip(-1), target.flip(-1)
        if self.augment.photometric:
            pixels = self._photometric(pixels)
        image_tensor = self.prepare.normalise(pixels)
        short = (0, width - pixels.shape[-1], 0, height - pixels.shape[-2])
        # Pixels of the padding are 0 after normalisation, which is the mean colour.
        image_tensor = torch.nn.functional.pad(image_tensor, short)
        return image_tensor, torch.nn.functional.pad(target, short, value=self.data.ignore_index)

    def _crop(
        self, pixels: Tensor, target: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """A random window, at most `height` x `width`, in which no class fills all."""
        tall, wide = max(0, target.shape[0] - height), max(0, target.shape[1] - width)
        for _ in range(10):
            y = int(torch.randint(tall + 1, ()))
            x = int(torch.randint(wide + 1, ()))
            cut = target[y : y + height, x : x + width]
            counts = torch.bincount(cut[cut != self.data.ignore_index])
            if counts.numel() and counts.max() < self.augment.most_of_one_class * counts.sum():
                break
        return pixels[:, y : y + height, x : x + width], cut


class WholePairs(Dataset[tuple[Tensor, Tensor]]):
    """Images as evaluation sees them, with the labels of the image's own size."""

    def __init__(self, pairs: MaskPairs, prepare: Preparation) -> None:
        self.pairs, self.prepare = pairs, prepare

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.pairs.read(index)
        return self.prepare(image), torch.from_numpy(labels)


def as_lists(samples: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    """A batch of images that differ in size."""
    images, targets = zip(*samples, strict=True)
    return {"images": list(images), "targets": list(targets)}


def _resized(pixels: Tensor, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if size == tuple(target.shape):
        return pixels, target
    nearest = InterpolationMode.NEAREST_EXACT
    return (
        TF.resize(pixels, list(size), antialias=True),
        TF.resize(target[None], list(size), interpolation=nearest)[0],
    )
