"""NAT and DiNAT against the authors' code."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitzoo
from tests.golden_cases import load_case, pretrained
from vitzoo._skeleton import without_memory
from vitzoo.attention.layers import Mlp
from vitzoo.attention.neighborhood import NeighborhoodAttention

CASES = ["nat_mini", "dinat_mini"]


@pytest.mark.parametrize("name", CASES)
def test_authors_file_gives_the_authors_numbers(name: str, tmp_path: Path) -> None:
    case = load_case("nat", f"{name}_224")
    model = pretrained(f"vz_{name}", case.save(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        features, maps = model.forward_intermediates(case.input())
        case.check("logits", model.forward_head(features))
    for i, x in enumerate(maps):
        case.check(f"stage{i}", x)


def test_dense_version_norms_the_raw_maps(tmp_path: Path) -> None:
    case = load_case("nat", "dinat_mini_224")
    model = pretrained("vz_dinat_mini", case.save(tmp_path), dense=True)
    names = {key for key, _ in model.named_parameters() if "norm" in key and "stages" not in key}
    assert names == {
        "stem.norm.weight",
        "stem.norm.bias",
        *(f"norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")),
    }
    for i in range(4):
        # A norm that does nothing shows that the map below it is the raw one.
        setattr(model, f"norm{i}", nn.Identity())
    with torch.inference_mode():
        for i, x in enumerate(model(case.input())):
            case.check(f"stage{i}", x)


@pytest.mark.parametrize("name", [n for n in vitzoo.list_models("nat") if "large" not in n])
def test_what_the_golden_bound_cannot_see(name: str) -> None:
    with without_memory():
        model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
        if isinstance(module, Mlp):
            assert isinstance(module.act, nn.GELU)
            assert module.act.approximate == "none"
        if isinstance(module, NeighborhoodAttention):
            assert module.qkv.out_features == 96 * module.num_heads
