"""Exported graphs run again: what they compute is what the model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from tests.registry_names import TIER_2
from vitzoo import info
from vitzoo.engine import export as exporting
from vitzoo.engine.graphs import SUFFIXES, run_graph, write_graph
from vitzoo.errors import InputError

for _package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(_package)

NARROW = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
DEEP = [pytest.param(name, marks=pytest.mark.slow) for name in TIER_2]


def _agrees(model: torch.nn.Module, shape: tuple[int, ...], folder: Path, *, size: bool) -> None:
    dynamic = ("batch", "size") if size else ("batch",)
    program = exporting.trace(model, shape, dynamic)
    for to, suffix in SUFFIXES.items():
        path = folder / f"graph{suffix}"
        write_graph(program, model, to, path, int8=False, shape=shape, dynamic=dynamic)
        worst, shapes = exporting._compare(model, run_graph(path, to), shape, dynamic, half=False)
        assert {x[0] for x in shapes} == {1, 3}
        assert len({x[2:] for x in shapes}) == (5 if size else 1)
        assert worst <= 1e-4, to


def test_any_batch_and_size_in_one_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vz_davit_tiny", num_classes=5, **NARROW).eval()
    _agrees(model, (3, 64, 64), tmp_path, size=True)


@pytest.mark.parametrize("name", DEEP)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    record = info(name)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = not {"any_size", "dynamic_size"} & set(record.limits)
    _agrees(model, record.input_size, tmp_path, size=size)


def test_the_file_beside_the_graph_says_how_to_use_it(tmp_path: Path) -> None:
    values = ["model.pretrained=false", f"model.args={{depths: {list(NARROW['depths'])}}}"]
    made = exporting.export(
        "vz_davit_tiny", "torch-export", values, output=tmp_path / "graph.pt2", features=True
    )
    assert made.agrees
    facts = json.loads(made.sidecar.read_text())
    assert facts["preprocessing"]["mean"]
    assert len(facts["labels"]) == 1000
    assert facts["licence"] == timm.get_pretrained_cfg("vz_davit_tiny").license
    assert facts["measured"]["worst"] <= 1e-4


def test_a_graph_that_is_off_is_called_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vz_davit_tiny", num_classes=5, **NARROW).eval()
    off = lambda x: [model(x) + 1e-3]  # noqa: E731
    worst, shapes = exporting._compare(model, off, (3, 64, 64), (), half=False)
    made = exporting.Export(
        graph=tmp_path / "a",
        sidecar=tmp_path / "a.json",
        worst=worst,
        bound=exporting.BOUNDS["float32"],
        compared=shapes,
        megabytes=1,
        eager_ms=1,
        graph_ms=1,
        ratio=1,
    )
    assert not made.agrees
    assert "OFF" in made.report()


@pytest.mark.parametrize(("to", "dynamic"), [("tflite", ()), ("onnx", ("depth",))])
def test_wrong_words_are_named(to: str, dynamic: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"tflite|depth"):
        exporting.export("vz_davit_tiny", to, dynamic=dynamic)  # type: ignore[arg-type]
