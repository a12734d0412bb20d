"""What a network learnt on five classes helps it with five others, family by family."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from vitzoo.engine.recipe import load_recipe, recipe_names
from vitzoo.engine.train import train

FIRST, OTHERS = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
LEAST_GAIN = 1.0


BROAD = ["data.train_first=15000", "schedule.epochs=3"]
# Few images, but updates enough that both settle: in twenty, whichever starts flatter is ahead.
BUDGET = ["data.train_first=500", "data.batch_size=20", "optim.lr=1e-3", "schedule.epochs=8"]


def _run(recipe: str, folder: str, classes: list[int], *values: str) -> Any:
    given = [f"data.classes={classes}".replace(" ", ""), "data.val_first=5000"]
    return train(load_recipe(recipe, [*given, f"run.folder={folder}", *values]))


def transfers(recipe: str) -> dict[str, Any]:
    """Train on classes 0-4; then on few images of 5-9, from there and from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        first = _run(recipe, f"{folder}/first", FIRST, *BROAD)
        start = f"model.checkpoint={Path(first.folder.weights)}"
        moved = _run(recipe, f"{folder}/moved", OTHERS, *BUDGET, start).metrics["top1"]
        scratch = _run(recipe, f"{folder}/scratch", OTHERS, *BUDGET).metrics["top1"]
    return {
        "recipe": recipe,
        "first": BROAD,
        "budget": BUDGET,
        "first_classes_top1": first.metrics["top1"],
        "top1": moved,
        "scratch_top1": scratch,
        "gain": moved - scratch,
        "required": {"gain": LEAST_GAIN},
        "passed": moved - scratch >= LEAST_GAIN,
    }


BARS = {
    f"transfer-{name.removesuffix('-fashion-mnist')}": partial(transfers, name)
    for name in recipe_names()
    if name.endswith("-fashion-mnist") and not name.startswith("sparsifiner")
}
