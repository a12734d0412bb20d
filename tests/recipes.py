"""Which recipes the tests of a task take, found from the folder."""

from __future__ import annotations

from typing import Any

import pytest

from vitzoo.engine.recipe import find_recipe, recipe_names


def recipes_of(task: str) -> list[Any]:
    """A task's recipes, as parameters; all but the first of each family are `slow`."""
    found: list[Any] = []
    seen: set[str] = set()
    for name in recipe_names():
        if find_recipe(name).parent.name != task:
            continue
        family = name.partition("-")[0]
        found.append(pytest.param(name, marks=[pytest.mark.slow] if family in seen else []))
        seen.add(family)
    return found
