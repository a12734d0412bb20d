"""BiFormer against the authors' code."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitzoo  # noqa: F401
from tests.golden_cases import GoldenCase, load_case, pretrained
from vitzoo.attention.choices import record_choices
from vitzoo.attention.routing import AttentionLePE, BiLevelRoutingAttention
from vitzoo.backbones.biformer import checkpoint_filter_fn
from vitzoo.zoo.errors import WeightsError

DENSE = "biformer_tiny_dense_256x192"
BLOCKS = ["topk1", "topk_all", "region_of_one_token", "auto_pad", "soft_avgpool_qkdim"]


@pytest.mark.parametrize("size", ["tiny", "small", "stl", "stl_nchw"])
def test_authors_file_gives_the_authors_numbers(size: str, tmp_path: Path) -> None:
    case = load_case("biformer", f"biformer_{size}_224")
    file = case.save(tmp_path)
    model = pretrained(f"vz_biformer_{size}", file)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        features, maps = model.forward_intermediates(case.input())
        case.check("logits", model.forward_head(features))
    for i, x in enumerate(maps, start=1):
        case.check(f"stage{i}", x)


@pytest.mark.parametrize(("size", "other"), [("stl", "stl_nchw"), ("stl_nchw", "stl")])
def test_the_two_implementations_are_told_apart(size: str, other: str, tmp_path: Path) -> None:
    file = load_case("biformer", f"biformer_{size}_224").save(tmp_path)
    with pytest.raises(WeightsError, match=rf"\(vz_biformer_{size} is\)"):
        pretrained(f"vz_biformer_{other}", file)


def test_dense_version(tmp_path: Path) -> None:
    case = load_case("biformer", DENSE)
    file = case.save(tmp_path)
    model = pretrained("vz_biformer_tiny", file, dense=True, n_win=8)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        outputs = model(case.input())
        model.extra_norms = nn.ModuleDict({str(i): nn.Identity() for i in range(4)})
        raw = model(case.input())
    for i, x in enumerate(outputs, start=1):
        case.check(f"feat{i}", x)
    case.check("stage4", raw[3])


def routed_block(case: GoldenCase) -> nn.Module:
    """The attention block of a case, its weights loaded."""
    arguments = case.spec["reference"]["kwargs"]
    names = ("n_win", "qk_dim", "soft_routing", "diff_routing", "param_routing")
    block = BiLevelRoutingAttention(
        arguments["dim"],
        arguments["num_heads"],
        top_k=arguments["topk"],
        lepe_kernel=arguments["side_dwconv"],
        kv_pool=arguments.get("kv_downsample_mode", "identity"),
        kv_size=arguments.get("kv_per_win", 1),
        pad_after=case.spec["reference"]["entry"] == "nchwBRA",
        **{name: arguments[name] for name in names if name in arguments},
    ).eval()
    # A model's file says `attn.` before an attention block's names, and holds a stem.
    weights = {f"attn.{name}": value for name, value in case.weights().items()}
    weights["downsample_layers.0.0.weight"] = torch.empty(0)
    renamed = checkpoint_filter_fn(weights, block)
    block.load_state_dict(
        {n.removeprefix("attn."): v for n, v in renamed.items() if n.startswith("attn.")}
    )
    return block


@pytest.mark.parametrize("name", BLOCKS)
def test_routed_block(name: str) -> None:
    case = load_case("biformer", f"bra_{name}")
    block = routed_block(case)
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    with torch.inference_mode(), record_choices() as choices:
        case.check("out", block(case.input()))
    case.check("r_idx", choices[0].sort(-1).values, bound=0)


def test_second_implementation_of_the_block() -> None:
    case = load_case("biformer", "bra_nchw_topk4")
    with torch.inference_mode():
        out = routed_block(case)(case.input().permute(0, 2, 3, 1))
    case.check("out", out.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["tiny", "stl", "stl_nchw"])
def test_norms_and_activations(name: str) -> None:
    """An eps of 1e-5 or a GELU by tanh would move the outputs less than the bound allows."""
    model = timm.create_model(f"vz_biformer_{name}", dense=True)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
        elif isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
        elif isinstance(module, nn.GELU):
            assert module.approximate == "none"
        elif isinstance(module, AttentionLePE):
            assert module.num_heads == 8
