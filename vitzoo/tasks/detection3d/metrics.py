"""Accuracy of upright boxes: by distance of centres (Argoverse 2) and by 3-D overlap (Waymo)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitzoo.heads.detection3d.boxes import iou_3d, wrap_angle
from vitzoo.heads.detection3d.decode import Detections3D

Array = np.ndarray[Any, np.dtype[Any]]

DISTANCES = (0.5, 1.0, 2.0, 4.0)
TRUE_POSITIVE_DISTANCE = 2.0
_TP = DISTANCES.index(TRUE_POSITIVE_DISTANCE)
# Errors of a class without a true positive, and what makes an error worth nothing in CDS.
_WORST = np.array([TRUE_POSITIVE_DISTANCE, 1.0, math.pi])
_RECALLS = np.linspace(0, 1, 100)


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """What counts.

    Attributes:
        max_range: metres from the vehicle within which boxes are looked at.
        max_per_frame: best boxes per class and frame.
        min_points: true boxes with fewer points are left out.
        overlaps: 3-D overlap of a hit, per class or one for all.
    """

    max_range: float = 150.0
    max_per_frame: int = 100
    min_points: int = 1
    overlaps: float | Sequence[float] = (0.7, 0.5, 0.5)


@dataclass(frozen=True)
class _Matched:
    """Boxes found of one class in one frame, by falling score."""

    scores: Array  # (N,)
    near: Array  # (N, distances) whether it is a hit at that distance
    errors: Array  # (N, 3) translation, scale, orientation; true positives only
    overlapping: Array  # (N,) whether it is a hit by 3-D overlap
    heading: Array  # (N,) 1 for the right heading, 0 for the opposite one


class DetectionMetrics:
    """Collects frames; `compute` gives the figures.

    By distance, as Argoverse 2's evaluation does: a box found is assigned to the nearest true
    centre, the best one assigned to a centre is its hit; AP is the mean over 0.5, 1, 2 and 4 m;
    translation, scale and orientation errors (ATE, ASE, AOE) are means over the hits at 2 m, and
    CDS is AP times what the errors leave. By overlap: boxes found take, best first, the free true
    box that they overlap most; APH weighs every hit with its heading, as Waymo's metric does (which
    matches by the Hungarian algorithm instead).

    Args:
        labels: class names.
        options: what counts.

    Raises:
        ValueError: not as many overlaps as classes.
    """

    def __init__(self, labels: Sequence[str], options: MetricOptions | None = None) -> None:
        self.labels = tuple(labels)
        self.options = options or MetricOptions()
        overlaps = self.options.overlaps
        values = list(overlaps) if isinstance(overlaps, Sequence) else [overlaps] * len(labels)
        if len(values) != len(labels):
            raise ValueError(f"{len(values)} overlaps for {len(labels)} classes")
        self.overlaps = values
        self.matched: list[list[_Matched]] = [[] for _ in labels]
        self.truths = np.zeros(len(labels), dtype=np.int64)

    def add(self, found: Detections3D, boxes: Tensor, labels: Tensor, point_counts: Tensor) -> None:
        """One frame: boxes found, true boxes (M, 7), their classes (M,) and points inside (M,)."""
        found = found.cpu()
        boxes, labels = boxes.cpu().float(), labels.cpu()
        counted = boxes[:, :3].norm(dim=-1) < self.options.max_range
        counted &= point_counts.cpu() >= self.options.min_points
        found = found[found.boxes[:, :3].norm(dim=-1) < self.options.max_range]
        for i in range(len(self.labels)):
            mine = found[found.labels == i]
            order = mine.scores.argsort(descending=True, stable=True)
            mine = mine[order[: self.options.max_per_frame]]
            truth = boxes[counted & (labels == i)]
            self.truths[i] += len(truth)
            if len(mine):
                self.matched[i].append(_match(mine, truth, self.overlaps[i]))

    def compute(self) -> dict[str, float]:
        """All figures over all processes; AP, APH and CDS in percent, errors in metres or radians.

        `NAME` is the mean over the classes that occur, `NAME/CLASS` one class: `AP`, `AP2m` (hits
        within 2 m only), `ATE`, `ASE`, `AOE`, `CDS`, `AP3D`, `APH3D`. Empty if nothing was added.
        """
        matched, truths = _gather(self.matched, self.truths)
        per_class: dict[str, dict[str, float]] = {}
        for label, parts, count in zip(self.labels, matched, truths, strict=True):
            if count:
                per_class[label] = _figures(parts, int(count))
        if not per_class:
            return {}
        names = next(iter(per_class.values()))
        figures = {
            name: float(np.mean([figure[name] for figure in per_class.values()])) for name in names
        }
        for label, figure in per_class.items():
            figures |= {f"{name}/{label}": value for name, value in figure.items()}
        return figures


def _match(found: Detections3D, truth: Tensor, overlap: float) -> _Matched:
    count = len(found)
    near = np.zeros((count, len(DISTANCES)), dtype=bool)
    errors = np.tile(_WORST, (count, 1))
    overlapping, heading = np.zeros(count, dtype=bool), np.zeros(count)
    if len(truth):
        # In space: so does av2's code, although its names say the plane.
        distance = torch.cdist(found.boxes[:, :3].double(), truth[:, :3].double())
        nearest = distance.argmin(1)
        centres, first = np.unique(nearest.numpy(), return_index=True)
        near[first] = distance[first, centres].numpy()[:, None] < np.array(DISTANCES)
        errors[first] = _errors(found.boxes[first], truth[centres])
        overlaps = iou_3d(found.boxes[:, None], truth[None]).numpy()
        turn = wrap_angle(found.boxes[:, None, 6] - truth[None, :, 6]).abs().numpy()
        for row in range(count):
            best = int(overlaps[row].argmax())
            if overlaps[row, best] >= overlap:
                overlapping[row] = True
                heading[row] = 1 - turn[row, best] / math.pi
                overlaps[:, best] = -1
    return _Matched(found.scores.double().numpy(), near, errors, overlapping, heading)


def _errors(found: Tensor, truth: Tensor) -> Array:
    """Translation in metres, scale (1 - least over largest sizes), turn in radians, (N, 3)."""
    translation = (found[:, :3] - truth[:, :3]).norm(dim=-1)
    shared = torch.minimum(found[:, 3:6], truth[:, 3:6]).prod(-1)
    # av2's own quotient: of the product of the larger sizes, not of the union.
    largest = torch.maximum(found[:, 3:6], truth[:, 3:6]).prod(-1)
    turn = wrap_angle(found[:, 6] - truth[:, 6]).abs()
    return torch.stack([translation, 1 - shared / largest, turn], dim=-1).double().numpy()


def _figures(parts: list[_Matched], count: int) -> dict[str, float]:
    if not parts:
        zero = dict.fromkeys(("AP", "AP2m", "CDS", "AP3D", "APH3D"), 0.0)
        return zero | dict(zip(("ATE", "ASE", "AOE"), _WORST.tolist(), strict=True))
    scores = np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores, kind="stable")
    near = np.concatenate([part.near for part in parts])[order]
    errors = np.concatenate([part.errors for part in parts])[order]
    overlapping = np.concatenate([part.overlapping for part in parts])[order]
    heading = np.concatenate([part.heading for part in parts])[order]

    at_distances = [average_precision(hits, count) for hits in near.T]
    hits = near[:, _TP]
    mean_errors = errors[hits].mean(0) if hits.any() else _WORST
    ap = float(np.mean(at_distances))
    left = float(np.mean(1 - np.clip(mean_errors / _WORST, 0, 1)))
    return {
        "AP": 100 * ap,
        "AP2m": 100 * at_distances[_TP],
        "CDS": 100 * ap * left,
        "AP3D": 100 * average_precision(overlapping, count),
        "APH3D": 100 * average_precision(overlapping, count, weights=heading),
        "ATE": float(mean_errors[0]),
        "ASE": float(mean_errors[1]),
        "AOE": float(mean_errors[2]),
    }


def average_precision(hits: Array, count: int, *, weights: Array | None = None) -> float:
    """Mean of the interpolated precision at 100 recalls from 0 to 1.

    Args:
        hits: (N,) whether each box found is a hit, by falling score.
        count: true boxes.
        weights: (N,) what each hit counts for precision and recall; 1 if None.
    """
    if not len(hits):
        return 0.0
    gained = np.cumsum(hits if weights is None else hits * weights)
    precision = gained / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.interp(_RECALLS, gained / count, precision, right=0.0).mean())


def _gather(matched: list[list[_Matched]], truths: Array) -> tuple[list[list[_Matched]], Array]:
    """What all processes collected."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return matched, truths
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (matched, truths))
    joined: list[list[_Matched]] = [[] for _ in matched]
    for parts, _ in everyone:
        for mine, theirs in zip(joined, parts, strict=True):
            mine += theirs
    return joined, np.sum([counts for _, counts in everyone], axis=0)
