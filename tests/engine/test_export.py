"""Exported graphs run again: what they compute is what the model computes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.registry_names import TIER_0, TIER_2, parameters
from vitzoo import info
from vitzoo.engine import checkpoint, graphs, parity
from vitzoo.engine.export import BOUNDS, Export, export
from vitzoo.engine.graphs import SUFFIXES, run_graph, write_graph
from vitzoo.engine.parity import Parity, compare, compare_detector, fresh_inputs
from vitzoo.engine.parity_choices import compare_but_for_choices
from vitzoo.engine.recipe import merge
from vitzoo.engine.traced import Network, OneImage, network_of, trace
from vitzoo.errors import InputError
from vitzoo.tasks import task_class

for _package in ("onnx", "onnxscript", "openvino"):
    pytest.importorskip(_package)
onnxruntime = pytest.importorskip("onnxruntime")

RunOf = Callable[[str], Path]
FOUR = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
# Two stages show what sizes do to a graph; every further one is seconds of tracing and writing.
TWO = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)}
# Symbolic regions take half a minute of tracing: slow tests.
ANY_SIZE: list[tuple[str, dict[str, Any]]] = [
    ("vz_dinat_mini", {**FOUR, "dilations": ((8,), (1,), (2,), (1,))}),
    ("vz_biformer_tiny", {"depths": (1, 1, 1, 1)}),
    ("vz_biformer_stl_nchw", {"depths": (1, 1, 1, 1)}),
    ("vz_sparsifiner_deit_tiny", {"depth": 2}),
    ("vz_sparsifiner_deit_tiny", {"depth": 3, "pruning_blocks": (1,), "token_keep_rate": 0.7}),
]
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
        bound = BOUNDS["float32"]
        found = compare_but_for_choices(network, run_graph(path, to), to, dynamic, bound=bound)
        assert {x[0] for x in found.shapes} == {1, 3}
        assert len({x[2:] for x in found.shapes}) == (5 if size else 1)
        assert found.worst <= bound, to


@pytest.mark.parametrize(
    ("stages", "to"),
    [
        pytest.param(TWO, "onnx", id="two-onnx"),
        *(pytest.param(FOUR, to, marks=pytest.mark.slow, id=f"four-{to}") for to in SUFFIXES),
    ],
)
def test_any_batch_and_size_in_one_graph(stages: dict[str, Any], to: str, tmp_path: Path) -> None:
    network = _network("vz_davit_tiny", (3, 64, 64), num_classes=5, **stages)
    assert_agrees(network, tmp_path, size=True, formats=(to,))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, arguments, marks=() if "sparsifiner" in name else pytest.mark.slow)
        for name, arguments in ANY_SIZE
    ],
)
def test_tiles_regions_and_budgets_follow_the_size(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    network = _network(name, (3, 224, 224), num_classes=5, **arguments)
    assert_agrees(network, tmp_path, size=True, formats=("torch-export",))


@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    record = info(name)
    size = not {"any_size", "dynamic_size"} & set(record.limits)
    assert_agrees(_network(name, record.input_size), tmp_path, size=size)


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
        assert len({shape[-2:] for shape in made.parity.shapes}) == 5
        assert isinstance(made.accuracy, dict)
        assert made.accuracy["graph"] == pytest.approx(made.accuracy["eager"], abs=0.1)
    facts = json.loads(made.sidecar.read_text())
    assert facts["task"] == task
    assert len(facts["labels"]) == {"classification": 10, "detection": 5, "segmentation": 6}[task]
    assert facts["preprocessing"]
    assert facts["licence"] == timm.get_pretrained_cfg("vz_davit_tiny").license
    assert {"torch", "timm", "vitzoo"} <= set(facts["versions"])
    assert facts["measured"]["worst"] <= BOUNDS["float32"]
    if task == "detection":
        # Noise and the run's one held-out image.
        assert len(facts["measured"]["compared"]) == 2
        assert facts["measured"]["objects"] > 0


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

    torch.manual_seed(0)
    everything: dict[str, Any] = {"box_score_thresh": 0.0, "box_detections_per_img": 10_000}
    if head in ("retinanet", "fcos"):
        everything = {"score_thresh": 0.0, "detections_per_img": 10_000, "topk_candidates": 10_000}
    model = vitzoo.build_detector(
        "vz_davit_tiny",
        head=head,
        num_classes=4,
        channels=64,
        backbone=FOUR,
        min_size=96,
        max_size=128,
        **everything,
    )
    if hasattr(model, "head"):
        # Fresh, it gives every anchor nearly one score, and rounding would decide who stays.
        for module in model.head.classification_head.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    keys = ("boxes", "scores", "labels")
    network = Network(OneImage(model, keys).eval(), (3, 96, 128), {}, keys, batched=False)
    path = tmp_path / "graph.onnx"
    write_detector(network, path)
    images = fresh_inputs(network, ())
    found = compare_detector(network, run_graph(path, "onnx"), tmp_path / "b.onnx", images)
    assert found.worst <= BOUNDS["float32"]
    assert found.objects
    assert found.threshold is None


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights, not the graph around them, make up its size."""
    from tests.engine.tiny_runs import tiny_run

    folder = tmp_path_factory.mktemp("wide")
    widths = "{depths: [1, 1], embed_dims: [128, 256], num_heads: [4, 8]}"
    return tiny_run("classification", folder, folder, f"model.args={widths}")


def _exported(run: Path, to: Any, folder: Path, **options: Any) -> Export:
    made = export(str(run), to, output=folder / f"graph{SUFFIXES[to]}", **options)
    assert made.agrees
    return made


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=() if to == "onnx" else pytest.mark.slow) for to in SUFFIXES]
)
def test_int8_is_smaller_and_says_what_it_costs(to: Any, wide_run: Path, tmp_path: Path) -> None:
    if to == "torch-export":
        pytest.importorskip("torchao")
    wide = _exported(wide_run, to, tmp_path / "wide")
    small = _exported(wide_run, to, tmp_path / "small", int8=True)
    assert small.megabytes < 0.7 * wide.megabytes
    assert 0 < small.parity.worst <= BOUNDS["int8"]
    assert isinstance(small.accuracy, dict)
    assert small.accuracy["samples"] == 16
    assert small.accuracy["eager"] == wide.accuracy["eager"]  # type: ignore[index]
    assert "top1 on 16 labelled samples: eager" in small.report()
    facts = json.loads(small.sidecar.read_text())
    assert facts["precision"] == "int8"
    assert facts["measured"]["accuracy"] == small.accuracy


@pytest.mark.slow
@pytest.mark.parametrize("to", SUFFIXES)
def test_half_says_what_it_costs(to: Any, run_of: RunOf, tmp_path: Path) -> None:
    made = _exported(run_of("classification"), to, tmp_path, half=True)
    assert made.parity.worst > 0
    assert isinstance(made.accuracy, dict)
    assert json.loads(made.sidecar.read_text())["precision"] == "float16"


def test_a_named_model_is_evaluated_on_given_data(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of("classification")
    facts = checkpoint.read(run / "weights.safetensors").facts["recipe"]
    arguments = json.dumps(facts["model"]["args"])
    values = [f"model.checkpoint={run / 'weights.safetensors'}", f"model.args={arguments}"]
    data = ["data.name=sklearn/digits", "data.val_first=16"]
    path = tmp_path / "graph.pt2"
    values.append("data.size=32")
    with_data = export("vz_davit_tiny", "torch-export", [*values, *data], output=path)
    assert isinstance(with_data.accuracy, dict)
    assert with_data.accuracy["graph"] == with_data.accuracy["eager"]
    without = export("vz_davit_tiny", "torch-export", values, output=path, half=True)
    assert "accuracy not measured: give labelled images as data.root=FOLDER" in without.report()
    other = [*values, *data, "data.classes=[0,1,2]"]
    refused = export("vz_davit_tiny", "torch-export", other, output=path)
    assert "3 classes are not the 10" in refused.accuracy


def test_graphs_of_one_name_lie_side_by_side(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    values = ["model.pretrained=false", "data.size=64", f"model.args={json.dumps(TWO)}"]
    first = export("vz_davit_tiny", "openvino", values)
    second = export("vz_davit_tiny", "onnx", values, int8=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "vz_davit_tiny-float32.xml",
        "vz_davit_tiny-float32.bin",
        "vz_davit_tiny-float32.xml.json",
        "vz_davit_tiny-int8.onnx",
        "vz_davit_tiny-int8.onnx.json",
    }
    assert json.loads(first.sidecar.read_text())["format"] == "openvino"
    facts = json.loads(second.sidecar.read_text())
    assert {"onnx", "onnxscript", "onnxruntime"} <= set(facts["versions"])
    assert second.megabytes == second.graph.stat().st_size / 1e6
    session = onnxruntime.InferenceSession(second.graph)
    assert [x.name for x in session.get_inputs()] == [facts["input"]] == ["image"]
    assert [x.name for x in session.get_outputs()] == facts["outputs"] == ["logits"]


SMALLEST = {info(name).family: name for name in sorted(TIER_0, key=parameters, reverse=True)}


@pytest.mark.parametrize("name", SMALLEST.values())
def test_features_are_what_features_only_returns(name: str) -> None:
    torch.manual_seed(0)
    wrapper = timm.create_model(name, features_only=True).eval()
    options = merge({"task": "classification", "model": {"name": name}}).options
    task = task_class("classification")(options)
    task.model = timm.create_model(name, num_classes=0).eval()
    # timm's wrappers rename what they hold.
    tensors = {
        re.sub("^(stages|stem)_", r"\1.", key.removeprefix("model.")): x
        for key, x in wrapper.state_dict().items()
    }
    assert not task.model.load_state_dict(tensors, strict=False).unexpected_keys
    network = network_of(task, "classification", features=True)
    x = torch.randn(1, *network.shape)
    with torch.no_grad():
        ours, theirs = network.model(x), wrapper(x)
    assert len(ours) == len(theirs) == len(network.outputs)
    for a, b, line in zip(ours, theirs, network.maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert line["channels"] == a.shape[1]
        assert line["stride"] == pytest.approx(network.shape[-1] / a.shape[-1])


def test_features_are_exported_without_a_head(tmp_path: Path) -> None:
    values = ["model.pretrained=false", "model.args={depth: 4}"]
    made = export("vz_lookupvit_small", "onnx", values, output=tmp_path / "a.onnx", features=True)
    assert made.agrees
    maps = run_graph(made.graph, "onnx")(torch.randn(1, 3, 224, 224))
    facts = json.loads(made.sidecar.read_text())
    assert (facts["task"], facts["labels"]) == ("features", [])
    assert [(x.shape[1], 224 // x.shape[2]) for x in maps] == [(384, 16)] * 4
    assert [(line["channels"], line["stride"]) for line in facts["maps"]] == [(384, 16)] * 4
    names = [x.name for x in onnxruntime.InferenceSession(made.graph).get_outputs()]
    assert names == facts["outputs"] == ["map_0", "map_1", "map_2", "map_3"]


def _made_of(found: Parity, precision: str = "float32") -> Export:
    return Export(
        graph=Path("a.onnx"),
        sidecar=Path("a.onnx.json"),
        precision=precision,
        parity=found,
        megabytes=1,
        eager_ms=1,
        graph_ms=1,
        ratio=1,
        accuracy="none",
    )


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 2,
        lambda x: x * torch.nan,
        lambda x: torch.where(x == x.max(), torch.inf, x),
        lambda x: x[:, :-1],
    ],
    ids=["twice", "nan", "infinite", "cut"],
)
def test_a_graph_that_is_off_is_called_off(precision: str, change: Any) -> None:
    network = _network("vz_davit_tiny", (3, 64, 64), num_classes=5, **TWO)
    right = compare(network, lambda x: [network.model(x.float())], precision=precision)
    assert _made_of(right, precision).agrees
    found = compare(network, lambda x: [change(network.model(x.float()))], precision=precision)
    made = _made_of(found, precision)
    assert not made.agrees
    assert "OFF" in made.report()


def test_logits_are_compared_as_they_are() -> None:
    network = _network("vz_davit_tiny", (3, 64, 64), num_classes=5, **TWO)
    with torch.no_grad():
        network.model.head.fc.bias.fill_(1000.0)  # type: ignore[union-attr, operator]
    made = _made_of(compare(network, lambda x: [network.model(x) + 1e-2]))
    assert not made.agrees


class _Finder(torch.nn.Module):
    """A detector whose objects have given scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores, self.score_thresh = torch.tensor(scores), 0.5

    def forward(self, images: Any) -> Any:
        scores = self.scores[self.scores > self.score_thresh]
        boxes = images[0].mean() + torch.arange(4.0).expand(len(scores), 4)
        return [{"boxes": boxes, "scores": scores, "labels": torch.ones(len(scores)).long()}]


def _compared(scores: list[float], monkeypatch: Any, shift: float = 0.0) -> Export:
    keys = ("boxes", "scores", "labels")
    model = OneImage(_Finder(scores), keys).eval()
    network = Network(model, (3, 8, 8), {}, keys, batched=False)

    def run(x: torch.Tensor) -> Any:
        boxes, *others = model(x)
        return [boxes + shift, *others]

    monkeypatch.setattr(parity, "write_detector", lambda network, path: None)
    monkeypatch.setattr(parity, "run_graph", lambda path, to: run)
    images = fresh_inputs(network, ())
    return _made_of(compare_detector(network, run, Path("unused"), images))


def test_no_object_is_no_parity(monkeypatch: Any) -> None:
    made = _compared([], monkeypatch)
    assert not made.agrees
    assert "no object on any of them" in made.report()


def test_unsure_objects_are_compared_below_the_threshold(monkeypatch: Any) -> None:
    made = _compared([0.4, 0.3, 0.1, 0.05], monkeypatch)
    assert made.agrees
    assert (made.parity.objects, made.parity.threshold) == (2, pytest.approx(0.2))
    assert not _compared([0.4, 0.3], monkeypatch, shift=0.1).agrees


@pytest.mark.slow
def test_a_detector_that_is_sure_of_nothing(run_of: RunOf, tmp_path: Path) -> None:
    values = ["model.head_args={box_score_thresh: 0.99, box_detections_per_img: 5}"]
    made = export(str(run_of("detection")), "onnx", values, output=tmp_path / "graph.onnx")
    assert made.agrees
    assert made.parity.objects
    assert made.parity.threshold is not None
    assert "none reached the model's score threshold" in made.report()


@pytest.mark.parametrize(
    ("task", "to", "options", "message"),
    [
        ("classification", "tflite", {}, "tflite"),
        ("classification", "onnx", {"dynamic": ("depth",)}, "depth"),
        ("classification", "onnx", {"half": True, "int8": True}, "exclude each other"),
        ("detection", "openvino", {}, "--to onnx can"),
        ("detection", "onnx", {"dynamic": ("batch",)}, "of one size"),
        ("detection", "onnx", {"features": True}, "features of a run of detection"),
        ("detection", "onnx", {"half": True}, "float32 only"),
        ("classification", "onnx", {"output": Path("run.json")}, "ends in .onnx"),
    ],
)
def test_wrong_words_are_named(
    task: str, to: Any, options: dict[str, Any], message: str, run_of: RunOf
) -> None:
    with pytest.raises(InputError, match=message):
        export(str(run_of(task)), to, **options)


def test_points_are_no_images() -> None:
    with pytest.raises(InputError, match="vz_flatformer reads LiDAR points"):
        export("vz_flatformer", "onnx", ["model.pretrained=false"])


def test_torchao_quantises_layers_whose_weights_are_joined_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    values = ["model.pretrained=false", "model.args={depth: 1}"]
    target = tmp_path / "graph.pt2"
    made = export("vz_sparsifiner_deit_tiny", "torch-export", values, int8=True, output=target)
    assert made.agrees


@pytest.mark.parametrize("name", ["vz_sparsifiner_deit_tiny", "vz_lookupvit_small"])
def test_quantised_layers_are_called_in_eager_mode(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = timm.create_model(name, depth=1).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)


def test_what_torchao_cannot_quantise_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")

    def refuse(*_: object) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(graphs, "trace", refuse)
    values = ["model.pretrained=false", "model.args={depth: 1}"]
    target = tmp_path / "graph.pt2"
    with pytest.raises(InputError, match="--to onnx --int8 can"):
        export("vz_sparsifiner_deit_tiny", "torch-export", values, int8=True, output=target)
