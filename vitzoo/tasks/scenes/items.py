"""Objects and photos that ship inside scikit-image, scikit-learn and Fashion-MNIST's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitzoo.errors import missing_extra

Array = np.ndarray[Any, Any]

# Photos of training and of validation: no scene of one half shares a picture with the other.
_TRAIN_PHOTOS = ("astronaut.png", "coffee.png", "motorcycle_left.png", "camera.png", "brick.png",
                 "gravel.png", "ihc.png", "retina.jpg", "flower.jpg")  # fmt: skip
_VAL_PHOTOS = ("chelsea.png", "rocket.jpg", "grass.png", "moon.png", "china.jpg")

# Fashion-MNIST's classes that fill a compact outline; its order is t-shirt, trouser, pullover,
# dress, coat, sandal, shirt, sneaker, bag, boot.
_GARMENTS = {"top": (0, 2, 4, 6), "shoe": (7, 9), "bag": (8,)}
_PER_CLASS = {"train": 300, "val": 100}


@dataclass(frozen=True)
class Item:
    """One object that scenes are made of.

    Attributes:
        grey: (h, w) float32, its surface from 0 to 1.
        cover: (h, w) float32, how much of a pixel it covers; its outline is at a half.
        turns: it may be put in at any angle, not only almost upright.
        flips: its mirror image is as good.
    """

    grey: Array
    cover: Array
    turns: bool = False
    flips: bool = False


def photos(split: str) -> list[Array]:
    """The backgrounds of `train` or `val`, (H, W, 3) uint8."""
    names = _TRAIN_PHOTOS if split == "train" else _VAL_PHOTOS
    folders = _data_folders()
    found = []
    for name in names:
        path = next(folder / name for folder in folders if (folder / name).is_file())
        found.append(np.asarray(Image.open(path).convert("RGB")))
    return found


def _data_folders() -> list[Path]:
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise missing_extra("det", error.name or "scikit-image") from None
    return [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    ]


def coins(split: str) -> list[Item]:
    """The whole coins of scikit-image's photograph: two thirds for training, a third held out."""
    from scipy import ndimage

    path = _data_folders()[0] / "coins.png"
    grey = np.asarray(Image.open(path), dtype=np.float32) / 255
    # The plate's brightness falls from the top left: a coin is what stands out of its surroundings.
    smooth = ndimage.gaussian_filter(grey, 1.5)
    solid = ndimage.binary_fill_holes(smooth > ndimage.uniform_filter(grey, 75) + 0.03)
    parts, _ = ndimage.label(ndimage.binary_opening(solid, iterations=4))
    found = []
    for number, place in enumerate(ndimage.find_objects(parts), start=1):
        mask = parts[place] == number
        h, w = mask.shape
        round_enough = 0.7 < mask.sum() / (h * w) < 0.86 and 0.85 < h / w < 1.18
        if min(h, w) >= 28 and round_enough:
            cover = np.pad(mask.astype(np.float32), 2)
            found.append(Item(np.pad(grey[place], 2, mode="edge"), cover, turns=True, flips=True))
    return [item for i, item in enumerate(found) if (i % 3 == 2) == (split == "val")]


def digits(split: str, values: tuple[int, ...] = tuple(range(10))) -> list[Item]:
    """Handwritten digits of scikit-learn: of every five images the last is held out."""
    _data_folders()
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = [
        image
        for i, (image, value) in enumerate(zip(bunch.images, bunch.target, strict=True))
        if int(value) in values and (i % 5 == 4) == (split == "val")
    ]
    found = []
    for image in chosen[: _PER_CLASS[split]]:
        # From 8x8 to 64x64 the strokes become smooth shapes of one brightness.
        cover = Image.fromarray(image.astype(np.float32) / 16).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        stroke = np.clip((np.pad(np.asarray(cover), 2) - 0.3) * 4, 0, 1)
        found.append(Item(np.full_like(stroke, 0.9), stroke))
    return found


def garments(split: str, root: str) -> dict[str, list[Item]]:
    """Tops, shoes and bags of Fashion-MNIST; held-out ones are from its own test half.

    Args:
        split: `train` or `val`.
        root: where torchvision finds the files; see `fashion_mnist_root`.
    """
    from torchvision.datasets import FashionMNIST

    dataset = FashionMNIST(root, train=split == "train")
    images, targets = dataset.data.numpy(), dataset.targets.numpy()
    found: dict[str, list[Item]] = {}
    for name, numbers in _GARMENTS.items():
        chosen = np.flatnonzero(np.isin(targets, numbers))
        items = [_garment(images[i], flips=name == "shoe") for i in chosen[: 2 * _PER_CLASS[split]]]
        found[name] = [item for item in items if item is not None][: _PER_CLASS[split]]
    return found


def _garment(image: Array, *, flips: bool) -> Item | None:
    """One image as an object; None where its outline is in pieces or almost empty."""
    from scipy import ndimage

    big = Image.fromarray(image).resize((84, 84), Image.Resampling.BICUBIC)
    grey = np.pad(np.asarray(big, dtype=np.float32) / 255, 3)
    solid = ndimage.binary_fill_holes(ndimage.binary_closing(grey > 0.12, iterations=2))
    parts, count = ndimage.label(solid)
    if not count:
        return None
    sizes = np.bincount(parts.ravel())[1:]
    mask = parts == 1 + int(sizes.argmax())
    if mask.sum() < 0.9 * solid.sum() or mask.mean() < 0.12:
        return None
    # A dark garment on a dark photo would be a hole: its surface starts at a quarter.
    return Item(0.25 + 0.75 * grey, mask.astype(np.float32), flips=flips)
