"""The recipe's sections for detection in images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vitzoo.tasks.contract import DataOptions


@dataclass(kw_only=True)
class DetectorOptions:
    """The recipe's `model` section; see `build_detector`.

    Attributes:
        name: a backbone of the zoo or of timm, with or without a weight tag; or `local-dir:FOLDER`
            or `hf-hub:ORG/NAME` with what `vitzoo weights convert` writes.
        head: `retinanet`, `fcos`, `faster_rcnn` or `mask_rcnn`.
        pretrained: start the backbone from its published weights, or from that folder's.
        checkpoint: start the backbone from this file instead: the zoo's, timm's, the authors', or
            the weights of a run of any task.
        drop_path_rate: stochastic depth.
        args: the backbone's other arguments (`window_size`, `dilations`, ...).
        channels: of the FPN and the heads.
        anchor_sizes: five sides in pixels; torchvision's if empty.
        head_args: arguments of torchvision's detector (`box_score_thresh`, ...).
        frozen_stages: keep the stem and the first n stages as they are.
        grad_checkpointing: recompute the backbone's activations in backward.
    """

    name: str = "???"  # OmegaConf's mark of a value that must be given
    head: str = "mask_rcnn"
    pretrained: bool = False
    checkpoint: str | None = None
    drop_path_rate: float | None = None
    args: dict[str, Any] = field(default_factory=dict)
    channels: int = 256
    anchor_sizes: list[int] = field(default_factory=list)
    head_args: dict[str, Any] = field(default_factory=dict)
    frozen_stages: int = 0
    grad_checkpointing: bool = False


@dataclass(kw_only=True)
class DetectionDataOptions(DataOptions):
    """The recipe's `data` section.

    Attributes:
        source: `coco` for a COCO-style file and its images, or the generated (synthetic) `scenes`
            and `scenes-digits`.
        train_annotations, val_annotations: JSON files, relative to `root`.
        train_images, val_images: folders of images, relative to `root`.
        train_first, val_first: keep only the first n images.
        min_size: shorter side that images are resized to; one of several, drawn for each image, in
            training; the last one in evaluation.
        max_size: longer side that they may then have.
    """

    source: Literal["coco", "scenes", "scenes-digits"] = "coco"
    train_annotations: str = "annotations/instances_train2017.json"
    val_annotations: str = "annotations/instances_val2017.json"
    train_images: str = "train2017"
    val_images: str = "val2017"
    train_first: int | None = None
    val_first: int | None = None
    min_size: list[int] = field(default_factory=lambda: [800])
    max_size: int = 1333
    batch_size: int = 2


@dataclass(kw_only=True)
class DetectionAugmentOptions:
    """The recipe's `augment` section; sizes are drawn by `data.min_size`.

    Attributes:
        hflip: probability of the mirror image.
        crop: probability of a random window, as DETR's training cuts it.
        photometric: change brightness, contrast, saturation and hue (SSD, arXiv 1512.02325).
    """

    hflip: float = 0.5
    crop: float = 0.0
    photometric: bool = False


@dataclass(kw_only=True)
class DetectionOptions:
    """The recipe's sections of this task."""

    model: DetectorOptions = field(default_factory=DetectorOptions)
    data: DetectionDataOptions = field(default_factory=DetectionDataOptions)
    augment: DetectionAugmentOptions = field(default_factory=DetectionAugmentOptions)
