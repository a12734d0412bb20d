"""The scenes on disk: COCO's JSON, images, and masks with class numbers."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitzoo._paths import cache_folder
from vitzoo.tasks.fashion_mnist import fashion_mnist_root
from vitzoo.tasks.scenes.compose import HEIGHT, WIDTH, Scene, box_of, compose
from vitzoo.tasks.scenes.items import Array, Item, coins, digits, garments, photos

# Name -> classes. The second needs nothing but the two wheels; its digits are classes of their own.
VARIANTS = {
    "scenes": ("coin", "digit", "top", "shoe", "bag"),
    "scenes-digits": ("coin", "zero", "one", "four", "seven"),
}
# Sparse and not in a row, as COCO's are: a class number taken for an id is found out.
CATEGORY_IDS = (3, 7, 18, 44, 90)
COUNTS = {"train": 400, "val": 100}
# Raised whenever the same seed would draw other scenes, so that no cache holds old ones.
_EDITION = 1
_SEEDS = {"train": 0, "val": 1}
_DIGITS = {"zero": 0, "one": 1, "four": 4, "seven": 7}


def scenes_folder(variant: str = "scenes") -> Path:
    """The folder of a variant in the user's cache, generated at the first call.

    Args:
        variant: `scenes`, which needs Fashion-MNIST's files, or `scenes-digits`, which does not.

    Raises:
        ValueError: no such variant.
        InputError: Fashion-MNIST or a package is not here; the message says how to get it.
    """
    target = cache_folder("datasets", f"{variant}-{_EDITION}")
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        build_scenes(partial, variant)
        try:
            partial.rename(target)
        except OSError:
            # Another process was faster; its scenes are the same.
            shutil.rmtree(partial)
    return target


def build_scenes(
    root: Path, variant: str = "scenes", *, counts: dict[str, int] | None = None
) -> None:
    """Generate the scenes of a variant: the same bytes for the same packages, wherever it runs.

    Writes `annotations/instances_{train,val}.json` (COCO, with masks as run lengths),
    `images/{train,val}/*.png`, `masks/{train,val}/*.png` (8 bit: 0 is background, class k of
    the variant is k + 1) and `classes.json`.

    Args:
        root: a folder that does not exist or may be written into.
        variant: which classes; see `VARIANTS`.
        counts: scenes of `train` and `val`; 400 and 100 if None.

    Raises:
        ValueError: no such variant.
        InputError: Fashion-MNIST or a package is not here.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no scenes {variant!r}; there are {', '.join(VARIANTS)}")
    # Before anything is written: this is what can be missing.
    garment_root = fashion_mnist_root(None, download=False) if variant == "scenes" else None
    for split, count in (counts or COUNTS).items():
        items = _items(variant, split, garment_root)
        backgrounds = photos(split)
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        annotations = _coco(variant, split)
        for number in range(count):
            scene = compose((_EDITION, _SEEDS[split], number), backgrounds, items)
            name = f"{number:06d}.png"
            (root / "images" / split / name).write_bytes(_png(scene.image))
            (root / "masks" / split / name).write_bytes(_png(scene.classes))
            _add(annotations, scene, number + 1, name)
        (root / "annotations").mkdir(exist_ok=True)
        text = json.dumps(annotations)
        (root / "annotations" / f"instances_{split}.json").write_text(text)
    names = ["background", *VARIANTS[variant]]
    (root / "classes.json").write_text(json.dumps(names) + "\n")


def _items(variant: str, split: str, garment_root: str | None) -> dict[int, list[Item]]:
    by_name = {"coin": coins(split)}
    if garment_root is None:
        by_name |= {name: digits(split, (value,)) for name, value in _DIGITS.items()}
    else:
        by_name |= {"digit": digits(split), **garments(split, garment_root)}
    return {i: by_name[name] for i, name in enumerate(VARIANTS[variant])}


def _png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _coco(variant: str, split: str) -> dict[str, Any]:
    names = VARIANTS[variant]
    return {
        "info": {"description": f"vitzoo's synthetic {variant}, {split}", "version": str(_EDITION)},
        "images": [],
        "annotations": [],
        "categories": [
            {"id": number, "name": name} for number, name in zip(CATEGORY_IDS, names, strict=True)
        ],
    }


def _add(annotations: dict[str, Any], scene: Scene, image_id: int, name: str) -> None:
    """One scene's entries."""
    annotations["images"].append(
        {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH}
    )
    for mask, label in zip(scene.masks, scene.labels, strict=True):
        annotations["annotations"].append(
            {
                "id": len(annotations["annotations"]) + 1,
                "image_id": image_id,
                "category_id": CATEGORY_IDS[label],
                "bbox": box_of(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths(mask)},
            }
        )


def run_lengths(mask: Array) -> list[int]:
    """COCO's uncompressed run lengths: column by column, zeros first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = [0, *changes.tolist(), flat.size]
    runs = np.diff(edges).tolist()
    return [0, *runs] if flat[0] else runs
