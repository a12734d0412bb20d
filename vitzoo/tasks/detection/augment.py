"""Random changes of an image together with its boxes and masks."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms.functional import hflip

Sample = dict[str, Any]

# DETR's (arXiv 2005.12872): shorter sides that the image is brought to, and sides of the window
# that is then cut from it.
_SHORT_SIDES = (400, 500, 600)
_WINDOW = (384, 600)
# Pixels. A thinner box can lose its area to rounding when it is moved and resized in float32, and
# torchvision stops a whole run at one. COCO's own corners have two decimals.
LEAST_SIDE = 0.005


def mirror(sample: Sample) -> None:
    """Exchange left and right of an image and its objects, in place."""
    sample["image"] = hflip(sample["image"])
    x0, y0, x1, y1 = sample["boxes"].unbind(1)
    width = sample["image"].shape[-1]
    sample["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    if "masks" in sample:
        sample["masks"] = sample["masks"].flip(-1)


def crop(sample: Sample) -> None:
    """Keep a random window of an image and what it shows of the objects, in place.

    The window has the share of the image that DETR's has. DETR resizes the image before it cuts,
    and the window again; here the detector's own resizing is the only one.
    """
    height, width = sample["image"].shape[-2:]
    short = _SHORT_SIDES[int(torch.randint(len(_SHORT_SIDES), ()))]
    scale = min(height, width) / short
    y, tall = _span(height, scale)
    x, wide = _span(width, scale)
    sample["image"] = sample["image"][:, y : y + tall, x : x + wide]
    corner = torch.tensor([x, y, x, y], dtype=torch.float32)
    limit = torch.tensor([wide, tall, wide, tall], dtype=torch.float32)
    boxes = (sample["boxes"] - corner).clamp(min=0).minimum(limit)
    kept = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)
    sample["boxes"], sample["labels"] = boxes[kept], sample["labels"][kept]
    if "masks" in sample:
        sample["masks"] = sample["masks"][kept, y : y + tall, x : x + wide]


def _span(side: int, scale: float) -> tuple[int, int]:
    """Start and length of a window on one side of an image, in its pixels."""
    least, most = (min(side, round(scale * bound)) for bound in _WINDOW)
    length = int(torch.randint(least, most + 1, ()))
    return int(torch.randint(side - length + 1, ())), length
