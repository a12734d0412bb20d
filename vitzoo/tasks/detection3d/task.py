"""Upright boxes in LiDAR sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from vitzoo.backbones import info, list_models
from vitzoo.errors import InputError
from vitzoo.heads.detection3d import (
    DecodeConfig,
    PillarDetector,
    PillarGrid,
    build_detector3d,
    join_frames,
)
from vitzoo.tasks.contract import Batch, Task, TaskData
from vitzoo.tasks.detection3d import av2, kitti, synthetic
from vitzoo.tasks.detection3d.augment import PasteBank, augment, crop
from vitzoo.tasks.detection3d.files import POINT_FILES, as_points, read_points
from vitzoo.tasks.detection3d.frames import LidarFrame
from vitzoo.tasks.detection3d.metrics import DetectionMetrics, MetricOptions
from vitzoo.tasks.detection3d.npz import NpzFrames
from vitzoo.tasks.detection3d.options import Detection3DOptions
from vitzoo.tasks.detection3d.result import Boxes3D
from vitzoo.zoo.files import check_weights

_CLASSES = {"synthetic": synthetic.CLASSES, "av2": av2.CLASSES, "kitti": kitti.CLASSES}
_POINT_FEATURES = {
    "synthetic": synthetic.SyntheticLidar.point_features,
    "av2": av2.Argoverse2.point_features,
    "kitti": kitti.Kitti.point_features,
}


class TrainingFrames(Dataset[LidarFrame]):
    """Frames with random changes, cut to the grid, without boxes that hardly a point is in."""

    def __init__(
        self,
        frames: Dataset[LidarFrame],
        options: Detection3DOptions,
        grid: PillarGrid,
        bank: PasteBank | None,
    ) -> None:
        self.frames, self.options, self.grid, self.bank = frames, options, grid, bank

    def __len__(self) -> int:
        return len(self.frames)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> LidarFrame:
        frame = augment(self.frames[index], self.options.augment, self.grid, self.bank)
        return frame.keep_boxes(frame.point_counts >= self.options.data.min_points)


class Cropped(Dataset[LidarFrame]):
    """Frames cut to the grid."""

    def __init__(self, frames: Dataset[LidarFrame], grid: PillarGrid) -> None:
        self.frames, self.grid = frames, grid

    def __len__(self) -> int:
        return len(self.frames)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> LidarFrame:
        return crop(self.frames[index], self.grid)


def collate(frames: list[LidarFrame]) -> Batch:
    """Lists, one entry per frame: sweeps differ in length."""
    return {
        "points": [frame.points for frame in frames],
        "boxes": [frame.boxes for frame in frames],
        "labels": [frame.labels for frame in frames],
        "point_counts": [frame.point_counts for frame in frames],
    }


class Detection3DTask(Task):
    """Upright boxes in LiDAR sweeps, with `PillarDetector`."""

    options_type: ClassVar[type] = Detection3DOptions
    metric: ClassVar[str] = "AP"
    endings: ClassVar[tuple[str, ...]] = POINT_FILES

    options: Detection3DOptions

    def __init__(self, options: Detection3DOptions) -> None:
        super().__init__(options)
        name = options.model.name
        if name not in list_models() or info(name).modality != "points":
            known = [known for known in list_models() if info(known).modality == "points"]
            raise InputError(
                f"model.name={name} takes no points; those that do: {', '.join(known)}"
            )
        self.grid = self._grid()
        self.labels = self._classes()

    def _grid(self) -> PillarGrid:
        model = self.options.model
        try:
            return PillarGrid(tuple(model.point_range), tuple(model.pillar_size))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InputError(f"model.{error}") from None

    def _classes(self) -> tuple[str, ...]:
        data = self.options.data
        own = _CLASSES.get(data.name, ())
        if not data.classes and not own:
            raise InputError("data.classes is not set: the names to look for in the npz files")
        unknown = [name for name in data.classes if own and name not in own]
        if unknown:
            raise InputError(
                f"data.classes: {data.name} has no {unknown[0]!r}; it has {', '.join(own)}"
            )
        if data.name == "synthetic" and data.classes and tuple(data.classes) != own:
            raise InputError(
                f"data.classes: the synthetic ones are {', '.join(own)}, in this order"
            )
        return tuple(data.classes) or own

    @property
    def point_features(self) -> int:
        """Numbers per point."""
        data = self.options.data
        return _POINT_FEATURES.get(data.name, data.point_features)

    def build_data(self, *, train: bool = True) -> TaskData:
        """Open both splits, or only the one for evaluation."""
        train_set = None
        if train:
            frames = self._open(train=True)
            train_set = TrainingFrames(frames, self.options, self.grid, self._bank(frames))
        val_set = Cropped(self._open(train=False), self.grid)
        return TaskData(train=train_set, val=val_set, labels=self._classes(), collate=collate)

    def _open(self, *, train: bool) -> Any:
        data = self.options.data
        first = data.train_first if train else data.val_first
        if data.name == "synthetic":
            return synthetic.SyntheticLidar(first or (400 if train else 100), held_out=not train)
        if data.root is None:
            raise InputError(f"data.root is not set: the folder of {data.name}")
        split = data.train_split if train else data.val_split
        every = data.every if train else 1
        frames: Any
        if data.name == "kitti":
            frames = kitti.Kitti(data.root, split, classes=self._classes())
        else:
            shared: Any = {"classes": self._classes(), "sweeps": data.sweeps, "every": every}
            if data.name == "npz":
                shared["point_features"] = data.point_features
            kind: Any = {"av2": av2.Argoverse2, "npz": NpzFrames}[data.name]
            frames = kind(data.root, split, **shared)
        return Subset(frames, range(min(first, len(frames)))) if first else frames

    def _bank(self, frames: Any) -> PasteBank | None:
        options = self.options.augment
        if not options.paste:
            return None
        count = min(options.paste_frames or len(frames), len(frames))
        try:
            return PasteBank(
                (frames[i] for i in range(count)),
                self._classes(),
                options.paste,
                min_points=options.paste_min_points,
            )
        except ValueError as error:
            raise InputError(f"augment.paste: {error}") from None

    def build_model(self, *, pretrained: bool = True) -> nn.Module:
        """The detector for `self.labels`."""
        options = self.options.model
        try:
            detector = build_detector3d(
                options.name,
                num_classes=len(self.labels),
                grid=self.grid,
                point_features=self.point_features,
                pillar_dims=options.pillar_dims,
                neck=options.neck,
                head=options.head,
                decode=self._decode(),
                velocity_weight=options.velocity_weight,
                **options.args,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot build the detector: {error}") from error
        if pretrained and options.checkpoint is not None:
            load_checkpoint(detector, options.checkpoint)
        if options.grad_checkpointing:
            detector.backbone.set_grad_checkpointing()  # type: ignore[operator]
        return detector

    def _decode(self) -> DecodeConfig | None:
        given = self.options.model.decode
        known = [f.name for f in dataclasses.fields(DecodeConfig)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"model.decode has no {unknown[0]!r}; it has {', '.join(known)}")
        return DecodeConfig(**given) if given else None

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """The head's losses and their sum."""
        targets = [
            {"boxes": boxes, "labels": labels}
            for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True)
        ]
        found = self.model(batch["points"], targets)
        total = torch.stack(list(found.values())).sum()
        return {"loss": total} | {name: value.detach() for name, value in found.items()}

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """AP by distance and by overlap; see `DetectionMetrics`."""
        options = self.options.metrics
        overlaps: Any = options.overlaps[0] if len(options.overlaps) == 1 else options.overlaps
        try:
            metrics = DetectionMetrics(
                self.labels,
                MetricOptions(
                    overlaps=overlaps,
                    max_range=options.max_range,
                    max_per_frame=options.max_per_frame,
                    min_points=options.min_points,
                ),
            )
        except ValueError as error:
            raise InputError(f"metrics.overlaps: {error}") from None
        for batch in loader:
            truths = zip(batch["boxes"], batch["labels"], batch["point_counts"], strict=True)
            for found, truth in zip(self.model(batch["points"]), truths, strict=True):
                metrics.add(found, *truth)
        return metrics.compute()

    @torch.inference_mode()
    def predict(self, images: Sequence[Any]) -> list[Boxes3D]:
        """Boxes for sweeps: paths (`.bin`, `.feather`, `.npy`, `.npz`) or arrays (N, C)."""
        results = []
        for given in images:
            from_file = isinstance(given, str | Path)
            try:
                points = (
                    read_points(given, columns=self.point_features)
                    if from_file
                    else as_points(given)
                )
                kept, _, dropped = join_frames([points], self.point_features, self.grid)
                (found,) = self.model([points.to(self.device)])
            except ValueError as error:
                raise InputError(str(error)) from None
            results.append(
                Boxes3D(
                    str(given) if from_file else None,
                    found.cpu(),
                    self.labels,
                    kept,
                    int(dropped[0]),
                    self.grid,
                )
            )
        return results


def load_checkpoint(detector: PillarDetector, path: str) -> None:
    """Load a detector's weights, in the zoo's or the authors' format.

    Raises:
        InputError: no such file, not plain tensors, or they do not fit.
    """
    from timm.models import load_state_dict

    file = Path(path).expanduser()
    check_weights(file)
    try:
        state = load_state_dict(str(file), weights_only=True)
        if any(name.startswith("middle_encoder.") for name in state):
            detector.load_reference(state)
        else:
            detector.load_state_dict(state)
    except (RuntimeError, OSError, KeyError) as error:
        raise InputError(f"cannot load {path}: {' '.join(str(error).split())[:600]}") from error
