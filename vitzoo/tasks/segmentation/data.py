"""Images with masks: where they lie, what their numbers mean, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers import get_img_extensions

from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.pictures import open_image
from vitzoo.tasks.segmentation.options import MaskDataOptions

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MaskPairs:
    """Images and their masks.

    Attributes:
        pairs: (image, mask) files; either may be missing.
        labels: names of the classes.
        ignore_index: label of pixels that do not count.
        table: label of each mask value, where the values are not the labels.
        palette: colours (classes, 3) uint8 of masks that are colour pictures; empty if none.
    """

    pairs: tuple[tuple[Path, Path], ...]
    labels: tuple[str, ...]
    ignore_index: int
    table: Array | None = None
    palette: Array | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, Array]:
        """An image and its labels (H, W) int64.

        Raises:
            UnreadableSample: a file that is missing or torn, a mask of another size than its
                image, a number or colour that is no label.
        """
        image_path, mask_path = self.pairs[index]
        image = open_image(str(image_path), where=str(image_path))
        labels = self._labels(mask_path)
        if labels.shape != (image.height, image.width):
            raise UnreadableSample(
                str(mask_path),
                f"the mask is {labels.shape[1]} x {labels.shape[0]} pixels, its image {image_path} "
                f"is {image.width} x {image.height}",
            )
        return image, labels

    def _labels(self, path: Path) -> Array:
        values = _mask_values(path)
        if values.ndim == 3:
            return self._from_colours(values, path)
        if self.table is not None:
            if values.max(initial=0) >= len(self.table):
                self._refuse(values, values >= len(self.table), path, len(self.table))
            return self.table[values]
        wrong = (values >= len(self.labels)) & (values != self.ignore_index)
        if wrong.any():
            self._refuse(values, wrong, path, len(self.labels))
        return values

    def _refuse(self, values: Array, wrong: Array, path: Path, count: int) -> None:
        y, x = np.argwhere(wrong)[0].tolist()
        raise UnreadableSample(
            str(path),
            f"label {values[y, x]} at x={x}, y={y}, but labels are 0 to {count - 1}, and "
            f"{self.ignore_index} is ignored",
        )

    def _from_colours(self, colours: Array, path: Path) -> Array:
        if self.palette is None or not len(self.palette):
            raise UnreadableSample(
                str(path),
                "the mask is a colour picture: give data.palette, a colour per class, or masks of "
                "one channel",
            )
        weights = np.array([1 << 16, 1 << 8, 1])
        codes, known = colours @ weights, self.palette.astype(np.int64) @ weights
        order = np.argsort(known)
        place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
        wrong = known[order][place] != codes
        if wrong.any():
            y, x = np.argwhere(wrong)[0].tolist()
            raise UnreadableSample(
                str(path), f"colour {colours[y, x].tolist()} at x={x}, y={y} is not in data.palette"
            )
        return order[place]


def _mask_values(path: Path) -> Array:
    """Numbers (H, W) or colours (H, W, 3) of a mask, int64."""
    try:
        with Image.open(path) as image:
            # A palette's colours are for the eye; the numbers behind them are the labels.
            kept = image if image.mode in ("L", "P", "I", "I;16", "1") else image.convert("RGB")
            return np.asarray(kept).astype(np.int64)
    except FileNotFoundError:
        raise UnreadableSample(str(path), "no such file: the image has no mask") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableSample(str(path), f"not a readable mask: {error}") from None


def open_pairs(options: MaskDataOptions, *, train: bool) -> MaskPairs:
    """One split of the data that the recipe names.

    Raises:
        InputError: nothing there, or classes that are not said.
    """
    split = options.train_split if train else options.val_split
    pairs = {
        "folder": _folder,
        "ade20k": _ade20k,
        "cityscapes": _cityscapes,
        "scenes": _scenes,
        "scenes-digits": _scenes,
    }[options.name](options, split)
    first = options.train_first if train else options.val_first
    return MaskPairs(
        pairs.pairs[:first], pairs.labels, options.ignore_index, pairs.table, pairs.palette
    )


def _root(options: MaskDataOptions) -> Path:
    if options.root is None:
        raise InputError(f"data.root is not set: the folder of {options.name}")
    root = Path(options.root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.root={options.root} is no folder")
    return root


def _matched(images: Path, masks: Path) -> tuple[tuple[Path, Path], ...]:
    """Files of the same name but for the ending, in either folder or both."""
    endings = tuple(get_img_extensions())
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder (see data.images, data.masks, data.*_split)")

    def files(folder: Path) -> dict[str, Path]:
        return {
            str(path.relative_to(folder).with_suffix("")): path
            for path in folder.rglob("*")
            if path.name.lower().endswith(endings)
        }

    found, drawn = files(images), files(masks)
    if not found:
        raise InputError(f"no images in {images}")
    # Where one of the two is missing the sample is unreadable, which data.on_error decides on.
    return tuple(
        (found.get(name, images / f"{name}.png"), drawn.get(name, masks / f"{name}.png"))
        for name in sorted({*found, *drawn})
    )


def _folder(options: MaskDataOptions, split: str) -> MaskPairs:
    root = _root(options)
    if not options.classes:
        raise InputError("data.classes is not set: the names of the labels, from 0 up")
    pairs = _matched(
        root / options.images.format(split=split), root / options.masks.format(split=split)
    )
    palette = np.array(options.palette, np.uint8) if options.palette else None
    table = None
    if options.zero_is_ignored:
        table = np.array([options.ignore_index, *range(len(options.classes))])
    return MaskPairs(pairs, tuple(options.classes), options.ignore_index, table, palette)


def _ade20k(options: MaskDataOptions, split: str) -> MaskPairs:
    """SceneParsing's layout; its `objectInfo150.txt` names the classes."""
    root = _root(options)
    split = {"train": "training", "val": "validation"}.get(split, split)
    pairs = _matched(root / "images" / split, root / "annotations" / split)
    labels = tuple(options.classes) or _ade20k_names(root)
    table = np.array([options.ignore_index, *range(len(labels))])
    return MaskPairs(pairs, labels, options.ignore_index, table)


def _ade20k_names(root: Path) -> tuple[str, ...]:
    file = root / "objectInfo150.txt"
    if not file.is_file():
        raise InputError(f"{file}, which names the classes, is not there: give data.classes")
    lines = file.read_text().splitlines()[1:]
    return tuple(line.split("\t")[-1].partition(",")[0].strip() for line in lines if line.strip())


def _cityscapes(options: MaskDataOptions, split: str) -> MaskPairs:
    """The official layout; the original 34 ids become the 19 that are evaluated."""
    from torchvision.datasets import Cityscapes

    root = _root(options)
    images = root / "leftImg8bit" / split
    found = sorted(images.glob("*/*_leftImg8bit.png"))
    if not found:
        raise InputError(f"no images in {images}/CITY/*_leftImg8bit.png")
    masks = root / "gtFine" / split
    pairs = tuple(
        (
            path,
            masks / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds"),
        )
        for path in found
    )
    table = np.full(256, options.ignore_index)
    evaluated = [known for known in Cityscapes.classes if known.train_id not in (-1, 255)]
    for known in evaluated:
        table[known.id] = known.train_id
    evaluated.sort(key=lambda known: known.train_id)
    colours = np.array([known.color for known in evaluated], np.uint8)
    return MaskPairs(
        pairs, tuple(known.name for known in evaluated), options.ignore_index, table, colours
    )


def _scenes(options: MaskDataOptions, split: str) -> MaskPairs:
    """The generated scenes; label 0 is the background."""
    import json

    from vitzoo.tasks.scenes import scenes_folder

    root = Path(options.root).expanduser() if options.root else scenes_folder(options.name)
    pairs = _matched(root / "images" / split, root / "masks" / split)
    written = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    names = tuple(category["name"] for category in written["categories"])
    return MaskPairs(pairs, ("background", *names), options.ignore_index)
