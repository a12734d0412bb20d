"""torchvision's detectors over any backbone, with one convention for labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from vitzoo.heads.detection.fpn import FeaturePyramid
from vitzoo.heads.pyramid import Maps

_RATIOS = (0.5, 1.0, 2.0)
_SIZES = (32, 64, 128, 256, 512)


class _Detector(nn.Module):
    """What the zoo adds to a detector of torchvision: timm's parameter groups, checked labels.

    Labels are 1 to `num_classes` going in and coming out, as in torchvision's trained detectors.
    """

    backbone: FeaturePyramid
    num_classes: int
    # What a head that knows no background subtracts from labels.
    label_offset = 0

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, found objects in evaluation.

        Args:
            images: each (3, H, W) from 0 to 1, of any sizes; normalised and resized here.
            targets: per image `boxes` (N, 4) as x0, y0, x1, y1 in pixels, `labels` (N,) from 1 to
                `num_classes`, and `masks` (N, H, W) for Mask R-CNN.

        Returns:
            Losses by name; or per image `boxes`, `labels`, `scores`, and `masks` (N, 1, H, W) with
            probabilities.

        Raises:
            ValueError: a label that is none of the classes.
        """
        if targets is not None:
            targets = [self._checked(target) for target in targets]
        found = super().forward(images, targets)
        if self.label_offset and isinstance(found, list):
            for one in found:
                one["labels"] = one["labels"] + self.label_offset
        return found

    def _checked(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = target["labels"]
        wrong = labels[(labels < 1) | (labels > self.num_classes)]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is not among 1 to {self.num_classes}")
        return {**target, "labels": labels - self.label_offset}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups of the backbone; FPN and heads are in the last."""
        return self.backbone.maps.layer_groups(_PREFIX, coarse=coarse)

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay."""
        own: Any = getattr(self.backbone.maps.model, "no_weight_decay", set)
        return {f"{_PREFIX}{name}" for name in own()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in backward."""
        self.backbone.maps.model.set_grad_checkpointing(enable)  # type: ignore[operator]


_PREFIX = "backbone.maps.body.model."


class _RetinaNet(_Detector, RetinaNet):
    label_offset = 1


class _FCOS(_Detector, FCOS):
    label_offset = 1


class _FasterRCNN(_Detector, FasterRCNN):
    pass


class _MaskRCNN(_Detector, MaskRCNN):
    pass


def _retinanet(body: FeaturePyramid, sizes: Sequence[int], classes: int, **kwargs: Any) -> Any:
    octaves = [tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in sizes]
    anchors = AnchorGenerator(tuple(octaves), (_RATIOS,) * len(octaves))
    return _RetinaNet(body, classes, anchor_generator=anchors, **kwargs)


def _fcos(body: FeaturePyramid, sizes: Sequence[int], classes: int, **kwargs: Any) -> Any:
    # FCOS has one point a cell; the "size" is what its distances are counted in: the stride.
    points = tuple((size // 4,) for size in sizes)
    anchors = AnchorGenerator(points, ((1.0,),) * len(points))
    return _FCOS(body, classes, anchor_generator=anchors, **kwargs)


def _faster_rcnn(body: FeaturePyramid, sizes: Sequence[int], classes: int, **kwargs: Any) -> Any:
    return _FasterRCNN(body, **_box_parts(body, sizes, classes), **kwargs)


def _mask_rcnn(body: FeaturePyramid, sizes: Sequence[int], classes: int, **kwargs: Any) -> Any:
    width = body.out_channels
    parts = {
        "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
    }
    return _MaskRCNN(body, **_box_parts(body, sizes, classes), **parts, **kwargs)


def _box_parts(body: FeaturePyramid, sizes: Sequence[int], classes: int) -> dict[str, Any]:
    """Anchors and box head; at 256 channels exactly torchvision's."""
    width = body.out_channels
    return {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in sizes), (_RATIOS,) * len(sizes)
        ),
        "box_head": TwoMLPHead(width * 7**2, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
    }


# Head -> builder, strides of the maps it reads, levels that the FPN adds.
HEADS: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "retinanet": (_retinanet, (8, 16, 32), "convolve"),
    "fcos": (_fcos, (8, 16, 32), "convolve"),
    "faster_rcnn": (_faster_rcnn, (4, 8, 16, 32), "pool"),
    "mask_rcnn": (_mask_rcnn, (4, 8, 16, 32), "pool"),
}


def build_detector(
    name: str,
    *,
    head: str = "mask_rcnn",
    num_classes: int,
    pretrained: bool = False,
    channels: int = 256,
    anchor_sizes: Sequence[int] | None = None,
    backbone: dict[str, Any] | None = None,
    **head_kwargs: Any,
) -> _Detector:
    """torchvision's detector over a zoo or timm backbone; see `_Detector.forward` for the calls.

    Args:
        name: a name that `timm.create_model` knows.
        head: `retinanet`, `fcos`, `faster_rcnn` or `mask_rcnn`.
        num_classes: object classes; labels are 1 to `num_classes`.
        pretrained: start the backbone from its published weights.
        channels: of the FPN; the heads' widths follow it. 256 are torchvision's.
        anchor_sizes: five sides in pixels, one a level, finest first; 32 to 512 if None. FCOS
            has none: its distances are counted in strides.
        backbone: further arguments of `timm.create_model` (`drop_path_rate`, `window_size`, ...).
        **head_kwargs: of torchvision's detector (`min_size`, `max_size`, `box_score_thresh`, ...).

    Raises:
        ValueError: unknown head, or a backbone without the strides that it reads.
    """
    if head not in HEADS:
        raise ValueError(f"no head {head!r}; there are {', '.join(HEADS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    sizes = tuple(anchor_sizes or _SIZES)
    if len(sizes) != len(_SIZES):
        raise ValueError(f"anchor_sizes needs {len(_SIZES)} sides, one a level, got {len(sizes)}")
    if head == "fcos" and anchor_sizes is not None:
        raise ValueError("fcos has no anchors: leave anchor_sizes out")
    build, strides, extra = HEADS[head]
    maps = Maps(name, strides=strides, pretrained=pretrained, **(backbone or {}))
    config: Any = maps.model.pretrained_cfg
    statistics = {"image_mean": list(config["mean"]), "image_std": list(config["std"])}
    detector: _Detector = build(
        FeaturePyramid(maps, channels, extra=extra), sizes, num_classes, **statistics | head_kwargs
    )
    detector.num_classes = num_classes
    return detector
