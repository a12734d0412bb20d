"""What the CenterPoint head should say, and its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.heads.detection3d.boxes import iou_3d
from vitzoo.heads.detection3d.pillars import PillarGrid

# Branches whose outputs make up a box's code, in order, and the weight of each number.
_CODE = ("reg", "height", "dim", "rot", "vel")
_PROB_MIN = 1e-4
_LOG_MIN = 1e-12
_COUNT_MIN = 1e-4


@dataclass(frozen=True)
class Targets:
    """Targets of a batch.

    Attributes:
        heatmap: (B, classes, H, W), 1 at the centres.
        codes: (B, K, 10): offset of the centre from its cell (x, y), height of the centre, log of
            length, width and height, sine and cosine of the heading, velocity (x, y).
        cells: (B, K) row * W + column of the centre.
        mask: (B, K) whether the slot holds a box.
    """

    heatmap: Tensor
    codes: Tensor
    cells: Tensor
    mask: Tensor


def gaussian_radius(length: Tensor, width: Tensor, overlap: float) -> Tensor:
    """Radius within which a corner may move so that boxes still overlap by `overlap`, in cells.

    CornerNet's published code divides each root by 2 where the formula has 2a; it became the
    standard, and trained heads expect it.
    """
    total, area = length + width, length * width
    c = area * (1 - overlap) / (1 + overlap)
    first = (total + (total.square() - 4 * c).sqrt()) / 2
    c = (1 - overlap) * area
    second = (2 * total + (4 * total.square() - 16 * c).sqrt()) / 2
    b = -2 * overlap * total
    c = (overlap - 1) * area
    third = (b + (b.square() - 16 * overlap * c).sqrt()) / 2
    return torch.minimum(torch.minimum(first, second), third)


def _pad(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, max_objects: int
) -> tuple[Tensor, Tensor]:
    """Boxes (B, K, 9) class by class, labels (B, K), -1 in empty slots."""
    kept_boxes, kept_labels = [], []
    for frame, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if box.dim() != 2 or box.shape[1] not in (7, 9) or label.shape != box.shape[:1]:
            raise ValueError(
                "boxes must be (N, 7), or (N, 9) with velocities, and labels (N,); got "
                f"{tuple(box.shape)} and {tuple(label.shape)}"
            )
        if bool((label >= num_classes).any()):
            raise ValueError(
                f"frame {frame}: labels must be below {num_classes}, got {label.max().item()}"
            )
        # Before the ranking, or they would take the slots of boxes that count.
        good = (label >= 0) & box[:, :7].isfinite().all(-1)
        box, label = box[good], label[good]
        order = label.argsort(stable=True)[:max_objects]
        # nuScenes has no velocity where it writes NaN.
        box = torch.cat([box[:, :7], box[:, 7:].nan_to_num(0, 0, 0)], dim=-1)
        kept_boxes.append(F.pad(box[order].float(), (0, 9 - box.shape[1])))
        kept_labels.append(label[order].long())
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(kept_boxes, True), pad(kept_labels, True, -1)


def make_targets(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    grid: PillarGrid,
    num_classes: int,
    stride: int = 1,
    overlap: float = 0.1,
    min_radius: int = 1,
    max_objects: int = 500,
) -> Targets:
    """Heatmaps and box codes of a batch.

    Args:
        boxes: per frame (N, 7), or (N, 9) with velocities.
        labels: per frame (N,), classes from 0; boxes with a negative one, or with a number that is
            not finite, are left out.
        grid: the pillars.
        num_classes: object classes.
        stride: pillars per cell of the head's map, along each side.
        overlap: sets the radius of a peak, see `gaussian_radius`.
        min_radius: of a peak, in cells.
        max_objects: boxes per frame, first come, class by class.

    Raises:
        ValueError: the shapes of boxes and labels do not fit, or a label is no class.
    """
    padded, classes = _pad(boxes, labels, num_classes, max_objects)
    # Up, as the neck's convolutions do; the reference rounds down and needs sides that divide.
    H, W = (-(-side // stride) for side in grid.size)
    cell_size = padded.new_tensor(grid.pillar_size) * stride
    place = (padded[..., :2] - padded.new_tensor(grid.point_range[:2])) / cell_size
    cell = place.trunc()
    limits = cell.new_tensor([W, H])
    mask = (classes >= 0) & (padded[..., 3:5] > 0).all(-1)
    mask &= ((cell >= 0) & (cell < limits)).all(-1)
    # trunc(-0.5) is 0: a centre just outside the low edges still counts, as in the reference.
    column, row = cell.long().unbind(-1)

    length, width = (padded[..., 3:5] / cell_size).unbind(-1)
    radius = gaussian_radius(length, width, overlap)
    radius = radius.nan_to_num().long().clamp(min=min_radius)
    yaw = padded[..., 6:7]
    codes = torch.cat(
        [
            place - cell,
            padded[..., 2:3],
            padded[..., 3:6].clamp(min=1e-8).log(),
            yaw.sin(),
            yaw.cos(),
            padded[..., 7:9],
        ],
        dim=-1,
    )
    plane = torch.arange(len(classes), device=mask.device)[:, None] * num_classes + classes
    heatmap = _draw_peaks(
        row[mask],
        column[mask],
        radius[mask],
        plane=plane[mask],
        shape=(len(classes) * num_classes, H, W),
    )
    return Targets(
        heatmap=heatmap.view(len(classes), num_classes, H, W),
        codes=codes * mask[..., None],
        cells=(row * W + column) * mask,
        mask=mask,
    )


def _draw_peaks(
    row: Tensor, column: Tensor, radius: Tensor, *, plane: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """Gaussian peaks (N,) of the given radii on planes of zeros; the highest counts."""
    planes, H, W = shape
    flat = torch.zeros(planes * H * W, device=row.device)
    if len(row) == 0:
        return flat
    # A radius beyond the map is cut there: one absurd box must not fill the memory.
    reach = min(int(radius.max()), max(H, W))
    steps = torch.arange(-reach, reach + 1, device=row.device)
    dy, dx = (d.flatten() for d in torch.meshgrid(steps, steps, indexing="ij"))
    y, x, r = row[:, None] + dy, column[:, None] + dx, radius[:, None]
    sigma = (2 * r + 1).double() / 6
    height = torch.exp(-(dx.square() + dy.square()) / (2 * sigma.square())).float()
    drawn = (dy.abs() <= r) & (dx.abs() <= r) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    cell = (plane[:, None] * H + y) * W + x
    return flat.scatter_reduce(0, cell[drawn], height[drawn], "amax")


def heatmap_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CenterNet's focal loss, over the number of centres (at least 1)."""
    p = logits.float().sigmoid().clamp(_PROB_MIN, 1 - _PROB_MIN)
    centre = target == 1
    at_centre = (p + _LOG_MIN).log() * (1 - p).square()
    elsewhere = (1 - p + _LOG_MIN).log() * p.square() * (1 - target) ** 4
    return -torch.where(centre, at_centre, elsewhere).sum() / centre.sum().clamp(min=1)


def losses(
    maps: dict[str, Tensor],
    targets: Targets,
    *,
    cell_size: tuple[float, float],
    velocity_weight: float = 0.0,
    box_weight: float = 2.0,
) -> dict[str, Tensor]:
    """The head's losses.

    Args:
        maps: outputs of `CenterHead`.
        targets: of the same batch.
        cell_size: (x, y) of a cell of the maps in metres.
        velocity_weight: of the velocity's error against the other numbers of the code; the paper's
            recipes leave velocity untrained.
        box_weight: of the whole box loss.

    Returns:
        `loss_heatmap`, `loss_box` (absolute error of the codes) and, with the branch, `loss_iou`.
    """
    found = {"loss_heatmap": heatmap_loss(maps["heatmap"], targets.heatmap)}
    frame, slot = targets.mask.nonzero(as_tuple=True)
    cells = targets.cells[frame, slot]
    gathered = {
        name: values.flatten(2)[frame, :, cells].float()
        for name, values in maps.items()
        if name != "heatmap"
    }
    count = len(frame) + _COUNT_MIN
    predicted = torch.cat([gathered[name] for name in _CODE if name in gathered], dim=-1)
    wanted = targets.codes[frame, slot]
    error = (predicted - wanted[:, : predicted.shape[1]]).abs().sum(0)
    weights = error.new_tensor([1.0] * 8 + [velocity_weight] * 2)[: len(error)]
    found["loss_box"] = (error * weights).sum() / count * box_weight
    if "iou" in gathered:
        with torch.no_grad():
            overlap = iou_3d(_boxes(predicted, cell_size), _boxes(wanted, cell_size))
        found["loss_iou"] = (gathered["iou"][:, 0] - overlap).abs().sum() / count
    return found


def _boxes(codes: Tensor, cell_size: tuple[float, float]) -> Tensor:
    """Codes of one cell -> boxes for the overlap of the `iou` branch, (N, 7).

    The reference reads the centre's height as that of the bottom, for both boxes; trained `iou`
    branches expect it. Boxes at the same cell are compared, so that the cell itself drops out.
    """
    centre = codes[:, :2] * codes.new_tensor(cell_size)
    size = codes[:, 3:6].exp()
    z = codes[:, 2:3] + size[:, 2:3] / 2
    yaw = torch.atan2(codes[:, 6:7], codes[:, 7:8])
    return torch.cat([centre, z, size, yaw], dim=-1)
