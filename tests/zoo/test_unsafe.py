"""A pickle that would run code is refused by every way in, and does not run."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitzoo  # noqa: F401  (registers the zoo's names)
from vitzoo.cli import run
from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.zoo.beside import read_over
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.files import check_weights
from vitzoo.zoo.formats import read_weights

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
    """A command in which FILE is the pickle; what it says becomes the error's text."""

    def call(path: Path) -> None:
        new = {"OUT": path.parent / "out", "IMAGE": path.parent / "image.png"}
        Image.new("RGB", (32, 32)).save(new["IMAGE"])
        given = [str(new.get(a, a)).replace("FILE", str(path)) for a in arguments]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = run(given)
        if code:
            assert str(path) in said.getvalue()
            raise InputError(said.getvalue())

    return call


WAYS: dict[str, Callable[[Path], None]] = {
    "check": check_weights,
    "create_model": create,
    "local-dir": from_folder,
    "train": train_from,
    "convert": command("weights", "convert", "FILE", "OUT", "--model", NAME),
    "info": command("weights", "info", "FILE"),
    "verify": command("weights", "verify", "FILE"),
    "eval": command("eval", NAME, "model.checkpoint=FILE", "data.name=sklearn/digits"),
    "predict": command("predict", NAME, "IMAGE", "model.checkpoint=FILE"),
}


@pytest.mark.parametrize("way", WAYS)
def test_refused(way: str, bad: Path) -> None:
    mark = bad.parent / "ran"
    with pytest.raises(InputError, match=r"was refused: it wants to import \S*mkdir") as raised:
        WAYS[way](bad)
    assert "safe_globals" not in str(raised.value)
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


def _of_a_library(patch: pytest.MonkeyPatch, name: str, base: type = object) -> type:
    """A class that is pickled under a name of a library which is there as long as the patch."""
    module, _, last = name.rpartition(".")
    parts = module.split(".")
    for i in range(len(parts)):
        package = ".".join(parts[: i + 1])
        patch.setitem(sys.modules, package, types.ModuleType(package))
    found = type(last, (base,), {"__module__": module})
    setattr(sys.modules[module], last, found)
    return found


def _kept(trainer: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What trainers of that kind write beside the weights."""
    if trainer == "ConvNeXt's":
        return {"optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}}
    if trainer == "Swin's":
        config = _of_a_library(patch, "yacs.config.CfgNode", dict)(lr=1.0)
        config.__dict__["__immutable__"] = True
        return {"config": config}
    if trainer == "hydra's":
        config = _of_a_library(patch, "omegaconf.dictconfig.DictConfig")()
        config.__dict__ |= {"_content": {"lr": 1.0}, "_metadata": [Any, dict]}
        return {"args": config, "out": Path("runs"), "flags": collections.defaultdict(list, a=[1])}
    if trainer == "mmengine's":
        history = _of_a_library(patch, "mmengine.logging.history_buffer.HistoryBuffer")
        buffer = history()
        buffer.__dict__ |= {"_log": np.zeros(2), "_last": collections.deque([1], maxlen=2)}
        return {"message_hub": {"loss": buffer}, "meta": {"best": np.float32(1)}}
    return {"args": argparse.Namespace(lr=1.0)}


@pytest.mark.parametrize(
    ("trainer", "zipped"),
    [
        *(
            (trainer, True)
            for trainer in ("timm's", "ConvNeXt's", "Swin's", "hydra's", "mmengine's")
        ),
        # The format before PyTorch 1.6.
        *((trainer, False) for trainer in ("timm's", "ConvNeXt's", "Swin's")),
    ],
)
def test_what_trainers_keep_beside_the_weights(
    tmp_path: Path, trainer: str, *, zipped: bool
) -> None:
    narrow = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128), "num_classes": 3}
    narrow |= {"num_heads": (1, 2, 4, 8)}
    model = timm.create_model(NAME, **narrow)
    path = tmp_path / "model_best.pth.tar"
    with pytest.MonkeyPatch.context() as patch:
        content = {"state_dict": model.state_dict()} | _kept(trainer, patch)
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    again = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **narrow
    )
    assert torch.equal(again.head.fc.weight, model.head.fc.weight)


def test_readers_do_not_take_each_others_names(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace()}, path)
    before = set(torch.serialization.get_safe_globals())
    with read_over(path):
        read_weights(path)
        torch.load(path, weights_only=True)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: read_weights(path), range(40)))
    assert len(found) == 40
    assert set(torch.serialization.get_safe_globals()) == before


def test_arrays_are_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model": {"a": np.ones(2)}}, path)
    with pytest.raises(WeightsError, match=r"a \(foreign object\)"):
        read_weights(path)


class _CallsNumpy:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return np.save, (str(self.target), 1.0)


def test_nothing_beside_the_weights_is_called(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model": {"a": torch.ones(2)}, "x": _CallsNumpy(tmp_path / "ran.npy")}, path)
    assert list(read_weights(path)["model"]) == ["a"]
    assert not (tmp_path / "ran.npy").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran.npy").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": None}, r"its entries are state_dict \(NoneType\)"),
        ({"model": [1]}, r"its entries are model \(list\)"),
        ({1: torch.zeros(2)}, "one of its keys is 1"),
        ([torch.zeros(2)], "holds a list"),
    ],
)
def test_files_without_named_weights(content: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    for way in ("create_model", "convert", "info", "train"):
        with pytest.raises(InputError, match=says):
            WAYS[way](path)


def test_damaged_bytes_are_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"hello, this is no pickle")
    with pytest.raises(InputError, match=r"weights\.pth (is not a whole|was refused)[^:]*[^\d]*$"):
        check_weights(path)
