"""UPerNet over a narrow DaViT labels pixels as it does over timm's resnet18."""

from functools import partial

from benchmarks.proof._scenes import keeps_up, overfits

OURS, THEIRS = "davit-upernet-scenes", "resnet18-upernet-scenes"
ON_16 = [
    "data.train_split=train",
    "data.val_split=train",
    "data.train_first=16",
    "data.val_first=16",
    "augment.enabled=false",
    "schedule.epochs=100",
    "schedule.warmup_updates=12",
    "run.eval_every=100",
]

BARS = {
    "scenes-upernet": partial(keeps_up, OURS, THEIRS, ("mIoU",)),
    "overfit-upernet": partial(overfits, OURS, ON_16, {"mIoU": 90.0}),
}
