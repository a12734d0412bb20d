"""Intersection over union and accuracy from a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitzoo.tasks.contract import all_reduce_sum


class Confusion:
    """Counts of (true, predicted) labels over images and processes.

    Args:
        labels: names of the classes.
        ignore_index: true label of pixels that do not count.
    """

    def __init__(self, labels: Sequence[str], *, ignore_index: int) -> None:
        self.labels, self.ignore_index = tuple(labels), ignore_index
        self.counts = torch.zeros(len(labels), len(labels), dtype=torch.int64)

    def add(self, found: Tensor, target: Tensor) -> None:
        """Count the pixels of one image: predicted and true labels, both (H, W)."""
        kept = target != self.ignore_index
        n = len(self.labels)
        cells = n * target[kept] + found[kept]
        self.counts += torch.bincount(cells, minlength=n * n).reshape(n, n).cpu()

    def compute(self, device: torch.device) -> dict[str, float]:
        """`mIoU`, `pixel_accuracy`, `mean_accuracy` and `IoU/<label>`, in percent.

        A class that is neither in the masks nor predicted has no IoU and is left out of the mean.
        Empty if there were no pixels.
        """
        counts = all_reduce_sum(self.counts, device).double()
        if not counts.sum():
            return {}
        hits, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
        union = true + found - hits
        iou = 100 * hits / union
        accuracy = 100 * hits / true
        means = {
            "mIoU": iou[union > 0].mean().item(),
            "pixel_accuracy": (100 * hits.sum() / counts.sum()).item(),
            "mean_accuracy": accuracy[true > 0].mean().item(),
        }
        each = zip(self.labels, iou.tolist(), (union > 0).tolist(), strict=True)
        return means | {f"IoU/{label}": value for label, value, seen in each if seen}
