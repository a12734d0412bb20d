"""Image classification with any backbone that has timm's classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vitzoo.errors import InputError
from vitzoo.tasks._models import ModelOptions, config_of, create_model, freeze, known_name
from vitzoo.tasks.contract import Batch, Running, Task, TaskData
from vitzoo.tasks.images import (
    ImageDataOptions,
    ImageSamples,
    ImageStream,
    Transform,
    open_source,
)
from vitzoo.tasks.pictures import image_of
from vitzoo.tasks.results import Classification, Ranked


@dataclass(kw_only=True)
class AugmentOptions:
    """The recipe's `augment` section; the values mean what timm's of the same name do.

    Attributes:
        scale, ratio: of the random crop.
        hflip, vflip: probabilities.
        color_jitter: strength; not used where `auto_augment` is.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5-inc1`.
        erase: probability of random erasing; `erase_mode` fills with noise or a constant.
        mixup, cutmix: alphas; 0 switches off.
        mix_prob, switch_prob: of mixing a batch at all, and of cutmix instead of mixup.
        mix_mode: per batch, pair or element.
        smoothing: of the labels.
        enabled: false trains on the images as evaluation sees them.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    erase: float = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    smoothing: float = 0.1
    enabled: bool = True


@dataclass(kw_only=True)
class ClassificationOptions:
    """The recipe's sections of this task."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: ImageDataOptions = field(default_factory=ImageDataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)


class ClassificationTask(Task):
    """One label an image."""

    options_type: ClassVar[type] = ClassificationOptions
    metric: ClassVar[str] = "top1"

    options: ClassificationOptions

    def __init__(self, options: ClassificationOptions) -> None:
        super().__init__(options)
        self._frozen: list[nn.Module] = []
        self._mixup: Mixup | None = None
        known_name(options.model.name, elsewhere=True)
        augment = options.augment
        if (augment.mixup or augment.cutmix) and options.data.batch_size % 2:
            raise InputError(
                f"data.batch_size={options.data.batch_size} is odd: mixup and cutmix mix pairs, so "
                "give an even number"
            )

    def build_data(self, *, train: bool = True) -> TaskData:
        """Open both splits (or only the one for evaluation) with timm's transforms."""
        options = self.options.data
        mode = "L" if self.options.model.in_chans == 1 else "RGB"
        expected = self.labels or None
        train_set = None
        if train:
            source = open_source(options, train=True)
            expected = self._labels_of(source)
            train_set = _samples(source, self.transform(train=True), mode, options.train_first)
        source = open_source(options, train=False, labels=expected)
        labels = self._labels_of(source)
        if expected is not None and labels != expected:
            raise InputError(
                f"the data has {len(labels)} classes, but the model was made for {len(expected)}"
                + ("" if len(labels) != len(expected) else " others")
            )
        val_set = _samples(source, self.transform(), mode, options.val_first)
        return TaskData(train=train_set, val=val_set, labels=labels)

    def _labels_of(self, source: Any) -> tuple[str, ...]:
        labels = getattr(source, "labels", None)
        count = self.options.data.num_classes
        if labels is None:
            if count is None:
                raise InputError(
                    f"{self.options.data.name} does not say its classes: give data.num_classes=N"
                )
            labels = tuple(str(i) for i in range(count))
        wanted = self.options.model.num_classes or count
        if wanted is not None and wanted != len(labels):
            raise InputError(f"the data has {len(labels)} classes, the recipe says {wanted}")
        return labels

    def data_config(self) -> dict[str, Any]:
        """Input size, interpolation, mean, std and crop: the model's own, then the recipe's."""
        data = self.options.data
        chosen = {
            key: value
            for key, value in asdict(data).items()
            if key in ("mean", "std", "interpolation", "crop_pct") and value is not None
        }
        config = config_of(self.options.model.name)
        own = config.to_dict() if config else {}
        chans = self.options.model.in_chans
        if chans != 3:
            for key in ("mean", "std"):
                if own.get(key):
                    own[key] = (sum(own[key]) / len(own[key]),) * chans
        resolved: dict[str, Any] = resolve_data_config(chosen, pretrained_cfg=own)
        side = data.size
        height, width = (side, side) if side else resolved["input_size"][1:]
        return resolved | {"input_size": (chans, height, width)}

    def transform(self, *, train: bool = False) -> Transform:
        """From a PIL image to a normalised tensor."""
        config, augment = self.data_config(), self.options.augment
        shared = {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
        if not train or not augment.enabled:
            crop = {"crop_pct": config["crop_pct"], "crop_mode": config["crop_mode"]}
            return create_transform(**shared, **crop, normalize=True)
        try:
            return create_transform(
                **shared,
                is_training=True,
                scale=augment.scale,
                ratio=augment.ratio,
                hflip=augment.hflip,
                vflip=augment.vflip,
                color_jitter=augment.color_jitter,
                auto_augment=augment.auto_augment,
                re_prob=augment.erase,
                re_mode=augment.erase_mode,
                normalize=True,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise InputError(
                f"timm knows no augment.auto_augment={augment.auto_augment} ({error}): give one "
                "such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original"
            ) from None

    def build_model(self, *, pretrained: bool = True) -> nn.Module:
        """timm's model with a classifier for `self.labels`, frozen as the recipe says."""
        options = self.options.model
        model = create_model(options, self.labels, pretrained=pretrained)
        self._frozen = freeze(
            model, stages=options.frozen_stages, linear_probe=options.linear_probe
        )
        augment = self.options.augment
        if augment.mixup or augment.cutmix:
            self._mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                mode=augment.mix_mode,
                label_smoothing=augment.smoothing,
                num_classes=len(self.labels),
            )
        return model

    def train_mode(self) -> None:
        """Training mode, but for modules without a trainable parameter."""
        self.model.train()
        for module in self._frozen:
            module.eval()

    def mix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and targets of a batch, mixed as the recipe says."""
        images, targets = batch
        return (images, targets) if self._mixup is None else self._mixup(images, targets)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with mixed targets (B, classes), or with smoothed ones (B,)."""
        if self._mixup is not None:
            return SoftTargetCrossEntropy()(logits, targets)
        return LabelSmoothingCrossEntropy(self.options.augment.smoothing)(logits, targets)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with smoothed or mixed labels; batch: images (B, C, H, W), targets (B,)."""
        images, targets = self.mix(batch)
        return {"loss": self.criterion(self.model(images), targets)}

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Loss, and top-1 and top-5 accuracy in percent."""
        running = Running()
        for images, targets in loader:
            logits = self.model(images).float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hit = best == targets[:, None]
            running.add(
                {
                    "loss": F.cross_entropy(logits, targets, reduction="sum").item(),
                    "top1": 100 * hit[:, :1].sum().item(),
                    "top5": 100 * hit.sum().item(),
                },
                len(targets),
            )
        return running.means(self.device)

    @torch.inference_mode()
    def predict(self, images: Sequence[Any]) -> list[Classification]:
        """The best five classes of each image.

        Raises:
            InputError: the model has no classifier.
        """
        if not self.labels:
            raise InputError(f"{self.options.model.name} has no classifier to predict with")
        mode = "L" if self.options.model.in_chans == 1 else "RGB"
        transform, results = self.transform(), []
        size = self.options.data.eval_batch_size or self.options.data.batch_size
        for start in range(0, len(images), size):
            pictures = [image_of(given, mode=mode) for given in images[start : start + size]]
            batch = torch.stack([transform(picture) for picture in pictures])
            scores = self.model(batch.to(self.device)).float().softmax(1).cpu()
            for given, picture, row in zip(
                images[start : start + size], pictures, scores, strict=True
            ):
                results.append(self._ranked(given, picture, row))
        return results

    def _ranked(self, given: Any, picture: Image.Image, scores: Tensor) -> Classification:
        values, indices = scores.topk(min(5, len(scores)))
        top = tuple(
            Ranked(label=self.labels[index], index=index, score=value)
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        )
        return Classification(given if isinstance(given, str) else None, top, picture)

    def published(self) -> Mapping[str, float]:
        """Accuracy of `model.name`'s tag as its origin states it."""
        from vitzoo.zoo.published import accuracy

        return accuracy(self.options.model.name)


def _samples(source: Any, transform: Transform, mode: str, first: int | None) -> Any:
    if isinstance(source, ImageStream):
        source.dataset.transform = transform
        return source
    return ImageSamples(source, transform, mode=mode, first=first)
