"""The whole detector: points, pillars, backbone, neck, head, boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

from vitzoo.heads.detection3d.centerpoint import CenterHead
from vitzoo.heads.detection3d.decode import DecodeConfig, Detections3D, apply_nms, decode
from vitzoo.heads.detection3d.neck import BevNeck
from vitzoo.heads.detection3d.pillars import PillarEncoder, PillarGrid, join_frames
from vitzoo.heads.detection3d.targets import losses, make_targets

StateDict = dict[str, Tensor]
# The recipes of the paper drop the outermost millimetre of the pillars' 6 m.
WAYMO_GRID = PillarGrid((-74.88, -74.88, -1.999, 74.88, 74.88, 3.999), (0.32, 0.32))


class PillarDetector(nn.Module):
    """A detector of upright boxes in LiDAR sweeps.

    Calls follow torchvision's detectors: in training `model(points, targets)` gives the losses, in
    evaluation `model(points)` gives the boxes of every frame.

    Args:
        pillars: points -> pillars.
        backbone: (features, coords, batch_size) -> map; see `vz_flatformer`.
        neck: map -> map.
        head: map -> quantities per cell.
        decode: how the head's maps become boxes.
        velocity_weight: of the velocity's error in the box loss.
    """

    def __init__(
        self,
        pillars: PillarEncoder,
        backbone: nn.Module,
        neck: BevNeck,
        head: CenterHead,
        *,
        decode: DecodeConfig | None = None,
        velocity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.pillars = pillars
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.decode = decode or DecodeConfig()
        self.velocity_weight = velocity_weight
        for name in ("iou_power", "nms_thresholds", "nms_before", "nms_after"):
            self.decode.per_class(name, head.num_classes)

    @property
    def grid(self) -> PillarGrid:
        """The pillars."""
        return self.pillars.grid

    @property
    def num_classes(self) -> int:
        """Object classes."""
        return self.head.num_classes

    def forward_maps(self, points: Sequence[Tensor], *, skip: Sequence[str] = ()) -> Any:
        """Frames of points (N, point_features) -> the head's maps."""
        joined, frame, _ = join_frames(points, self.pillars.point_features, self.grid)
        features, coords = self.pillars(joined, frame)
        return self.head(self.neck(self.backbone(features, coords, len(points))), skip=skip)

    def forward(
        self,
        points: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        *,
        velocity: bool = False,
    ) -> dict[str, Tensor] | list[Detections3D]:
        """Losses in training, boxes in evaluation.

        Args:
            points: per frame (N, point_features): x, y, z in metres, then the sensor's features.
                Points outside the grid's range or not finite are left out; a frame may be empty.
            targets: per frame `boxes` (M, 7), or (M, 9) with velocities, and `labels` (M,).
            velocity: also give velocities; they cost a twentieth of the time.

        Raises:
            ValueError: training without targets, or shapes that do not fit.
        """
        if not self.training:
            maps = self.forward_maps(points, skip=() if velocity else ("vel",))
            return self.postprocess(maps)
        if targets is None or len(targets) != len(points):
            given = "none" if targets is None else str(len(targets))
            raise ValueError(f"training needs targets of {len(points)} frames, got {given}")
        wanted = make_targets(
            [t["boxes"] for t in targets],
            [t["labels"] for t in targets],
            grid=self.grid,
            num_classes=self.num_classes,
            stride=self.neck.stride,
        )
        x, y = self.grid.pillar_size
        stride = self.neck.stride
        return losses(
            self.forward_maps(points),
            wanted,
            cell_size=(x * stride, y * stride),
            velocity_weight=self.velocity_weight,
        )

    def postprocess(self, maps: dict[str, Tensor]) -> list[Detections3D]:
        """The head's maps -> boxes, suppressed, class by class."""
        found = decode(maps, grid=self.grid, stride=self.neck.stride, config=self.decode)
        return [apply_nms(frame, self.num_classes, self.decode) for frame in found]

    def load_reference(self, state_dict: StateDict) -> None:
        """Load a checkpoint of the authors' code (mmdet3d 0.x), trained by whoever.

        Raises:
            RuntimeError: the parameters do not fit.
        """
        result = self.load_state_dict(rename_reference(state_dict, self.backbone), strict=False)
        missing = [n for n in result.missing_keys if not n.endswith("num_batches_tracked")]
        if missing or result.unexpected_keys:
            raise RuntimeError(
                f"the checkpoint lacks {missing} and has {result.unexpected_keys} besides"
            )


def build_detector3d(
    name: str = "vz_flatformer",
    *,
    num_classes: int,
    grid: PillarGrid = WAYMO_GRID,
    point_features: int = 5,
    pillar_dims: Sequence[int] = (64, 128),
    neck: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    decode: DecodeConfig | None = None,
    velocity_weight: float = 0.0,
    **backbone_kwargs: Any,
) -> PillarDetector:
    """A detector of upright boxes in LiDAR sweeps around a point-cloud backbone.

    Without further arguments it is the paper's on Waymo.

    Args:
        name: a registered backbone of modality `points`.
        num_classes: object classes.
        grid: range and pillars.
        point_features: numbers per point.
        pillar_dims: widths of the pillar encoder; the last is the backbone's.
        neck: arguments of `BevNeck`.
        head: arguments of `CenterHead`.
        decode: how the head's maps become boxes.
        velocity_weight: of the velocity's error in the box loss.
        **backbone_kwargs: for `timm.create_model`.

    Raises:
        ValueError: settings per class are not as many as the classes.
    """
    encoder = PillarEncoder(grid, point_features, pillar_dims)
    backbone = timm.create_model(
        name, in_chans=pillar_dims[-1], grid_size=grid.size, **backbone_kwargs
    )
    bev = BevNeck(pillar_dims[-1], **(neck or {}))
    if decode is None and num_classes != 3:
        decode = DecodeConfig(nms_thresholds=0.55, nms_before=1024, nms_after=100)
    return PillarDetector(
        encoder,
        backbone,
        bev,
        CenterHead(bev.num_features, num_classes, **(head or {})),
        decode=decode,
        velocity_weight=velocity_weight,
    )


_REFERENCE_NAMES = (
    (r"^voxel_encoder\.vfe_layers\.", "pillars.layers."),
    (r"^backbone\.blocks\.(\d+)\.(\d+)\.0\.", r"neck.stages.\1.\2.conv."),
    (r"^backbone\.blocks\.(\d+)\.(\d+)\.1\.", r"neck.stages.\1.\2.bn."),
    (r"^neck\.deblocks\.(\d+)\.0\.", r"neck.ups.\1.conv."),
    (r"^neck\.deblocks\.(\d+)\.1\.", r"neck.ups.\1.bn."),
    (r"^bbox_head\.shared_conv\.", "head.shared."),
    (r"^bbox_head\.task_heads\.0\.", "head.branches."),
)


def rename_reference(state_dict: StateDict, backbone: nn.Module) -> StateDict:
    """Parameters of the authors' detector -> ours, for our boxes.

    The reference's `dim` is (width, length, height) and its yaw is -(heading + pi / 2), so outputs
    of the last convolutions change places, and sine and cosine also sign.
    """
    if isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]  # type: ignore[assignment]
    found = {}
    encoder = {n: v for n, v in state_dict.items() if n.startswith("middle_encoder.")}
    for name, value in backbone.rename_checkpoint(encoder).items():  # type: ignore[operator]
        found[f"backbone.{name}"] = value
    for name, value in state_dict.items():
        if name in encoder:
            continue
        for pattern, replacement in _REFERENCE_NAMES:
            renamed, hits = re.subn(pattern, replacement, name)
            if hits:
                name = renamed
                break
        if re.match(r"head\.branches\.dim\.1\.", name):
            value = value[[1, 0, 2]]
        elif re.match(r"head\.branches\.rot\.1\.", name):
            value = -value[[1, 0]]
        found[name] = value
    return found
