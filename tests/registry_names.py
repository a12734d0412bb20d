"""Which names the registry-wide suite runs, found from the registry itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm

import vitzoo
from vitzoo._skeleton import without_memory

MILLION = 1_000_000


@functools.cache
def _built(name: str) -> tuple[int, frozenset[type]]:
    """Parameters and module classes of a model, from one build on the meta device."""
    with without_memory():
        model = timm.create_model(name)
    kinds = {type(module) for module in model.modules()}
    own = frozenset(kind for kind in kinds if not kind.__module__.startswith("torch."))
    return sum(p.numel() for p in model.parameters()), own


def parameters(name: str) -> int:
    """Parameters of a model, counted."""
    return _built(name)[0]


def module_types(name: str) -> frozenset[type]:
    """The set of classes that a model is made of, torch's own left out."""
    return _built(name)[1]


def _smallest_of_each_kind() -> list[str]:
    kinds: dict[frozenset[type], str] = {}
    for name in sorted(TIER_0, key=parameters):
        kinds.setdefault(module_types(name), name)
    return list(kinds.values())


def _smallest_of_each_family() -> list[str]:
    families: dict[str, str] = {}
    for name in TIER_2:
        families.setdefault(vitzoo.info(name).family, name)
    return list(families.values())


TIER_0 = [name for name in vitzoo.list_models() if vitzoo.info(name).modality == "image"]
TIER_1 = [name for name in TIER_0 if parameters(name) < 40 * MILLION]
UNDER_100_M = [name for name in TIER_0 if parameters(name) < 100 * MILLION]
TIER_2 = _smallest_of_each_kind()
TIER_3 = _smallest_of_each_family()


def by_name(names: list[str], quick: Sequence[str] | None = None) -> Callable[[Any], Any]:
    """Parametrise over models; all checks of one model run on one worker, which builds it once.

    Args:
        names: the models.
        quick: those that are not `slow`; all if None.
    """
    found = []
    for name in names:
        marks = [pytest.mark.xdist_group(name)]
        if quick is not None and name not in quick:
            marks.append(pytest.mark.slow)
        found.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", found)
