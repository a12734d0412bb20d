"""UPerNet over `vz_halonet26t` labels pixels as it does over timm's resnet18."""

from functools import partial

from benchmarks.proof._scenes import keeps_up, overfits

OURS, THEIRS = "halonet-upernet-scenes", "resnet18-upernet-scenes"
BY_HEART = "davit-upernet-scenes"
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
    "overfit-upernet": partial(overfits, BY_HEART, ON_16, {"mIoU": 90.0}),
}
