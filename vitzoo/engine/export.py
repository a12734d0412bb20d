"""Export to a graph that runs without this package, run again and compared before it is handed out.

A graph comes with a JSON file of the same name: input size, preprocessing, labels, versions,
licence, and what was measured.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from vitzoo._paths import write_atomically
from vitzoo.engine.evaluate import Source, open_source
from vitzoo.engine.graphs import QUANTIZED, SUFFIXES, Runner, run_graph, write_graph
from vitzoo.errors import InputError
from vitzoo.tasks import Task

Format = Literal["onnx", "torch-export", "openvino"]
# Largest difference to eager float32, over max(1, largest value), that an export may show.
BOUNDS = {"float32": 1e-4, "float16": 2e-2}
_OTHER_SIZES = ((64, 64), (224, 224), (97, 131), (256, 320), (333, 250))


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export and what was seen when it ran again.

    Attributes:
        graph, sidecar: the files.
        worst: largest difference to eager over max(1, largest value), over all fresh inputs.
        bound: what `worst` may be; None for int8, whose cost is `accuracy`.
        compared: shapes (batch, channels, height, width) of the fresh inputs.
        megabytes: of the graph with its weights.
        eager_ms, graph_ms: median milliseconds of one batch of one image, run in turns.
        ratio: median of eager over graph, pair by pair.
        accuracy: top-1 of eager and graph on the labelled set, where there is one.
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
    accuracy: dict[str, float] | None = None

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
                "top-1 on {samples} labelled samples: eager {eager_top1:.2f}, "
                "graph {graph_top1:.2f}".format(**self.accuracy)
            )
        return "\n".join(lines)


class Features(nn.Module):
    """A backbone as a graph of maps: what `features_only` returns, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> the maps, first to last."""
        return tuple(self.model.forward_intermediates(x, intermediates_only=True))  # type: ignore[operator]


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
        to: `onnx`, `torch-export` or `openvino`.
        values: recipe values.
        dynamic: what stays open in the graph, `batch` and `size` (height and width).
        features: export the feature maps instead of the task's output.
        half: float16 weights.
        int8: int8 weights and activations: torchao's for torch-export, ONNX Runtime's for the
            others.
        output: the graph's file; the model's name in the run's folder, or here, if None.

    Raises:
        InputError: unknown format or word, or a model whose `limits` exclude it.
    """
    _check(to, dynamic, half=half, int8=int8)
    source = open_source(given, values)
    task = source.task()
    if source.weights is None:
        from vitzoo.engine.predict import imagenet_labels

        config = timm.get_pretrained_cfg(source.title)
        task.labels = imagenet_labels(config.num_classes if config else 1000)
    source.load_model(task, torch.device("cpu"))
    model = Features(task.model).eval() if features else task.model
    _check_limits(source, dynamic)
    path = output or (source.folder or Path()) / f"{Path(given).name}{SUFFIXES[to]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = tuple(task.data_config()["input_size"])  # type: ignore[attr-defined]
    program = trace(model, shape, dynamic, dtype=torch.float16 if half else torch.float32)
    write_graph(program, model, to, path, int8=int8, shape=shape, dynamic=dynamic)
    run = run_graph(path, to)
    found = _compare(model, run, shape, dynamic, half=half)
    accuracy = None if features else _accuracy(source, task, run, half=half)
    eager_ms, graph_ms, ratio = _race(model, run, shape, half=half)
    kind = "float16" if half else "float32"
    result = Export(
        graph=path,
        sidecar=path.with_suffix(".json"),
        worst=found[0],
        bound=None if int8 else BOUNDS[kind],
        compared=found[1],
        megabytes=sum(file.stat().st_size for file in _files(path)) / 1e6,
        eager_ms=eager_ms,
        graph_ms=graph_ms,
        ratio=ratio,
        accuracy=accuracy,
    )
    _write_facts(result, source, task, to, dynamic, "int8" if int8 else kind, features=features)
    return result


def trace(
    model: nn.Module,
    shape: Sequence[int],
    dynamic: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.export.ExportedProgram:
    """The model's graph in torch's own form.

    Args:
        model: in eval mode; with `dtype` float16 a copy is traced.
        shape: (channels, height, width) of the default input.
        dynamic: `batch`, `size` or both.
        dtype: of weights and input.
    """
    import copy

    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    channels, height, width = shape
    if "size" in dynamic:
        # Two sides, and no multiple of anything: equal ones would be taken for one symbol.
        height, width = height + 1, width + 33
    x = torch.randn(2 if "batch" in dynamic else 1, channels, height, width, dtype=dtype)
    free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC} if "batch" in dynamic else {}
    if "size" in dynamic:
        free |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _sizes_unknown(bool(dynamic)):
        return torch.export.export(model, (x,), dynamic_shapes=(free,))


@contextmanager
def _sizes_unknown(active: bool) -> Iterator[None]:
    """Trace without taking a side of one for a case of its own."""
    from torch.fx.experimental import _config

    before = _config.backed_size_oblivious
    _config.backed_size_oblivious = active or before
    try:
        yield
    finally:
        _config.backed_size_oblivious = before


def _check(to: str, dynamic: Sequence[str], *, half: bool, int8: bool) -> None:
    if to not in SUFFIXES:
        raise InputError(f"unknown format {to!r}; known: {', '.join(SUFFIXES)}")
    unknown = [word for word in dynamic if word not in ("batch", "size")]
    if unknown:
        raise InputError(f"--dynamic takes batch and size, not {', '.join(unknown)}")
    if half and int8:
        raise InputError("--half and --int8 exclude each other")


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


def fresh_inputs(shape: Sequence[int], dynamic: Sequence[str]) -> list[Tensor]:
    """Random images of other batches and sizes than the traced one, as far as they are open."""
    channels, height, width = shape
    batches = (1, 3) if "batch" in dynamic else (1,)
    sizes = [(height, width)] if "size" not in dynamic else list(_OTHER_SIZES)
    made = torch.Generator().manual_seed(7)
    return [
        torch.randn(batches[i % len(batches)], channels, *size, generator=made)
        for i, size in enumerate(sizes * (1 if len(sizes) > 1 else len(batches)))
    ]


@torch.no_grad()
def _compare(
    model: nn.Module, run: Runner, shape: Sequence[int], dynamic: Sequence[str], *, half: bool
) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Largest relative difference over fresh inputs, and their shapes."""
    worst, shapes = 0.0, []
    for x in fresh_inputs(shape, dynamic):
        expected = model(x)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        found = run(x.half() if half else x)
        for ours, theirs in zip(expected, found, strict=True):
            scale = max(1.0, ours.abs().max().item())
            worst = max(worst, (theirs.float() - ours).abs().max().item() / scale)
        shapes.append(tuple(x.shape))
    return worst, tuple(shapes)


def _accuracy(source: Source, task: Task, run: Runner, *, half: bool) -> dict[str, float] | None:
    """Top-1 of eager and of the graph on the run's labelled set; None without one."""
    if source.weights is None or source.recipe.task != "classification":
        return None
    samples: Any = task.build_data(train=False).val
    hits, count = [0, 0], 0
    with torch.no_grad():
        for image, target in (samples[i] for i in range(len(samples))):
            x = image[None]
            for i, scores in enumerate((task.model(x), run(x.half() if half else x)[0])):
                hits[i] += int(scores.argmax(1).item() == int(target))
            count += 1
    eager, graph = (100 * hit / count for hit in hits)
    return {"eager_top1": eager, "graph_top1": graph, "samples": count}


@torch.no_grad()
def _race(
    model: nn.Module, run: Runner, shape: Sequence[int], *, half: bool, pairs: int = 7
) -> tuple[float, float, float]:
    """Median milliseconds of eager and graph on one image, and the median ratio of pairs."""
    x = torch.randn(1, *shape)
    y = x.half() if half else x
    steps: tuple[Callable[[], Any], ...] = (lambda: model(x), lambda: run(y))
    for step in steps:
        step()
    times = []
    for _ in range(pairs):
        pair = []
        for step in steps:
            start = time.perf_counter()
            step()
            pair.append(1e3 * (time.perf_counter() - start))
        times.append(pair)
    eager, graph = (statistics.median(column) for column in zip(*times, strict=True))
    return eager, graph, statistics.median(a / b for a, b in times)


def _files(path: Path) -> list[Path]:
    """The graph's files: weights may lie beside it."""
    beside = (path.with_suffix(".bin"), path.with_name(f"{path.name}.data"))
    return [path, *(file for file in beside if file.is_file())]


def _write_facts(
    result: Export,
    source: Source,
    task: Task,
    to: Format,
    dynamic: Sequence[str],
    kind: str,
    *,
    features: bool,
) -> None:
    from importlib.metadata import version

    name = source.recipe.options.model.name
    config = timm.get_pretrained_cfg(name)
    used = {"onnx": "onnxruntime", "openvino": "openvino"}.get(to)
    facts = {
        "model": name,
        "from": source.title,
        "task": "features" if features else source.recipe.task,
        "format": to,
        "precision": kind,
        "int8_by": QUANTIZED[to] if kind == "int8" else None,
        "dynamic": list(dynamic),
        "preprocessing": task.data_config(),  # type: ignore[attr-defined]
        "labels": list(task.labels),
        "licence": getattr(config, "license", None),
        "versions": {p: version(p) for p in ("torch", "timm", "vitzoo", *([used] if used else []))},
        "measured": {
            key: value for key, value in asdict(result).items() if key not in ("graph", "sidecar")
        },
    }
    write_atomically(result.sidecar, (json.dumps(facts, indent=2, default=str) + "\n").encode())
