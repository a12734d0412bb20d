"""Accuracy of boxes, from cases that can be worked out by hand, and against `av2`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vitzoo.heads.detection3d import Detections3D
from vitzoo.tasks.detection3d.metrics import DetectionMetrics, MetricOptions, average_precision

LABELS = ("car", "pedestrian")


def box(x: float, y: float = 0.0, yaw: float = 0.0, length: float = 4.0) -> list[float]:
    return [x, y, 0.0, length, 2.0, 1.5, yaw]


def found(rows: list[list[float]], scores: list[float], label: int = 0) -> Detections3D:
    return Detections3D(
        torch.tensor(rows).reshape(-1, 7),
        torch.tensor(scores),
        torch.full((len(rows),), label, dtype=torch.int64),
    )


def truth(rows: list[list[float]], label: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    boxes = torch.tensor(rows).reshape(-1, 7)
    return boxes, torch.full((len(rows),), label), torch.full((len(rows),), 9)


def measure(
    *frames: tuple[Detections3D, tuple[Tensor, Tensor, Tensor]], **options: object
) -> dict[str, float]:
    metrics = DetectionMetrics(LABELS, MetricOptions(overlaps=(0.7, 0.5), **options))
    for boxes, true in frames:
        metrics.add(boxes, *true)
    return metrics.compute()


def test_perfect_boxes() -> None:
    rows = [box(3), box(10, 4, 1.0), box(-20, 3, 3.0)]
    figures = measure((found(rows, [0.9, 0.8, 0.7]), truth(rows)))
    for name in ("AP", "AP2m", "CDS", "AP3D", "APH3D"):
        assert figures[f"{name}/car"] == pytest.approx(100, abs=1e-4), name
    assert figures["ATE"] == pytest.approx(0, abs=1e-6)
    assert "AP/pedestrian" not in figures


def test_distance_decides_the_thresholds() -> None:
    figures = measure((found([box(11.5)], [0.5]), truth([box(10)])))
    # A hit at 2 and 4 m, none at 0.5 and 1 m.
    assert figures["AP"] == pytest.approx(50)
    assert figures["AP2m"] == 100
    assert figures["ATE"] == pytest.approx(1.5)
    assert figures["CDS"] == pytest.approx(50 * (0.25 + 1 + 1) / 3)
    assert figures["AP3D"] == 0


def test_a_centre_is_hit_once_by_the_best_box() -> None:
    figures = measure((found([box(10.2), box(10)], [0.9, 0.8]), truth([box(10), box(20)])))
    # One hit in front of one false box, and half of the truth is never found.
    assert figures["AP2m"] == pytest.approx(100 * 50 / 100)
    assert figures["ATE"] == pytest.approx(0.2, abs=1e-6)


def test_errors_of_a_hit() -> None:
    figures = measure((found([box(10, 0, 0.4, length=5.0)], [0.9]), truth([box(10)])))
    assert figures["AOE"] == pytest.approx(0.4)
    assert figures["ASE"] == pytest.approx(1 - 4 / 5)
    turned = measure((found([box(10, 0, 3.0)], [0.9]), truth([box(10, 0, -3.0)])))
    assert turned["AOE"] == pytest.approx(2 * math.pi - 6, abs=1e-5)


def test_heading_weighs_the_overlap() -> None:
    figures = measure((found([box(10, 0, math.pi)], [0.9]), truth([box(10)])))
    assert figures["AP3D"] == pytest.approx(100)
    assert figures["APH3D"] == pytest.approx(0, abs=1e-3)


def test_what_is_left_out() -> None:
    boxes, labels, counts = truth([box(10), box(30), box(60)])
    counts[1] = 0
    boxes_found = found([box(10), box(60)], [0.9, 0.8])
    figures = measure((boxes_found, (boxes, labels, counts)), max_range=50.0)
    assert figures["AP"] == pytest.approx(100)
    many = found([box(10), box(11)], [0.1, 0.9])
    assert measure((many, truth([box(10)])), max_per_frame=1)["ATE"] == pytest.approx(1)


def test_classes_and_empty_frames() -> None:
    figures = measure(
        (found([], []), truth([box(5)], label=1)),
        (found([box(10)], [0.9]), truth([box(10)])),
        (found([box(10)], [0.8]), truth([])),
    )
    assert figures["AP/pedestrian"] == 0
    assert figures["ATE/pedestrian"] == 2
    # The false box behind the hit counts at one recall of the hundred, the last.
    assert figures["AP/car"] == pytest.approx(99.5)
    assert figures["AP"] == pytest.approx(49.75)
    assert measure((found([box(1)], [0.5]), truth([]))) == {}
    with pytest.raises(ValueError, match="2 overlaps for 1 classes"):
        DetectionMetrics(["car"], MetricOptions(overlaps=(0.7, 0.5)))


def test_average_precision() -> None:
    assert average_precision(np.array([], dtype=bool), 3) == 0
    hits = np.array([True, False, True, False])
    # Precision 1 up to recall 1/4; from there it falls to 2/3 at recall 2/4 and ends.
    recalls = np.linspace(0, 1, 100)
    expected = np.interp(recalls, [1 / 4, 1 / 4, 2 / 4, 2 / 4], [1, 2 / 3, 2 / 3, 1 / 2], right=0)
    assert average_precision(hits, 4) == pytest.approx(expected.mean(), abs=0.01)


def test_against_av2() -> None:
    """Argoverse's own evaluation of the same boxes."""
    evaluation = pytest.importorskip("av2.evaluation.detection.utils")
    rng = np.random.default_rng(0)
    metrics = DetectionMetrics(("REGULAR_VEHICLE",), MetricOptions(overlaps=0.7))
    found_rows, true_rows = [], []
    cfg = evaluation.DetectionCfg(dataset_dir=None, eval_only_roi_instances=False)
    for frame in range(12):
        boxes = torch.from_numpy(rng.uniform(-60, 60, (15, 7))).float()
        boxes[:, 2:6] = torch.from_numpy(rng.uniform(1, 4, (15, 4))).float()
        boxes[:, 6] = torch.from_numpy(rng.uniform(-3, 3, 15)).float()
        noise = torch.from_numpy(rng.normal(0, 0.4, (20, 7))).float()
        guesses = boxes[torch.from_numpy(rng.integers(0, 15, 20))] + noise
        guesses[:, 3:6] = guesses[:, 3:6].clamp(min=0.2)
        scores = torch.from_numpy(rng.permutation(20) / 20 + frame / 1000).float()
        metrics.add(
            Detections3D(guesses, scores, torch.zeros(20, dtype=torch.int64)),
            boxes,
            torch.zeros(15, dtype=torch.int64),
            torch.ones(15),
        )
        found_rows.append((guesses.double().numpy(), scores.double().numpy()))
        true_rows.append(boxes.double().numpy())
    ours = metrics.compute()
    theirs = _av2_figures(evaluation, cfg, found_rows, true_rows)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=2e-3), name


def _av2_rows(boxes: np.ndarray) -> np.ndarray:
    """Columns of av2: place, size, quaternion (w, x, y, z)."""
    half = boxes[:, 6:7] / 2
    zero = np.zeros_like(half)
    return np.concatenate([boxes[:, :6], np.cos(half), zero, zero, np.sin(half)], axis=1)


def _av2_figures(evaluation: object, cfg: object, found_rows: list, true_rows: list) -> dict:
    parts = []
    for (guesses, scores), boxes in zip(found_rows, true_rows, strict=True):
        order = np.argsort(-scores, kind="stable")
        metrics, _ = evaluation.assign(_av2_rows(guesses[order]), _av2_rows(boxes), cfg)
        parts.append((scores[order], metrics))
    scores = np.concatenate([s for s, _ in parts])
    metrics = np.concatenate([m for _, m in parts])[np.argsort(-scores, kind="stable")]
    count = sum(len(boxes) for boxes in true_rows)
    recalls = np.linspace(0, 1, 100)
    precisions = [
        evaluation.compute_average_precision(metrics[:, i].astype(bool), recalls, count)[0]
        for i in range(4)
    ]
    hits = metrics[:, 2].astype(bool)
    errors = metrics[hits, 4:7].mean(0)
    left = (1 - np.clip(errors / np.array([2.0, 1.0, np.pi]), 0, 1)).mean()
    return {
        "AP": 100 * np.mean(precisions),
        "AP2m": 100 * precisions[2],
        "ATE": errors[0],
        "ASE": errors[1],
        "AOE": errors[2],
        "CDS": 100 * np.mean(precisions) * left,
    }
