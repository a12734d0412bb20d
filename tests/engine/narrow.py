"""A recipe so small that a run takes seconds, with everything that resuming must restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitzoo.engine.recipe import Recipe, merge

NARROW: dict[str, Any] = {
    "task": "classification",
    "model": {
        "name": "vz_davit_tiny",
        "drop_rate": 0.1,
        "drop_path_rate": 0.1,
        "args": {
            "depths": [1, 1, 1, 1],
            "embed_dims": [8, 16, 16, 24],
            "num_heads": [1, 2, 2, 3],
            "window_size": 4,
        },
    },
    "data": {
        "name": "sklearn/digits",
        "size": 32,
        "train_first": 72,
        "val_first": 40,
        "batch_size": 16,
        "workers": 0,
    },
    "augment": {"auto_augment": "rand-m5-mstd0.5", "erase": 0.25, "mixup": 0.2, "cutmix": 0.5},
    "optim": {"lr": 1e-3, "clip": 1.0},
    "schedule": {"epochs": 2, "warmup_epochs": 1},
    "ema": {"decay": 0.9},
    "run": {"name": "run", "device": "cpu", "precision": "no", "save_every": 1},
}


def narrow(folder: Path, *values: str) -> Recipe:
    """The recipe with its run under `folder`."""
    return merge(NARROW, [f"run.folder={folder}", *values])
