"""What a model draws once an update: the loop says which update comes next, and says it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.narrow import NARROW, narrow
from vitzoo.backbones.lookupvit import LookupViT, TokenSets
from vitzoo.engine.recipe import merge
from vitzoo.engine.train import train
from vitzoo.tasks.classification import ClassificationTask

FLEXIBLE: dict[str, Any] = {
    "name": "vz_lookupvit_small",
    "args": {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "compressed_size": 2,
        "compressed_sizes": [2, 3, 4, 5],
    },
}


def test_a_flexible_lookupvit_draws_a_grid_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, size = LookupViT.draw_compressed_size, TokenSets.size
    drawn: list[tuple[int, int]] = []
    used: list[int] = []

    def recorded_draw(self: LookupViT, step: int) -> int:
        drawn.append((step, draw(self, step)))
        return drawn[-1][1]

    def recorded_size(self: TokenSets, asked: int | None) -> int:
        found = size(self, asked)
        if self.training:
            used.append(found)
        return found

    monkeypatch.setattr(LookupViT, "draw_compressed_size", recorded_draw)
    monkeypatch.setattr(TokenSets, "size", recorded_size)
    recipe = merge(
        NARROW | {"model": FLEXIBLE},
        [f"run.folder={tmp_path}", "run.accumulate=2", "run.save_every=null"],
    )
    train(recipe)
    assert [step for step, _ in drawn] == [0, 1, 2, 3]
    assert used == [side for _, side in drawn for _ in range(2)]
    assert len(set(used)) > 1


class Heard(nn.Module):
    """Keeps the numbers it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[int] = []

    def begin_update(self, update: int) -> None:
        self.updates.append(update)


def test_every_part_that_wants_to_know_is_told(tmp_path: Path) -> None:
    task = ClassificationTask(narrow(tmp_path).options)
    parts = Heard(), Heard()
    # As in a wrapper, and as a backbone in a detector.
    task.model = nn.ModuleDict({"module": nn.Sequential(parts[0], torch.nn.ReLU()), "b": parts[1]})
    for update in (3, 4):
        task.begin_update(update)
    assert [part.updates for part in parts] == [[3, 4], [3, 4]]
