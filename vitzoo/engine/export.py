"""Export to a graph that runs without this package, run again and compared before it is handed out.

A graph comes with a JSON file of the same name: input size, preprocessing, labels, versions,
licence, and what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from vitzoo._paths import write_atomically
from vitzoo.engine.evaluate import Source, open_source
from vitzoo.engine.graphs import QUANTIZED, SUFFIXES, run_graph, write_detector, write_graph
from vitzoo.engine.parity import accuracy, compare, race
from vitzoo.engine.predict import ready
from vitzoo.engine.traced import Network, network_of, trace
from vitzoo.errors import InputError
from vitzoo.tasks import Task

Format = Literal["onnx", "torch-export", "openvino"]
# Largest difference to eager float32, over max(1, largest value), that an export may show.
BOUNDS = {"float32": 1e-4, "float16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export and what was seen when it ran again.

    Attributes:
        graph, sidecar: the files.
        worst: largest difference to eager over max(1, largest value), over all fresh inputs.
        bound: what `worst` may be; None for int8, whose cost is `accuracy`.
        compared: shapes of the fresh inputs.
        megabytes: of the graph with its weights.
        eager_ms, graph_ms: median milliseconds of one batch of one image, run in turns.
        ratio: median of eager over graph, pair by pair.
        accuracy: `metric`, and its figures for `eager` and `graph` on so many labelled `samples`,
            where there are any.
    """

    graph: Path
    sidecar: Path
    worst: float
    bound: float | None
    compared: tuple[tuple[int, ...], ...]
    megabytes: float
    eager_ms: float
    graph_ms: float
    ratio: float
    accuracy: dict[str, Any] | None = None

    @property
    def agrees(self) -> bool:
        """Whether the graph computes what the model does."""
        return self.bound is None or self.worst <= self.bound

    def report(self) -> str:
        """What a user reads: files, parity, size, speed and accuracy."""
        bound = "" if self.bound is None else f" (may be {self.bound:g})"
        verdict = "" if self.agrees else "  OFF: do not use this graph"
        lines = [
            f"{self.graph}, {self.sidecar.name}: {self.megabytes:.1f} MB",
            f"parity on {len(self.compared)} fresh inputs: {self.worst:.1e}{bound}{verdict}",
            f"one image: eager {self.eager_ms:.1f} ms, graph {self.graph_ms:.1f} ms, "
            f"{self.ratio:.2f}x",
        ]
        if self.accuracy is not None:
            lines.append(
                "{metric} on {samples} labelled samples: eager {eager:.2f}, "
                "graph {graph:.2f}".format(**self.accuracy)
            )
        return "\n".join(lines)


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
        features: export the feature maps instead of the task's output.
        half: float16 weights.
        int8: int8 weights, and activations where the format's own quantiser has them (`QUANTIZED`).
        output: the graph's file; the model's name in the run's folder, or here, if None.

    Raises:
        InputError: unknown format or word, a task without graphs, or a model whose `limits`
            exclude it.
    """
    _check(to, dynamic, half=half, int8=int8)
    source = open_source(given, values)
    task = ready(source, torch.device("cpu"))
    network = network_of(task, source.recipe.task, features=features)
    _check_limits(source, dynamic)
    if not network.batched:
        _check_detector(to, dynamic, half=half, int8=int8)
    path = output or (source.folder or Path()) / f"{Path(given).name}{SUFFIXES[to]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if network.batched:
        program = trace(
            network.model, network.shape, dynamic, dtype=torch.float16 if half else torch.float32
        )
        write_graph(program, network, to, path, int8=int8, dynamic=dynamic)
    else:
        write_detector(network, path)
    result = _run_again(source, task, network, to, path, dynamic, half=half, int8=int8)
    kind = "int8" if int8 else "float16" if half else "float32"
    facts = _facts(source, task, network, "features" if features else source.recipe.task)
    facts |= {
        "format": to,
        "precision": kind,
        "int8_by": QUANTIZED[to] if int8 else None,
        "dynamic": list(dynamic),
        "versions": _versions(to),
        "measured": {k: v for k, v in asdict(result).items() if k not in ("graph", "sidecar")},
    }
    write_atomically(result.sidecar, (json.dumps(facts, indent=2, default=str) + "\n").encode())
    return result


def _run_again(
    source: Source,
    task: Task,
    network: Network,
    to: Format,
    path: Path,
    dynamic: Sequence[str],
    *,
    half: bool,
    int8: bool,
) -> Export:
    run = run_graph(path, to)
    worst, shapes = compare(network, run, dynamic, half=half)
    found = None
    if network.outputs:
        found = accuracy(source, task, network, run, dynamic, half=half)
    eager_ms, graph_ms, ratio = race(network, run, half=half)
    return Export(
        graph=path,
        sidecar=path.with_suffix(".json"),
        worst=worst,
        bound=None if int8 else BOUNDS["float16" if half else "float32"],
        compared=shapes,
        megabytes=sum(file.stat().st_size for file in _files(path)) / 1e6,
        eager_ms=eager_ms,
        graph_ms=graph_ms,
        ratio=ratio,
        accuracy=found,
    )


def _check(to: str, dynamic: Sequence[str], *, half: bool, int8: bool) -> None:
    if to not in SUFFIXES:
        raise InputError(f"unknown format {to!r}; known: {', '.join(SUFFIXES)}")
    unknown = [word for word in dynamic if word not in ("batch", "size")]
    if unknown:
        raise InputError(f"--dynamic takes batch and size, not {', '.join(unknown)}")
    if half and int8:
        raise InputError("--half and --int8 exclude each other")


def _check_detector(to: str, dynamic: Sequence[str], *, half: bool, int8: bool) -> None:
    if to != "onnx":
        raise InputError(
            f"a detector cannot be exported to {to}: how many boxes its suppression keeps depends "
            "on the image, which torch.export does not trace; --to onnx can"
        )
    if dynamic:
        raise InputError("a detector's graph takes one image of one size: leave --dynamic out")
    if half or int8:
        raise InputError("a detector's graph is float32: its boxes do not survive less")


def _check_limits(source: Source, dynamic: Sequence[str]) -> None:
    from vitzoo.backbones import info

    try:
        limits = info(source.recipe.options.model.name).limits
    except ValueError:
        return  # one of timm's own
    keys = ("export", "dynamic_size", "any_size") if "size" in dynamic else ("export",)
    for key in keys:
        if key in limits:
            raise InputError(f"{source.recipe.options.model.name} has no such graph: {limits[key]}")


def _files(path: Path) -> list[Path]:
    """The graph's files: weights may lie beside it."""
    beside = (path.with_suffix(".bin"), path.with_name(f"{path.name}.data"))
    return [path, *(file for file in beside if file.is_file())]


def _facts(source: Source, task: Task, network: Network, kind: str) -> dict[str, Any]:
    name = source.recipe.options.model.name
    return {
        "model": name,
        "from": source.title,
        "task": kind,
        "input_size": list(network.shape),
        "outputs": list(network.outputs) or "maps, first to last",
        "preprocessing": network.preprocessing,
        "labels": list(task.labels),
        "first_label": network.first_label,
        "licence": getattr(timm.get_pretrained_cfg(name), "license", None),
    }


def _versions(to: Format) -> dict[str, str]:
    from importlib.metadata import version

    used = {"onnx": ["onnxruntime"], "openvino": ["openvino"]}.get(to, [])
    return {package: version(package) for package in ("torch", "timm", "vitzoo", *used)}
