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
        image = open_image(str(image_path), where=str(image_path), upright=False)
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
        ignored = values == self.ignore_index
        if self.table is None:
            found, last = values, len(self.labels) - 1
            wrong = (values > last) & ~ignored
        else:
            # Beside what the table ignores a mask may hold the number for pixels that do not count.
            last = len(self.table) - 1
            found = self.table[values.clip(max=last)]
            outside = values > last
            wrong, found = outside & ~ignored, np.where(outside, self.ignore_index, found)
        if wrong.any():
            y, x = np.argwhere(wrong)[0].tolist()
            raise UnreadableSample(
                str(path),
                f"label {values[y, x]} at x={x}, y={y}, but labels are 0 to {last}, and "
                f"{self.ignore_index} is ignored",
            )
        return found

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
    if pairs.table is not None and 0 <= options.ignore_index < len(pairs.labels):
        raise InputError(
            f"data.ignore_index={options.ignore_index} is a label of {options.name}'s "
            f"{len(pairs.labels)} classes once they are counted from 0: give another, such as 255"
        )
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
        known: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.name.lower().endswith(endings):
                name = str(path.relative_to(folder).with_suffix(""))
                if name in known:
                    raise InputError(f"{known[name]} and {path}: which of the two is meant?")
                known[name] = path
        return known

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
    palette = palette_of_recipe(options, len(options.classes))
    table = None
    if options.zero_is_ignored:
        table = np.array([options.ignore_index, *range(len(options.classes))])
    return MaskPairs(pairs, tuple(options.classes), options.ignore_index, table, palette)


def palette_of_recipe(options: MaskDataOptions, count: int) -> Array | None:
    """Colours (count, 3) uint8 that the recipe gives, or the data set has; None if neither.

    Raises:
        InputError: not a colour for each class.
    """
    given = options.palette
    if not given and options.name == "cityscapes":
        return np.array([known.color for known in _cityscapes_classes()], np.uint8)
    if not given:
        return None
    if len(given) != count:
        raise InputError(f"data.palette has {len(given)} colours for {count} classes")
    for colour in given:
        if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
            raise InputError(f"data.palette: {colour} is not red, green, blue from 0 to 255")
    if len({tuple(colour) for colour in given}) < count:
        raise InputError("data.palette has a colour twice")
    return np.array(given, np.uint8)


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
    table = np.full(max(known.id for known in Cityscapes.classes) + 1, options.ignore_index)
    evaluated = _cityscapes_classes()
    for known in evaluated:
        table[known.id] = known.train_id
    return MaskPairs(
        pairs,
        tuple(known.name for known in evaluated),
        options.ignore_index,
        table,
        palette_of_recipe(options, len(evaluated)),
    )


def _cityscapes_classes() -> list[Any]:
    """The 19 classes that are evaluated, in the order of their labels."""
    from torchvision.datasets import Cityscapes

    evaluated = [known for known in Cityscapes.classes if known.train_id not in (-1, 255)]
    return sorted(evaluated, key=lambda known: known.train_id)


def _scenes(options: MaskDataOptions, split: str) -> MaskPairs:
    """The generated scenes; label 0 is the background."""
    import json

    from vitzoo.tasks.scenes import scenes_folder

    root = Path(options.root).expanduser() if options.root else scenes_folder(options.name)
    pairs = _matched(root / "images" / split, root / "masks" / split)
    written = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    names = tuple(category["name"] for category in written["categories"])
    return MaskPairs(pairs, ("background", *names), options.ignore_index)
