"""A run of each image task, trained for one step on generated data: what exports and predictions
of runs are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitzoo.engine.recipe import merge
from vitzoo.engine.train import train
from vitzoo.tasks.scenes import build_scenes


def _davit(widths: list[int], heads: list[int]) -> dict[str, Any]:
    depths = [1] * len(widths)
    args = {"depths": depths, "embed_dims": widths, "num_heads": heads, "window_size": 4}
    return {"name": "vz_davit_tiny", "args": args}


# Heads want maps at four strides; a classifier is traced, which takes longer with every stage.
BACKBONE = _davit([8, 16, 16, 24], [1, 2, 2, 3])
CLASSIFIER = _davit([8, 16], [1, 2])
ONE_STEP: dict[str, Any] = {
    "schedule": {"epochs": 1},
    "run": {"device": "cpu", "precision": "no"},
}
SCENES = {"train": 2, "val": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "classification": {
        "model": CLASSIFIER,
        "data": {"name": "sklearn/digits", "size": 32, "train_first": 16, "val_first": 16},
    },
    "detection": {
        "model": BACKBONE
        | {
            "channels": 16,
            "anchor_sizes": [16, 32, 64, 96, 128],
            "head_args": {"box_score_thresh": 0.0, "box_detections_per_img": 5},
        },
        "data": {
            "train_annotations": "annotations/instances_train.json",
            "val_annotations": "annotations/instances_val.json",
            "train_images": "images/train",
            "val_images": "images/val",
            "min_size": [96],
            "max_size": 128,
        },
    },
    "segmentation": {
        "model": BACKBONE
        | {
            "head": "fpn",
            "head_args": {"pyramid_channels": 32, "segmentation_channels": 32},
        },
        "data": {"name": "scenes", "size": [64, 96]},
    },
}


def scenes(folder: Path) -> Path:
    """Two generated training scenes and a held-out one, with boxes, masks and labels."""
    build_scenes(folder, "scenes-digits", counts=SCENES)
    return folder


def tiny_run(task: str, folder: Path, root: Path, *values: str) -> Path:
    """Train a tiny run of `task` for one step and return its folder.

    Args:
        task: a key of `RECIPES`.
        folder: where runs go.
        root: generated scenes; digits need none.
        values: further recipe values.
    """
    recipe = {"task": task} | ONE_STEP | RECIPES[task]
    given = [f"run.folder={folder}", f"run.name={task}", "data.workers=0", *values]
    if task == "classification":
        given.append("data.batch_size=16")
    else:
        given += [f"data.root={root}", "data.batch_size=2"]
    train(merge(recipe, given))
    return folder / task
