"""Every layout that weights come in goes through `convert` to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.golden_cases import load_case, pretrained
from tests.zoo.test_convert import WRAPPINGS
from vitzoo.cli import run
from vitzoo.zoo.convert import convert
from vitzoo.zoo.errors import WeightsError

FOUR: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 64]}
HEADS: dict[str, Any] = {"num_heads": [1, 2, 2, 4]}
TOKENS: dict[str, Any] = {"embed_dim": 96, "depth": 2, "num_heads": 3}
# One small model a family.
NARROW: dict[str, dict[str, Any]] = {
    "vz_davit_tiny": FOUR | HEADS,
    "vz_litv2_small": FOUR | HEADS,
    "vz_biformer_tiny": FOUR | HEADS,
    "vz_biformer_stl": FOUR | HEADS,
    "vz_nat_mini": {"depths": [1, 1, 1, 1], "embed_dims": [32, 32, 64, 64]},
    "vz_nat_iso_small": TOKENS,
    "vz_halonet26t": {"depths": [1, 1, 1, 2], "embed_dims": [16, 16, 32, 32]},
    "vz_uhalonet_micro": FOUR | HEADS,
    "vz_sparsifiner_deit_tiny": TOKENS,
    "vz_lookupvit_small": TOKENS,
}


def narrow(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 7, **NARROW[name], **kwargs}).eval()


def answers(model: nn.Module, channels: int = 3) -> Tensor:
    x = torch.randn(2, channels, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x)


def again(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", NARROW)
def test_the_converted_file_converts(name: str, channels: int, tmp_path: Path) -> None:
    model = narrow(name, in_chans=channels)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    convert(tmp_path / "mine.pth", tmp_path / "one", name, arguments=NARROW[name])
    # safetensors lists its tensors by name, not in the network's order.
    file = tmp_path / "one" / "model.safetensors"
    convert(file, tmp_path / "two", name, arguments=NARROW[name])
    expected = answers(model, channels)
    assert torch.equal(answers(again(tmp_path / "one"), channels), expected)
    assert torch.equal(answers(again(tmp_path / "two"), channels), expected)
    config = json.loads((tmp_path / "two" / "config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"][0], config["num_classes"]) == (channels, 7)


def test_flatformer_converts_again(tmp_path: Path) -> None:
    case = load_case("flatformer", "backbone_b1_600")
    convert(case.save(tmp_path), tmp_path / "one", "vz_flatformer")
    file = tmp_path / "one" / "model.safetensors"
    convert(file, tmp_path / "two", "vz_flatformer")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == file.read_bytes()


# As the authors' files hold them: a classifier's, and a detector's backbone with output norms.
THIN = {"depths": [1, 1, 1, 1]}


def thin(case: str) -> dict[str, Tensor]:
    """The authors' BiFormer-T, the first block of every stage only."""
    weights = load_case("biformer", case).weights()
    blocks = {name: name.split(".")[2] for name in weights if name.startswith("stages.")}
    return {name: value for name, value in weights.items() if blocks.get(name, "0") == "0"}


@pytest.fixture(scope="module")
def authors() -> dict[str, dict[str, Tensor]]:
    return {"whole": thin("biformer_tiny_224"), "dense": thin("biformer_tiny_dense_256x192")}


WAYS = {**WRAPPINGS, "backbone": lambda w: {f"backbone.{k}": v for k, v in w.items()}}
DENSE = ("mmdet", "mmseg", "backbone")


@pytest.mark.parametrize("how", WAYS)
def test_authors_weights_convert_in_every_wrapper(
    how: str, authors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    dense = how in DENSE
    weights = authors["dense" if dense else "whole"]
    arguments = {**THIN, **({"dense": True} if dense else {})}
    torch.save(weights, tmp_path / "bare.pth")
    torch.save(WAYS[how](weights), tmp_path / "wrapped.pth")
    convert(tmp_path / "wrapped.pth", tmp_path / "out", "vz_biformer_tiny", arguments=arguments)
    direct = pretrained("vz_biformer_tiny", tmp_path / "bare.pth", **arguments)
    x = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if dense:
            pairs = [m.forward_intermediates(x)[1] for m in (direct, again(tmp_path / "out"))]
            assert len(pairs[0]) == 4
        else:
            pairs = [[m(x)] for m in (direct, again(tmp_path / "out"))]
            assert pairs[0][0].shape == (1, 1000)
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    torch.save(narrow("vz_davit_tiny").state_dict(), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def command(source: Path, target: Path, *values: str) -> list[str]:
    given = [f"--arg={key}={value}" for key, value in NARROW["vz_davit_tiny"].items()]
    words = ["weights", "convert", str(source), str(target), "--model", "vz_davit_tiny"]
    return [*words, *given, *(f"--arg={value}" for value in values)]


def test_other_image_channels(mine: Path, tmp_path: Path) -> None:
    assert run(command(mine, tmp_path / "out", "in_chans=1")) == 0
    grey = again(tmp_path / "out")
    before, after = narrow("vz_davit_tiny").state_dict(), grey.state_dict()
    summed = before["stem.conv.weight"].sum(1, keepdim=True)
    assert torch.equal(after["stem.conv.weight"], summed)
    assert all(torch.equal(after[k], v) for k, v in before.items() if k != "stem.conv.weight")
    assert answers(grey, channels=1).shape == (2, 7)


def test_without_the_classifier(mine: Path, tmp_path: Path) -> None:
    assert run(command(mine, tmp_path / "out", "num_classes=0")) == 0
    found = again(tmp_path / "out")
    expected = narrow("vz_davit_tiny")
    expected.reset_classifier(0)
    assert torch.equal(answers(found), answers(expected))


def test_a_classifier_is_not_made_up(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has 7 outputs, not 5: num_classes=0 leaves it out"):
        convert(
            mine,
            tmp_path / "out",
            "vz_davit_tiny",
            arguments={**NARROW["vz_davit_tiny"], "num_classes": 5},
        )
    assert not (tmp_path / "out").exists()


def test_unknown_model_is_answered_with_the_nearest(mine: Path, tmp_path: Path) -> None:
    for name in ("vz_nat_mni", "vz_nat_mni.shilabs_in1k"):
        with pytest.raises(WeightsError, match=r"no model 'vz_nat_mni'; did you mean vz_nat_mini"):
            convert(mine, tmp_path / "out", name)
    with pytest.raises(WeightsError, match="known: shilabs_in1k"):
        convert(mine, tmp_path / "out", "vz_nat_mini.mine")
