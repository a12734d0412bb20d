"""torchvision's detectors over every family of the zoo."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor

import vitzoo
from tests.registry_names import TIER_0, TIER_1, parameters
from vitzoo._skeleton import without_memory
from vitzoo.heads.detection import HEADS, build_detector
from vitzoo.heads.pyramid import Maps, SimplePyramid

SMALL = {"min_size": 64, "max_size": 128, "channels": 64, "num_classes": 3}
# Fewer proposals: what is under test does not depend on their number, the time does.
FEW = {
    "rpn_pre_nms_top_n_train": 100,
    "rpn_post_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 50,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 20,
}
HEAD_ARGS = {"faster_rcnn": FEW, "mask_rcnn": FEW}


def _smallest_of_each_family() -> list[str]:
    found: dict[str, str] = {}
    for name in sorted(TIER_0, key=parameters):
        # One family may hold networks of several scales and of one.
        strides = len(set(vitzoo.info(name).strides))
        found.setdefault(f"{vitzoo.info(name).family} {strides > 1}", name)
    return list(found.values())


FAMILIES = _smallest_of_each_family()
PRODUCT = [(name, head) for name in FAMILIES for head in ("retinanet", "mask_rcnn")]
REST = [(n, h) for n in TIER_1 for h in HEADS if (n, h) not in PRODUCT]


def scene(height: int, width: int) -> tuple[Tensor, dict[str, Tensor]]:
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 5:40, 6:45] = 1
    masks[1, 20:50, 10:30] = 1
    boxes = torch.tensor([[6.0, 5, 45, 40], [10, 20, 30, 50]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}
    return torch.rand(3, height, width), target


def check(name: str, head: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(name, head=head, **SMALL, **HEAD_ARGS.get(head, {})).train()
    (first, first_target), (second, second_target) = scene(67, 91), scene(81, 53)
    losses = detector([first, second], [first_target, second_target])
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
    without = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    detector.eval()
    with torch.no_grad():
        found = detector([first, second])
    for one, image in zip(found, (first, second), strict=True):
        count = len(one["boxes"])
        assert one["boxes"].shape == (count, 4)
        assert one["scores"].shape == one["labels"].shape == (count,)
        assert ((one["labels"] >= 1) & (one["labels"] <= 3)).all()
        limits = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert ((one["boxes"] >= 0) & (one["boxes"] <= limits)).all()
        if head == "mask_rcnn":
            assert one["masks"].shape == (count, 1, *image.shape[1:])


@pytest.mark.parametrize(("name", "head"), PRODUCT)
def test_learns_and_finds(name: str, head: str) -> None:
    check(name, head)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), REST)
def test_every_name_and_head(name: str, head: str) -> None:
    if "any_size" in vitzoo.info(name).limits:
        pytest.skip(vitzoo.info(name).limits["any_size"])
    check(name, head)


@pytest.mark.parametrize("head", HEADS)
def test_timms_models_images_without_objects_and_labels(head: str) -> None:
    torch.manual_seed(0)
    detector = build_detector("resnet10t", head=head, **SMALL).train()
    image, target = scene(67, 91)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    empty["masks"] = torch.zeros(0, 67, 91, dtype=torch.uint8)
    losses = detector([image, image], [target, empty])
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(value) for value in detector([image], [empty]).values())
    with pytest.raises(ValueError, match="label 4 is not among 1 to 3"):
        detector([image], [{**target, "labels": torch.tensor([1, 4])}])


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_one_stage_labels_come_back_from_one(head: str) -> None:
    """Weights that shout one class give its label, and a target of that label costs little."""
    detector = build_detector("resnet10t", head=head, score_thresh=0.0, **SMALL)
    bias = detector.head.classification_head.cls_logits.bias
    torch.nn.init.constant_(bias, -9.0)
    with torch.no_grad():
        bias.view(-1, 3)[:, 1] = 9.0
    detector.eval()
    with torch.no_grad():
        (found,) = detector([torch.rand(3, 64, 64)])
    assert set(found["labels"][:20].tolist()) == {2}


def test_at_full_width_the_heads_are_torchvisions() -> None:
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    with without_memory():
        ours = build_detector("resnet50", head="mask_rcnn", num_classes=90)
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for part in ("rpn", "roi_heads", "backbone.fpn"):
        shapes = [
            {k: v.shape for k, v in model.get_submodule(part).state_dict().items()}
            for model in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]


def test_dense_versions_hold_the_norms_they_use() -> None:
    # The authors' detectors norm all stages that are used but LITv2's first.
    for name, head, norms in (
        ("vz_davit_tiny", "retinanet", (1, 2, 3)),
        ("vz_davit_tiny", "mask_rcnn", (0, 1, 2, 3)),
        ("vz_litv2_small", "mask_rcnn", (1, 2, 3)),
    ):
        with without_memory():
            maps = build_detector(name, head=head, **SMALL).backbone.maps
        assert maps.model.dense
        assert maps.model.norm_indices == norms


def test_statistics_groups_and_frozen_batch_norm() -> None:
    detector = build_detector("vz_biformer_tiny", head="retinanet", **SMALL).train()
    config = timm.get_pretrained_cfg("vz_biformer_tiny")
    assert tuple(detector.transform.image_mean) == tuple(config.mean)
    norms = [m for m in detector.backbone.maps.modules() if "BatchNorm" in type(m).__name__]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)
    groups = param_groups_layer_decay(detector, layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    assert max(scales) == 1.0
    assert len(scales) >= 4


def test_the_simple_pyramid() -> None:
    maps = SimplePyramid(16)(torch.rand(1, 16, 5, 7))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (4, 20, 28),
        (8, 10, 14),
        (16, 5, 7),
        (16, 3, 4),
    ]
    with pytest.raises(ValueError, match="has strides"):
        Maps("vz_lookupvit_small", strides=(2, 4))
    with pytest.raises(ValueError, match="none at 64"):
        Maps("vz_davit_tiny", strides=(4, 64))
    for given, message in (
        ({"head": "yolo"}, "no head 'yolo'"),
        ({"num_classes": 0}, "at least 1"),
        ({"anchor_sizes": (8, 16)}, "needs 5 sides"),
        ({"head": "fcos", "anchor_sizes": (8, 16, 32, 64, 128)}, "no anchors"),
    ):
        with pytest.raises(ValueError, match=message):
            build_detector("resnet10t", **{"num_classes": 2, **given})
