"""DaViT against the authors' code."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitzoo  # noqa: F401
from tests.golden_cases import load_case, pretrained
from vitzoo.attention import ChannelAttention, WindowAttention
from vitzoo.backbones.davit import Block, checkpoint_filter_fn

DENSE = "davit_tiny_dense_224"


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_authors_file_gives_the_authors_numbers(size: str, tmp_path: Path) -> None:
    case = load_case("davit", f"davit_{size}_224")
    file = case.save(tmp_path)
    model = pretrained(f"vz_davit_{size}", file)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        features, maps = model.forward_intermediates(case.input())
        case.check("logits", model.forward_head(features))
        for i, x in enumerate(maps):
            case.check(f"stage{i}", x)
        raw = pretrained(f"vz_davit_{size}", file, features_only=True)(case.input())
    for i, x in enumerate(raw):
        case.check(f"stage{i}", x)


def test_dense_version(tmp_path: Path) -> None:
    case = load_case("davit", DENSE)
    model = pretrained("vz_davit_tiny", case.save(tmp_path), dense=True)
    with torch.inference_mode():
        outputs = model(case.input())
    assert len(outputs) == 4
    for i, x in enumerate(outputs):
        case.check(f"out{i}", x)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("davit_spatial_block_padded", WindowAttention), ("davit_channel_block", ChannelAttention)],
)
def test_blocks(name: str, attention: type[nn.Module]) -> None:
    case = load_case("davit", name)
    arguments = case.spec["reference"]["arguments"]
    dim, heads = arguments["dim"], arguments["num_heads"]
    extra = {"window_size": arguments["window_size"]} if "window_size" in arguments else {}
    block = Block(dim, attention(dim, heads, **extra), mlp_ratio=4.0, drop_path=0.0).eval()
    block.load_state_dict(checkpoint_filter_fn(case.weights(), block))
    with torch.inference_mode():
        out = block(case.input().permute(0, 2, 3, 1))
    case.check("out", out.permute(0, 3, 1, 2))


def test_other_classes_and_image_channels_keep_the_rest(tmp_path: Path) -> None:
    case = load_case("davit", "davit_tiny_224")
    file = case.save(tmp_path)
    whole = pretrained("vz_davit_tiny", file).state_dict()
    changed = pretrained("vz_davit_tiny", file, num_classes=5, in_chans=1).state_dict()
    new = {name for name, value in changed.items() if value.shape != whole[name].shape}
    assert new == {"head.fc.weight", "head.fc.bias", "stem.conv.weight"}
    for name in changed.keys() - new:
        assert torch.equal(changed[name], whole[name]), name
    gray = whole["stem.conv.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(changed["stem.conv.weight"], gray)


def test_details_that_the_golden_bound_cannot_see() -> None:
    """A LayerNorm eps of 1e-6 moves an output by 1e-5 only."""
    model = timm.create_model("vz_davit_tiny", dense=True)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) > 20
    assert {norm.eps for norm in norms} == {1e-5}
    activations = [
        m for m in timm.create_model("vz_davit_tiny").modules() if isinstance(m, nn.GELU)
    ]
    assert len(activations) == 12
    assert {gelu.approximate for gelu in activations} == {"none"}
