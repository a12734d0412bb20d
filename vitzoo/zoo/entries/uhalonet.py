"""U-HaloNet's published weights (github.com/OpenGVLab/STM-Evaluation)."""

from vitzoo.zoo.entries._entry import WeightEntry

_ORIGIN = "https://github.com/OpenGVLab/STM-Evaluation"
_RELEASE = f"{_ORIGIN}/releases/download"


def _pair(size: str, top1: float, box_ap: float, mask_ap: float) -> tuple[WeightEntry, WeightEntry]:
    classifier = WeightEntry(
        model=f"vz_uhalonet_{size}",
        tag="opengvlab_in1k",
        sources=(f"{_RELEASE}/cls-ckpt/unified_halonet_{size}.pth",),
        origin=_ORIGIN,
        licence="mit",
        published=(("top1", top1),),
        notes="The licence is the repository's; the weights have no statement of their own.",
    )
    detector = WeightEntry(
        model=f"vz_uhalonet_{size}",
        tag="opengvlab_coco_mask_rcnn",
        sources=(f"{_RELEASE}/det-ckpt/mask_rcnn_unified_halonet_{size}_1x.pth",),
        origin=_ORIGIN,
        licence="mit",
        task="detection",
        dataset="COCO",
        num_classes=80,
        published=(("box_ap", box_ap), ("mask_ap", mask_ap)),
        strict=False,
        arguments=(("dense", True),),
        notes="Mask R-CNN with FPN, 1x schedule; the backbone is the dense version.",
    )
    return classifier, detector


ENTRIES = (
    *_pair("micro", top1=75.8, box_ap=40.3, mask_ap=37.3),
    *_pair("tiny", top1=83.0, box_ap=46.9, mask_ap=42.4),
    *_pair("small", top1=84.0, box_ap=48.2, mask_ap=43.3),
    *_pair("base", top1=84.6, box_ap=49.0, mask_ap=43.8),
)
