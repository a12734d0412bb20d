"""One scene: a piece of a photo with one to six objects, and what can be seen of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vitzoo.tasks.scenes.items import Array, Item

HEIGHT, WIDTH = 192, 256
MOST_OBJECTS = 6
SMALLEST, LARGEST = 0.12, 0.45
MOST_OVERLAP = 0.3
# An object that others cover more than this would no longer be itself.
_MOST_HIDDEN = 0.25
_ATTEMPTS = 40


@dataclass(frozen=True)
class Scene:
    """A generated image and its objects.

    Attributes:
        image: (192, 256, 3) uint8.
        masks: (N, 192, 256) bool, the visible pixels of each object; they share none.
        labels: N class numbers from 0.
    """

    image: Array
    masks: Array
    labels: tuple[int, ...]

    @property
    def boxes(self) -> list[list[int]]:
        """COCO's x, y, width, height of each mask, tight."""
        return [box_of(mask) for mask in self.masks]

    @property
    def classes(self) -> Array:
        """(192, 256) uint8: 0 for the background, class number + 1 on an object."""
        found = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for mask, label in zip(self.masks, self.labels, strict=True):
            found[mask] = label + 1
        return found


def box_of(mask: Array) -> list[int]:
    """COCO's x, y, width, height of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Intersection over union of two boxes in COCO's form."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def compose(
    seed: Sequence[int], backgrounds: Sequence[Array], items: Mapping[int, Sequence[Item]]
) -> Scene:
    """Draw a scene.

    Args:
        seed: integers; the same ones give the same scene.
        backgrounds: photos (H, W, 3) uint8.
        items: class number -> objects to choose from.
    """
    rng = np.random.default_rng(seed)
    image = _background(rng, backgrounds)
    masks: list[Array] = []
    labels: list[int] = []
    wanted = int(rng.integers(1, MOST_OBJECTS + 1))
    for _ in range(wanted):
        for _ in range(_ATTEMPTS):
            label = sorted(items)[int(rng.integers(len(items)))]
            item = items[label][int(rng.integers(len(items[label])))]
            placed = _place(rng, item)
            if placed is None:
                continue
            paint, cover = placed
            mask = cover >= 0.5
            remaining = [other & ~mask for other in masks]
            if not _fits(mask, masks, remaining):
                continue
            image = image + cover[..., None] * (paint - image)
            masks, labels = [*remaining, mask], [*labels, label]
            break
    return Scene(np.round(image).astype(np.uint8), np.stack(masks), tuple(labels))


def _fits(mask: Array, before: Sequence[Array], remaining: Sequence[Array]) -> bool:
    """Whether a new object leaves the others visible, large enough and apart."""
    boxes = [box_of(mask)]
    for old, new in zip(before, remaining, strict=True):
        if new.sum() < (1 - _MOST_HIDDEN) * old.sum():
            return False
        boxes.append(box_of(new))
    if any(not SMALLEST <= max(box[2:]) / HEIGHT <= LARGEST for box in boxes):
        return False
    pairs = ((boxes[i], boxes[j]) for i in range(len(boxes)) for j in range(i))
    return all(overlap(one, other) <= MOST_OVERLAP for one, other in pairs)


def _background(rng: np.random.Generator, photos: Sequence[Array]) -> Array:
    """A piece of a photo, mirrored or not, with its contrast reduced: float64 (H, W, 3)."""
    photo = photos[int(rng.integers(len(photos)))]
    largest = min(photo.shape[0] / HEIGHT, photo.shape[1] / WIDTH)
    scale = largest * rng.uniform(0.6, 1.0)
    height, width = int(HEIGHT * scale), int(WIDTH * scale)
    top = int(rng.integers(photo.shape[0] - height + 1))
    left = int(rng.integers(photo.shape[1] - width + 1))
    piece = Image.fromarray(photo[top : top + height, left : left + width])
    found: Array = np.asarray(piece.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=float)
    if rng.random() < 0.5:
        found = found[:, ::-1]
    return rng.uniform(0.0, 40.0) + rng.uniform(0.6, 0.85) * found


def _place(rng: np.random.Generator, item: Item) -> tuple[Array, Array] | None:
    """An object at a random size, angle, colour and place: (paint (H, W, 3), cover (H, W)).

    None where its outline, once turned, is outside the sizes allowed.
    """
    grey, cover = item.grey, item.cover
    if item.flips and rng.random() < 0.5:
        grey, cover = grey[:, ::-1], cover[:, ::-1]
    angle = rng.uniform(0, 360) if item.turns else rng.uniform(-20, 20)
    turned = [
        Image.fromarray(np.ascontiguousarray(part)).rotate(
            angle, Image.Resampling.BILINEAR, expand=True
        )
        for part in (grey, cover)
    ]
    x, y, width, height = box_of(np.asarray(turned[1]) >= 0.5)
    turned = [part.crop((x - 1, y - 1, x + width + 1, y + height + 1)) for part in turned]
    # Sizes are drawn on a logarithmic scale, so that small objects are as frequent as large ones.
    low, high = math.log(SMALLEST * HEIGHT + 1), math.log(LARGEST * HEIGHT - 1)
    scale = math.exp(rng.uniform(low, high)) / max(width, height)
    size = [max(3, round(side * scale)) for side in turned[0].size]
    if size[0] > WIDTH or size[1] > HEIGHT:
        return None
    grey, cover = (
        np.asarray(part.resize((size[0], size[1]), Image.Resampling.BILINEAR)) for part in turned
    )
    top = int(rng.integers(HEIGHT - size[1] + 1))
    left = int(rng.integers(WIDTH - size[0] + 1))
    place = (slice(top, top + size[1]), slice(left, left + size[0]))
    paint: Any = np.zeros((HEIGHT, WIDTH, 3))
    paint[place] = grey[..., None] * rng.uniform(90, 255, 3)
    whole = np.zeros((HEIGHT, WIDTH))
    whole[place] = np.clip(cover, 0, 1)
    mask = whole >= 0.5
    if not mask.any() or not SMALLEST <= max(box_of(mask)[2:]) / HEIGHT <= LARGEST:
        return None
    return paint, whole
