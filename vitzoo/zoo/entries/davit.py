"""DaViT's published weights (arXiv 2204.03645, github.com/dingmyu/davit)."""

from vitzoo.zoo.entries._entry import Task, WeightEntry

_ORIGIN = "https://github.com/dingmyu/davit"
_PAPER = "2204.03645"
_SHARE = "https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk/"


def _imagenet(size: str, authors: str, top1: float, top5: float) -> WeightEntry:
    return WeightEntry(
        model=f"vz_davit_{size}",
        tag="msft_in1k",
        sources=(f"hf-hub:timm/davit_{size}.msft_in1k", _SHARE + authors),
        licence="apache-2.0",
        origin=_ORIGIN,
        paper=_PAPER,
        # The authors' default is 0.9; their published accuracy is reached with 0.95.
        crop_pct=0.95,
        published=(("top1", top1), ("top5", top5)),
        notes="The authors state no licence for the weights; timm's copy is marked Apache-2.0.",
    )


def _florence(size: str, hub_id: str) -> WeightEntry:
    return WeightEntry(
        model=f"vz_davit_{size}_fl",
        tag="msft_florence2",
        sources=(f"hf-hub:{hub_id}",),
        licence=None,
        origin=f"https://huggingface.co/{hub_id}",
        paper="2311.06242",
        dataset="FLD-5B",
        num_classes=0,
        input_size=(3, 768, 768),
        crop_pct=0.95,
        strict=False,
        notes="Image tower of Florence-2: no head norm and no classifier in the file.",
    )


def _dense(size: str, head: str, task: Task, notes: str, **figures: float) -> WeightEntry:
    data = "ADE20K" if task == "segmentation" else "COCO"
    return WeightEntry(
        model=f"vz_davit_{size}",
        tag=f"msft_{data.lower()}_{head}",
        origin=_ORIGIN,
        paper=_PAPER,
        task=task,
        dataset=data,
        num_classes=150 if task == "segmentation" else 80,
        input_size=(3, 512, 512) if task == "segmentation" else (3, 800, 1333),
        published=tuple(figures.items()),
        strict=False,
        arguments=(("dense", True),),
        notes=f"{notes} The file is linked from the origin's tables, on a host for browsers.",
    )


# Size -> Mask R-CNN's box and mask AP at 1x and 3x, RetinaNet's box AP, UPerNet's mIoU.
_DENSE = {
    "tiny": ((45.0, 41.1), (47.4, 42.9), 44.0, 46.5, 46.3),
    "small": ((47.7, 42.9), (49.5, 44.3), 46.0, 48.2, 48.8),
    "base": ((48.2, 43.3), (49.9, 44.6), 46.7, 48.7, 49.4),
}


def _dense_of(size: str) -> tuple[WeightEntry, ...]:
    mask1, mask3, retina1, retina3, miou = _DENSE[size]
    return (
        *(
            _dense(
                size,
                f"mask_rcnn_{schedule}",
                "detection",
                f"Mask R-CNN with FPN, {schedule} schedule.",
                box_ap=box,
                mask_ap=mask,
            )
            for schedule, (box, mask) in (("1x", mask1), ("3x", mask3))
        ),
        *(
            _dense(
                size,
                f"retinanet_{schedule}",
                "detection",
                f"RetinaNet with FPN, {schedule} schedule.",
                box_ap=box,
            )
            for schedule, box in (("1x", retina1), ("3x", retina3))
        ),
        _dense(size, "upernet", "segmentation", "UPerNet, 160K iterations.", miou=miou),
    )


ENTRIES = (
    _imagenet(
        "tiny", "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB", top1=82.8, top5=96.2
    ),
    _imagenet(
        "small", "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO", top1=84.2, top5=96.9
    ),
    _imagenet(
        "base", "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u", top1=84.6, top5=96.9
    ),
    _florence("base", "microsoft/Florence-2-base"),
    _florence("huge", "microsoft/Florence-2-large"),
    *(entry for size in _DENSE for entry in _dense_of(size)),
)
