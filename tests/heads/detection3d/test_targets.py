"""What targets do with labels that are no class."""

from __future__ import annotations

import pytest
import torch

from vitzoo.heads.detection3d.pillars import PillarGrid
from vitzoo.heads.detection3d.targets import make_targets

GRID = PillarGrid((0.0, 0.0, -1.0, 8.0, 8.0, 3.0), (0.5, 0.5))
BOXES = torch.tensor([[2.0, 2.0, 0.5, 3.0, 1.5, 1.5, 0.1], [6.0, 5.0, 0.5, 1.0, 1.0, 1.5, 0.0]])


def test_a_label_that_is_no_class_raises() -> None:
    with pytest.raises(ValueError, match="labels must be below 2, got 2"):
        make_targets([BOXES, BOXES], [torch.tensor([0, 2])] * 2, grid=GRID, num_classes=2)


def test_ignored_boxes_take_no_slot() -> None:
    some = make_targets([BOXES], [torch.tensor([1, -1])], grid=GRID, num_classes=2)
    alone = make_targets([BOXES[:1]], [torch.tensor([1])], grid=GRID, num_classes=2)
    assert torch.equal(some.codes, alone.codes)
    assert torch.equal(some.heatmap, alone.heatmap)
    assert some.mask.tolist() == [[True]]
