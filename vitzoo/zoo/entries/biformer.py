"""BiFormer's published weights (arXiv 2303.08810, github.com/rayleizhu/BiFormer)."""

from typing import Any

from vitzoo.zoo.entries._entry import WeightEntry

_ORIGIN = "https://github.com/rayleizhu/BiFormer"
_PAPER = "2303.08810"


def _imagenet(model: str, share: str, **facts: Any) -> WeightEntry:
    return WeightEntry(
        model=f"vz_biformer_{model}",
        tag="rayleizhu_in1k",
        sources=(f"https://api.onedrive.com/v1.0/shares/{share}/root/content",),
        licence="mit",
        origin=_ORIGIN,
        paper=_PAPER,
        **facts,
    )


def _segmentation(size: str, head: str, schedule: str, **facts: float) -> WeightEntry:
    return WeightEntry(
        model=f"vz_biformer_{size}",
        tag=f"rayleizhu_ade20k_{head}",
        state="never published",
        origin=_ORIGIN,
        paper=_PAPER,
        task="segmentation",
        dataset="ADE20K",
        num_classes=0,
        input_size=(3, 512, 512),
        published=tuple(facts.items()),
        notes=f"{schedule}, 8 regions per side.",
    )


def _detection(size: str, head: str, notes: str | None = None, **facts: float) -> WeightEntry:
    return WeightEntry(
        model=f"vz_biformer_{size}",
        tag=f"rayleizhu_coco_{head}",
        state="never published",
        origin=_ORIGIN,
        paper=_PAPER,
        task="detection",
        dataset="COCO",
        num_classes=0,
        input_size=(3, 800, 1344),
        published=tuple(facts.items()),
        notes=f"1x schedule, 16 regions per side. {notes or ''}".strip(),
    )


ENTRIES = (
    _imagenet("tiny", "s!AkBbczdRlZvChHEOoGkgwgQzEDlM", published=(("top1", 81.4),)),
    _imagenet(
        "small",
        "s!AkBbczdRlZvChHDyM-x9KWRBZ832",
        published=(("top1", 83.754), ("top5", 96.638), ("loss", 0.869)),
    ),
    _imagenet("base", "s!AkBbczdRlZvChHI_XPhoadjaNxtO", published=(("top1", 84.3),)),
    _imagenet("stl", "s!AkBbczdRlZvChSf-m7ujkvx9lIQ1", published=(("top1", 82.7),)),
    _imagenet("stl_nchw", "s!AkBbczdRlZvChWYrKbWbMgqd2Ai0", published=(("top1", 82.7),)),
    _segmentation("small", "semantic_fpn", "Semantic FPN, 80K iterations", miou=48.9),
    _segmentation("base", "semantic_fpn", "Semantic FPN, 80K iterations", miou=49.9),
    _segmentation("small", "upernet", "UPerNet, 160K iterations", miou=49.8, miou_ms_flip=50.8),
    _segmentation("base", "upernet", "UPerNet, 160K iterations", miou=51.0, miou_ms_flip=51.7),
    _detection(
        "small",
        "mask_rcnn",
        "The authors' rerun: 48.1 box, 43.6 mask.",
        box_ap=47.8,
        mask_ap=43.2,
    ),
    _detection("base", "mask_rcnn", box_ap=48.6, mask_ap=43.7),
    _detection("small", "retinanet", "The authors' rerun: 47.3 box.", box_ap=45.9),
    _detection("base", "retinanet", box_ap=47.1),
)
