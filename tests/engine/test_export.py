"""Exported graphs run again: what they compute is what the model computes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.registry_names import TIER_2
from vitzoo import info
from vitzoo.engine.export import BOUNDS, Export, export
from vitzoo.engine.graphs import SUFFIXES, run_graph, write_graph
from vitzoo.engine.parity import compare
from vitzoo.engine.traced import Network, trace
from vitzoo.errors import InputError

for _package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(_package)

RunOf = Callable[[str], Path]
FOUR = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
# Symbolic regions take half a minute of tracing: slow tests.
ANY_SIZE: dict[str, dict[str, Any]] = {
    "vz_dinat_mini": {**FOUR, "dilations": ((8,), (1,), (2,), (1,))},
    "vz_biformer_tiny": {"depths": (1, 1, 1, 1)},
    "vz_biformer_stl_nchw": {"depths": (1, 1, 1, 1)},
    "vz_sparsifiner_deit_tiny": {"depth": 2},
}
WHOLE = [pytest.param(name, marks=pytest.mark.slow) for name in TIER_2]


def _network(name: str, shape: tuple[int, int, int], **arguments: Any) -> Network:
    torch.manual_seed(0)
    return Network(timm.create_model(name, **arguments).eval(), shape, {}, ("logits",))


def assert_agrees(
    network: Network, folder: Path, *, size: bool, formats: Sequence[str] = tuple(SUFFIXES)
) -> None:
    dynamic = ("batch", "size") if size else ("batch",)
    start = time.process_time()
    program = trace(network.model, network.shape, dynamic)
    assert time.process_time() - start < 60
    for to in formats:
        path = folder / f"graph{SUFFIXES[to]}"
        write_graph(program, network, to, path, int8=False, dynamic=dynamic)
        worst, shapes = compare(network, run_graph(path, to), dynamic, half=False)
        assert {x[0] for x in shapes} == {1, 3}
        assert len({x[2:] for x in shapes}) == (5 if size else 1)
        assert worst <= BOUNDS["float32"], to


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=() if to == "onnx" else pytest.mark.slow) for to in SUFFIXES]
)
def test_any_batch_and_size_in_one_graph(to: str, tmp_path: Path) -> None:
    network = _network("vz_davit_tiny", (3, 64, 64), num_classes=5, **FOUR)
    assert_agrees(network, tmp_path, size=True, formats=(to,))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if "sparsifiner" in name else pytest.mark.slow)
        for name in ANY_SIZE
    ],
)
def test_tiles_regions_and_budgets_follow_the_size(name: str, tmp_path: Path) -> None:
    network = _network(name, (3, 224, 224), num_classes=5, **ANY_SIZE[name])
    assert_agrees(network, tmp_path, size=True, formats=("torch-export",))


@pytest.mark.parametrize("to", SUFFIXES)
@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_model(name: str, to: str, tmp_path: Path) -> None:
    record = info(name)
    size = not {"any_size", "dynamic_size"} & set(record.limits)
    assert_agrees(_network(name, record.input_size), tmp_path, size=size, formats=(to,))


@pytest.mark.parametrize(
    ("task", "to"),
    [
        ("classification", "torch-export"),
        ("detection", "onnx"),
        pytest.param("segmentation", "onnx", marks=pytest.mark.slow),
        pytest.param("segmentation", "torch-export", marks=pytest.mark.slow),
        pytest.param("segmentation", "openvino", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_exported_with_what_its_user_needs(
    task: str, to: Any, run_of: RunOf, tmp_path: Path
) -> None:
    run = run_of(task)
    dynamic = () if task == "detection" else ("batch", "size")
    made = export(str(run), to, dynamic=dynamic, output=tmp_path / f"graph{SUFFIXES[to]}")
    assert made.agrees
    if dynamic:
        assert len({shape[-2:] for shape in made.compared}) == 5
        assert made.accuracy is not None
        assert made.accuracy["graph"] == pytest.approx(made.accuracy["eager"], abs=0.1)
    facts = json.loads(made.sidecar.read_text())
    assert facts["task"] == task
    assert len(facts["labels"]) == {"classification": 10, "detection": 5, "segmentation": 6}[task]
    assert facts["preprocessing"]
    assert facts["licence"] == timm.get_pretrained_cfg("vz_davit_tiny").license
    assert {"torch", "timm", "vitzoo"} <= set(facts["versions"])
    assert facts["measured"]["worst"] <= BOUNDS["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "segformer", "dpt", "unet"])
@pytest.mark.parametrize("to", SUFFIXES)
def test_every_decoder_at_any_size(head: str, to: str, tmp_path: Path) -> None:
    import vitzoo

    torch.manual_seed(0)
    model = vitzoo.build_segmenter("vz_davit_tiny", head=head, num_classes=4, **FOUR).eval()
    network = Network(model, (3, 64, 96), {}, ("logits",))
    assert_agrees(network, tmp_path, size=True, formats=(to,))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "fcos", "faster_rcnn"])
def test_every_detector(head: str, tmp_path: Path) -> None:
    import vitzoo
    from vitzoo.engine.graphs import write_detector
    from vitzoo.engine.traced import OneImage

    torch.manual_seed(0)
    score = "score_thresh" if head in ("retinanet", "fcos") else "box_score_thresh"
    model = vitzoo.build_detector(
        "vz_davit_tiny",
        head=head,
        num_classes=4,
        channels=16,
        backbone=FOUR,
        min_size=96,
        max_size=128,
        **{score: 0.0},
    )
    keys = ("boxes", "scores", "labels")
    network = Network(OneImage(model, keys).eval(), (3, 96, 128), {}, keys, batched=False)
    path = tmp_path / "graph.onnx"
    write_detector(network, path)
    worst, _ = compare(network, run_graph(path, "onnx"), (), half=False)
    assert worst <= BOUNDS["float32"]


@pytest.mark.parametrize(
    ("to", "precision"),
    [
        pytest.param("onnx", "int8", marks=pytest.mark.slow),
        pytest.param("torch-export", "int8", marks=pytest.mark.slow),
        pytest.param("openvino", "int8", marks=pytest.mark.slow),
        pytest.param("onnx", "half", marks=pytest.mark.slow),
        pytest.param("torch-export", "half", marks=pytest.mark.slow),
        pytest.param("openvino", "half", marks=pytest.mark.slow),
    ],
)
def test_fewer_bits_are_smaller_and_say_what_they_cost(
    to: Any, precision: str, run_of: RunOf, tmp_path: Path
) -> None:
    if to == "torch-export" and precision == "int8":
        pytest.importorskip("torchao")
    run, suffix = str(run_of("classification")), SUFFIXES[to]
    made = export(run, to, output=tmp_path / f"small{suffix}", **{precision: True})
    assert made.agrees
    assert made.worst > 0
    assert made.accuracy is not None
    assert made.accuracy["samples"] == 16
    assert "top1 on 16 labelled samples: eager" in made.report()
    facts = json.loads(made.sidecar.read_text())
    assert facts["precision"] == {"int8": "int8", "half": "float16"}[precision]


def test_features_are_exported_without_a_head(tmp_path: Path) -> None:
    values = ["model.pretrained=false", "model.args={depths: [1, 1, 1, 1]}", "data.size=64"]
    made = export(
        "vz_davit_tiny", "torch-export", values, output=tmp_path / "graph.pt2", features=True
    )
    assert made.agrees
    maps = run_graph(made.graph, "torch-export")(torch.randn(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == [16, 8, 4, 2]
    facts = json.loads(made.sidecar.read_text())
    assert (facts["task"], len(facts["labels"])) == ("features", 1000)


def test_a_graph_that_is_off_is_called_off(tmp_path: Path) -> None:
    network = _network("vz_davit_tiny", (3, 64, 64), num_classes=5, **FOUR)
    worst, shapes = compare(network, lambda x: [network.model(x) + 1e-3], (), half=False)
    made = Export(
        graph=tmp_path / "a",
        sidecar=tmp_path / "a.json",
        worst=worst,
        bound=BOUNDS["float32"],
        compared=shapes,
        megabytes=1,
        eager_ms=1,
        graph_ms=1,
        ratio=1,
    )
    assert not made.agrees
    assert "OFF" in made.report()


@pytest.mark.parametrize(
    ("task", "to", "options", "message"),
    [
        ("classification", "tflite", {}, "tflite"),
        ("classification", "onnx", {"dynamic": ("depth",)}, "depth"),
        ("classification", "onnx", {"half": True, "int8": True}, "exclude each other"),
        ("detection", "openvino", {}, "--to onnx can"),
        ("detection", "onnx", {"dynamic": ("batch",)}, "of one size"),
        ("detection", "onnx", {"features": True}, "features of a run of detection"),
    ],
)
def test_wrong_words_are_named(
    task: str, to: Any, options: dict[str, Any], message: str, run_of: RunOf
) -> None:
    with pytest.raises(InputError, match=message):
        export(str(run_of(task)), to, **options)
