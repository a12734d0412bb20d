"""Boxes in space and from above: overlaps, corners, conventions.

A box is (x, y, z, length, width, height, yaw): its centre in metres, its length along its heading,
the heading in radians, counter-clockwise from +x seen from above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOX_SIZE = 7


def wrap_angle(angle: Tensor) -> Tensor:
    """Angles in radians -> the same in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def corners_from_above(boxes: Tensor) -> Tensor:
    """Boxes (..., 7) -> corners (..., 4, 2), counter-clockwise from the front left."""
    signs = boxes.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = boxes[..., None, 3:5] * signs
    return rotate(local, boxes[..., None, 6]) + boxes[..., None, :2]


def rotate(points: Tensor, angle: Tensor) -> Tensor:
    """Turn points (..., 2) counter-clockwise by `angle` (...)."""
    x, y = points.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


def intersection_from_above(a: Tensor, b: Tensor) -> Tensor:
    """Area that the rectangles of boxes a and b (..., 7) share, in square metres; they broadcast.

    By Green's theorem the area is the integral of clamp(y, -w/2, w/2) dx along a's outline where
    |x| <= l/2, in b's own axes. It needs no list of crossing points and changes steadily where
    edges coincide.
    """
    a, b = torch.broadcast_tensors(a, b)
    centred = torch.cat([a[..., :2] - b[..., :2], a[..., 2:]], dim=-1)
    outline = rotate(corners_from_above(centred), -b[..., None, 6])
    x0, y0 = outline.unbind(-1)
    x1, y1 = outline.roll(-1, dims=-2).unbind(-1)
    half_l, half_w = b[..., 3, None] / 2, b[..., 4, None] / 2

    dx = torch.where(x1 == x0, 1, x1 - x0)
    left, right = x0.clamp(-half_l, half_l), x1.clamp(-half_l, half_l)
    y_left = y0 + (y1 - y0) * ((left - x0) / dx).clamp(0, 1)
    y_right = y0 + (y1 - y0) * ((right - x0) / dx).clamp(0, 1)

    # Along an edge the clamped height has at most two bends: where it crosses -w/2 and w/2.
    dy = torch.where(y_right == y_left, 1, y_right - y_left)
    t = torch.stack([(-half_w - y_left) / dy, (half_w - y_left) / dy]).clamp(0, 1)
    t0, t1 = t.amin(0), t.amax(0)
    heights = [
        (y_left + (y_right - y_left) * s).clamp(-half_w, half_w)
        for s in (torch.zeros_like(t0), t0, t1, torch.ones_like(t0))
    ]
    mean = (
        t0 * (heights[0] + heights[1])
        + (t1 - t0) * (heights[1] + heights[2])
        + (1 - t1) * (heights[2] + heights[3])
    ) / 2
    # Counter-clockwise, the integral of y dx is minus the area.
    return -((right - left) * mean).sum(-1).clamp(max=0)


def iou_from_above(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the rectangles of boxes a and b (..., 7); they broadcast."""
    shared = intersection_from_above(a, b)
    union = a[..., 3] * a[..., 4] + b[..., 3] * b[..., 4] - shared
    return shared / union.clamp(min=1e-8)


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the volumes of upright boxes a and b (..., 7)."""
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    shared = intersection_from_above(a, b) * (top - bottom).clamp(min=0)
    union = a[..., 3:6].prod(-1) + b[..., 3:6].prod(-1) - shared
    return shared / union.clamp(min=1e-8)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Points (N, 3 or more), boxes (M, 7) -> (N, M), True where a point lies inside a box."""
    offset = points[:, None, :3] - boxes[None, :, :3]
    local = rotate(offset[..., :2], -boxes[None, :, 6])
    inside = (local.abs() <= boxes[None, :, 3:5] / 2).all(-1)
    return inside & (offset[..., 2].abs() <= boxes[None, :, 5] / 2)


def from_mmdet3d(boxes: Tensor) -> Tensor:
    """Boxes of mmdet3d 0.x (..., 7 or more) -> ours.

    There z is the bottom, sizes are (width, length, height) with the width along x at yaw 0, and a
    positive yaw turns clockwise. Columns after the seventh stay.
    """
    x, y, z, w, length, h, yaw = boxes[..., :BOX_SIZE].unbind(-1)
    heading = wrap_angle(-yaw - math.pi / 2)
    found = torch.stack([x, y, z + h / 2, length, w, h, heading], dim=-1)
    return torch.cat([found, boxes[..., BOX_SIZE:]], dim=-1)


def to_mmdet3d(boxes: Tensor) -> Tensor:
    """The inverse of `from_mmdet3d`."""
    x, y, z, length, w, h, heading = boxes[..., :BOX_SIZE].unbind(-1)
    yaw = wrap_angle(-heading - math.pi / 2)
    found = torch.stack([x, y, z - h / 2, w, length, h, yaw], dim=-1)
    return torch.cat([found, boxes[..., BOX_SIZE:]], dim=-1)
