"""HaloNets' published weights: timm's. The paper's H0 to H7 were never published."""

from vitzoo.zoo.entries._entry import WeightEntry

_PAPER = "2103.12731"
_RELEASE = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/"
_HALF = (0.5, 0.5, 0.5)


def _entry(
    name: str,
    tag: str,
    file: str,
    *,
    top1: float,
    top5: float,
    real_top1: float,
    crop_pct: float = 0.94,
    **more: object,
) -> WeightEntry:
    return WeightEntry(
        model=f"vz_{name}",
        tag=tag,
        sources=(f"hf-hub:timm/{name}.{tag}", _RELEASE + file),
        licence="apache-2.0",
        origin="https://github.com/huggingface/pytorch-image-models",
        paper=_PAPER,
        crop_pct=crop_pct,
        published=(("top1", top1), ("top5", top5), ("real_top1", real_top1)),
        **({"input_size": (3, 256, 256)} | more),  # type: ignore[arg-type]
    )


ENTRIES = (
    _entry(
        "halonet26t",
        "a1h_in1k",
        "halonet26t_a1h_256-3083328c.pth",
        top1=79.134,
        top5=94.340,
        real_top1=85.217,
        crop_pct=0.95,
    ),
    _entry(
        "halonet50ts",
        "a1h_in1k",
        "halonet50ts_a1h2_256-f3a3daee.pth",
        top1=81.640,
        top5=95.612,
        real_top1=86.481,
    ),
    _entry(
        "sehalonet33ts",
        "ra2_in1k",
        "sehalonet33ts_256-87e053f9.pth",
        top1=80.976,
        top5=95.272,
        real_top1=86.596,
    ),
    _entry(
        "eca_halonext26ts",
        "c1_in1k",
        "eca_halonext26ts_c_256-06906299.pth",
        top1=79.518,
        top5=94.582,
        real_top1=85.138,
    ),
    _entry(
        "haloregnetz_b",
        "ra3_in1k",
        "haloregnetz_c_raa_256-c8ad7616.pth",
        top1=81.058,
        top5=95.196,
        real_top1=86.502,
        input_size=(3, 224, 224),
        mean=_HALF,
        std=_HALF,
    ),
    _entry(
        "halo2botnet50ts_256",
        "a1h_in1k",
        "halo2botnet50ts_a1h2_256-fd9c11a3.pth",
        top1=82.084,
        top5=95.658,
        real_top1=86.703,
        crop_pct=0.95,
    ),
    _entry(
        "lamhalobotnet50ts_256",
        "a1h_in1k",
        "lamhalobotnet50ts_a1h2_256-fe3d9445.pth",
        top1=81.552,
        top5=95.510,
        real_top1=86.365,
        crop_pct=0.95,
    ),
)
