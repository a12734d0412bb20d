"""Probabilities of every pixel: whole images or sliding windows, several scales, mirrored."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.errors import InputError
from vitzoo.tasks.segmentation.options import InferenceOptions

Forward = Callable[[Tensor], Tensor]


def check(options: InferenceOptions) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: windows with gaps between them, no scale, a scale that is not positive.
    """
    window, stride = options.window, options.stride
    for name, value in (("window", window), ("stride", stride)):
        if len(value) != 2 or min(value) < 1:
            raise InputError(f"inference.{name} is a height and a width in pixels, not {value}")
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise InputError(f"inference.stride={stride} leaves gaps between windows of {window}")
    if not options.scales or min(options.scales) <= 0:
        raise InputError(f"inference.scales={options.scales}: give one or more positive numbers")


def probabilities(
    forward: Forward, images: Tensor, size: tuple[int, int], options: InferenceOptions
) -> Tensor:
    """Class probabilities at `size`, averaged over scales and mirrorings.

    Args:
        forward: images (B, 3, h, w) -> logits (B, classes, h, w).
        images: (B, 3, H, W), prepared.
        size: height and width of the result.
        options: the recipe's section.
    """
    total = None
    for scale in options.scales:
        scaled = images
        if scale != 1:
            sides = [max(1, round(side * scale)) for side in images.shape[-2:]]
            scaled = F.interpolate(images, sides, mode="bilinear", antialias=scale < 1)
        for mirrored in (False, True) if options.flip else (False,):
            seen = scaled.flip(-1) if mirrored else scaled
            logits = slide(forward, seen, options) if options.mode == "slide" else forward(seen)
            logits = F.interpolate(logits.float(), size, mode="bilinear")
            found = (logits.flip(-1) if mirrored else logits).softmax(1)
            total = found if total is None else total + found
    assert total is not None  # `check` refuses an empty list of scales
    return total / (len(options.scales) * (1 + options.flip))


def slide(forward: Forward, images: Tensor, options: InferenceOptions) -> Tensor:
    """Logits of overlapping windows, averaged where they overlap.

    The last window of a row or column is moved back to end at the border; images smaller than a
    window are one window.
    """
    height, width = images.shape[-2:]
    rows = _starts(height, options.window[0], options.stride[0])
    columns = _starts(width, options.window[1], options.stride[1])
    total = counts = None
    for y in rows:
        for x in columns:
            cut = images[..., y : y + options.window[0], x : x + options.window[1]]
            logits = forward(cut).float()
            if total is None or counts is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
                counts = logits.new_zeros(height, width)
            place = (..., slice(y, y + cut.shape[-2]), slice(x, x + cut.shape[-1]))
            total[place] += logits
            counts[place] += 1
    assert total is not None
    assert counts is not None
    return total / counts


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(0, side - window)
    starts = list(range(0, last + 1, stride))
    return starts if starts[-1] == last else [*starts, last]


def by_size(images: list[Tensor]) -> list[list[int]]:
    """Positions of images of equal size, so that they run as one batch."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return list(groups.values())
