"""timm's HaloNets and U-HaloNet against the reference code, and the paper's table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models.byobnet import ByobNet
from torch import nn

import vitzoo
from tests.golden_cases import load_case, pretrained
from vitzoo.backbones import halonet, uhalonet

TIMMS = {name: v for name, v in halonet.VARIANTS.items() if isinstance(v, halonet.Variant)}
MODELS = {
    "halonet26t_256": "vz_halonet26t",
    "halonet50ts_256": "vz_halonet50ts",
    "halonet_h1_256": "vz_halonet_h1_timm",
}


@pytest.mark.parametrize("name", MODELS)
def test_timms_file_gives_timms_numbers(name: str, tmp_path: Path) -> None:
    case = load_case("halonet", name)
    file = case.save(tmp_path)
    model = pretrained(MODELS[name], file)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        features, maps = model.forward_intermediates(case.input())
        case.check("logits", model.forward_head(features))
        raw = pretrained(MODELS[name], file, features_only=True)(case.input())
        dense = pretrained(MODELS[name], file, dense=True)(case.input())
    for found in (maps, raw, dense):
        assert len(found) == 5
        for i, x in enumerate(found):
            case.check(f"stage{i}", x)


def test_steps_apart_give_timms_numbers_too() -> None:
    """With gradients on, norms and activations are modules of their own."""
    case = load_case("halonet", "halonet26t_256")
    model = timm.create_model("vz_halonet26t").eval()
    model.load_state_dict(case.weights(), strict=False)
    case.check("logits", model(case.input()))


@pytest.mark.parametrize("name", TIMMS)
def test_every_timm_variant_agrees_with_timm(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(_timms_name(name)).eval()
    ours = timm.create_model(name).eval()
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1, 0.1)
                module.bias.normal_(0, 0.1)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(1, 3, TIMMS[name].size, TIMMS[name].size)
    with torch.inference_mode():
        expected, found = theirs(x), ours(x)
    scale = expected.abs().max()
    assert scale > 0.01
    assert (found - expected).abs().max() <= 3e-5 * max(1.0, scale)


def _timms_name(name: str) -> str:
    return name.removeprefix("vz_").removesuffix("_timm")


def test_timms_own_models_stay_as_they_are() -> None:
    """Import and use of the zoo leave timm's classes, configurations and names alone."""
    program = """
import timm, torch
from timm.models import byoanet, byobnet
from timm.layers import get_attn
names, blocks = set(timm.list_models()), dict(byobnet._block_registry)
configs = {name: repr(cfg) for name, cfg in byoanet.model_cfgs.items()}
x = torch.randn(1, 3, 256, 256)
torch.manual_seed(0)
model = timm.create_model("halonet26t").eval()
with torch.inference_mode():
    before = model(x)
types = [type(m) for m in model.modules()]
import vitzoo
with torch.inference_mode():
    timm.create_model("vz_halonet26t").eval()(x)
    timm.create_model("vz_halonet50ts", embed_dims=(16, 32, 64, 64), num_heads=(2, 2, 2, 2))
assert names <= set(timm.list_models())
assert not [n for n in vitzoo.list_models() if n in names]
assert byobnet._block_registry == blocks
assert {name: repr(cfg) for name, cfg in byoanet.model_cfgs.items()} == configs
assert get_attn("halo").__module__ == "timm.layers.halo_attn"
torch.manual_seed(0)
model = timm.create_model("halonet26t").eval()
assert [type(m) for m in model.modules()] == types
with torch.inference_mode():
    assert torch.equal(model(x), before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_papers_parameter_counts() -> None:
    stated = (5.50, 8.11, 9.41, 11.84, 19.10, 30.72, 43.46, 67.43)
    for i, millions in enumerate(stated):
        model = timm.create_model(f"vz_halonet_h{i}", device="meta")
        count = sum(p.numel() for p in model.parameters())
        assert round(count / 1e6, 2) == millions
        assert count == vitzoo.info(f"vz_halonet_h{i}").params


def test_the_papers_heads_and_widths() -> None:
    model = timm.create_model("vz_halonet_h5", device="meta")
    for stage, heads, width in zip(model.stages, (4, 8, 8, 8), (64, 128, 256, 512), strict=True):
        for block in stage:
            attention = block.self_attn
            assert (attention.num_heads, attention.head_dim) == (heads, width // heads)
            assert attention.kv.out_channels == width + 2.5 * width
        assert isinstance(stage[1].shortcut, nn.Identity)
        assert not isinstance(stage[0].shortcut, nn.Identity)


@pytest.mark.parametrize("name", ["vz_halonet26t", "vz_haloregnetz_b", "vz_halonet_h7"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (75, 150)])
def test_any_size(name: str, height: int, width: int) -> None:
    model = timm.create_model(name, depths=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64)).eval()
    with torch.inference_mode():
        maps = model.forward_intermediates(
            torch.randn(1, 3, height, width), intermediates_only=True
        )
    for x, stride in zip(maps, (2, 4, 8, 16, 32), strict=True):
        assert x.shape[2:] == (-(-height // stride), -(-width // stride))


def test_narrow_networks_keep_each_kind_of_block() -> None:
    model = timm.create_model(
        "vz_eca_halonext26ts",
        depths=(1, 2, 1, 2),
        embed_dims=(16, 32, 64, 64),
        num_heads=(1, 1, 2, 4),
    )
    kinds = [[type(block).__name__ for block in stage] for stage in model.stages]
    assert kinds == [
        ["Bottleneck"],
        ["Bottleneck"] * 2,
        ["HaloBottleneck"],
        ["HaloBottleneck"] * 2,
    ]
    assert model.stages[2][0].self_attn.num_heads == 2


def test_norm_eps_and_drop_path() -> None:
    models = [
        timm.create_model(name, drop_path_rate=0.3, device="meta")
        for name in ("halonet26t", "vz_halonet26t")
    ]
    assert isinstance(models[1], ByobNet)
    assert {m.eps for m in models[1].modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    theirs, ours = (
        [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
        for model in models
    )
    assert ours == theirs
    assert ours[0] == 0
    assert ours[-1] == pytest.approx(0.3)


def test_drop_path_drops_the_branch() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vz_halonet26t", depths=(1, 1, 1, 2), embed_dims=(16, 16, 32, 32), drop_path_rate=0.999
    ).train()
    block = model.stages[3][1]
    nn.init.ones_(block.conv3_1x1.bn.weight)
    x = torch.rand(2, 32, 8, 8)
    assert torch.equal(block(x), x)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"norm_indices must be \(\), got \(1, 2\)"):
        timm.create_model("vz_halonet26t", dense=True, norm_indices=(1, 2))
    with pytest.raises(ValueError, match="depths needs 4 numbers"):
        timm.create_model("vz_halonet_h0", depths=(1, 1))
    with pytest.raises(TypeError, match="colour"):
        timm.create_model("vz_halonet_h0", colour="red")


# U-HaloNet


def test_unified_halonet(tmp_path: Path) -> None:
    case = load_case("halonet", "uhalonet_micro_224")
    file = case.save(tmp_path)
    model = pretrained("vz_uhalonet_micro", file)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        case.check("logits", model(case.input()))


def test_unified_halonet_dense(tmp_path: Path) -> None:
    case = load_case("halonet", "uhalonet_micro_dense_256x192")
    model = pretrained("vz_uhalonet_micro", case.save(tmp_path), dense=True)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        outputs = model(case.input())
    assert len(outputs) == 4
    for i, x in enumerate(outputs):
        case.check(f"out{i}", x)


def test_unified_halonet_detection_file(tmp_path: Path) -> None:
    """mmdetection's checkpoint: weights under `state_dict` and `backbone.`, necks beside them."""
    case = load_case("halonet", "uhalonet_micro_dense_256x192")
    state = {f"backbone.{name}": value for name, value in case.weights().items()}
    file = tmp_path / "detector.pth"
    torch.save({"state_dict": state | {"neck.weight": torch.ones(1)}}, file)
    model = pretrained("vz_uhalonet_micro", file, dense=True)
    with torch.inference_mode():
        case.check("out3", model(case.input())[3])


def test_a_classifiers_file_starts_the_dense_version(tmp_path: Path) -> None:
    case = load_case("halonet", "uhalonet_micro_224")
    torch.save({"model": case.weights()}, tmp_path / "cls.pth")
    model = pretrained("vz_uhalonet_micro", tmp_path / "cls.pth", dense=True)
    state = model.state_dict()
    loaded = case.weights()["downsample_layers.3.reduction.0.weight"]
    assert torch.equal(state["stages.3.downsample.conv.weight"], loaded)
    assert state["out_norm_2.weight"].eq(1).all()
    assert not [name for name in state if "stage_norm" in name or "head" in name]


def test_tables_are_interpolated_to_another_window() -> None:
    case = load_case("halonet", "uhalonet_micro_224")
    model = timm.create_model("vz_uhalonet_micro", halo_size=1)
    found = uhalonet.checkpoint_filter_fn(case.weights(), model)
    name = "stages.2.blocks.4.attn.pos_embed.width_rel"
    given = case.weights()["stages.2.4.attn.pos_embed.width_rel"]
    assert found[name].shape == (17, 32)
    # Rows 0, 3, ... 24 of 25 fall on rows 0, 2, ... 16 of 17.
    torch.testing.assert_close(found[name][::2], given[::3])
    torch.testing.assert_close(found[name][1], (given[1] + given[2]) / 2)
    model.load_state_dict(found, strict=False)


def test_unified_halonet_norms_activations_and_drop_path() -> None:
    model = timm.create_model("vz_uhalonet_micro", drop_path_rate=0.28)
    blocks = [block for stage in model.stages for block in stage.blocks]
    eps = {
        name: module.eps
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    inside = {name for name in eps if ".blocks." in name}
    assert len(inside) == 2 * len(blocks)
    assert {eps[name] for name in inside} == {1e-5}
    assert {value for name, value in eps.items() if name not in inside} == {1e-6}
    gelus = [module for module in model.modules() if isinstance(module, nn.GELU)]
    assert {module.approximate for module in gelus} == {"none"}
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.02 * i for i in range(15)], abs=1e-6)
    assert all(block.ls2.gamma.eq(1e-6).all() for block in blocks)
    assert model.stages[2].downsample.conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    table = torch.cat([block.attn.pos_embed.width_rel for block in blocks])
    assert table.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_dense_versions_maps_have_no_stage_norms() -> None:
    dense = timm.create_model("vz_uhalonet_tiny", dense=True, norm_indices=(1, 3), device="meta")
    norms = [name for name, _ in dense.named_children() if name.startswith("out_norm")]
    assert norms == ["out_norm_1", "out_norm_3"]
    assert isinstance(dense.stages[1].downsample.stage_norm, nn.Identity)
