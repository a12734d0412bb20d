"""The detector on frames and grids of any shape, and on points that are no good."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitzoo
from vitzoo.heads.detection3d import (
    DecodeConfig,
    PillarDetector,
    PillarEncoder,
    PillarGrid,
    join_frames,
    losses,
    make_targets,
)

GRID = PillarGrid((-5.0, -4.0, -2.0, 5.0, 4.0, 2.0), (0.4, 0.32))
TINY = {
    "pillar_dims": (8, 16),
    "neck": {"dims": (8, 8), "depths": (1, 1), "out_dim": 8},
    "head": {"dim": 8},
    "num_heads": 2,
    "depth": 1,
    "group_size": 9,
    "window_size": 3,
}


def tiny(grid: PillarGrid = GRID, **kwargs: object) -> PillarDetector:
    torch.manual_seed(0)
    arguments = TINY | {"num_classes": 2, "grid": grid, "point_features": 4}
    return vitzoo.build_detector3d(**(arguments | kwargs)).eval()


def draw_points(count: int, seed: int = 0) -> Tensor:
    unit = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return (unit - 0.5) * torch.tensor([10, 8, 4, 2])


@pytest.mark.parametrize("size", [(25, 25), (20, 31), (7, 9), (1, 5)])
def test_grids_of_any_shape(size: tuple[int, int]) -> None:
    ny, nx = size
    grid = PillarGrid((-5.0, -4.0, -2.0, 5.0, 4.0, 2.0), (10 / nx, 8 / ny))
    assert grid.size == size
    with torch.inference_mode():
        maps = tiny(grid).forward_maps([draw_points(50)])
    assert maps["heatmap"].shape == (1, 2, ny, nx)


def test_frames_do_not_depend_on_their_neighbours() -> None:
    detector = tiny()
    frames = [draw_points(400), draw_points(0), draw_points(3, 1), draw_points(90, 2)]
    with torch.inference_mode():
        together = detector.forward_maps(frames)
        for i, frame in enumerate(frames):
            for name, values in detector.forward_maps([frame]).items():
                # Of the map's scale: convolutions sum in another order for another batch.
                bound = 1e-6 * max(1.0, values.abs().max().item())
                assert (together[name][i] - values[0]).abs().max() <= bound, name


def test_bad_points_are_dropped_with_a_count() -> None:
    good = draw_points(50)
    bad = good[:6].clone()
    bad[0, 0], bad[1, 3], bad[2, 2] = float("nan"), float("inf"), 9.0
    bad[3, 0], bad[4, 1], bad[5, 2] = 5.0, -4.01, float("-inf")
    points, frame, dropped = join_frames([bad, torch.cat([good, bad])], 4, GRID)
    assert dropped.tolist() == [6, 6]
    assert torch.equal(points, good)
    assert frame.tolist() == [1] * 50
    detector = tiny()
    with torch.inference_mode():
        clean = detector.forward_maps([good])["heatmap"]
        assert torch.equal(detector.forward_maps([torch.cat([bad, good])])["heatmap"], clean)
        assert detector.forward_maps([bad])["heatmap"].isfinite().all()


def test_wrong_points_give_a_sentence() -> None:
    detector = tiny()
    with pytest.raises(ValueError, match=r"frame 1: points must be \(N, 4\), got \(5, 3\)"):
        detector([draw_points(5), draw_points(5)[:, :3]])
    with pytest.raises(ValueError, match="at least one frame"):
        detector([])
    with pytest.raises(ValueError, match="training needs targets of 1 frames, got none"):
        detector.train()([draw_points(5)])
    with pytest.raises(ValueError, match="nms_before has 3 values for 2 classes"):
        tiny(decode=DecodeConfig(nms_thresholds=0.5))
    with pytest.raises(ValueError, match="iou_power has 3 values for 2 classes"):
        tiny(
            decode=DecodeConfig(nms_thresholds=0.5, nms_before=9, nms_after=9, iou_power=[1, 1, 1])
        )
    with pytest.raises(ValueError, match="nms='soft' is not one of rotated, circle"):
        DecodeConfig(nms="soft")
    with pytest.raises(ValueError, match="score_threshold='high' is not of numbers"):
        DecodeConfig(score_threshold="high")
    with pytest.raises(ValueError, match="group 0 must be positive"):
        tiny(group_size=0)
    with pytest.raises(ValueError, match="point_range"):
        PillarGrid((0, 0, 0, 1, -1, 1), (0.1, 0.1))


@pytest.mark.parametrize("counts", [(200, 0), (1, 0), (0, 0), (2, 300)])
def test_training_reaches_every_parameter(counts: tuple[int, ...]) -> None:
    detector = tiny().train()
    boxes = torch.tensor([[1.0, 1, 0, 2, 1, 1, 0.3], [-2, 2, 0, 1, 1, 2, 3]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 1])}] * 2
    found = detector([draw_points(n) for n in counts], targets)
    assert set(found) == {"loss_heatmap", "loss_box", "loss_iou"}
    sum(found.values()).backward()
    assert all(value.isfinite() for value in found.values())
    for name, parameter in detector.named_parameters():
        points_needed = name.startswith(("pillars", "backbone"))
        assert parameter.grad is not None or (points_needed and sum(counts) == 0), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_frame_without_boxes_trains() -> None:
    none = {"boxes": torch.zeros(0, 7), "labels": torch.zeros(0, dtype=torch.int64)}
    found = tiny().train()([draw_points(60)], [none])
    assert found["loss_box"] == 0
    assert found["loss_heatmap"] > 0


def test_a_label_without_a_class_gives_a_sentence() -> None:
    """In the first frame it would have drawn its peak into the second one's map."""
    box = torch.tensor([[1.0, 1, 0, 2, 1, 1, 0.3]])
    with pytest.raises(ValueError, match="frame 0: labels must be below 2, got 2"):
        make_targets([box, box], [torch.tensor([2]), torch.tensor([0])], grid=GRID, num_classes=2)


def test_boxes_that_do_not_count_take_no_slot() -> None:
    good = torch.tensor([[1.0, 1, 0, 2, 1, 1, 0.3, 1, 2], [-2, 2, 0, 1, 1, 2, 3, 0, 0]])
    bad = good[:1].repeat(3, 1)
    bad[0, 3], bad[1, 0] = float("inf"), float("nan")
    labels = torch.tensor([0, 0, -1])
    given = [torch.cat([bad, good])], [torch.cat([labels, torch.tensor([0, 1])])]
    found = make_targets(*given, grid=GRID, num_classes=2, max_objects=2)
    wanted = make_targets([good], [torch.tensor([0, 1])], grid=GRID, num_classes=2)
    for name, value in vars(wanted).items():
        assert torch.equal(getattr(found, name), value), name
    good[0, 7:] = float("nan")
    unknown = make_targets([good], [torch.tensor([0, 1])], grid=GRID, num_classes=2)
    assert unknown.codes[0, 0, 8:].tolist() == [0, 0]


def test_one_absurd_box_does_not_fill_the_memory() -> None:
    box = torch.tensor([[0.0, 0, 0, 1e6, 1e6, 1, 0]])
    found = make_targets([box], [torch.tensor([0])], grid=GRID, num_classes=1)
    assert found.heatmap.min() > 0.99


def test_targets_of_an_odd_grid_fit_the_maps_of_a_strided_neck() -> None:
    grid = PillarGrid((-5.0, -4.0, -2.0, 5.0, 4.0, 2.0), (10 / 9, 8 / 7))
    detector = tiny(grid, neck={"dims": (8,), "depths": (0,), "strides": (2,), "out_dim": 8})
    maps = detector.forward_maps([draw_points(50)])
    box = torch.tensor([[4.9, 3.9, 0, 2, 1, 1, 0.3]])
    targets = make_targets([box], [torch.tensor([1])], grid=grid, num_classes=2, stride=2)
    assert targets.mask.all()
    assert losses(maps, targets, cell_size=(20 / 9, 16 / 7))["loss_box"].isfinite()


def test_it_learns_one_scene() -> None:
    torch.manual_seed(0)
    detector = tiny(decode=DecodeConfig(nms_thresholds=0.5, nms_before=100, nms_after=9)).train()
    boxes = torch.tensor([[1.0, 1, 0, 2, 1, 1, 0.3], [-2, 2, 0, 1, 0.8, 1.5, 3]])
    around = boxes[:, None, :3] + 0.4 * (torch.rand(2, 80, 3) - 0.5)
    points = torch.nn.functional.pad(around.flatten(0, 1), (0, 1))
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 1])}]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(detector([points], targets).values()).backward()
        optimizer.step()
    with torch.inference_mode():
        (found,) = detector.eval()([points])
    best = [found[found.labels == label][:1] for label in (0, 1)]
    centres = torch.cat([b.boxes[:, :2] for b in best])
    assert (centres - boxes[:, :2]).norm(dim=-1).max() < 0.5


def test_pillar_encoder_keeps_float32_under_autocast() -> None:
    encoder = PillarEncoder(GRID, 4, (8, 16)).eval()
    points, frame, _ = join_frames([draw_points(40)], 4, GRID)
    with torch.inference_mode():
        expected, coords = encoder(points, frame)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = encoder(points, frame)
    assert torch.equal(found, expected)
    ny, nx = GRID.size
    assert (coords[:, 1] < ny).all()
    assert (coords[:, 2] < nx).all()
    assert coords.unique(dim=0).shape == coords.shape
