"""Boxes and masks in images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from vitzoo.errors import InputError
from vitzoo.heads.detection import HEADS, build_detector
from vitzoo.tasks._models import (
    backbone_of,
    freeze,
    known_name,
    recompute_activations,
    refused_pickle,
)
from vitzoo.tasks.contract import Batch, Task, TaskData
from vitzoo.tasks.detection.coco import CocoImages
from vitzoo.tasks.detection.metrics import coco_metrics, coco_results
from vitzoo.tasks.detection.options import DetectionOptions
from vitzoo.tasks.detection.result import Objects
from vitzoo.tasks.pictures import image_of
from vitzoo.tasks.scenes import scenes_folder


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Lists, one entry per image: sizes differ."""
    targets = [
        {key: value for key, value in sample.items() if key not in ("image", "image_id")}
        for sample in samples
    ]
    return {
        "images": [sample["image"] for sample in samples],
        "targets": targets,
        "image_ids": [sample["image_id"] for sample in samples],
    }


class DetectionTask(Task):
    """Boxes and masks in images, with torchvision's detectors over a backbone."""

    options_type: ClassVar[type] = DetectionOptions
    metric: ClassVar[str] = "box_AP"
    shown: ClassVar[tuple[str, ...]] = ("box_AP", "box_AP50", "mask_AP", "mask_AP50")

    options: DetectionOptions

    def __init__(self, options: DetectionOptions) -> None:
        super().__init__(options)
        if options.model.head not in HEADS:
            raise InputError(f"model.head={options.model.head}: there are {', '.join(HEADS)}")
        if not options.data.min_size:
            raise InputError("data.min_size is empty: give at least one side")
        known_name(options.model.name, elsewhere=True)
        self.category_ids: list[int] = []
        self.frozen: list[nn.Module] = []
        self.val: CocoImages | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the head gives masks."""
        return self.options.model.head == "mask_rcnn"

    def build_data(self, *, train: bool = True) -> TaskData:
        """Open both splits, or only the one for evaluation."""
        self.val = self._open("val")
        train_set = None
        if train:
            train_set = self._open("train")
            # What else a file says of its categories may differ.
            kept = [(data.category_ids, data.labels) for data in (train_set, self.val)]
            if kept[0] != kept[1]:
                differing = set(train_set.labels) ^ set(self.val.labels)
                raise InputError(
                    f"{train_set.path} and {self.val.path} have other categories: "
                    f"{', '.join(sorted(differing)) or 'the same names under other ids'}"
                )
        if self.labels and self.labels != self.val.labels:
            strangers = [name for name in self.val.labels if name not in self.labels]
            raise InputError(
                f"{self.val.path} has {len(self.val.labels)} categories, the model "
                f"{len(self.labels)}, not {strangers[0]!r}"
                if strangers
                else f"the categories of {self.val.path} are not the model's, in its order"
            )
        self.category_ids = self.val.category_ids
        return TaskData(train=train_set, val=self.val, labels=self.val.labels, collate=collate)

    def _open(self, split: str) -> CocoImages:
        data, augment = self.options.data, self.options.augment
        annotations = data.train_annotations if split == "train" else data.val_annotations
        images = data.train_images if split == "train" else data.val_images
        if data.source == "coco":
            if data.root is None:
                raise InputError("data.root is not set: the folder of annotations and images")
            root = Path(data.root).expanduser()
        else:
            root = scenes_folder(data.source)
            annotations, images = f"annotations/instances_{split}.json", f"images/{split}"
        return CocoImages(
            root / annotations,
            root / images,
            masks=self.has_masks,
            first=data.train_first if split == "train" else data.val_first,
            flip=augment.hflip if split == "train" else 0.0,
            crop=augment.crop if split == "train" else 0.0,
            photometric=augment.photometric and split == "train",
        )

    def build_model(self, *, pretrained: bool = True) -> nn.Module:
        """The detector for `self.labels`; COCO's ids of the classes travel with its weights."""
        options, data = self.options.model, self.options.data
        name, load, arguments = backbone_of(options, pretrained=pretrained)
        if options.drop_path_rate is not None:
            arguments["drop_path_rate"] = options.drop_path_rate
        try:
            detector = build_detector(
                name,
                head=options.head,
                num_classes=len(self.labels),
                pretrained=load,
                channels=options.channels,
                anchor_sizes=options.anchor_sizes or None,
                backbone=arguments,
                min_size=tuple(data.min_size),
                max_size=data.max_size,
                **options.head_args,
            )
        except InputError:
            raise
        except (TypeError, ValueError, RuntimeError, OSError, KeyError) as error:
            text = " ".join(str(error).split())
            if load and "weights_only" in text:
                raise refused_pickle(options.checkpoint or options.name) from None
            raise InputError(f"cannot build the detector: {text[:600]}") from error
        ids = self.category_ids or list(range(1, len(self.labels) + 1))
        detector.register_buffer("category_ids", torch.tensor(ids))
        self.frozen = freeze(
            detector.backbone.maps.model, stages=options.frozen_stages, linear_probe=False
        )
        if options.grad_checkpointing:
            recompute_activations(detector)
        return detector

    def train_mode(self) -> None:
        """Training mode, frozen stages at rest."""
        self.model.train()
        for module in self.frozen:
            module.eval()

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """The head's losses and their sum."""
        found = self.model(batch["images"], batch["targets"])
        total = torch.stack(list(found.values())).sum()
        return {"loss": total} | {name: value.detach() for name, value in found.items()}

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """COCO's figures for boxes and, where the head gives them, masks; in percent."""
        assert self.val is not None, "build_data comes before evaluate"
        results: list[dict[str, Any]] = []
        seen: list[Any] = []
        for batch in loader:
            for image_id, found in zip(
                batch["image_ids"], self.model(batch["images"]), strict=True
            ):
                results += coco_results(found, image_id, self.val.category_ids)
                seen.append(image_id)
        results, seen = _gathered(results), _gathered(seen)
        if not seen:
            return {}
        # Empty where no image has an object: then the figures say 0, not nothing.
        figures = coco_metrics(self.val.truth(seen), results, masks=self.has_masks)
        return figures or {self.metric: 0.0}

    @torch.inference_mode()
    def predict(self, images: Sequence[Any]) -> list[Objects]:
        """Objects of images; see `image_of`."""
        ids = tuple(self.model.category_ids.tolist())  # type: ignore[operator]
        results = []
        for given in images:
            from_file = isinstance(given, str | Path)
            image = image_of(given)
            pixels = pil_to_tensor(image).float().to(self.device) / 255
            found = {key: value.cpu() for key, value in self.model([pixels])[0].items()}
            masks = found["masks"][:, 0] >= 0.5 if "masks" in found else None
            results.append(
                Objects(
                    str(given) if from_file else None,
                    found["boxes"],
                    found["scores"],
                    found["labels"] - 1,
                    masks,
                    self.labels,
                    ids,
                    image,
                )
            )
        return results


def _gathered(items: list[Any]) -> list[Any]:
    """The items of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return items
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
