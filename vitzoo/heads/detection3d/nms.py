"""Non-maximum suppression of boxes seen from above, on any device, without a compiled extension."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitzoo.heads.detection3d.boxes import iou_from_above

NmsKind = Literal["rotated", "circle"]

# Pairs whose overlap is computed at once; bounds the memory.
_PAIRS_AT_ONCE = 1 << 17


def suppress(
    boxes: Tensor,
    thresholds: Tensor,
    *,
    groups: Tensor | None = None,
    kind: NmsKind = "rotated",
) -> Tensor:
    """Greedy suppression in row order: which rows stay.

    Args:
        boxes: (N, 7), by falling score.
        thresholds: scalar or (N,). `rotated`: a row goes if its overlap with a kept earlier row is
            above its threshold; `circle`: if the squared distance of their centres in square metres
            is at most its threshold.
        groups: (N,) integers; only rows of the same group suppress each other. All one if None.
        kind: `rotated` or `circle`.

    Returns:
        (N,) boolean.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("rotated", "circle"):
        raise ValueError(f"kind must be 'rotated' or 'circle', got {kind!r}")
    boxes = boxes.float()
    thresholds = thresholds.to(boxes).expand(len(boxes))
    distance = (boxes[:, None, :2] - boxes[None, :, :2]).square().sum(-1)
    if kind == "circle":
        hits = distance <= thresholds
    else:
        reach = boxes[:, 3:5].norm(dim=-1) / 2
        hits = distance.sqrt() <= reach[:, None] + reach
    if groups is not None:
        hits &= groups[:, None] == groups
    earlier, later = hits.triu(1).nonzero(as_tuple=True)
    if kind == "rotated" and len(earlier):
        pairs = zip(earlier.split(_PAIRS_AT_ONCE), later.split(_PAIRS_AT_ONCE), strict=True)
        overlap = torch.cat([iou_from_above(boxes[i], boxes[j]) for i, j in pairs])
        above = overlap > thresholds[later]
        earlier, later = earlier[above], later[above]
    return _greedy(len(boxes), earlier, later)


def _greedy(count: int, earlier: Tensor, later: Tensor) -> Tensor:
    """Rows that no kept earlier row hits.

    A row's state is final one pass after those of all earlier rows that hit it, so the passes are
    as many as the longest chain of hits, not as many as the rows.
    """
    keep = torch.ones(count, dtype=torch.bool, device=earlier.device)
    while True:
        before = keep
        keep = torch.ones_like(before)
        keep[later[before[earlier]]] = False
        if torch.equal(keep, before):
            return keep


def nms(boxes: Tensor, scores: Tensor, threshold: float, *, kind: NmsKind = "rotated") -> Tensor:
    """Indices of the boxes that stay, by falling score.

    Args:
        boxes: (N, 7).
        scores: (N,).
        threshold: as in `suppress`.
        kind: `rotated` (overlap seen from above) or `circle` (squared distance of centres).
    """
    order = scores.argsort(descending=True, stable=True)
    keep = suppress(boxes[order], torch.tensor(threshold, device=boxes.device), kind=kind)
    return order[keep]
