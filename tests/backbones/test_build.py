"""A file must hold every layer of the model, whatever the model is built for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitzoo._skeleton import without_memory
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.published import all_entries

NARROW: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "embed_dims": (16, 32, 64, 128),
    "num_heads": (1, 2, 4, 8),
}
BUILDS: dict[str, dict[str, Any]] = {
    "classifier": {"num_classes": 10},
    "dense": {"dense": True},
    "features": {"features_only": True},
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("vz_davit_tiny", num_classes=10, **NARROW).state_dict()


def load(
    state_dict: dict[str, Tensor], folder: Path, name: str = "vz_davit_tiny", **kwargs: Any
) -> nn.Module:
    torch.save(state_dict, folder / "weights.pth")
    overlay = {"file": str(folder / "weights.pth"), "num_classes": 10}
    kwargs = NARROW | kwargs
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.mark.parametrize("build", BUILDS)
def test_whole_file_loads(build: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    found = load(weights, tmp_path, **BUILDS[build]).state_dict()
    key = "stages.2.blocks.0.0.attn.qkv.weight"
    assert any(torch.equal(v, weights[key]) for k, v in found.items() if k.endswith(".qkv.weight"))


@pytest.mark.parametrize("build", BUILDS)
def test_missing_stage_is_named(build: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torn = {k: v for k, v in weights.items() if not k.startswith("stages.2.")}
    with pytest.raises(WeightsError, match=r"\d+ missing \(stages\.2\."):
        load(torn, tmp_path, **BUILDS[build])


@pytest.mark.parametrize("build", BUILDS)
def test_renamed_layer_is_named(build: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {
        k.replace("3.blocks.0.0.attn.qkv", "3.blocks.0.0.attn.qvk"): v for k, v in weights.items()
    }
    with pytest.raises(WeightsError, match=r"2 missing .*qkv.*nearest .*qvk.*; 2 unexpected"):
        load(wrong, tmp_path, **BUILDS[build])


def test_florences_towers_lack_only_the_heads_norm(tmp_path: Path) -> None:
    name = "vz_davit_base_fl"
    whole = timm.create_model(name, **NARROW).state_dict()
    tower = {k: v for k, v in whole.items() if not k.startswith("head.")}
    load(tower, tmp_path, name, num_classes=0)
    load(tower, tmp_path, name, dense=True)
    del tower["stem.norm.weight"]
    for build in ({"num_classes": 0}, {"dense": True}):
        with pytest.raises(WeightsError, match=r"1 missing \(stem\.norm\.weight\)"):
            load(tower, tmp_path, name, **build)


def test_a_file_without_the_classifier_asked_for(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    body = {f"module.backbone.{k}": v for k, v in weights.items() if not k.startswith("head.fc.")}
    with pytest.raises(WeightsError, match=r"no classifier \(head\.fc\.weight\)"):
        load(body, tmp_path, num_classes=10)
    load(body, tmp_path, num_classes=0)
    three = weights | {k: weights[k][:3] for k in ("head.fc.weight", "head.fc.bias")}
    with pytest.raises(WeightsError, match="give num_classes=3"):
        load(three, tmp_path, num_classes=10)


@pytest.mark.parametrize("prefix", ["model.", "encoder.", "_orig_mod.module.", "module.model."])
def test_trainers_prefixes(prefix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    model = load({prefix + k: v for k, v in weights.items()}, tmp_path, num_classes=10)
    assert torch.equal(model.head.fc.weight, weights["head.fc.weight"])


def test_the_advice_on_class_counts_keeps_the_files_classifier(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    given: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    with pytest.raises(WeightsError, match=r"give num_classes=10$"):
        timm.create_model("vz_davit_tiny", **given, **NARROW)
    model = timm.create_model("vz_davit_tiny", num_classes=10, **given, **NARROW)
    assert torch.equal(model.head.fc.weight, weights["head.fc.weight"])
    other = timm.create_model("vz_davit_tiny", num_classes=7, **given, **NARROW)
    assert other.head.fc.weight.shape[0] == 7


def test_half_a_classifier_is_none(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    given: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    torch.save({k: v for k, v in weights.items() if k != "head.fc.bias"}, path)
    model = timm.create_model("vz_davit_tiny", num_classes=10, **given, **NARROW)
    assert not torch.equal(model.head.fc.weight, weights["head.fc.weight"])
    small = {"embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 10}
    name = "vz_sparsifiner_lvvit_small"
    whole = timm.create_model(name, **small).state_dict()
    torch.save(whole, path)
    both = timm.create_model(name, **given, **small)
    assert torch.equal(both.aux_head.weight, whole["aux_head.weight"])
    torch.save({k: v for k, v in whole.items() if not k.startswith("aux_head.")}, path)
    assert timm.create_model(name, **given, **small).num_classes == 10


@pytest.mark.parametrize("build", [{"num_classes": 10}, {"num_classes": 3}, {"dense": True}])
def test_the_first_convolution_belongs_to_the_file(
    build: dict[str, Any], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    first = "stem.conv.weight"
    without = {k: v for k, v in weights.items() if k != first}
    with pytest.raises(WeightsError, match=r"1 missing \(stem\.conv\.weight\)"):
        load(without, tmp_path, **build)
    with pytest.raises(WeightsError, match=r"stem\.conv\.weight is \(16, 3, 5, 5\) in the file"):
        load(weights | {first: weights[first][:, :, :5, :5]}, tmp_path, **build)
    grey = load(weights, tmp_path, in_chans=1, **build)
    assert grey.stem.conv.weight.shape[1] == 1


def test_a_detectors_file(
    weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = {"dense": True, "norm_indices": (1, 2, 3)}
    detector = timm.create_model("vz_davit_tiny", **dense, **NARROW).state_dict()
    for build in ({"num_classes": 10}, {"num_classes": 0}, {"features_only": True}):
        with pytest.raises(WeightsError, match=r"give dense=True$"):
            load(detector, tmp_path, **build)
    load(detector, tmp_path, **dense)
    load(weights, tmp_path, dense=True)
    assert "output norms" not in caplog.text
    load(detector, tmp_path, dense=True, norm_indices=(2,))
    assert "output norms" not in caplog.text
    load(detector, tmp_path, dense=True)
    assert "norm_indices=(1, 2, 3) gives" in caplog.text


DENSE_TAGS = [
    entry
    for entry in all_entries()
    if entry.task in ("detection", "segmentation") and entry.state != "never published"
]


def test_tags_of_detectors_and_segmenters_build_dense_versions() -> None:
    built = {}
    for entry in DENSE_TAGS:
        with without_memory():
            built[entry.name] = timm.create_model(entry.name)
    assert all(model.dense for model in built.values())
    assert built["vz_litv2_small.ziplab_fpn_ade20k"].norm_indices == (0, 1, 2, 3)
    first = built["vz_dinat_large.shilabs_ade20k_upernet"].attention_groups()[0]
    assert [attention.dilation for attention in first] == [1, 20, 1]
