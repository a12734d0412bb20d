"""An authors' file, converted, loads through timm to the same numbers; sharing it keeps it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo
from tests.backbones.test_golden_flatformer import pillars_of
from tests.golden_cases import GOLDEN, GoldenCase, load_case, pretrained
from tests.zoo.hub_server import Hub
from vitzoo.cli import run
from vitzoo.zoo.convert import convert, look_into
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.formats import unwrap
from vitzoo.zoo.model_card import push

# Golden case of a whole model -> (model, what it is built with).
DENSE = {"dense": True}
CASES: dict[tuple[str, str], tuple[str, dict]] = {
    ("davit", "davit_tiny_224"): ("vz_davit_tiny", {}),
    ("davit", "davit_small_224"): ("vz_davit_small", {}),
    ("davit", "davit_tiny_dense_224"): ("vz_davit_tiny", DENSE),
    ("litv2", "litv2_small_224"): ("vz_litv2_small", {}),
    ("litv2", "litv2_medium_224"): ("vz_litv2_medium", {}),
    ("litv2", "litv2_small_dense_224"): ("vz_litv2_small", DENSE),
    ("biformer", "biformer_tiny_224"): ("vz_biformer_tiny", {}),
    ("biformer", "biformer_small_224"): ("vz_biformer_small", {}),
    ("biformer", "biformer_stl_224"): ("vz_biformer_stl", {}),
    ("biformer", "biformer_stl_nchw_224"): ("vz_biformer_stl_nchw", {}),
    ("biformer", "biformer_tiny_dense_256x192"): ("vz_biformer_tiny", DENSE),
    ("nat", "nat_mini_224"): ("vz_nat_mini", {}),
    ("nat", "dinat_mini_224"): ("vz_dinat_mini", {}),
    ("halonet", "halonet26t_256"): ("vz_halonet26t", {}),
    ("halonet", "halonet50ts_256"): ("vz_halonet50ts", {}),
    ("halonet", "halonet_h1_256"): ("vz_halonet_h1_timm", {}),
    ("halonet", "uhalonet_micro_224"): ("vz_uhalonet_micro", {}),
    ("halonet", "uhalonet_micro_dense_256x192"): ("vz_uhalonet_micro", DENSE),
    ("sparsifiner", "sparsifiner_deit_tiny_224"): ("vz_sparsifiner_deit_tiny", {}),
    ("sparsifiner", "sparsifiner_deit_small_224"): ("vz_sparsifiner_deit_small", {}),
    ("flatformer", "backbone_b1_600"): ("vz_flatformer", {}),
    ("flatformer", "backbone_b2_1500"): ("vz_flatformer", {}),
}
# The smallest of each family.
QUICK = {
    "davit_tiny_224",
    "litv2_small_224",
    "biformer_tiny_224",
    "nat_mini_224",
    "halonet26t_256",
    "uhalonet_micro_224",
    "sparsifiner_deit_tiny_224",
    "backbone_b1_600",
}


def cases() -> list:
    return [
        pytest.param(*key, id=key[1], marks=() if key[1] in QUICK else pytest.mark.slow)
        for key in CASES
    ]


def test_every_golden_model_is_converted() -> None:
    whole = set()
    for path in GOLDEN.glob("*/*.json"):
        outputs = json.loads(path.read_text())["outputs"]
        if "logits" in outputs or "_dense_" in path.stem or path.stem.startswith("backbone_"):
            whole.add(path.stem)
    assert len(whole) > 15
    assert whole <= {name for _, name in CASES}


def answers(model: nn.Module, case: GoldenCase) -> list[Tensor]:
    if case.name.startswith("backbone_"):
        with torch.no_grad():
            return [model.forward_features(*pillars_of(case))]
    x = case.input()
    with torch.no_grad():
        if getattr(model, "dense", False):
            return list(model.forward_intermediates(x, intermediates_only=True))
        return [model(x)]


@pytest.mark.parametrize(("family", "name"), cases())
def test_converted_gives_the_same(family: str, name: str, tmp_path: Path) -> None:
    model, arguments = CASES[family, name]
    case = load_case(family, name)
    file = case.save(tmp_path)
    convert(file, tmp_path / "out", model, arguments=arguments)
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    direct = pretrained(model, file, **arguments)
    expected, found = answers(direct, case), answers(again, case)
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for output in ("logits", "pillars"):
        if output in case.outputs:
            case.check(output, found[0])


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vz_nat_mini", num_classes=7, depths=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64)
    ).eval()


ARGUMENTS = {"depths": [1, 1, 1, 1], "embed_dims": [32, 32, 64, 64]}


@pytest.fixture
def folder(narrow: nn.Module, tmp_path: Path) -> Path:
    torch.save({"state_dict": narrow.state_dict()}, tmp_path / "mine.pth")
    convert(tmp_path / "mine.pth", tmp_path / "out", "vz_nat_mini", arguments=ARGUMENTS)
    return tmp_path / "out"


def test_class_count_of_the_file_is_kept(folder: Path, narrow: nn.Module) -> None:
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), narrow(x))


WRAPPINGS = {
    "model": lambda w: {"model": w, "epoch": 3},
    "state_dict": lambda w: {"state_dict": w},
    "ema": lambda w: {"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": w},
    "module": lambda w: {f"module.{k}": v for k, v in w.items()},
    "module in model": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "mmdet": lambda w: {
        "state_dict": {f"backbone.{k}": v for k, v in w.items()}
        | {"neck.w": torch.zeros(1), "bbox_head.w": torch.zeros(1)},
        "meta": {"epoch": 12},
    },
    "mmseg": lambda w: {
        "state_dict": {f"module.backbone.{k}": v for k, v in w.items()}
        | {"module.decode_head.w": torch.zeros(1)}
    },
    "mmpretrain": lambda w: {
        "state_dict": {f"backbone.{k}": v for k, v in w.items() if not k.startswith("head.")}
        | {f"head.fc.{k[5:]}": v for k, v in w.items() if k.startswith("head.")}
    },
    "our segmenter": lambda w: (
        {f"backbone.body.model.{k}": v for k, v in w.items()} | {"decoder.w": torch.zeros(1)}
    ),
    "our detector": lambda w: (
        {f"backbone.maps.body.model.{k}": v for k, v in w.items()}
        | {"backbone.fpn.w": torch.zeros(1), "rpn.w": torch.zeros(1)}
    ),
}


@pytest.mark.parametrize("how", WRAPPINGS)
def test_wrappers_are_taken_off(how: str) -> None:
    weights = {"stem.w": torch.ones(2), "head.weight": torch.ones(3, 2)}
    assert unwrap(WRAPPINGS[how](weights)).keys() == weights.keys()


def test_of_model_and_average_the_evaluated_one_is_taken(narrow: nn.Module, tmp_path: Path) -> None:
    weights = narrow.state_dict()
    other = {name: torch.zeros_like(value) for name, value in weights.items()}
    file = tmp_path / "deit.pth"
    # As trainers in DeiT's manner write their best file, which they choose by `model`.
    torch.save({"model": weights, "model_ema": other, "epoch": 3}, file)
    assert torch.equal(unwrap(torch.load(file))["norm.weight"], weights["norm.weight"])
    overlay = {"file": str(file), "num_classes": 7}
    loaded = timm.create_model(
        "vz_nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, **ARGUMENTS
    )
    convert(file, tmp_path / "out", "vz_nat_mini", arguments=ARGUMENTS)
    converted = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    for model in (loaded, converted):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    # As timm's trainer writes it.
    torch.save({"state_dict": other, "state_dict_ema": weights}, file)
    loaded = timm.create_model(
        "vz_nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, **ARGUMENTS
    )
    assert torch.equal(loaded.norm.weight, weights["norm.weight"])


def test_misfit_is_named_with_the_nearest(narrow: nn.Module, tmp_path: Path) -> None:
    weights = dict(narrow.state_dict())
    weights["stages.0.blocks.0.attn.qvk.weight"] = weights.pop("stages.0.blocks.0.attn.qkv.weight")
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as failure:
        convert(tmp_path / "w.pth", tmp_path / "out", "vz_nat_mini", arguments=ARGUMENTS)
    text = str(failure.value)
    assert "stages.0.blocks.0.attn.qkv.weight, nearest stages.0.blocks.0.attn.qvk.weight" in text
    assert "unexpected" in text


def test_info_names_the_model_by_its_size(tmp_path: Path) -> None:
    path = load_case("nat", "nat_mini_224").save(tmp_path)
    facts = look_into(path)
    assert facts.params == vitzoo.info("vz_nat_mini").params
    assert (facts.wrapper, facts.prefix, facts.dtypes) == (None, None, ("float32",))


def test_commands(narrow: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine-00000000.pth"
    torch.save({"model": narrow.state_dict()}, file)
    assert run(["weights", "info", str(file)]) == 0
    assert "wrapper  model" in capsys.readouterr().out
    # Digits in the name of a user's file are no hash.
    assert run(["weights", "verify", str(file)]) == 0
    assert "no hash is known" in capsys.readouterr().out
    given = ["weights", "convert", str(file), str(tmp_path / "out"), "--model", "vz_nat_mini"]
    given += [f"--arg={key}={value}" for key, value in ARGUMENTS.items()]
    assert run(given) == 0
    assert run(given) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert run(["weights", "list", "--family", "davit", "--licence", "apache-2.0"]) == 0
    assert "vz_davit_tiny.msft_in1k" in capsys.readouterr().out
    assert run(["weights", "list", "--state", "lost"]) == 2
    assert run(["weights", "fetch", "vz_davit_tiny.msft"]) == 2
    assert "did you mean vz_davit_tiny.msft_in1k" in capsys.readouterr().err


SHARE = """
import sys
import timm, torch
from vitzoo.cli import run
folder, target = sys.argv[1:]
assert run(["weights", "push", folder, "me/narrow"]) == 0
again = timm.create_model("hf-hub:me/narrow", pretrained=True).eval()
torch.save(again.state_dict(), target)
"""


def test_pushed_and_loaded_from_the_hub(folder: Path, narrow: nn.Module, tmp_path: Path) -> None:
    with Hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
        }
        target = tmp_path / "again.pth"
        command = [sys.executable, "-c", SHARE, str(folder), str(target)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"{hub.address}/me/narrow" in done.stdout
        assert "/api/repos/create" in hub.posts
        for name in ("model.safetensors", "config.json", "README.md"):
            assert hub.files[f"me/narrow/{name}"] == (folder / name).read_bytes()
    assert b'"hf-hub:me/narrow"' in hub.files["me/narrow/README.md"]
    found = torch.load(target, weights_only=True)
    assert all(torch.equal(found[k], v) for k, v in narrow.state_dict().items())


def test_pushing_what_convert_did_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="vitzoo weights convert"):
        push(tmp_path, "me/narrow")


def test_card_states_import_licence_and_published_figures(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    file = load_case("nat", "nat_mini_224").save(tmp_path)
    convert(file, tmp_path / "out", "vz_nat_mini.shilabs_in1k")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "import vitzoo" in text
    card = ModelCard(text).data
    assert (card.license, card.library_name) == ("mit", "timm")
    (result,) = card.eval_results
    assert (result.metric_value, result.verified, result.dataset_name) == (
        81.8,
        False,
        "ImageNet-1K",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "vz_nat_mini"
