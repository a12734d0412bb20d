"""Masks of a COCO-style file: polygons and run lengths, checked before anything draws them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vitzoo.tasks.contract import UnreadableSample

# Corners of a polygon that encloses anything.
_CORNERS = 3


def mask_of(annotation: dict[str, Any], size: tuple[int, int], where: str) -> Any:
    """(H, W) uint8 of an annotation's `segmentation`.

    Args:
        annotation: an entry of the file.
        size: width and height of the image.
        where: the annotation's name for an error.

    Raises:
        UnreadableSample: no mask, or one that is not COCO's form or not of this image.
    """
    from pycocotools import mask as coco_mask

    given = annotation.get("segmentation")
    if not given:
        raise UnreadableSample(where, "it has no mask")
    width, height = size
    if isinstance(given, dict):
        _check_runs(given, size, where)
    else:
        _check_polygons(given, size, where)
    try:
        runs = given
        if not isinstance(given, dict):
            runs = coco_mask.merge(coco_mask.frPyObjects(given, height, width))
        elif isinstance(given["counts"], list):
            runs = coco_mask.frPyObjects(given, height, width)
        return coco_mask.decode(runs).astype(np.uint8)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UnreadableSample(where, f"its mask is not COCO's form: {error}") from None


def _check_runs(given: dict[str, Any], size: tuple[int, int], where: str) -> None:
    width, height = size
    sides, counts = given.get("size"), given.get("counts")
    if not (isinstance(sides, list) and len(sides) == 2):
        raise UnreadableSample(where, f"its mask has size {sides}, not [height, width]")
    if sides != [height, width]:
        raise UnreadableSample(
            where, f"its mask is {sides[1]} x {sides[0]}, the image {width} x {height}"
        )
    if isinstance(counts, str):
        counts = _lengths(counts)
    # pycocotools takes a length below 0 for four thousand millions, and leaves pixels that no run
    # reaches as they were in memory.
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise UnreadableSample(where, "its run lengths are not a list of whole numbers from 0 up")
    if sum(counts) != width * height:
        raise UnreadableSample(
            where, f"its run lengths hold {sum(counts)} pixels, the image {width * height}"
        )


def _lengths(text: str) -> list[int]:
    """The run lengths in COCO's compressed form: five bits a character, lowest first.

    From the fourth on each is the difference to the last but one. What is cut off or of other
    characters gives lengths that do not add up to an image.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths


def _check_polygons(given: Any, size: tuple[int, int], where: str) -> None:
    """Refuse what pycocotools would take for a box, draw without end, or stop at without a word."""
    if not isinstance(given, list) or not all(isinstance(polygon, list) for polygon in given):
        raise UnreadableSample(where, "its mask is neither run lengths nor a list of polygons")
    for i, polygon in enumerate(given):
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in polygon):
            raise UnreadableSample(where, f"polygon {i} of its mask does not hold numbers only")
        if len(polygon) % 2 or len(polygon) < 2 * _CORNERS:
            raise UnreadableSample(
                where,
                f"polygon {i} of its mask has {len(polygon)} numbers, but a polygon is x, y of "
                f"{_CORNERS} corners or more",
            )
        # What leaves the image is cut off. A border is drawn cell by cell, however, so corners far
        # away would fill the memory.
        for values, side in zip((polygon[::2], polygon[1::2]), size, strict=True):
            if min(values) < -side or max(values) > 2 * side:
                raise UnreadableSample(
                    where,
                    f"polygon {i} of its mask reaches from {min(values):g} to {max(values):g}, "
                    f"far outside the image of {size[0]} x {size[1]}",
                )
