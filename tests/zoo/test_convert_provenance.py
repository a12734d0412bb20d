"""A converted folder states an origin only where the file surely is the published one."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor

import vitzoo  # noqa: F401  (registers the zoo's names)
from tests.golden_cases import load_case
from vitzoo.zoo import provenance
from vitzoo.zoo.convert import convert
from vitzoo.zoo.download import _target_of
from vitzoo.zoo.errors import CorruptFileError
from vitzoo.zoo.files import sha256_of
from vitzoo.zoo.published import find_entry

NARROW = {"depths": [1, 1, 1, 1], "embed_dims": [32, 32, 64, 64]}
TAG = "vz_nat_mini.shilabs_in1k"
ENTRY = find_entry(TAG)
assert ENTRY


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """A file like the authors', of 1000 classes."""
    return load_case("nat", "nat_mini_224").weights()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def narrow_file(path: Path, classes: int = 7, **kwargs: Any) -> Path:
    model = timm.create_model("vz_nat_mini", num_classes=classes, **NARROW, **kwargs)
    torch.save(model.state_dict(), path)
    return path


def saved(weights: dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return path


def states(folder: Path) -> bool:
    """Whether a folder states the published weights' origin; it is all or nothing."""
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    text = (folder / "README.md").read_text()
    card = ModelCard(text).data
    said = [config.get(key) for key in ("tag", "license", "origin_url", "paper_ids")]
    said += [card.license, card.eval_results, card.datasets, "SHI-Labs" in text, "81.8" in text]
    assert all(said) or not any(said), said
    assert bool(said[0]) == ("origin and licence of the weights: not stated" not in text)
    if said[0]:
        assert (config["tag"], config["license"]) == ("shilabs_in1k", "mit")
        assert config["origin_url"] == ENTRY.origin  # type: ignore[union-attr]
    return bool(said[0])


@pytest.mark.parametrize("model", [None, "vz_nat_mini"])
def test_a_name_proves_nothing(
    model: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = narrow_file(tmp_path / "nat_mini.pth")
    with caplog.at_level(logging.WARNING, "vitzoo.zoo"):
        convert(file, tmp_path / "out", model, arguments=NARROW)
    assert not states(tmp_path / "out")
    assert f"give --model {TAG}" in caplog.text


def test_nor_does_a_name_with_the_right_shapes(whole: dict[str, Tensor], tmp_path: Path) -> None:
    convert(saved(whole, tmp_path / "nat_mini.pth"), tmp_path / "out")
    assert not states(tmp_path / "out")


def test_an_own_file_inherits_nothing_from_the_variant(tmp_path: Path) -> None:
    file = narrow_file(tmp_path / "mine.pth", classes=1000)
    convert(file, tmp_path / "out", "vz_nat_mini", arguments=NARROW)
    assert not states(tmp_path / "out")
    torch.save(timm.create_model("vz_halonet_h0").state_dict(), tmp_path / "h0.pth")
    # Nobody published this variant, but its code has a licence.
    convert(tmp_path / "h0.pth", tmp_path / "h0", "vz_halonet_h0")
    assert not states(tmp_path / "h0")


def test_the_tag_that_the_user_names_is_stated(whole: dict[str, Tensor], tmp_path: Path) -> None:
    convert(saved(whole, tmp_path / "w.pth"), tmp_path / "out", TAG)
    assert states(tmp_path / "out")


def test_the_tag_is_not_stated_of_another_class_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = timm.create_model("vz_nat_mini", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, "vitzoo.zoo"):
        convert(tmp_path / "w.pth", tmp_path / "out", TAG)
    assert not states(tmp_path / "out")
    assert "classifier has 7 outputs, theirs 1000" in caplog.text


@pytest.mark.parametrize(
    ("facts", "doubt"),
    [
        ({"classes": None}, "0 outputs"),
        ({"channels": 1}, "images of 1 channels"),
        ({"arguments": {"kernel_size": 5}}, "another kernel_size"),
        ({"arguments": {"num_classes": 0}}, "another num_classes"),
        ({"arguments": {"alpha": 0.9}}, None),
    ],
)
def test_nor_of_another_architecture(
    facts: dict[str, Any], doubt: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    own = dataclasses.replace(ENTRY, arguments=(("alpha", 0.9),))  # type: ignore[type-var]
    match = provenance.Match(entry=own, certain=True)
    with caplog.at_level(logging.WARNING, "vitzoo.zoo"):
        found = match.claimed(**{"classes": 1000, "channels": 3, "arguments": {}, **facts})
    assert found is (own if doubt is None else None)
    assert (doubt or "") in caplog.text


def test_a_file_of_the_cache_is_recognised(whole: dict[str, Tensor], tmp_path: Path) -> None:
    file = saved(whole, _target_of(ENTRY.sources[0], None))  # type: ignore[union-attr]
    assert file.name == "projects--nat--checkpoints--CLS--nat_mini.pth"
    convert(file, tmp_path / "out")
    assert states(tmp_path / "out")
    elsewhere = provenance.match_of(file.rename(tmp_path / file.name), "vz_nat_mini")
    assert elsewhere is not None
    assert not elsewhere.certain


def test_a_file_of_the_hubs_cache_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, file_download

    hub = tmp_path / "hub"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(hub), raising=False)
    file = (
        hub / "models--timm--davit_tiny.msft_in1k" / "snapshots" / ("c" * 40) / "model.safetensors"
    )
    file.parent.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, file)
    refs = hub / "models--timm--davit_tiny.msft_in1k" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c" * 40)
    match = provenance.match_of(file, None)
    assert match is not None
    assert (match.entry.name, match.certain) == ("vz_davit_tiny.msft_in1k", True)


def test_a_changed_file_of_the_cache_is_refused(whole: dict[str, Tensor], tmp_path: Path) -> None:
    file = saved(whole, _target_of(ENTRY.sources[0], None))  # type: ignore[union-attr]
    file.with_name(file.name + ".sha256").write_text("0" * 64)
    with pytest.raises(CorruptFileError, match="removed"):
        convert(file, tmp_path / "out")
    assert not file.exists()


@pytest.mark.parametrize("how", ["sha256", "digits in the address"])
def test_a_known_hash_is_recognised(
    how: str, whole: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(whole, tmp_path / "w.pth")
    found = sha256_of(file)
    facts: dict[str, Any] = {"sources": (f"https://host/nat_mini-{found[:8]}.pth",)}
    facts = {"sha256": found} if how == "sha256" else facts
    known = dataclasses.replace(ENTRY, **facts)  # type: ignore[type-var]
    monkeypatch.setattr(provenance, "all_entries", lambda: [known])
    match = provenance.match_of(file, None)
    assert match == provenance.Match(entry=known, certain=True)


def test_a_detectors_figures_are_not_its_backbones(tmp_path: Path) -> None:
    case = load_case("litv2", "litv2_small_dense_224")
    weights = {f"backbone.{name}": value for name, value in case.weights().items()}
    file = saved({"state_dict": weights}, tmp_path / "w.pth")
    convert(file, tmp_path / "out", "vz_litv2_small.ziplab_mask_rcnn_coco")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "of the whole detection model whose backbone this is" in text
    card = ModelCard(text).data
    assert (card.eval_results, card.pipeline_tag) == (None, "image-feature-extraction")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert config["tag"] == "ziplab_mask_rcnn_coco"
