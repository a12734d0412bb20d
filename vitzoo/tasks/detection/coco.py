"""Images with boxes and masks from a COCO-style file."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection.augment import LEAST_SIDE, Sample, crop, mirror
from vitzoo.tasks.detection.masks import mask_of
from vitzoo.tasks.pictures import open_image

logger = logging.getLogger("vitzoo.data")


class CocoImages(Dataset[Sample]):
    """Every image of a COCO-style file, those without objects among them.

    A sample has `image` (3, H, W) from 0 to 1, `boxes` (N, 4) as x0, y0, x1, y1, `labels` (N,)
    from 1, `masks` (N, H, W) uint8 where they are wanted, and the `image_id`. Crowds are left
    out; `truth` has them for the evaluation.

    Args:
        annotations: the JSON file.
        images: the folder that `file_name` is relative to.
        masks: also read masks.
        first: keep only the first n images.
        flip: probability of the mirror image.
        crop: probability of a random window.
        photometric: change brightness, contrast, saturation and hue at random.

    Raises:
        InputError: no such file, or not COCO's form; the message says what is missing.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        *,
        masks: bool,
        first: int | None = None,
        flip: float = 0.0,
        crop: float = 0.0,
        photometric: bool = False,
    ) -> None:
        self.path, self.folder, self.masks = annotations, images, masks
        self.flip, self.crop = flip, crop
        self._photometric = v2.RandomPhotometricDistort(p=0.5) if photometric else nn.Identity()
        content = _read(annotations)
        known = {one["id"] for one in content["images"]}
        strays = sum(one["image_id"] not in known for one in content["annotations"])
        if strays:
            logger.warning(
                "%s: %d annotations are of images that it does not list", self.path, strays
            )
        self.categories = sorted(content["categories"], key=lambda one: one["id"])
        self.images = content["images"][:first]
        self.by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for one in content["annotations"]:
            self.by_image[one["image_id"]].append(one)
        self.label_of = {one["id"]: i for i, one in enumerate(self.categories, start=1)}

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the categories, by rising id."""
        return tuple(str(one["name"]) for one in self.categories)

    @property
    def category_ids(self) -> list[int]:
        """COCO's id of label i + 1."""
        return [one["id"] for one in self.categories]

    def __len__(self) -> int:
        return len(self.images)

    def truth(self, image_ids: list[Any]) -> dict[str, Any]:
        """The file's content for some images; an image's size, where it has none, is read."""
        kept = set(image_ids)
        return {
            "images": [self._with_size(one) for one in self.images if one["id"] in kept],
            "annotations": [a for image in image_ids for a in self.by_image.get(image, [])],
            "categories": self.categories,
        }

    def _with_size(self, record: dict[str, Any]) -> dict[str, Any]:
        if _has_size(record):
            return record
        # Polygons have no size of their own, so the evaluation cannot draw them without.
        with Image.open(self._file(record)) as image:
            return {**record, "width": image.width, "height": image.height}

    def _file(self, record: dict[str, Any]) -> Path:
        return self.folder / str(record["file_name"])

    def __getitem__(self, index: int) -> Sample:
        record = self.images[index]
        path = self._file(record)
        image = open_image(path, where=str(path), upright=False)
        if _has_size(record) and image.size != (record["width"], record["height"]):
            raise UnreadableSample(
                str(path),
                f"the image is {image.width} x {image.height}, but {record['width']} x "
                f"{record['height']} in {self.path.name}",
            )
        boxes, labels = [], []
        masks: list[Any] = []
        for one in self.by_image.get(record["id"], []):
            where = f"annotation {one.get('id')} of {path} ({self.path.name})"
            # A crowd is checked, too: the evaluation reads it.
            box, label = _box(one, image.size, where), self._label(one, where)
            mask = mask_of(one, image.size, where) if self.masks else None
            if one.get("iscrowd"):
                continue
            boxes.append(box)
            labels.append(label)
            masks.append(mask)
        width, height = image.size
        sample: Sample = {
            "image": self._photometric(pil_to_tensor(image)).float() / 255,
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.long),
            "image_id": record["id"],
        }
        if self.masks:
            joined = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
            sample["masks"] = torch.from_numpy(joined)
        if self.flip and torch.rand(()).item() < self.flip:
            mirror(sample)
        if self.crop and torch.rand(()).item() < self.crop:
            crop(sample)
        return sample

    def _label(self, one: dict[str, Any], where: str) -> int:
        try:
            return self.label_of[one["category_id"]]
        except (KeyError, TypeError):
            known = ", ".join(str(number) for number in self.label_of)
            raise UnreadableSample(
                where, f"category id {one.get('category_id')} is none of the file's: {known}"
            ) from None


# What an entry of each list cannot be without; the rest is looked at when its image is read.
_WANTED = {
    "images": ("id", "file_name"),
    "annotations": ("image_id",),
    "categories": ("id", "name"),
}
# What these are looked up by, and what a model's file keeps its categories as.
_IDS: tuple[tuple[str, str, tuple[type, ...]], ...] = (
    ("images", "id", (int, str)),
    ("annotations", "image_id", (int, str)),
    ("categories", "id", (int,)),
)


def _has_size(record: dict[str, Any]) -> bool:
    return isinstance(record.get("width"), int) and isinstance(record.get("height"), int)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no annotations {path}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    for key, wanted in _WANTED.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path} is not COCO's form: it has no list {key!r}")
        for i, one in enumerate(content[key]):
            missing = [name for name in wanted if not isinstance(one, dict) or name not in one]
            if missing:
                raise InputError(f"{path} is not COCO's form: {key}[{i}] has no {missing[0]!r}")
    for key, name, kinds in _IDS:
        for i, one in enumerate(content[key]):
            if type(one[name]) not in kinds:
                raise InputError(
                    f"{path} is not COCO's form: {key}[{i}] has {name} {one[name]!r}, not "
                    + " or ".join({int: "a whole number", str: "a text"}[kind] for kind in kinds)
                )
    for key in ("images", "categories"):
        if not content[key]:
            raise InputError(f"{path} lists no {key}")
        twice = [one for one, count in Counter(c["id"] for c in content[key]).items() if count > 1]
        if twice:
            raise InputError(f"{path} has id {twice[0]} twice among its {key}")
    return content


def _box(one: dict[str, Any], size: tuple[int, int], where: str) -> list[float]:
    """x0, y0, x1, y1 of an annotation, cut to the image by at most a pixel's rounding."""
    given = one.get("bbox")
    if not isinstance(given, list) or len(given) != 4:
        raise UnreadableSample(where, f"its box {given} is not [x, y, width, height]")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in given):
        raise UnreadableSample(where, f"its box {given} is not four numbers")
    x, y, width, height = (float(value) for value in given)
    if width < LEAST_SIDE or height < LEAST_SIDE:
        raise UnreadableSample(where, f"its box {given} has no area")
    # Annotators' tools round: COCO's own boxes leave the image by fractions of a pixel.
    if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
        raise UnreadableSample(
            where, f"its box {given} lies outside the image of {size[0]} x {size[1]}"
        )
    x0, y0 = max(x, 0.0), max(y, 0.0)
    x1, y1 = min(x + width, float(size[0])), min(y + height, float(size[1]))
    if min(x1 - x0, y1 - y0) < LEAST_SIDE:
        raise UnreadableSample(where, f"its box {given} has no area inside the image")
    return [x0, y0, x1, y1]
