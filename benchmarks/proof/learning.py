"""Narrow models learn small real data sets better than a logistic regression on their pixels."""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from vitzoo.engine.recipe import load_recipe, recipe_names
from vitzoo.engine.train import train
from vitzoo.tasks.images import open_source


def _pixels(options: Any, *, train: bool) -> tuple[Any, Any]:
    """A split's images as rows of grey values from 0 to 1, and its classes."""
    source: Any = open_source(options, train=train)
    first = options.train_first if train else options.val_first
    count = len(source) if first is None else min(first, len(source))
    pairs = [source.image(i) for i in range(count)]
    return np.stack([np.asarray(image).ravel() / 255 for image, _ in pairs]), [t for _, t in pairs]


def learns(recipe_name: str, *, points: float) -> dict[str, Any]:
    """Train a recipe from scratch; a logistic regression on the same samples is the yardstick."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(recipe_name, [f"run.folder={folder}"])
        summary = train(recipe)
        line = summary.folder.read_metrics()[-1]
    data = recipe.options.data
    model = LogisticRegression(max_iter=2000).fit(*_pixels(data, train=True))
    baseline = 100 * float(model.score(*_pixels(data, train=False)))
    return {
        "recipe": recipe_name,
        "model": recipe.options.model.name,
        "top1": line["metrics"]["top1"],
        "logistic_regression_top1": baseline,
        "required": baseline + points,
        "passed": line["metrics"]["top1"] >= baseline + points,
        "training_seconds": line["seconds"],
    }


def _bars() -> dict[str, Callable[[], dict[str, Any]]]:
    bars = {}
    for name in recipe_names():
        if name.endswith("-digits"):
            bars[name] = partial(learns, name, points=2.0)
        elif name.endswith("-fashion-mnist"):
            bars[name] = partial(learns, name, points=1.0)
    return bars


BARS = _bars()
