"""What only NAT and DiNAT have: dilations at run time, their file layouts, bias tables that fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.golden_cases import pretrained
from vitzoo._skeleton import without_memory
from vitzoo.attention.neighborhood import NeighborhoodAttention
from vitzoo.backbones._build import rename
from vitzoo.backbones.nat import checkpoint_filter_fn

NARROW = {"embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2), "num_classes": 3}


def dilations(model: nn.Module) -> list[list[int]]:
    return [
        [m.dilation for m in stage.modules() if isinstance(m, NeighborhoodAttention)]
        for stage in model.stages
    ]


def test_published_dilations() -> None:
    with without_memory():
        mini, large = timm.create_model("vz_dinat_mini"), timm.create_model("vz_dinat_large")
        swin = timm.create_model("vz_dinat_s_tiny", dilations="ade20k")
        wide = timm.create_model("vz_dinat_large_384")
        swin_large = timm.create_model("vz_dinat_s_large", dilations="ade20k_640")
        plain = timm.create_model("vz_nat_tiny")
    built = [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    assert dilations(mini) == built
    mini.set_dilations("coco")
    assert dilations(mini) == [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
    mini.set_dilations("ade20k")
    assert dilations(mini) == [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]
    mini.set_dilations("built")
    assert dilations(mini) == built
    large.set_dilations("ade20k_640")
    middle = [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5]
    assert dilations(large) == [[1, 20, 1], [1, 5, 1, 10], middle, [1, 2, 1, 2, 1]]
    assert dilations(swin) == [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]
    assert dilations(swin_large) == [[1, 20], [1, 10], middle, [1, 2]]
    assert dilations(wide) == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert {d for stage in dilations(plain) for d in stage} == {1}


@pytest.mark.parametrize("table", ["ade20k", [[1, 2], [2], [1], [1]]])
def test_dilations_go_back_to_the_constructors(table: object) -> None:
    with without_memory():
        model = timm.create_model("vz_dinat_mini", depths=(2, 2, 2, 1), dilations=table)
    before = dilations(model)
    model.set_dilations("coco")
    assert dilations(model) != before
    model.set_dilations("built")
    assert dilations(model) == before


def test_dilations_change_the_maps_not_the_weights() -> None:
    model = timm.create_model("vz_dinat_mini", depths=(2, 2, 2, 1), dense=True, **NARROW).eval()
    nn.init.normal_(model.stages[0].blocks[1].attn.rpb)
    names = list(model.state_dict())
    x = torch.randn(1, 3, 70, 64)
    with torch.inference_mode():
        before = model(x)
        model.set_dilations([[1, 2], [2], [1], [1]])
        after = model(x)
        model.set_dilations("built")
        again = model(x)
    assert list(model.state_dict()) == names
    assert not torch.allclose(before[0], after[0])
    for a, b in zip(before, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cityscapes", "known: .*coco"),
        ([[1]] * 3, "4 stages take a list of dilations each, got "),
        (2, "4 stages take a list of dilations each, got 2"),
        ([1, 8, 4, 2], "stage 0 takes a list of 1 to 2"),
        ([[1], [1.5], [1], [1]], "stage 1 takes"),
        ([[1, 1, 1], [1], [1], [1]], "stage 0 takes a list of 1 to 2"),
        ([[1], [0], [1], [1]], "stage 1 takes"),
        ([[1], [], [1], [1]], "stage 1 takes"),
    ],
)
def test_dilations_that_do_not_fit_are_refused(wanted: object, message: str) -> None:
    with without_memory():
        model = timm.create_model("vz_dinat_s_tiny", depths=(2, 2, 2, 2))
    before = dilations(model)
    with pytest.raises(ValueError, match=message):
        model.set_dilations(wanted)
    assert dilations(model) == before


def authors_name(name: str, isotropic: bool) -> str:
    """Our name of a DiNAT_s or isotropic parameter in the authors' files."""
    head, *rest = name.split(".")
    if head == "stem":
        return name.replace("stem.conv", "patch_embed.proj").replace("stem.", "patch_embed.")
    if head == "head":
        return name.replace("head.fc", "head")
    if head != "stages":
        return name
    stage, *rest = rest
    if rest[0] == "downsample":
        return ".".join(["layers", str(int(stage) - 1), *rest])
    return ".".join(["layers", stage, *(rest[2:] if isotropic else rest)])


@pytest.mark.parametrize("name", ["vz_dinat_s_tiny", "vz_dinat_iso_small"])
def test_layouts_without_a_golden_case(name: str) -> None:
    isotropic = "iso" in name
    small = {"depth": 2} if isotropic else {"depths": (2, 1, 1, 1), **NARROW}
    model = timm.create_model(name, **small)
    state = {authors_name(key, isotropic): value for key, value in model.state_dict().items()}
    assert "layers.0.attn.rpb" in state or "layers.0.blocks.1.attn.rpb" in state
    mapped = checkpoint_filter_fn(state, model)
    assert mapped.keys() == model.state_dict().keys()
    assert all(torch.equal(mapped[key], value) for key, value in model.state_dict().items())


def test_layer_scale_and_detector_names() -> None:
    model = timm.create_model("vz_nat_small", depths=(1, 1, 1, 1), **NARROW)
    mapped = checkpoint_filter_fn(
        {"state_dict": {"backbone.levels.2.blocks.0.gamma1": torch.ones(1)}}, model
    )
    assert list(mapped) == ["stages.2.blocks.0.ls1.gamma"]
    assert mapped.keys() <= model.state_dict().keys()
    assert model.stages[0].blocks[0].ls1.gamma.unique().tolist() == [pytest.approx(1e-5)]


def test_bias_tables_of_another_kernel_are_interpolated() -> None:
    seven = timm.create_model("vz_dinat_mini", depths=(1, 1, 1, 1), **NARROW)
    eleven = timm.create_model("vz_dinat_mini", depths=(1, 1, 1, 1), kernel_size=11, **NARROW)
    ramp = torch.linspace(-1, 1, 13)
    with torch.no_grad():
        seven.stages[0].blocks[0].attn.rpb.copy_(ramp[:, None] + 0 * ramp)
    eleven.load_state_dict(checkpoint_filter_fn(seven.state_dict(), eleven))
    table = eleven.stages[0].blocks[0].attn.rpb
    assert table.shape == (1, 21, 21)
    assert table[0, 10, 10].abs() < 1e-6
    assert (table[0].diff(dim=0)[1:-1] > 0).all()
    assert torch.allclose(table[0, :, :1].expand(21, 21), table[0], atol=1e-5)


def test_merging_order_of_dinat_s() -> None:
    with torch.device("cpu"):
        model = timm.create_model("vz_dinat_s_tiny", depths=(1, 1, 1, 1), **NARROW)
    merge = model.stages[1].downsample
    merge.norm = nn.Identity()
    nn.init.zeros_(merge.reduction.weight)
    with torch.no_grad():
        # Output channel i reads the first channel of cell i.
        for i in range(4):
            merge.reduction.weight[i, 32 * i] = 1
    x = torch.zeros(1, 3, 2, 32)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 0, 1, 0], x[0, 1, 1, 0] = 1.0, 2.0, 3.0, 4.0
    out = merge(x)
    assert out.shape == (1, 2, 1, 32)
    assert out[0, 0, 0, :4].tolist() == [1, 2, 3, 4]


def test_tables_of_bias_are_not_decayed_and_start_small() -> None:
    model = timm.create_model("vz_nat_mini", depths=(1, 1, 1, 1), **NARROW)
    assert model.no_weight_decay() == {f"stages.{i}.blocks.0.attn.rpb" for i in range(4)}
    assert 0 < model.stages[3].blocks[0].attn.rpb.std() < 0.03


def transformers_names(state_dict: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our state dict as transformers' `NatForImageClassification` or `Dinat...` has it."""
    rules = (
        (r"^head\.fc\.", "classifier."),
        (r"^norm\.", f"{family}.layernorm."),
        (r"^stem\.conv1\.", f"{family}.embeddings.patch_embeddings.projection.0."),
        (r"^stem\.conv2\.", f"{family}.embeddings.patch_embeddings.projection.1."),
        (r"^stem\.norm\.", f"{family}.embeddings.norm."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", rf"{family}.encoder.levels.\1.layers.\2."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.self."),
    )
    found = {}
    for name, value in rename(state_dict, rules).items():
        if moved := re.match(r"stages\.(\d+)\.downsample\.(.*)", name):
            level = f"{family}.encoder.levels.{int(moved[1]) - 1}"
            found[f"{level}.downsample.{moved[2]}"] = value
        elif ".self.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = third.clone()
        elif name.endswith(".ls1.gamma"):
            both = torch.stack([value, _second_scale(state_dict, name)])
            found[name.replace("ls1.gamma", "layer_scale_parameters")] = both
        elif not name.endswith(".ls2.gamma"):
            found[name] = value
    return found


def _second_scale(state_dict: dict[str, Tensor], name: str) -> Tensor:
    stage, block = re.search(r"levels\.(\d+)\.layers\.(\d+)\.", name).groups()
    return state_dict[f"stages.{stage}.blocks.{block}.ls2.gamma"]


@pytest.mark.parametrize("family", ["nat", "dinat"])
def test_transformers_files(family: str, tmp_path: Path) -> None:
    narrow = {"depths": (1, 2, 1, 1), "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)}
    name = f"vz_{family}_base"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **narrow).eval()
    for key, value in model.named_parameters():
        nn.init.normal_(value, mean=float(key.endswith("gamma")), std=0.1)
    torch.save(transformers_names(model.state_dict(), family), tmp_path / "pytorch_model.bin")
    again = pretrained(name, tmp_path / "pytorch_model.bin", num_classes=10, **narrow)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
