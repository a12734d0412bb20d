"""Export to a graph that runs without this package, run again and compared before it is handed out.

A graph comes with a JSON file, `.json` after its name: input, outputs, preprocessing, labels,
versions, licence, and what was measured.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vitzoo._paths import write_atomically
from vitzoo.engine.evaluate import Source, open_source
from vitzoo.engine.graphs import (
    INPUT,
    QUANTIZED,
    SUFFIXES,
    files_of,
    run_graph,
    write_detector,
    write_graph,
)
from vitzoo.engine.parity import (
    Parity,
    accuracy,
    compare,
    compare_detector,
    fresh_inputs,
    own_images,
    race,
)
from vitzoo.engine.parity_choices import compare_but_for_choices
from vitzoo.engine.predict import ready
from vitzoo.engine.traced import Network, network_of, trace
from vitzoo.errors import InputError
from vitzoo.tasks import Task
from vitzoo.tasks._models import config_of

Format = Literal["onnx", "torch-export", "openvino"]
# Largest difference to eager float32 that an export may show. float32: of logits as they are, of
# maps as a share of the largest value. float16 and int8: of all outputs as such a share. The share
# of int8 logits was 0.003 to 0.004 for a narrow DaViT trained on digits in the three formats, and
# for untrained ones in ONNX 0.018 (vz_biformer_tiny), 0.047 (vz_davit_tiny and
# vz_sparsifiner_deit_tiny) and 0.056 (vz_nat_mini): beyond 0.2 more than rounding is wrong.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "int8": 0.2}


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export and what was seen when it ran again.

    Attributes:
        graph, sidecar: the files.
        precision: float32, float16 or int8.
        parity: how far the graph is from eager.
        bound: what `parity.worst` may be.
        megabytes: of the graph with its weights.
        eager_ms, graph_ms: median milliseconds of one batch of one image, run in turns.
        ratio: median of eager over graph, pair by pair.
        accuracy: `metric`, and its figures for `eager` and `graph` on so many labelled `samples`;
            or why there are none.
    """

    graph: Path
    sidecar: Path
    precision: str
    parity: Parity
    megabytes: float
    eager_ms: float
    graph_ms: float
    ratio: float
    accuracy: dict[str, Any] | str

    @property
    def bound(self) -> float:
        """The largest difference that the precision may show."""
        return BOUNDS[self.precision]

    @property
    def agrees(self) -> bool:
        """Whether the graph computes what the model does."""
        return self.parity.worst <= self.bound

    def report(self) -> str:
        """What a user reads: files, parity, size, speed and accuracy."""
        lines = [
            f"{self.graph}, {self.sidecar.name}: {self.megabytes:.1f} MB",
            self._parity_line(),
            f"one image: eager {self.eager_ms:.1f} ms, graph {self.graph_ms:.1f} ms, "
            f"{self.ratio:.2f}x",
        ]
        if isinstance(self.accuracy, dict):
            lines.append(
                "{metric} on {samples} labelled samples: eager {eager:.2f}, "
                "graph {graph:.2f}".format(**self.accuracy)
            )
        elif self.precision != "float32":
            lines.append(f"accuracy not measured: {self.accuracy}")
        return "\n".join(lines)

    def _parity_line(self) -> str:
        found = self.parity
        on = f"parity on {len(found.shapes)} inputs"
        if found.objects == 0:
            return (
                f"{on}: no object on any of them, nothing to compare  OFF: do not trust this graph"
            )
        if found.objects is not None:
            on += f", {found.objects} objects"
        if found.threshold is not None:
            on += f" (none reached the model's score threshold; it was {found.threshold:.3g} here)"
        if found.flipped:
            on += f" ({found.flipped} images with another top-k choice, compared under it)"
        verdict = "" if self.agrees else "  OFF: do not use this graph"
        return f"{on}: {found.worst:.1e} (may be {self.bound:g}){verdict}"


def export(
    given: str,
    to: Format,
    values: Sequence[str] = (),
    *,
    dynamic: Sequence[str] = (),
    features: bool = False,
    half: bool = False,
    int8: bool = False,
    output: Path | None = None,
) -> Export:
    """Export a model, run the graph on fresh inputs and write what it is beside it.

    Args:
        given: a run, a weights file, or a model's name (`model.pretrained=false` among the values
            exports it untrained).
        to: `onnx`, `torch-export` or `openvino`; a detector's post-processing, whose shapes depend
            on what it finds, is written to ONNX only.
        values: recipe values.
        dynamic: what stays open in the graph, `batch` and `size` (height and width); nothing of a
            detector's.
        features: export the feature maps instead of the task's output: those of `features_only`,
            of a segmenter those that its decoder reads.
        half: float16 weights.
        int8: int8 weights, and activations where the format's own quantiser has them (`QUANTIZED`).
        output: the graph's file; if None the model's name and the precision, in the run's folder
            or here. The JSON file has `.json` after the graph's whole name.

    Raises:
        InputError: unknown format, word or ending, a task without graphs, or a model whose
            `limits` exclude it.
    """
    _check(to, dynamic, output, half=half, int8=int8)
    precision = "int8" if int8 else "float16" if half else "float32"
    source = open_source(given, values)
    _check_limits(source, dynamic)
    task = ready(source, torch.device("cpu"))
    network = network_of(task, source.recipe.task, features=features)
    if not network.batched:
        _check_detector(to, dynamic, precision)
    path = output or _path(given, source, to, precision, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(network, to, path, dynamic, precision)
    result = _run_again(source, task, network, to, path, dynamic, precision)
    kind = "features" if features else source.recipe.task
    facts = _facts(source, task, network, kind) | _of_graph(result, to, dynamic)
    write_atomically(result.sidecar, (json.dumps(facts, indent=2) + "\n").encode())
    return result


def _path(given: str, source: Source, to: str, precision: str, *, features: bool) -> Path:
    """Where a graph goes unless told: no two formats or precisions share a file."""
    place = Path(given)
    name = place.stem if place.is_file() else place.name
    what = "-features" if features else ""
    return (source.folder or Path()) / f"{name}{what}-{precision}{SUFFIXES[to]}"


def _write(network: Network, to: str, path: Path, dynamic: Sequence[str], precision: str) -> None:
    if not network.batched:
        write_detector(network, path)
        return
    dtype = torch.float16 if precision == "float16" else torch.float32
    program = trace(network.model, network.shape, dynamic, dtype=dtype)
    write_graph(program, network, to, path, int8=precision == "int8", dynamic=dynamic)


def _run_again(
    source: Source,
    task: Task,
    network: Network,
    to: str,
    path: Path,
    dynamic: Sequence[str],
    precision: str,
) -> Export:
    run = run_graph(path, to)
    if network.batched and precision == "float32":
        parity = compare_but_for_choices(network, run, to, dynamic, bound=BOUNDS[precision])
    elif network.batched:
        parity = compare(network, run, dynamic, precision=precision)
    else:
        images = [*fresh_inputs(network, ()), *own_images(task, network)]
        with tempfile.TemporaryDirectory() as folder:
            parity = compare_detector(network, run, Path(folder) / "lowered.onnx", images)
    if network.maps:
        found: dict[str, Any] | str = "feature maps have none"
    else:
        found = accuracy(source, task, network, run, dynamic, precision=precision)
    eager_ms, graph_ms, ratio = race(network, run, precision=precision)
    return Export(
        graph=path,
        sidecar=path.with_name(f"{path.name}.json"),
        precision=precision,
        parity=parity,
        megabytes=sum(file.stat().st_size for file in files_of(path, to)) / 1e6,
        eager_ms=eager_ms,
        graph_ms=graph_ms,
        ratio=ratio,
        accuracy=found,
    )


def _of_graph(result: Export, to: str, dynamic: Sequence[str]) -> dict[str, Any]:
    return {
        "format": to,
        "precision": result.precision,
        "int8_by": QUANTIZED[to] if result.precision == "int8" else None,
        "dynamic": list(dynamic),
        "versions": _versions(to, result.precision),
        "measured": _measured(result),
    }


def _measured(result: Export) -> dict[str, Any]:
    """What was measured, in JSON's types: it has no infinity."""
    worst = result.parity.worst
    return {
        "worst": worst if math.isfinite(worst) else None,
        "bound": result.bound,
        "agrees": result.agrees,
        "compared": result.parity.shapes,
        "objects": result.parity.objects,
        "score_threshold": result.parity.threshold,
        "other_choices": result.parity.flipped,
        "megabytes": result.megabytes,
        "eager_ms": result.eager_ms,
        "graph_ms": result.graph_ms,
        "ratio": result.ratio,
        "accuracy": result.accuracy,
    }


def _check(to: str, dynamic: Sequence[str], output: Path | None, *, half: bool, int8: bool) -> None:
    if to not in SUFFIXES:
        raise InputError(f"unknown format {to!r}; known: {', '.join(SUFFIXES)}")
    unknown = [word for word in dynamic if word not in ("batch", "size")]
    if unknown:
        raise InputError(f"--dynamic takes batch and size, not {', '.join(unknown)}")
    if half and int8:
        raise InputError("--half and --int8 exclude each other")
    if output is not None and output.suffix != SUFFIXES[to]:
        raise InputError(f"{output}: the name of a graph for {to} ends in {SUFFIXES[to]}")


def _check_detector(to: str, dynamic: Sequence[str], precision: str) -> None:
    if to != "onnx":
        raise InputError(
            f"a detector cannot be exported to {to}: how many boxes its suppression keeps depends "
            "on the image, which torch.export does not trace; --to onnx can"
        )
    if dynamic:
        raise InputError("a detector's graph takes one image of one size: leave --dynamic out")
    if precision != "float32":
        raise InputError(
            "a detector's graph is written in float32 only: leave --half and --int8 out"
        )


def _check_limits(source: Source, dynamic: Sequence[str]) -> None:
    from vitzoo.backbones import info

    name = source.recipe.options.model.name
    try:
        record = info(name)
    except ValueError:
        return  # one of timm's own
    if record.modality != "image":
        raise InputError(f"{name} reads LiDAR points: only models of images can be exported")
    keys = ("export", "dynamic_size", "any_size") if "size" in dynamic else ("export",)
    for key in keys:
        if key in record.limits:
            raise InputError(f"{name} has no such graph: {record.limits[key]}")


def _facts(source: Source, task: Task, network: Network, kind: str) -> dict[str, Any]:
    name = source.recipe.options.model.name
    return {
        "model": name,
        "from": source.title,
        "task": kind,
        "input": INPUT,
        "input_size": list(network.shape),
        "outputs": list(network.outputs),
        "maps": list(network.maps) or None,
        "preprocessing": network.preprocessing,
        "labels": [] if network.maps else list(task.labels),
        "first_label": network.first_label,
        "licence": getattr(config_of(name), "license", None),
    }


def _versions(to: str, precision: str) -> dict[str, str]:
    """Of what wrote and ran the graph."""
    from importlib.metadata import PackageNotFoundError, version

    # Graphs for OpenVINO go through ONNX.
    used = ["torchao"] if precision == "int8" and to == "torch-export" else []
    if to != "torch-export":
        used = ["onnx", "onnxscript", "openvino" if to == "openvino" else "onnxruntime"]
        if precision == "int8" and to == "openvino":
            used.append("onnxruntime")
    found = {}
    for package in ("torch", "timm", "vitzoo", *used):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
