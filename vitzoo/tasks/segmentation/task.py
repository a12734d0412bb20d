"""A label for every pixel, with any backbone that has maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.errors import InputError
from vitzoo.heads.segmentation import HEADS, build_segmenter
from vitzoo.tasks._models import (
    backbone_of,
    config_of,
    freeze,
    known_name,
    recompute_activations,
    refused_pickle,
)
from vitzoo.tasks.contract import Batch, Task, TaskData
from vitzoo.tasks.pictures import image_of
from vitzoo.tasks.segmentation.data import open_pairs, palette_of_recipe
from vitzoo.tasks.segmentation.inference import by_size, check, probabilities
from vitzoo.tasks.segmentation.metrics import Confusion
from vitzoo.tasks.segmentation.options import SegmentationOptions
from vitzoo.tasks.segmentation.result import LabelMap, palette_of
from vitzoo.tasks.segmentation.transforms import Preparation, TrainingPairs, WholePairs, as_lists


class SegmentationTask(Task):
    """One label a pixel."""

    options_type: ClassVar[type] = SegmentationOptions
    metric: ClassVar[str] = "mIoU"
    shown: ClassVar[tuple[str, ...]] = ("mIoU", "pixel_accuracy", "mean_accuracy")

    options: SegmentationOptions

    def __init__(self, options: SegmentationOptions) -> None:
        super().__init__(options)
        self._frozen: list[nn.Module] = []
        known_name(options.model.name, elsewhere=True)
        if options.model.head not in HEADS:
            raise InputError(f"model.head={options.model.head}: known are {', '.join(HEADS)}")
        if options.model.head == "upernet" and options.data.batch_size < 2:
            raise InputError(
                "data.batch_size=1: UPerNet normalises means of whole images over the batch, so "
                "give 2 or more"
            )
        check(options.inference)

    def build_data(self, *, train: bool = True) -> TaskData:
        """Open both splits, or only the one for evaluation."""
        data, train_set = self.options.data, None
        expected = self.labels or None
        if train:
            pairs = open_pairs(data, train=True)
            expected = pairs.labels
            train_set = TrainingPairs(pairs, self.preparation(), data, self.options.augment)
        pairs = open_pairs(data, train=False)
        if expected is not None and pairs.labels != expected:
            raise InputError(
                f"the data has {len(pairs.labels)} classes, but the model was made for "
                f"{len(expected)}" + ("" if len(pairs.labels) != len(expected) else " others")
            )
        return TaskData(
            train=train_set,
            val=WholePairs(pairs, self.preparation()),
            labels=pairs.labels,
            val_collate=as_lists,
        )

    def preparation(self) -> Preparation:
        """Resizing as the recipe says; mean and std the recipe's, else the backbone's own."""
        data = self.options.data
        own: Any = config_of(self.options.model.name)
        mean = data.mean or (own.mean if own else (0.485, 0.456, 0.406))
        std = data.std or (own.std if own else (0.229, 0.224, 0.225))
        return Preparation(mean, std, data.short_side, data.long_side)

    def build_model(self, *, pretrained: bool = True) -> nn.Module:
        """The segmenter for `self.labels`, frozen as the recipe says."""
        options = self.options.model
        name, load, arguments = backbone_of(options, pretrained=pretrained)
        try:
            model = build_segmenter(
                name,
                head=options.head,
                num_classes=len(self.labels),
                pretrained=load,
                aux=options.aux,
                head_args=options.head_args,
                **arguments,
            )
        except InputError:
            raise
        except (TypeError, ValueError, RuntimeError, OSError, KeyError) as error:
            text = " ".join(str(error).split())
            if load and "weights_only" in text:
                raise refused_pickle(options.checkpoint or options.name) from None
            raise InputError(f"cannot build the segmenter: {text[:600]}") from error
        body: Any = model.backbone.model
        self._frozen = freeze(body, stages=options.frozen_stages, linear_probe=False)
        if options.grad_checkpointing:
            recompute_activations(model)
        if options.compile:
            model.compile()
        return model

    def train_mode(self) -> None:
        """Training mode, but for modules without a trainable parameter."""
        self.model.train()
        for module in self._frozen:
            module.eval()

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """The recipe's losses; batch: images (B, 3, H, W), targets (B, H, W)."""
        images, targets = batch
        found, weights = self.model(images), self.options.loss
        logits = found["out"] if isinstance(found, dict) else found
        loss = weights.cross_entropy * self._cross_entropy(logits, targets)
        if weights.dice:
            from segmentation_models_pytorch.losses import DiceLoss

            dice = DiceLoss("multiclass", ignore_index=self.options.data.ignore_index)
            loss = loss + weights.dice * dice(logits.float(), targets)
        if isinstance(found, dict):
            loss = loss + weights.aux * self._cross_entropy(found["aux"], targets)
        return {"loss": loss}

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the pixels that count; 0 where none does."""
        ignored = self.options.data.ignore_index
        total = F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="sum")
        return total / (targets != ignored).sum().clamp(min=1)

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """mIoU, accuracies and every class's IoU in percent, at the masks' own size."""
        confusion = Confusion(self.labels, ignore_index=self.options.data.ignore_index)
        for batch in loader:
            sizes = [tuple(target.shape) for target in batch["targets"]]
            for found, target in zip(
                self.label_maps(batch["images"], sizes), batch["targets"], strict=True
            ):
                confusion.add(found, target)
        return confusion.compute(self.device)

    def label_maps(self, images: list[Tensor], sizes: Sequence[Any]) -> list[Tensor]:
        """Labels (h, w) of prepared images (3, H, W), each at its size."""
        found: dict[int, Tensor] = {}
        for group in by_size(images):
            # Images of equal size may stand for originals that differ by a rounding.
            for size in sorted({sizes[i] for i in group}):
                same = [i for i in group if sizes[i] == size]
                batch = torch.stack([images[i] for i in same]).to(self.device)
                scores = probabilities(self.model, batch, size, self.options.inference)
                found |= dict(zip(same, scores.argmax(1), strict=True))
        return [found[i] for i in range(len(images))]

    @torch.inference_mode()
    def predict(self, images: Sequence[Any]) -> list[LabelMap]:
        """The labels of each image's pixels."""
        prepare, palette, results = self.preparation(), self._palette(), []
        size = self.options.data.eval_batch_size or self.options.data.batch_size
        for start in range(0, len(images), size):
            given = images[start : start + size]
            pictures = [image_of(image) for image in given]
            sizes = [(picture.height, picture.width) for picture in pictures]
            masks = self.label_maps([prepare(picture) for picture in pictures], sizes)
            for image, picture, mask in zip(given, pictures, masks, strict=True):
                source = image if isinstance(image, str) else None
                found = mask.cpu().numpy()
                results.append(LabelMap(source, self.labels, found, palette, picture))
        return results

    def _palette(self) -> Any:
        own = palette_of_recipe(self.options.data, len(self.labels))
        return palette_of(len(self.labels)) if own is None else own
