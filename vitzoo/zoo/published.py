"""The whole weights table, and looking things up in it."""

from __future__ import annotations

import importlib
import pkgutil

from vitzoo.zoo import entries
from vitzoo.zoo.entries import WeightEntry


def all_entries() -> list[WeightEntry]:
    """Every entry of the weights table, family by family."""
    found: list[WeightEntry] = []
    for module in pkgutil.iter_modules(entries.__path__):
        if not module.name.startswith("_"):
            table = importlib.import_module(f"{entries.__name__}.{module.name}")
            found.extend(table.ENTRIES)
    return found


def find_entry(name: str) -> WeightEntry | None:
    """The table's entry of `model.tag`, or of a model's first published weights."""
    model, _, tag = name.partition(".")
    for entry in all_entries():
        if entry.model == model and entry.task == "classification" and tag in ("", entry.tag):
            return entry
    return None


def accuracy(name: str) -> dict[str, float]:
    """Published metrics of `model.tag`, or of the model's first entry where no tag is given."""
    entry = find_entry(name)
    return dict(entry.published) if entry else {}
