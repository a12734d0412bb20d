"""Published weights of NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001)."""

from typing import Any

from vitzoo.zoo.entries._entry import WeightEntry

_ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
_DINAT = "https://shi-labs.com/projects/dinat/checkpoints/"
_TWO_NAMES = "The authors' tables link this file without the `in` of `in1k`, their code with it."
# The same weights under the names of transformers' classes.
_ON_THE_HUB = {
    model: (f"hf-hub:shi-labs/{model.replace('_', '-')}-in1k-224",)
    for model in ("nat_mini", "nat_base", "dinat_mini", "dinat_tiny", "dinat_small", "dinat_base")
}


def _entry(model: str, top1: float | None, source: str, **facts: Any) -> WeightEntry:
    plain_nat = model.startswith("nat_") and "iso" not in model
    return WeightEntry(
        model=f"vz_{model}",
        sources=(source, *_ON_THE_HUB.get(model, ())),
        licence="mit",
        origin=_ORIGIN,
        paper="2204.07143" if plain_nat else "2209.15001",
        published=() if top1 is None else (("top1", top1),),
        **({"tag": "shilabs_in1k"} | facts),
    )


def _at_384(model: str, top1: float, file: str, **facts: Any) -> WeightEntry:
    return _entry(
        model,
        top1,
        _DINAT + file,
        tag="shilabs_in22k_ft_in1k",
        input_size=(3, 384, 384),
        crop_pct=1.0,
        **facts,
    )


def _in22k(model: str, file: str, **facts: Any) -> WeightEntry:
    return _entry(
        model,
        None,
        _DINAT + "imagenet22k/" + file,
        tag="shilabs_in22k",
        dataset="ImageNet-22K",
        num_classes=21841,
        **facts,
    )


# Model -> Mask R-CNN's box and mask AP, Cascade's, UPerNet's mIoU at one scale and at several.
_DENSE: dict[str, tuple[tuple[float, float] | None, tuple[float, float], tuple[float, float]]] = {
    "nat_mini": ((46.5, 41.7), (50.3, 43.6), (45.1, 46.4)),
    "nat_tiny": ((47.7, 42.6), (51.4, 44.5), (47.1, 48.4)),
    "nat_small": ((48.4, 43.2), (52.0, 44.9), (48.0, 49.5)),
    "nat_base": (None, (52.3, 45.1), (48.5, 49.7)),
    "dinat_mini": ((47.2, 42.5), (51.2, 44.4), (45.8, 47.2)),
    "dinat_tiny": ((48.6, 43.5), (52.2, 45.1), (47.8, 48.8)),
    "dinat_small": ((49.3, 44.0), (52.9, 45.8), (48.9, 49.9)),
    "dinat_base": (None, (53.4, 46.2), (49.6, 50.4)),
    "dinat_large": (None, (55.3, 47.8), (54.0, 54.9)),
    "dinat_s_tiny": ((46.6, 42.1), (51.0, 44.1), (46.0, 47.4)),
    "dinat_s_small": ((48.6, 43.5), (52.3, 45.2), (48.6, 49.9)),
    "dinat_s_base": (None, (52.6, 45.3), (49.4, 50.2)),
    "dinat_s_large": (None, (54.8, 47.2), (53.4, 54.6)),
}
_NO_ADDRESS = "The origin's tables link the file; its exact address is not known here."


def _dense_file(model: str, folder: str, head: str) -> dict[str, Any]:
    """Where NAT's file is; of DiNAT's only the folder is known."""
    if not model.startswith("nat_"):
        return {"notes": _NO_ADDRESS}
    return {"sources": (f"{_NAT.replace('CLS', folder)}{model}_{head}.pth",)}


def _dense_arguments(model: str, table: str) -> tuple[tuple[str, Any], ...]:
    """NAT is not dilated."""
    dense = (("dense", True),)
    return dense if model.startswith("nat_") else (*dense, ("dilations", table))


def _detection(model: str, head: str, figures: tuple[float, float]) -> WeightEntry:
    file = _dense_file(model, "DET", head.replace("_", ""))
    notes = " ".join(("3x schedule.", file.pop("notes", ""))).strip()
    return WeightEntry(
        model=f"vz_{model}",
        tag=f"shilabs_coco_{head}",
        licence="mit",
        origin=_ORIGIN,
        paper="2209.15001" if model.startswith("dinat") else "2204.07143",
        task="detection",
        dataset="COCO",
        num_classes=80,
        input_size=(3, 800, 1333),
        published=(("box_ap", figures[0]), ("mask_ap", figures[1])),
        strict=False,
        arguments=_dense_arguments(model, "coco"),
        notes=notes,
        **file,
    )


def _segmentation(model: str, figures: tuple[float, float]) -> WeightEntry:
    side = 640 if model in ("dinat_large", "dinat_s_large") else 512
    return WeightEntry(
        model=f"vz_{model}",
        tag="shilabs_ade20k_upernet",
        licence="mit",
        origin=_ORIGIN,
        paper="2209.15001" if model.startswith("dinat") else "2204.07143",
        task="segmentation",
        dataset="ADE20K",
        num_classes=150,
        input_size=(3, side, side),
        published=(("miou", figures[0]), ("miou_ms", figures[1])),
        strict=False,
        arguments=_dense_arguments(model, "ade20k_640" if side == 640 else "ade20k"),
        **_dense_file(model, "SEG", "upernet"),
    )


def _dense_of(model: str) -> tuple[WeightEntry, ...]:
    mask_rcnn, cascade, upernet = _DENSE[model]
    detectors = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade}
    return (
        *(_detection(model, head, found) for head, found in detectors.items() if found),
        _segmentation(model, upernet),
    )


ENTRIES = (
    *(
        _entry(f"nat_{size}", top1, f"{_NAT}nat_{size}.pth")
        for size, top1 in (("mini", 81.8), ("tiny", 83.2), ("small", 83.7), ("base", 84.3))
    ),
    *(
        _entry(f"dinat_{size}", top1, f"{_DINAT}imagenet1k/dinat_{size}_in1k_224.pth")
        for size, top1 in (("mini", 81.8), ("tiny", 82.7), ("small", 83.8), ("base", 84.4))
    ),
    _entry(
        "dinat_large",
        86.6,
        _DINAT + "imagenet1k/dinat_large_in22k_in1k_224.pth",
        tag="shilabs_in22k_ft_in1k",
    ),
    _in22k("dinat_large", "dinat_large_in22k_224.pth"),
    _at_384("dinat_large_384", 87.4, "imagenet1k/dinat_large_in22k_in1k_384.pth"),
    _at_384("dinat_large_384_11x11", 87.5, "imagenet1k/dinat_large_in22k_in1k_384_11x11.pth"),
    _in22k(
        "dinat_large_384_11x11",
        "dinat_large_in22k_224_11x11interp.pth",
        notes="The 7x7 weights with the bias tables interpolated for kernel 11.",
    ),
    *(
        _entry(
            f"dinat_s_{size}",
            top1,
            f"{_DINAT}imagenet1k/dinat_s_{size}_in1k_224.pth",
            notes=_TWO_NAMES,
        )
        for size, top1 in (("tiny", 81.8), ("small", 83.5), ("base", 83.8))
    ),
    _entry(
        "dinat_s_large",
        86.5,
        _DINAT + "imagenet1k/dinat_s_large_in1k_224.pth",
        tag="shilabs_in22k_ft_in1k",
        notes=_TWO_NAMES,
    ),
    _in22k("dinat_s_large", "dinat_s_large_in22k_224.pth"),
    _at_384("dinat_s_large_384", 87.4, "imagenet1k/dinat_s_large_in1k_384.pth", notes=_TWO_NAMES),
    *(
        _entry(
            f"{family}_iso_{size}",
            top1,
            f"{_DINAT}isotropic/{family}_isotropic_{size}_in1k_224.pth",
        )
        for family, size, top1 in (
            ("nat", "small", 80.0),
            ("nat", "base", 81.6),
            ("dinat", "small", 80.8),
            ("dinat", "base", 82.1),
        )
    ),
    *(entry for model in _DENSE for entry in _dense_of(model)),
)
