"""Mask R-CNN over `vz_halonet26t` finds and outlines what it finds over timm's resnet18."""

from functools import partial
from typing import Any

from benchmarks.proof._scenes import keeps_up, overfits
from vitzoo.tasks.scenes import scenes_folder

OURS, THEIRS = "halonet-maskrcnn-scenes", "resnet18-maskrcnn-scenes"
BY_HEART = "davit-maskrcnn-scenes"
REQUIRED = {"box_AP50": 90.0, "mask_AP50": 85.0}


def overfit() -> dict[str, Any]:
    """16 scenes of the training half, in both splits."""
    splits = [
        text
        for split in ("train", "val")
        for text in (
            f"data.{split}_annotations=annotations/instances_train.json",
            f"data.{split}_images=images/train",
            f"data.{split}_first=16",
        )
    ]
    return overfits(
        BY_HEART,
        [
            "data.source=coco",
            f"data.root={scenes_folder()}",
            *splits,
            "augment.hflip=0",
            "schedule.epochs=60",
            "schedule.warmup_updates=12",
            "run.eval_every=60",
        ],
        REQUIRED,
    )


BARS = {
    "scenes-maskrcnn": partial(keeps_up, OURS, THEIRS, ("box_AP50", "mask_AP50")),
    "overfit-maskrcnn": overfit,
}
