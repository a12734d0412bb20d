"""Rotated overlap, suppression and targets against plain restatements."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitzoo.heads.detection3d import PillarGrid, iou_3d, iou_from_above, make_targets, nms, suppress
from vitzoo.heads.detection3d.boxes import (
    corners_from_above,
    intersection_from_above,
    points_in_boxes,
    wrap_angle,
)


def draw_boxes(count: int, *, spread: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(count, 7, generator=generator)
    low = torch.tensor([-spread, -spread, -1, 0.3, 0.3, 0.5, -7])
    high = torch.tensor([spread, spread, 1, 5, 3, 3, 7])
    return low + unit * (high - low)


def clip_area(a: Tensor, b: Tensor) -> float:
    """Area shared by two rectangles: one polygon clipped by the other's sides, one by one."""
    polygon = corners_from_above(a.double()).tolist()
    sides = corners_from_above(b.double()).tolist()
    for (px, py), (qx, qy) in zip(sides, sides[1:] + sides[:1], strict=True):
        height = [(qx - px) * (y - py) - (qy - py) * (x - px) for x, y in polygon]
        clipped = []
        for i, (x1, y1) in enumerate(polygon):
            x0, y0, h0, h1 = *polygon[i - 1], height[i - 1], height[i]
            if h0 * h1 < 0:
                t = h0 / (h0 - h1)
                clipped.append((x0 + t * (x1 - x0), y0 + t * (y1 - y0)))
            if h1 >= 0:
                clipped.append((x1, y1))
        polygon = clipped
    return (
        sum(
            x0 * y1 - x1 * y0
            for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True)
        )
        / 2
    )


def test_shared_area_against_polygon_clipping() -> None:
    a, b = draw_boxes(60), draw_boxes(60, seed=1)
    found = intersection_from_above(a[:, None], b[None])
    expected = torch.tensor([[clip_area(p, q) for q in b] for p in a])
    assert (expected > 0).float().mean() > 0.2
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("yaw", [0.0, 0.7, math.pi / 2, -math.pi])
def test_overlap_where_edges_coincide(yaw: float) -> None:
    box = torch.tensor([1.0, -2.0, 0.0, 4.0, 2.0, 1.5, yaw])
    turned = box + torch.tensor([0, 0, 0, 0, 0, 0, math.pi])
    assert iou_from_above(box, box).item() == pytest.approx(1, abs=1e-5)
    assert iou_from_above(box, turned).item() == pytest.approx(1, abs=1e-5)
    half = box * torch.tensor([1, 1, 1, 1, 0.5, 1, 1])
    assert iou_from_above(box, half).item() == pytest.approx(0.5, abs=1e-5)
    beside = box + 4 * torch.tensor([math.cos(yaw), math.sin(yaw), 0, 0, 0, 0, 0])
    assert iou_from_above(box, beside).item() == pytest.approx(0, abs=1e-6)
    above = box + torch.tensor([0, 0, 0.5, 0, 0, 0, 0])
    assert iou_3d(box, above).item() == pytest.approx(1 / 2, abs=1e-5)
    assert iou_3d(box, box + torch.tensor([0, 0, 1.5, 0, 0, 0, 0])).item() == 0


def test_overlap_is_symmetric_and_differentiable() -> None:
    a, b = draw_boxes(40).double().requires_grad_(), draw_boxes(40, seed=2).double()
    torch.testing.assert_close(iou_3d(a, b), iou_3d(b, a))
    touching = intersection_from_above(a, b) > 0.05
    few = a.detach()[touching][:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: iou_from_above(x, b[touching][:4]), few)


@pytest.mark.parametrize(
    ("kind", "threshold"), [("rotated", 0.1), ("rotated", 0.4), ("circle", 2.0)]
)
def test_suppression_against_the_greedy_loop(kind: str, threshold: float) -> None:
    boxes, scores = draw_boxes(150, spread=6), torch.rand(150, generator=torch.manual_seed(1))
    overlap = iou_from_above(boxes[:, None], boxes[None])
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if kind == "rotated":
            clear = bool((overlap[kept, i] <= threshold).all())
        else:
            clear = bool(((boxes[kept, :2] - boxes[i, :2]).square().sum(1) > threshold).all())
        if clear:
            kept.append(i)
    assert nms(boxes, scores, threshold, kind=kind).tolist() == kept
    assert 10 < len(kept) < 140


def test_groups_do_not_suppress_each_other() -> None:
    boxes = torch.zeros(6, 7) + torch.tensor([0, 0, 0, 2.0, 1, 1, 0])
    groups = torch.tensor([0, 1, 0, 2, 1, 1])
    keep = suppress(boxes, torch.tensor(0.5), groups=groups)
    assert keep.tolist() == [True, True, False, True, False, False]
    assert suppress(boxes[:0], torch.tensor(0.5)).shape == (0,)
    with pytest.raises(ValueError, match="'rotated' or 'circle'"):
        suppress(boxes, torch.tensor(0.5), kind="square")


def test_points_in_boxes() -> None:
    box = torch.tensor([[1.0, 1.0, 0.0, 4.0, 1.0, 2.0, math.pi / 2]])
    points = torch.tensor([[1, 2.9, 0.9], [1, 3.1, 0], [1.6, 1, 0], [1, 1, 1.1], [0.6, 0, -1]])
    assert points_in_boxes(points, box)[:, 0].tolist() == [True, False, False, False, True]


def test_wrap_angle() -> None:
    assert wrap_angle(torch.tensor([0.0, 4.0, -7.0])).tolist() == pytest.approx(
        [0, 4 - 2 * math.pi, 2 * math.pi - 7], abs=1e-6
    )


GRID = PillarGrid((0.0, -4.0, -2.0, 8.0, 4.0, 4.0), (0.5, 0.25))


def test_targets_at_the_edges() -> None:
    size = [2.0, 1.0, 1.0, 0.3]
    boxes = torch.tensor(
        [
            [-0.2, -3.9, 0, *size],  # half a cell below the low edge: still the first cell
            [-0.6, -3.9, 0, *size],  # more than a cell: skipped
            [8.01, 0.0, 0, *size],  # above the high edge: skipped
            [4.0, 0.0, 0, 2.0, 0.0, 1.0, 0],  # no width: skipped
            [7.99, 3.99, 0, *size],
        ]
    )
    targets = make_targets(
        [boxes, boxes[:0]],
        [torch.tensor([1, 1, 0, 0, 0]), torch.zeros(0)],
        grid=GRID,
        num_classes=2,
    )
    # Class 0 first: rows 2, 3, 4, then rows 0, 1.
    assert targets.mask.tolist() == [[False, False, True, True, False], [False] * 5]
    assert targets.cells[0].tolist() == [0, 0, 32 * 16 - 1, 0, 0]
    assert targets.heatmap.shape == (2, 2, 32, 16)
    assert (targets.heatmap == 1).sum((2, 3)).tolist() == [[1, 1], [0, 0]]


def test_targets_on_a_coarser_map_and_without_boxes() -> None:
    none = [torch.zeros(0, 7)], [torch.zeros(0, dtype=torch.int64)]
    targets = make_targets(*none, grid=GRID, num_classes=2, stride=2)
    assert targets.heatmap.shape == (1, 2, 16, 8)
    assert not targets.heatmap.any()
    with pytest.raises(ValueError, match="boxes must be"):
        make_targets([torch.zeros(2, 6)], [torch.zeros(2)], grid=GRID, num_classes=2)
