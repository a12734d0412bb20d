"""Published weights of NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001)."""

from typing import Any

from vitzoo.zoo.entries._entry import WeightEntry

_ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
_DINAT = "https://shi-labs.com/projects/dinat/checkpoints/"
_TWO_NAMES = "The authors' tables link this file without the `in` of `in1k`, their code with it."


def _entry(model: str, top1: float | None, source: str, **facts: Any) -> WeightEntry:
    plain_nat = model.startswith("nat_") and "iso" not in model
    return WeightEntry(
        model=f"vz_{model}",
        sources=(source,),
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
)
