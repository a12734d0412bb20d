"""Loader processes change no batch, and no more are started than there are cores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset

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


def test_more_workers_than_cores_are_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert batches(tmp_path, 4096).loader.num_workers == loaders._cores()
    monkeypatch.setattr(loaders, "_cores", lambda: 1)
    with caplog.at_level("INFO", logger="vitzoo.data"):
        assert batches(tmp_path, 2).loader.num_workers == 1
    assert "1 loader processes for 1 cores instead of 2" in caplog.text


class Stream(IterableDataset):
    """Three numbers."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def set_workers(self, workers: int) -> None:
        self.workers = workers


def test_a_stream_is_shared_by_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_cores", lambda: 1)
    stream = Stream()
    made = Batches(stream, list, batch_size=1, workers=2, train=True, on_error="stop")
    assert stream.workers == made.loader.num_workers == 2
