"""What a run must have in common with its start to go on, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitzoo._paths import write_atomically
from vitzoo.engine.recipe import Recipe, write_recipe
from vitzoo.engine.runfolder import RunFolder
from vitzoo.errors import InputError, some_of

_WAY_OUT = "give run.name=NAME for a new run"

# May differ between a run and its resumption: none of them changes the result, as long as what lies
# under data.root is the same; its classes and numbers of samples are compared.
FREE_KEYS = {
    "data.root",
    "data.workers",
    "data.eval_batch_size",
    "model.compile",
    "model.grad_checkpointing",
    "run.folder",
    "run.device",
    "run.save_every",
    "run.keep_checkpoints",
}


def same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Keep the recipe with the run, or check that it is the one kept.

    Raises:
        InputError: the run was started with other values.
    """
    if not any(folder.checkpoints.glob("*.safetensors")):
        if folder.weights.exists():
            raise InputError(
                f"{folder.root} has weights but no checkpoint to go on from: {_WAY_OUT}"
            )
        # Nothing is trained yet: a first start that failed must not bind the next.
        write_atomically(folder.recipe, write_recipe(recipe.merged).encode())
        return
    from omegaconf import OmegaConf

    if not folder.recipe.is_file():
        raise InputError(
            f"{folder.root} has checkpoints but no {folder.recipe.name} to compare with: put it "
            f"back, or {_WAY_OUT}"
        )
    before = _flat(OmegaConf.to_container(OmegaConf.load(folder.recipe)))
    now = _flat(recipe.merged)
    differing = [
        f"{key}={before.get(key)} (now {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_KEYS
    ]
    if differing:
        raise InputError(
            f"{folder.root} was started with {some_of(differing)}: give the same values to go on, "
            f"or {_WAY_OUT}"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def count_samples(*parts: Any) -> list[int | None]:
    """Lengths of datasets, None for streams."""
    return [len(part) if hasattr(part, "__len__") else None for part in parts]


def same_labels(root: Path, before: Sequence[str], now: Sequence[str]) -> None:
    """Check the classes.

    Raises:
        InputError: they, or their order, are others than at the run's start.
    """
    if list(before) == list(now):
        return
    changes = [
        f"{what} {some_of(names)}"
        for what, names in (
            ("without", [name for name in before if name not in now]),
            ("with", [name for name in now if name not in before]),
        )
        if names
    ]
    raise InputError(
        f"{root} was trained on {len(before)} classes, the data now has {len(now)}, "
        f"{' and '.join(changes) or 'in another order'}: {_WAY_OUT}"
    )


def same_samples(root: Path, before: Sequence[int | None], now: Sequence[int | None]) -> None:
    """Check the numbers of samples, from which the length of an epoch and the schedule follow.

    Raises:
        InputError: training or validation data have more or fewer samples than at the start.
    """
    if list(before) != list(now):
        counts = (" and ".join(map(str, numbers)) for numbers in (before, now))
        raise InputError(
            f"{root} was trained on {next(counts)} samples (training and validation), the data now "
            f"has {next(counts)}: {_WAY_OUT}"
        )
