"""LITv2's published weights (arXiv 2205.13213, github.com/ziplab/LITv2)."""

from functools import partial
from typing import Any

from vitzoo.zoo.entries._entry import Task, WeightEntry

_ORIGIN = "https://github.com/ziplab/LITv2"
_RELEASES = f"{_ORIGIN}/releases/download"

_entry: Any = partial(
    WeightEntry,
    licence="apache-2.0",
    origin=_ORIGIN,
    paper="2205.13213",
)


def _imagenet(size: str, file: str, top1: float, **differs: Any) -> WeightEntry:
    return _entry(
        model=f"vz_litv2_{size}",
        tag="ziplab_in1k",
        sources=(f"{_RELEASES}/v1.0/{file}.pth",),
        published=(("top1", top1),),
        **differs,
    )


def _alpha(alpha: float, top1: float) -> WeightEntry:
    return _entry(
        model="vz_litv2_small",
        tag=f"ziplab_alpha{round(10 * alpha):02d}_in1k",
        sources=(f"{_RELEASES}/v1.1/alpha_{alpha:g}.pth",),
        published=(("top1", top1),),
        arguments=(("alpha", alpha),),
        notes=f"From the paper's study of alpha, here {alpha:g}.",
    )


def _coco(
    size: str, head: str, window_size: int, published: tuple[tuple[str, float], ...]
) -> WeightEntry:
    suffix = "_ws_4" if window_size == 4 else ""
    return _dense(
        size,
        tag=f"ziplab_{head}{suffix.replace('_ws_', '_ws')}_coco",
        file=f"{head}_litv2_{size[0]}_fpn_1x_coco{suffix}",
        task="detection",
        dataset="COCO 2017",
        num_classes=80,
        input_size=(3, 800, 1333),
        published=published,
        arguments=(
            ("dense", True),
            ("norm_indices", (1, 2, 3)),
            ("window_sizes", (0, 0, window_size, 1)),
        ),
        notes=f"Whole detector, 1x schedule, HiLo windows of {window_size}.",
    )


def _ade20k(size: str, miou: float) -> WeightEntry:
    return _dense(
        size,
        tag="ziplab_fpn_ade20k",
        file=f"litv2_{size[0]}_fpn_r50_512x512_80k_ade20k",
        task="segmentation",
        dataset="ADE20K",
        num_classes=150,
        input_size=(3, 512, 512),
        published=(("miou", miou),),
        arguments=(("dense", True), ("norm_indices", (0, 1, 2, 3))),
        notes="Whole segmenter, Semantic FPN, 80k iterations.",
    )


def _dense(size: str, *, file: str, task: Task, **facts: Any) -> WeightEntry:
    return _entry(
        model=f"vz_litv2_{size}",
        sources=(f"{_RELEASES}/v1.0/{file}.pth",),
        task=task,
        strict=False,
        **facts,
    )


# Size -> window -> (RetinaNet's box AP, Mask R-CNN's box AP and mask AP).
_COCO = {
    "small": {2: (44.0, 44.9, 40.8), 4: (43.7, 44.7, 40.7)},
    "medium": {2: (46.0, 46.8, 42.3), 4: (45.8, 46.5, 42.0)},
    "base": {2: (46.7, 47.3, 42.6), 4: (46.3, 46.8, 42.3)},
}
_ALPHA = {0.0: 81.16, 0.2: 81.89, 0.4: 81.81, 0.5: 81.88, 0.7: 81.94, 0.9: 82.03, 1.0: 81.89}

ENTRIES = (
    _imagenet("small", "litv2_s", 82.0),
    _imagenet("medium", "litv2_m", 83.3),
    _imagenet("base", "litv2_b", 83.6),
    _imagenet(
        "base_384",
        "litv2_b_384",
        84.7,
        input_size=(3, 384, 384),
        crop_pct=1.0,
        crop_mode="squash",
    ),
    *(_alpha(alpha, top1) for alpha, top1 in _ALPHA.items()),
    *(
        entry
        for size, windows in _COCO.items()
        for window, (retina, box, mask) in windows.items()
        for entry in (
            _coco(size, "retinanet", window, (("box_ap", retina),)),
            _coco(size, "mask_rcnn", window, (("box_ap", box), ("mask_ap", mask))),
        )
    ),
    _ade20k("small", 44.3),
    _ade20k("medium", 45.7),
    _ade20k("base", 47.2),
)
