"""LITv2 beyond the golden numbers: constants, arguments, tags, and the authors' files."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import get_pretrained_cfg
from torch import nn

import vitzoo  # noqa: F401
from vitzoo._skeleton import without_memory
from vitzoo.attention import add_mlp, layers
from vitzoo.backbones.litv2 import Block, ConvMlp, Downsample, checkpoint_filter_fn
from vitzoo.zoo.entries.litv2 import ENTRIES

NARROW = {"embed_dims": (32, 64, 128, 256), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1)}


def narrow(name: str = "vz_litv2_small", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(NARROW | kwargs)).eval()


def test_norms_and_activations() -> None:
    model = narrow(dense=True, norm_indices=(0, 1, 2, 3))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert norms
    assert {m.eps for m in norms} == {1e-5}
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in batch_norms} == {(1e-5, 0.1)}
    gelus = [m.approximate for m in model.modules() if isinstance(m, nn.GELU)]
    assert gelus == ["none"] * 3


def test_the_mlp_activates_after_its_convolution_with_the_exact_gelu() -> None:
    mlp = ConvMlp(8, 32).eval()
    x = torch.randn(2, 5, 7, 8)
    hidden = mlp.dwconv(mlp.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(hidden)))
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(hidden)), rtol=0, atol=1e-6)


def test_large_maps_go_in_groups_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, norm, x = ConvMlp(8, 32).eval(), nn.LayerNorm(8).eval(), torch.randn(5, 6, 6, 8)
    whole = x + mlp(norm(x))
    sizes: list[int] = []
    run = layers.convolution_onednn

    def noted(x: torch.Tensor, *weights: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(x))
        return run(x, *weights, **options)

    monkeypatch.setattr(layers, "convolution_onednn", noted)
    monkeypatch.setattr(layers, "_LARGE_HIDDEN_BYTES", 5 * 6 * 6 * 32 * 4)
    # Less than one image: one at a time.
    for budget, expected in ((2 * 6 * 6 * 32 * 4, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(layers, "_HIDDEN_BYTES", budget)
        sizes.clear()
        with torch.inference_mode():
            torch.testing.assert_close(add_mlp(x, norm, mlp), whole)
        assert sizes == expected


def test_a_fresh_merging_is_a_strided_convolution() -> None:
    merging = Downsample(8, 16).eval()
    x = torch.randn(2, 7, 9, 8)
    dconv = merging.dconv
    out = F.conv2d(x.permute(0, 3, 1, 2), dconv.weight, dconv.bias, stride=2)
    expected = F.gelu(merging.norm(out)).permute(0, 2, 3, 1)
    assert expected.shape == (2, 3, 4, 16)
    torch.testing.assert_close(merging(x), expected, rtol=1e-5, atol=1e-6)


def test_initialisation() -> None:
    model = narrow()
    for module in model.modules():
        if isinstance(module, ConvMlp):
            assert module.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.15)
            assert not module.dwconv.bias.any()
            assert module.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.fc1.bias.any()
    for stage in model.stages[1:]:
        dconv = stage.downsample.dconv
        assert not dconv.conv_offset.weight.any()
        assert not dconv.conv_offset.bias.any()
        bound = dconv.weight[0].numel() ** -0.5
        assert 0.9 * bound < dconv.weight.abs().max() <= bound
        assert dconv.bias.abs().max() <= bound


def test_drop_path_rises_over_all_blocks() -> None:
    model = timm.create_model("vz_litv2_small", drop_path_rate=0.2, **NARROW)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    rates = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0 for b in blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_the_first_two_stages_have_no_attention() -> None:
    has_attention = [stage.blocks[0].attn is not None for stage in narrow().stages]
    assert has_attention == [False, False, True, True]


def test_a_window_of_four_takes_the_same_weights_and_changes_the_map() -> None:
    two, four = narrow(num_classes=5), narrow(num_classes=5, window_sizes=(0, 0, 4, 1))
    four.load_state_dict(two.state_dict())
    x = torch.randn(1, 3, 128, 160)
    with torch.inference_mode():
        assert not torch.allclose(two(x), four(x), atol=1e-4)


def test_dense_norms_carry_the_authors_names() -> None:
    detection = {n.split(".")[0] for n, _ in narrow(dense=True).named_parameters()}
    segmentation = narrow(dense=True, norm_indices=(0, 1, 2, 3))
    assert detection == {"stem", "stages", "norm1", "norm2", "norm3"}
    assert hasattr(segmentation, "norm0")


def test_detectors_files_load_into_the_dense_version() -> None:
    model = narrow(dense=True)
    theirs = {"patch_embed.proj.weight": torch.ones_like(model.stem.conv.weight)}
    for i in range(3):
        weight = model.stages[i + 1].downsample.dconv.weight
        theirs[f"layers.{i}.downsample.dconv.weight"] = torch.full_like(weight, i)
    theirs["norm1.bias"] = torch.ones(64)
    wrapped = {"backbone." + name: value for name, value in theirs.items()}
    found = checkpoint_filter_fn(
        {"state_dict": wrapped | {"neck.lateral.weight": torch.ones(1)}, "meta": {}}, model
    )
    missing = model.load_state_dict(found, strict=False)
    assert not missing.unexpected_keys
    assert [int(stage.downsample.dconv.weight.max()) for stage in model.stages[1:]] == [0, 1, 2]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_tag_builds_the_network_of_its_weights(alpha: float) -> None:
    name = f"vz_litv2_small.ziplab_alpha{round(10 * alpha):02d}_in1k"
    assert get_pretrained_cfg(name).url.endswith(f"v1.1/alpha_{alpha:g}.pth")
    with without_memory():
        attn = timm.create_model(name).stages[2].blocks[0].attn
        given = timm.create_model(name, alpha=0.9).stages[2].blocks[0].attn
    assert attn.low_heads == int(12 * alpha)
    assert given.low_heads == 10


def test_the_table_of_weights() -> None:
    assert len(ENTRIES) == len({entry.name for entry in ENTRIES}) == 4 + 7 + 12 + 3
    assert all(entry.state == "unchecked" for entry in ENTRIES)
    cfg = get_pretrained_cfg("vz_litv2_base_384")
    assert (cfg.input_size, cfg.crop_pct, cfg.crop_mode) == ((3, 384, 384), 1.0, "squash")
    assert get_pretrained_cfg("vz_litv2_small").crop_pct == 0.875
