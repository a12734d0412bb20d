"""What users get wrong, or have in another form, at every command: a sentence and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitzoo.cli import run
from vitzoo.engine import checkpoint
from vitzoo.engine.runfolder import RunFolder
from vitzoo.tasks.pictures import open_image
from vitzoo.zoo.convert import convert

NAME = "vz_davit_tiny"
ARGUMENTS = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 128], "num_heads": [1, 2, 4, 8]}
AS_VALUE = "model.args={depths: [1,1,1,1], embed_dims: [16,32,64,128], num_heads: [1,2,4,8]}"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitzoo: ")
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7, **ARGUMENTS).eval()


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "mine.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "out"
    convert(file, target, NAME, arguments=ARGUMENTS)
    return target


@pytest.fixture
def image(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def best(model: nn.Module, image: Path) -> int:
    config = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    x = timm.data.create_transform(**config)(Image.open(image))[None]
    return int(model(x).argmax())


@pytest.mark.parametrize("how", ["local-dir", "folder", "file in it", "checkpoint"])
def test_weights_of_ones_own_predict(
    how: str, model: nn.Module, file: Path, folder: Path, image: Path, tmp_path: Path
) -> None:
    given = {
        "local-dir": [f"local-dir:{folder}"],
        "folder": [folder],
        "file in it": [folder / "model.safetensors"],
        "checkpoint": [NAME, f"model.checkpoint={file}", AS_VALUE],
    }[how]
    target = tmp_path / "found.json"
    arguments = ["predict", given[0], image, *given[1:], "--json", target]
    assert run([str(argument) for argument in arguments]) == 0
    found = json.loads(target.read_text())
    assert found["predictions"][0]["top"][0]["index"] == best(model, image)
    assert found["skipped"] == []


def test_weights_of_ones_own_evaluate_and_train(
    capsys: pytest.CaptureFixture[str], file: Path, folder: Path, tmp_path: Path
) -> None:
    digits = ("data.name=sklearn/digits", "data.val_first=40", "data.size=32", "data.workers=0")
    seven = "data.classes=[0,1,2,3,4,5,6]"
    assert run(["eval", f"local-dir:{folder}", *digits, seven]) == 0
    assert "10 classes" in refused(capsys, "eval", f"local-dir:{folder}", *digits)
    given = [f"model.checkpoint={file}", AS_VALUE, *digits]
    assert "was trained for 7" in refused(capsys, "eval", NAME, *given)
    assert f"model.checkpoint={file}" in refused(capsys, "eval", file)
    assert "no readable config.json" in refused(capsys, "eval", f"local-dir:{tmp_path}")


def test_models_without_a_classifier(capsys: pytest.CaptureFixture[str], image: Path) -> None:
    assert "no classifier" in refused(capsys, "predict", "vz_davit_base_fl", image)


@pytest.mark.parametrize(
    "value",
    [
        "data.batch_size=0",
        "data.batch_size=-2",
        "data.workers=-1",
        "data.train_first=-5",
        "data.size=-3",
        "data.interpolation=foo",
        "data.mean=[0.5]",
        "run.accumulate=0",
        "schedule.epochs=0",
        "model.in_chans=2",
        "augment.auto_augment=foo",
    ],
)
def test_values_out_of_range(
    value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refused(capsys, "train", "davit-digits", value, f"run.folder={tmp_path}")
    assert value.partition("=")[0] in said


def test_targets_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], image: Path, file: Path, tmp_path: Path
) -> None:
    assert "must end in" in refused(capsys, "predict", NAME, image, "--draw", tmp_path / "x.xyz")
    assert "is a folder" in refused(capsys, "predict", NAME, image, "--json", tmp_path)
    missing = tmp_path / "none" / "x.json"
    assert "no folder" in refused(capsys, "predict", NAME, image, "--json", missing)
    said = refused(capsys, "train", "davit-digits", f"run.folder={image}")
    assert str(image) in said
    below = [f"--arg={key}={value}".replace(" ", "") for key, value in ARGUMENTS.items()]
    said = refused(capsys, "weights", "convert", file, image / "out", "--model", NAME, *below)
    assert str(image) in said


def test_conversions_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    given = ("weights", "convert", file, tmp_path / "out", "--model")
    assert "nonsense" in refused(capsys, *given, NAME, "--arg", "nonsense=1")
    assert "not YAML" in refused(capsys, *given, NAME, "--arg", "depths=[1,1")
    assert "does not fit vz_flatformer" in refused(capsys, *given, "vz_flatformer")
    assert "the zoo has no model 'resnet18'" in refused(capsys, *given, "resnet18")


def test_names_and_files_that_are_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "no weights 'nope'" in refused(capsys, "info", f"{NAME}.nope")
    assert "is a folder" in refused(capsys, "weights", "verify", tmp_path)
    assert "there is no weights file" in refused(capsys, "weights", "verify", tmp_path / "a.pth")
    assert "there are classification," in refused(capsys, "train", "davit-digits", "task=x")
    said = refused(capsys, "train", "davit-digits", "task=detection")
    assert "davit-digits.yaml has task=classification" in said


def test_runs_whose_checkpoints_are_gone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "davit-digits")
    folder.checkpoints.mkdir(parents=True)
    checkpoint.path_of(folder.checkpoints, 3).write_bytes(b"damaged")
    folder.weights.write_bytes(b"kept")
    train = ("train", "davit-digits", f"run.folder={tmp_path}")
    assert "no recipe.yaml" in refused(capsys, *train)
    from vitzoo.engine.recipe import load_recipe, write_recipe

    folder.recipe.write_text(write_recipe(load_recipe("davit-digits").merged))
    assert "is whole" in refused(capsys, *train)
    assert folder.weights.read_bytes() == b"kept"


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    found = np.asarray(open_image(str(tmp_path / "deep.png"), where="deep.png"))
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_array_equal(found, expected)
