"""A folder of class folders without a split, and photographs that lie on their side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitzoo.engine.recipe import Recipe, merge
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.tasks.pictures import image_of, open_image
from vitzoo.tasks.splits import part_of

COUNTS = {"cat": 20, "dog": 7}
TINY = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 24], "num_heads": [1, 2, 2, 3]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in COUNTS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def recipe(folder: Path, *values: str) -> Recipe:
    return merge(
        {
            "task": "classification",
            "model": {"name": "vz_davit_tiny", "args": TINY | {"window_size": 4}},
            "data": {"root": str(folder), "size": 32, "batch_size": 4, "workers": 0},
            "schedule": {"epochs": 1},
            "run": {"folder": str(folder.parent), "device": "cpu", "precision": "no"},
        },
        list(values),
    )


def samples(folder: Path) -> list[tuple[str, int]]:
    return [
        (str(folder / name / f"{i}.png"), label)
        for label, (name, count) in enumerate(COUNTS.items())
        for i in range(count)
    ]


def test_a_part_of_each_class_is_held_out(folder: Path) -> None:
    found = samples(folder)
    train_part, held_out = (part_of(found, folder, 0.2, held_out=h) for h in (False, True))
    assert sorted(train_part + held_out) == sorted(found)
    assert [sum(label == i for _, label in held_out) for i in (0, 1)] == [4, 1]
    assert part_of(found[::-1], folder, 0.2, held_out=True) == held_out[::-1]
    # Another place, the same files.
    moved = [(path.replace("images", "pictures"), label) for path, label in found]
    again = part_of(moved, folder.parent / "pictures", 0.2, held_out=True)
    assert [(p.replace("pictures", "images"), label) for p, label in again] == held_out


def test_training_on_a_folder_without_a_split(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.val_fraction=0\.1"):
        train(recipe(folder))
    summary = train(recipe(folder, "data.val_fraction=0.2"))
    assert 0 <= summary.metrics["top1"] <= 100


def test_a_fraction_that_cannot_be(folder: Path) -> None:
    for fraction, message in ((1.0, "between 0 and 1"), (0.95, "too few")):
        with pytest.raises(InputError, match=message):
            part_of(samples(folder), folder, fraction, held_out=True)
    split = folder.parent / "split"
    split.mkdir()
    folder.rename(split / "train")
    with pytest.raises(InputError, match="split already"):
        train(recipe(split, "data.val_fraction=0.1"))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by a quarter, clockwise.
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path, exif=exif)
    image = image_of(path)
    assert image.size == (20, 40)
    assert np.array_equal(np.asarray(image), np.rot90(pixels, -1))
    assert open_image(path, where="photo", upright=False).size == (40, 20)
