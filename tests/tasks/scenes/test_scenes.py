"""The generated scenes keep what they promise, and are the same wherever they are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from vitzoo.errors import InputError
from vitzoo.tasks.fashion_mnist import DEBIAN_FASHION_MNIST
from vitzoo.tasks.scenes import HEIGHT, VARIANTS, WIDTH, build_scenes
from vitzoo.tasks.scenes.build import CATEGORY_IDS
from vitzoo.tasks.scenes.compose import overlap
from vitzoo.tasks.scenes.items import coins, photos

COUNTS = {"train": 12, "val": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    build_scenes(folder, "scenes-digits", counts=COUNTS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decode(run_lengths: list[int]) -> Any:
    values = np.arange(len(run_lengths)) % 2
    return np.repeat(values, run_lengths).reshape(WIDTH, HEIGHT).T.astype(bool)


def test_boxes_and_masks_are_exact(root: Path) -> None:
    for split, count in COUNTS.items():
        found = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        assert [category["id"] for category in found["categories"]] == list(CATEGORY_IDS)
        assert len(found["images"]) == count
        for image in found["images"]:
            objects = [a for a in found["annotations"] if a["image_id"] == image["id"]]
            assert 1 <= len(objects) <= 6
            pixels = np.asarray(Image.open(root / "images" / split / image["file_name"]))
            classes = np.asarray(Image.open(root / "masks" / split / image["file_name"]))
            assert pixels.shape == (HEIGHT, WIDTH, 3)
            assert classes.shape == (HEIGHT, WIDTH)
            joined = np.zeros_like(classes)
            for one in objects:
                mask = decode(one["segmentation"]["counts"])
                x, y, width, height = one["bbox"]
                assert mask.sum() == one["area"] == mask[y : y + height, x : x + width].sum()
                assert mask[y].any()
                assert mask[:, x].any()
                assert mask[y + height - 1].any()
                assert mask[:, x + width - 1].any()
                assert 0.12 * HEIGHT <= max(width, height) <= 0.45 * HEIGHT
                assert not joined[mask].any()
                joined[mask] = CATEGORY_IDS.index(one["category_id"]) + 1
            assert np.array_equal(joined, classes)
            boxes = [one["bbox"] for one in objects]
            assert all(overlap(a, b) <= 0.3 for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_same_scenes_again(root: Path, tmp_path: Path) -> None:
    build_scenes(tmp_path, "scenes-digits", counts={"train": 3, "val": 6})
    again, before = contents(tmp_path), contents(root)
    assert all(before[name] == data for name, data in again.items() if "_train.json" not in name)


def test_the_halves_share_nothing() -> None:
    for kind in (photos, lambda split: [item.grey for item in coins(split)]):
        train, val = kind("train"), kind("val")
        assert len(train) > len(val) >= 5
        assert not any(a.shape == b.shape and (a == b).all() for a in train for b in val)


def test_garments_or_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no scenes 'cars'; there are scenes, scenes-digits"):
        build_scenes(tmp_path, "cars")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if DEBIAN_FASHION_MNIST.is_dir():
        build_scenes(tmp_path / "scenes", counts={"train": 4, "val": 4})
        names = json.loads((tmp_path / "scenes" / "classes.json").read_text())
        assert names == ["background", *VARIANTS["scenes"]]
    monkeypatch.setattr("vitzoo.tasks.fashion_mnist.DEBIAN_FASHION_MNIST", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        build_scenes(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
