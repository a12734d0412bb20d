"""The halves of a folder of images: split folders by their usual names, or a part of each class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vitzoo.errors import InputError

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "validation", "valid", "eval", "evaluation", "test")


def find_split(root: Path, split: str) -> Path:
    """The folder of a split under `root`, or `root` itself where it has no split folders.

    Raises:
        InputError: other split folders are there, but not this one.
    """
    synonyms: tuple[str, ...] = (split,)
    for group in (TRAIN_FOLDERS, VAL_FOLDERS):
        if split in group:
            synonyms = (split, *group)
    for name in synonyms:
        if (root / name).is_dir():
            return root / name
    others = [name for name in TRAIN_FOLDERS + VAL_FOLDERS if (root / name).is_dir()]
    if others:
        raise InputError(
            f"{root} has the folder {others[0]!r} but none for the split {split!r}: name one of "
            f"its folders {', '.join(synonyms)}, or set data.train_split and data.val_split"
        )
    return root


def part_of(
    samples: Sequence[tuple[str, int]], root: Path, fraction: float, *, held_out: bool
) -> list[tuple[str, int]]:
    """The training or the held-out samples of a folder without split folders.

    Which files are held out follows from their names below `root` alone: it is the same on every
    machine and in every run, and new files move none of the old ones by more than the rounding.

    Args:
        samples: (path, class) of all.
        root: the folder.
        fraction: of each class that is held out, rounded, but at least one file.
        held_out: which part.

    Raises:
        InputError: no fraction between 0 and 1, or a class too small to be split.
    """
    if not 0 < fraction < 1:
        raise InputError(f"data.val_fraction={fraction} is not between 0 and 1")
    by_class: dict[int, list[tuple[str, int]]] = {}
    for sample in samples:
        by_class.setdefault(sample[1], []).append(sample)
    kept = set()
    for files in by_class.values():
        count = max(1, round(fraction * len(files)))
        if count >= len(files):
            raise InputError(
                f"{Path(files[0][0]).parent} has {len(files)} images, too few to hold out a part "
                f"of {fraction} for validation"
            )
        kept.update(sorted(files, key=lambda sample: _lot(Path(sample[0]), root))[:count])
    return [sample for sample in samples if (sample in kept) == held_out]


def _lot(path: Path, root: Path) -> str:
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()
