"""A pickle that would run code is refused by every way in, and does not run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import vitzoo  # noqa: F401  (registers the zoo's names)
from vitzoo.cli import run
from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.zoo.files import check_weights

NAME = "vz_nat_mini"


class _Writes:
    """Unpickling this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(params=["pth", "bin", "pth.tar"])
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"pytorch_model.{request.param}"
    torch.save({"model": {"w": torch.zeros(3)}, "optimizer": _Writes(tmp_path / "ran")}, path)
    return path


def create(path: Path) -> None:
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)})


def from_folder(path: Path) -> None:
    folder = path.parent / "folder"
    folder.mkdir()
    path.rename(folder / "pytorch_model.bin")
    config = {"architecture": NAME, "num_classes": 1000, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    timm.create_model(f"local-dir:{folder}", pretrained=True)


def train_from(path: Path) -> None:
    values = ["run.folder=" + str(path.parent / "run"), f"model.checkpoint={path}"]
    train(load_recipe("davit-digits", values))


def command(*arguments: str) -> Callable[[Path], None]:
    def call(path: Path) -> None:
        given = [str(path) if a == "FILE" else a for a in arguments]
        given = [str(path.parent / "out") if a == "OUT" else a for a in given]
        if run(given) != 0:
            raise InputError(f"`vitzoo {' '.join(given)}` ended in exit code 2: refused")

    return call


WAYS: dict[str, Callable[[Path], None]] = {
    "check": check_weights,
    "create_model": create,
    "local-dir": from_folder,
    "train": train_from,
    "convert": command("weights", "convert", "FILE", "OUT", "--model", NAME),
    "info": command("weights", "info", "FILE"),
    "verify": command("weights", "verify", "FILE"),
    "eval": command("eval", "FILE"),
    "predict": command("predict", "FILE", "FILE"),
}


@pytest.mark.parametrize("way", WAYS)
def test_refused(way: str, bad: Path) -> None:
    if bad.suffix != ".pth" and way in ("train", "predict", "local-dir"):
        pytest.skip("one suffix is enough for a way that opens it like the others")
    mark = bad.parent / "ran"
    with pytest.raises(InputError, match=r"refused|damaged|not a"):
        WAYS[way](bad)
    assert not mark.exists(), f"{way} executed the pickle"


def test_the_pickle_is_malicious(bad: Path) -> None:
    """Else the tests above would prove nothing."""
    torch.load(bad, weights_only=False)
    assert (bad.parent / "ran").exists()


def test_resume_passes_over_a_pickle(tmp_path: Path) -> None:
    from vitzoo.engine import checkpoint

    path = checkpoint.path_of(tmp_path, 3)
    torch.save({"model": _Writes(tmp_path / "ran")}, path)
    assert checkpoint.newest(tmp_path) is None
    assert not (tmp_path / "ran").exists()
