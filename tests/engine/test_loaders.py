"""Batches are the same with any number of loader processes, of which there are not too many."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.engine.narrow import narrow
from vitzoo.engine import loaders
from vitzoo.engine.loaders import Batches
from vitzoo.tasks import task_class


def batches(folder: Path, workers: int) -> Batches:
    recipe = narrow(folder)
    data = task_class(recipe.task)(recipe.options).build_data()
    return Batches(
        data.train,
        data.collate,
        batch_size=16,
        workers=workers,
        train=True,
        on_error="stop",
        seed=3,
    )


@pytest.mark.parametrize("skip", [0, 3])
def test_batches_do_not_depend_on_workers_or_on_where_one_starts(
    tmp_path: Path, skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "_cores", lambda: 2)
    whole = list(batches(tmp_path, 0).epoch(1))
    assert len(whole) == 4
    parts = list(batches(tmp_path, 2).epoch(1, skip=skip))
    for mine, other in zip(parts, whole[skip:], strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])


def test_more_workers_than_cores_are_not_started(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = batches(tmp_path, 4096)
    assert 1 <= made.loader.num_workers < 4096
