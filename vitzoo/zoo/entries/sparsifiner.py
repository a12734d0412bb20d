"""Sparsifiner's weights (arXiv 2303.13755): none are published, only the dense starting points."""

from vitzoo.zoo.entries._entry import WeightEntry

_ORIGIN = "https://github.com/lim142857/Sparsifiner"
_DEIT = "https://dl.fbaipublicfiles.com/deit/"
_TOKEN_LABELING = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/"


def _trained(model: str) -> WeightEntry:
    return WeightEntry(
        model=model,
        tag="lim142857_in1k",
        state="never published",
        origin=_ORIGIN,
        paper="2303.13755",
        notes="The authors' repository links no trained weights, only the dense starting points.",
    )


def _deit_start(size: str, digest: str) -> WeightEntry:
    return WeightEntry(
        model=f"vz_sparsifiner_deit_{size}",
        tag="deit_start",
        sources=(f"{_DEIT}deit_{size}_patch16_224-{digest}.pth",),
        licence="apache-2.0",
        origin="https://github.com/facebookresearch/deit",
        paper="2012.12877",
        notes="Dense DeiT, where training starts; the connectivity predictors are untrained. "
        "The licence is the origin's code's; none was read beside the file.",
    )


ENTRIES = (
    _trained("vz_sparsifiner_deit_tiny"),
    _deit_start("tiny", "a1311bcf"),
    _trained("vz_sparsifiner_deit_small"),
    _deit_start("small", "cd65a155"),
    _trained("vz_sparsifiner_deit_base"),
    _deit_start("base", "b5f2ef4d"),
    _trained("vz_sparsifiner_lvvit_small"),
    WeightEntry(
        model="vz_sparsifiner_lvvit_small",
        tag="lvvit_start",
        sources=(f"{_TOKEN_LABELING}lvvit_s-26M-224-83.3.pth.tar",),
        licence="apache-2.0",
        origin="https://github.com/zihangJiang/TokenLabeling",
        paper="2104.10858",
        notes="Dense LV-ViT, where training starts; the connectivity predictors are untrained. "
        "The licence is the origin's code's; none was read beside the file.",
    ),
)
