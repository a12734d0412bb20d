"""The detector around FlatFormer against the authors' code, step by step and as a whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitzoo  # noqa: F401
from tests.golden_cases import BOUND, GoldenCase, draw_input, load_case
from vitzoo.heads.detection3d import (
    BevNeck,
    CenterHead,
    DecodeConfig,
    Detections3D,
    PillarEncoder,
    PillarGrid,
    apply_nms,
    build_detector3d,
    decode,
    from_mmdet3d,
    iou_from_above,
    losses,
    make_targets,
    nms,
    to_mmdet3d,
)
from vitzoo.heads.detection3d.boxes import wrap_angle
from vitzoo.heads.detection3d.detector import rename_reference

SMALL_GRID = PillarGrid((-15.36, -15.36, -2.0, 15.36, 15.36, 4.0), (0.32, 0.32))
BRANCHES = {"heatmap": 3, "reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1}
# The configuration's range of centres, which is wider than the golden grids.
CONFIG = DecodeConfig(centre_range=(-74.88, -74.88, -10, 74.88, 74.88, 10))


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load all but the batch counters, which the cases do not hold."""
    result = module.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in result.missing_keys)


def frames_of(case: GoldenCase) -> list[Tensor]:
    return list(torch.from_numpy(case.outputs["points"]).split(case.spec["input"]["counts"]))


def swap(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps between the reference's box convention and ours, both ways."""
    return maps | {"dim": maps["dim"][:, [1, 0, 2]], "rot": -maps["rot"][:, [1, 0]]}


def check_boxes(case: GoldenCase, output: str, boxes: Tensor) -> None:
    """Compare boxes in the reference's convention; angles may differ by whole turns."""
    golden = torch.from_numpy(case.outputs[output])
    boxes = boxes.clone()
    boxes[:, 6] = golden[:, 6] + wrap_angle(boxes[:, 6] - golden[:, 6])
    case.check(output, boxes)


def test_pillar_encoder() -> None:
    case = load_case("flatformer", "vfe_b2")
    encoder = PillarEncoder(SMALL_GRID).eval()
    load(encoder, {k.replace("vfe_layers", "layers"): v for k, v in case.weights().items()})
    assert sum(p.numel() for p in encoder.parameters()) == case.spec["params"]
    frames = frames_of(case)
    frame = torch.arange(2).repeat_interleave(torch.tensor([len(f) for f in frames]))
    points = torch.cat(frames)
    assert SMALL_GRID.cells(points).tolist() == case.outputs["coors"][:, 2:].tolist()
    with torch.inference_mode():
        pillars, coords = encoder(points, frame)
    assert coords.tolist() == case.outputs["pillar_coords"][:, [0, 2, 3]].tolist()
    case.check("pillars", pillars)


def test_neck_and_head() -> None:
    case = load_case("flatformer", "bev_neck_head_48x64")
    neck, head = BevNeck(128), CenterHead(256, 3)
    model = nn.ModuleDict({"neck": neck, "head": head, "backbone": nn.Identity()}).eval()
    model.backbone.rename_checkpoint = lambda state: state
    load(model, rename_reference(case.weights(), model.backbone))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        stages = neck.forward_stages(case.input())
        joined = neck(case.input())
        maps = swap(head(joined))
    for i, stage in enumerate(stages):
        case.check(f"second{i}", stage)
    case.check("neck", joined)
    for name in BRANCHES:
        case.check(name, maps[name])


def reference_boxes(case: GoldenCase) -> tuple[list[Tensor], list[Tensor]]:
    boxes = [from_mmdet3d(torch.tensor(frame)) for frame in case.spec["input"]["boxes"]]
    return boxes, [torch.tensor(labels) for labels in case.spec["input"]["labels"]]


def test_targets_and_losses() -> None:
    case = load_case("flatformer", "centerhead_targets")
    boxes, labels = reference_boxes(case)
    targets = make_targets(boxes, labels, grid=SMALL_GRID, num_classes=3)
    where = targets.heatmap.nonzero()
    assert where.tolist() == case.outputs["heatmap.index"].tolist()
    case.check("heatmap.value", targets.heatmap[tuple(where.T)])

    slots = targets.mask.shape[1]
    golden = {name: torch.from_numpy(case.outputs[name]) for name in ("anno", "ind", "mask")}
    assert not golden["mask"][:, slots:].any()
    assert torch.equal(targets.mask, golden["mask"][:, :slots].bool())
    assert torch.equal(targets.cells, golden["ind"][:, :slots])
    codes = targets.codes.clone()
    codes[..., 3:5] = targets.codes[..., [4, 3]]
    codes[..., 6:8] = -targets.codes[..., [7, 6]]
    assert (codes - golden["anno"][:, :slots]).abs().max() <= BOUND

    maps = {
        name: 0.5 * draw_input((2, size, 96, 96), seed)
        for seed, (name, size) in enumerate(BRANCHES.items())
    }
    found = losses(swap(maps), targets, cell_size=(0.32, 0.32))
    for ours, theirs in {
        "loss_heatmap": "loss_heatmap",
        "loss_box": "loss_bbox",
        "loss_iou": "loss_iou",
    }.items():
        golden_loss = float(case.outputs[theirs][0])
        assert abs(found[ours].item() - golden_loss) <= BOUND * max(1, golden_loss), ours


def test_decode_and_suppression() -> None:
    case = load_case("flatformer", "centerhead_decode")
    maps = {
        name: draw_input((2, size, 96, 96), 140 + i)
        for i, (name, size) in enumerate(BRANCHES.items())
    }
    maps["heatmap"] = 2 * maps["heatmap"] - 7
    maps["dim"] = 0.3 * maps["dim"] + 0.8
    maps["iou"] = 0.3 * maps["iou"] + 0.6
    # This case filters centres by the small range itself.
    config = DecodeConfig(max_candidates=200)
    for i, found in enumerate(decode(swap(maps), grid=SMALL_GRID, config=config)):
        assert len(found) == case.outputs[f"pre_n{i}"][0]
        case.check(f"pre_scores{i}", found.scores[:100])
        assert found.labels[:100].tolist() == case.outputs[f"pre_labels{i}"].tolist()
        before = to_mmdet3d(with_velocities(found))
        before[:, 2] += before[:, 5] / 2
        check_boxes(case, f"pre_boxes{i}", before[:100])
        kept = apply_nms(found, 3, config)
        case.check(f"scores{i}", kept.scores)
        assert kept.labels.tolist() == case.outputs[f"labels{i}"].tolist()
        check_boxes(case, f"boxes{i}", to_mmdet3d(with_velocities(kept)))


def with_velocities(found: Detections3D) -> Tensor:
    return torch.cat([found.boxes, found.velocities], dim=-1)


def test_rotated_overlap_and_suppression() -> None:
    case = load_case("flatformer", "rotated_iou_nms")
    x, y, w, length, yaw = torch.from_numpy(case.outputs["boxes"]).unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    boxes = from_mmdet3d(torch.stack([x, y, zero, w, length, one, yaw], dim=-1))
    case.check("iou", iou_from_above(boxes[:, None], boxes[None]))
    scores = torch.linspace(1, 0.1, len(boxes))
    for threshold in (0.1, 0.2, 0.55, 0.8):
        golden = case.outputs[f"keep_{threshold}"].tolist()
        assert nms(boxes, scores, threshold).tolist() == golden


def test_whole_detector() -> None:
    case = load_case("flatformer", "detector_small_b1")
    config = replace(CONFIG, max_candidates=500)
    detector = build_detector3d(num_classes=3, grid=SMALL_GRID, decode=config).eval()
    detector.load_reference(case.weights())
    assert sum(p.numel() for p in detector.parameters()) == case.spec["params"]
    seen: dict[str, Tensor] = {}
    detector.backbone.register_forward_hook(lambda _, __, out: seen.update(bev=out))
    detector.neck.register_forward_hook(lambda _, __, out: seen.update(neck=out))
    frames = frames_of(case)
    with torch.inference_mode():
        maps = detector.forward_maps(frames)
        (found,) = detector(frames, velocity=True)
        (without,) = detector(frames)
    case.check("bev", seen["bev"])
    case.check("neck", seen["neck"])
    for name in BRANCHES:
        case.check(name, swap(maps)[name])
    assert len(found) == case.outputs["n0"][0]
    assert found.labels.tolist() == case.outputs["labels0"].tolist()
    case.check("scores0", found.scores)
    check_boxes(case, "boxes0", to_mmdet3d(with_velocities(found)))
    assert without.velocities is None
    assert torch.equal(without.boxes, found.boxes)


def test_norm_eps() -> None:
    detector = build_detector3d(num_classes=3, grid=SMALL_GRID)
    for name, module in detector.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            default = name.startswith("head.branches.")
            assert module.eps == (1e-5 if default else 1e-3), name
            assert module.momentum == (0.1 if default else 0.01), name


def test_box_conventions_are_inverse() -> None:
    boxes = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 9))).float()
    boxes[:, 6] = wrap_angle(boxes[:, 6])
    torch.testing.assert_close(to_mmdet3d(from_mmdet3d(boxes)), boxes)


@pytest.mark.parametrize("name", ["bbox_head.task_heads.0.vel.1.bias", "middle_encoder.x"])
def test_a_checkpoint_that_does_not_fit_says_so(name: str) -> None:
    case = load_case("flatformer", "detector_small_b1")
    detector = build_detector3d(num_classes=3, grid=SMALL_GRID)
    weights = case.weights()
    if weights.pop(name, None) is None:
        weights[name] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="the checkpoint lacks"):
        detector.load_reference(weights)
