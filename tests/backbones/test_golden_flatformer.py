"""FlatFormer against the authors' code: index tables and pillar features."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo  # noqa: F401
from tests.golden_cases import GoldenCase, draw_input, load_case
from vitzoo.backbones.flatformer import FlatFormer, flatten_windows
from vitzoo.ops.grouped import group_tables


def pillars_of(case: GoldenCase) -> tuple[Tensor, Tensor, int]:
    """Features, coordinates (frame, y, x) and frame count of a case."""
    coords = torch.from_numpy(case.outputs["coords"]).long()[:, [0, 2, 3]]
    seed = case.spec["input"].get("feature_seed", 0)
    return draw_input((len(coords), 128), seed), coords, len(case.spec["input"]["counts"])


@pytest.mark.parametrize("name", ["mapping_b1_600", "mapping_b2_1500"])
def test_index_tables(name: str) -> None:
    case = load_case("flatformer", name)
    _, coords, frames = pillars_of(case)
    orders = flatten_windows(coords, (468, 468), 13)
    for flattening, order in zip(("x", "x_shift", "y", "y_shift"), orders, strict=True):
        assert order.tolist() == case.outputs[flattening].tolist()
    offsets = torch.bincount(coords[:, 0] + 1, minlength=frames + 1).cumsum(0)
    token_of_slot, _, slot_of_token = group_tables(offsets, len(coords), 144)
    golden = case.outputs["flat2win"].tolist()
    assert token_of_slot.flatten()[: len(golden)].tolist() == golden
    assert slot_of_token.tolist() == case.outputs["win2flat"].tolist()


@pytest.mark.parametrize("name", ["backbone_b1_600", "backbone_b2_1500"])
def test_authors_file_gives_the_authors_numbers(name: str, tmp_path: Path) -> None:
    case = load_case("flatformer", name)
    overlay = {"file": str(case.save(tmp_path))}
    model = timm.create_model(
        "vz_flatformer", pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    features, coords, frames = pillars_of(case)
    with torch.inference_mode():
        out = model.forward_features(features, coords, frames)
        bev = model(features, coords, frames)
        model.blocks = model.blocks[:1]
        first = model.forward_features(features, coords, frames)
    case.check("pillars", out)
    case.check("block0", first)
    frame, y, x = coords.unbind(-1)
    assert torch.equal(bev[frame, :, y, x], out)
    assert bev.shape == (frames, 128, 468, 468)
    assert bev.count_nonzero() == out.count_nonzero()


def test_norm_eps_and_gelu_form() -> None:
    model = FlatFormer(16, num_heads=2, grid_size=(8, 8), depth=1)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 8
    assert all(norm.eps == 1e-5 for norm in norms)
    gelus = [m for m in model.modules() if isinstance(m, nn.GELU)]
    assert len(gelus) == 4
    assert all(gelu.approximate == "none" for gelu in gelus)
