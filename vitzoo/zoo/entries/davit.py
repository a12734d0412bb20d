"""DaViT's published weights (arXiv 2204.03645, github.com/dingmyu/davit)."""

from vitzoo.zoo.entries._entry import WeightEntry

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
)
