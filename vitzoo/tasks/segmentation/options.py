"""The recipe's sections for semantic segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vitzoo.tasks.contract import DataOptions


@dataclass(kw_only=True)
class SegmenterOptions:
    """The recipe's `model` section.

    Attributes:
        name: a backbone of the zoo or of timm, with or without a weight tag; or `local-dir:FOLDER`
            or `hf-hub:ORG/NAME` with what `vitzoo weights convert` writes.
        head: `upernet`, `fpn`, `segformer`, `dpt` or `unet`.
        pretrained: start the backbone from its published weights, or from that folder's.
        checkpoint: start the backbone from this file instead: the zoo's, timm's, the authors', or
            the weights of a run of any task.
        aux: add the auxiliary classifier on the map of stride 16.
        args: the backbone's arguments (`dilations`, `n_win`, `drop_path_rate`, `depths`, ...).
        head_args: widths of the decoder.
        frozen_stages: keep the stem and the first n stages as they are.
        grad_checkpointing: recompute the backbone's activations in backward.
        compile: run the model through torch.compile.
    """

    name: str = "???"  # OmegaConf's mark of a value that must be given
    head: str = "upernet"
    pretrained: bool = False
    checkpoint: str | None = None
    aux: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    head_args: dict[str, Any] = field(default_factory=dict)
    frozen_stages: int = 0
    grad_checkpointing: bool = False
    compile: bool = False


@dataclass(kw_only=True)
class MaskDataOptions(DataOptions):
    """The recipe's `data` section.

    Attributes:
        name: `folder`, `ade20k`, `cityscapes`, or the generated (synthetic) `scenes` and
            `scenes-digits`.
        images, masks: of `folder`, the two folders under `root`; `{split}` is the split's name.
        train_split, val_split: names of the two halves.
        train_first, val_first: keep only the first n samples.
        classes: names in the order of the labels; the data set's own if empty.
        ignore_index: label of pixels that neither train nor count.
        zero_is_ignored: masks hold 0 for such pixels and k for label k - 1 (ADE20K).
        palette: a colour per class, red, green, blue from 0 to 255: for drawing, and to read masks
            that are colour pictures.
        size: height and width of the training crops; those of the images if None, where all are
            equal.
        short_side: images are resized to this shorter side; as they are if None.
        long_side: but no longer than this.
        mean, std: of the pixels; the backbone's own if None.
    """

    name: Literal["folder", "ade20k", "cityscapes", "scenes", "scenes-digits"] = "folder"
    images: str = "images/{split}"
    masks: str = "masks/{split}"
    train_split: str = "train"
    val_split: str = "val"
    train_first: int | None = None
    val_first: int | None = None
    classes: list[str] = field(default_factory=list)
    ignore_index: int = 255
    zero_is_ignored: bool = False
    palette: list[list[int]] = field(default_factory=list)
    size: list[int] | None = None
    short_side: int | None = None
    long_side: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    batch_size: int = 8


@dataclass(kw_only=True)
class MaskAugmentOptions:
    """The recipe's `augment` section.

    Attributes:
        scale: the image is resized by a factor from this range.
        hflip: probability.
        photometric: change brightness, contrast, saturation and hue.
        most_of_one_class: a crop is drawn again, ten times at most, while one class fills more.
        enabled: false trains on whole images as evaluation sees them.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    photometric: bool = True
    most_of_one_class: float = 0.75
    enabled: bool = True


@dataclass(kw_only=True)
class LossOptions:
    """The recipe's `loss` section: weights of its terms.

    Attributes:
        cross_entropy, dice: of the logits.
        aux: of the auxiliary logits' cross-entropy.
    """

    cross_entropy: float = 1.0
    dice: float = 0.0
    aux: float = 0.4


@dataclass(kw_only=True)
class InferenceOptions:
    """The recipe's `inference` section.

    Attributes:
        mode: the `whole` image, or windows that `slide` over it, their logits averaged.
        window, stride: of the windows, height and width.
        scales: sizes whose probabilities are averaged.
        flip: average with the mirrored image's.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: list[int] = field(default_factory=lambda: [512, 512])
    stride: list[int] = field(default_factory=lambda: [341, 341])
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False


@dataclass(kw_only=True)
class SegmentationOptions:
    """The recipe's sections of this task."""

    model: SegmenterOptions = field(default_factory=SegmenterOptions)
    data: MaskDataOptions = field(default_factory=MaskDataOptions)
    augment: MaskAugmentOptions = field(default_factory=MaskAugmentOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
