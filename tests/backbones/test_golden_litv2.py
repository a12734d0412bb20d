"""LITv2 against the authors' code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitzoo  # noqa: F401
from tests.golden_cases import GoldenCase, load_case, pretrained
from vitzoo.attention.hilo import HiLo
from vitzoo.backbones.litv2 import Downsample, checkpoint_filter_fn
from vitzoo.ops import use_backend


def channels_last(case: GoldenCase) -> torch.Tensor:
    """The case's NCHW input as a (B, H, W, C) map."""
    return case.input().permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("size", ["small", "medium"])
def test_authors_file_gives_the_authors_numbers(size: str, tmp_path: Path) -> None:
    case = load_case("litv2", f"litv2_{size}_224")
    file = case.save(tmp_path)
    model = pretrained(f"vz_litv2_{size}", file)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        features, maps = model.forward_intermediates(case.input())
        case.check("logits", model.forward_head(features))
        for i, x in enumerate(maps):
            case.check(f"stage{i}", x)
        raw = pretrained(f"vz_litv2_{size}", file, features_only=True)(case.input())
    for i, x in enumerate(raw):
        case.check(f"stage{i}", x)


def test_dense_version(tmp_path: Path) -> None:
    case = load_case("litv2", "litv2_small_dense_224")
    file = case.save(tmp_path)
    model = pretrained("vz_litv2_small", file, dense=True, norm_indices=(1, 2, 3))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        outputs = model(case.input())
        raw = pretrained("vz_litv2_small", file, dense=True, norm_indices=())(case.input())
        tagged = pretrained("vz_litv2_small.ziplab_retinanet_coco", file)(case.input())
    assert len(outputs) == len(raw) == 4
    for i, (out, stage) in enumerate(zip(outputs, raw, strict=True)):
        assert torch.equal(tagged[i], out)
        case.check(f"out{i}", out)
        case.check(f"stage{i}", stage)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "name", ["hilo_a0.9_w2_14x14", "hilo_a0.5_w2_14x14", "hilo_a0.5_w2_padded_9x13"]
)
def test_hilo(name: str, backend: str) -> None:
    case = load_case("litv2", name)
    arguments = dict(case.spec["reference"]["arguments"])
    attn = HiLo(arguments.pop("dim"), arguments.pop("num_heads"), **arguments).eval()
    attn.load_state_dict(case.weights())
    assert sum(p.numel() for p in attn.parameters()) == case.spec["params"]
    with torch.inference_mode(), use_backend(backend):
        out = attn(channels_last(case))
    case.check("out", out.permute(0, 3, 1, 2))


@pytest.mark.parametrize("backend", ["auto", "torchvision", "reference"])
def test_deformable_token_merging(backend: str) -> None:
    case = load_case("litv2", "dtm_96_14x18")
    prefix = "layers.0.downsample."
    merging = Downsample(96, 192).eval()
    weights = checkpoint_filter_fn(
        {prefix + name: value for name, value in case.weights().items()}, merging
    )
    merging.load_state_dict(
        {name.removeprefix("stages.1.downsample."): value for name, value in weights.items()}
    )
    assert sum(p.numel() for p in merging.parameters()) == case.spec["params"]
    with torch.inference_mode(), use_backend(backend, operator="deformable_merge"):
        out = merging(channels_last(case))
    case.check("out", out.permute(0, 3, 1, 2))
