"""A graph run again: what it computes, how fast, and what it costs on a labelled set."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vitzoo.engine.evaluate import Source
from vitzoo.engine.graphs import Runner, run_graph, write_detector
from vitzoo.engine.loaders import Batches
from vitzoo.engine.traced import Network
from vitzoo.errors import InputError
from vitzoo.tasks import Task, TaskData
from vitzoo.tasks._models import has_other_labels

_OTHER_SIZES = ((64, 64), (224, 224), (97, 131), (256, 320), (333, 250))
# Labelled samples that an export is evaluated on at most.
_SAMPLES = 1000
# Of a detector: images of its own data that are compared, and best objects where none is sure.
_IMAGES = 4
_OBJECTS = 20


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a graph is from the model it came from.

    Attributes:
        worst: largest difference; infinite where one side is not finite and the other is not the
            same, where shapes or counts differ, or where a detector found nothing to compare.
        shapes: of the inputs.
        objects: what a detector found in all of them; None for others.
        threshold: score threshold that was lowered so that there were any; None if it was not.
        flipped: images off only by another top-k choice, if that was looked into.
    """

    worst: float
    shapes: tuple[tuple[int, ...], ...]
    objects: int | None = None
    threshold: float | None = None
    flipped: int | None = None


def fresh_inputs(network: Network, dynamic: Sequence[str]) -> list[Tensor]:
    """Random images of other batches and sizes than the traced one, as far as they are open."""
    channels, height, width = network.shape
    batches = (1, 3) if "batch" in dynamic else (1,)
    sizes = [(height, width)] if "size" not in dynamic else list(_OTHER_SIZES)
    made = torch.Generator().manual_seed(7)
    if not network.batched:
        return [torch.rand(channels, *size, generator=made) for size in sizes]
    return [
        torch.randn(batches[i % len(batches)], channels, *size, generator=made)
        for i, size in enumerate(sizes * (1 if len(sizes) > 1 else len(batches)))
    ]


@torch.no_grad()
def compare(
    network: Network, run: Runner, dynamic: Sequence[str] = (), *, precision: str = "float32"
) -> Parity:
    """The largest difference to eager float32 on fresh inputs.

    Logits in float32 are compared as they are. Feature maps, and all outputs of fewer bits, are
    compared as a share of the output's largest value, which rounding follows.
    """
    relative = bool(network.maps) or precision != "float32"
    worst, shapes = 0.0, []
    for x in fresh_inputs(network, dynamic):
        expected, found = _both(network, run, x, half=precision == "float16")
        worst = max(worst, apart(expected, found, relative=relative))
        shapes.append(tuple(x.shape))
    return Parity(worst=worst, shapes=tuple(shapes))


def _both(
    network: Network, run: Runner, x: Tensor, *, half: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of eager and of the graph."""
    expected = outputs_of(network.model(x))
    found = [out.float() for out in run(x.half() if half else x)]
    return [out.float() for out in expected], found


def outputs_of(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a network returns as a list."""
    return [out] if isinstance(out, Tensor) else list(out)


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor], *, relative: bool) -> float:
    """The largest difference of outputs; with `relative` as a share of each one's largest value."""
    if len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        largest = a.abs().max().item() if relative and a.numel() else 1.0
        worst = max(worst, _largest_difference(a, b) / max(largest, 1e-12))
    return worst


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Infinite where a value is not finite and the other side's is not the same."""
    if a.shape != b.shape:
        return math.inf
    same = (a == b) | (a.isnan() & b.isnan())
    # Comparisons with NaN are false: max() would pass over it.
    gap = (a - b).abs().nan_to_num(nan=math.inf).masked_fill(same, 0)
    return gap.max().item() if gap.numel() else 0.0


@torch.no_grad()
def compare_detector(network: Network, run: Runner, path: Path, images: Sequence[Tensor]) -> Parity:
    """The largest difference to eager in boxes, scores, labels and masks.

    Where no object reaches the model's score threshold there is nothing to compare. The same graph
    is then written once more with a threshold that the best objects of the first image reach.

    Args:
        network: of a detector.
        run: its graph.
        path: a file that may be written for the second graph.
        images: (3, H, W) from 0 to 1, of the graph's size.
    """
    first = _compare_objects(network, run, images)
    if first.objects:
        return first
    with _lowered(network, images[0]) as threshold:
        write_detector(network, path)
        second = _compare_objects(network, run_graph(path, "onnx"), images)
    worst = max(first.worst, second.worst) if second.objects else math.inf
    return replace(second, worst=worst, threshold=threshold)


def _compare_objects(network: Network, run: Runner, images: Sequence[Tensor]) -> Parity:
    worst, objects = 0.0, 0
    for x in images:
        expected, found = _both(network, run, x)
        worst = max(worst, _objects_apart(expected, found))
        objects += len(expected[0])
    return Parity(worst=worst, shapes=tuple(tuple(x.shape) for x in images), objects=objects)


@contextmanager
def _lowered(network: Network, image: Tensor) -> Iterator[float]:
    """A detector whose score threshold lets the best objects of an image through."""
    detector: Any = network.model.model
    holder = detector.roi_heads if hasattr(detector, "roi_heads") else detector
    before, holder.score_thresh = holder.score_thresh, 0.0
    try:
        scores = network.model(image)[1].sort(descending=True).values[:_OBJECTS].double()
        if len(scores) > 1:
            # In the widest gap, so that rounding does not decide which object is in.
            cut = int((scores[:-1] - scores[1:]).argmax())
            holder.score_thresh = (scores[cut : cut + 2].sum() / 2).item()
        yield holder.score_thresh
    finally:
        holder.score_thresh = before


def own_images(task: Task, network: Network) -> list[Tensor]:
    """Labelled images of a detection run in the graph's size; none where they are not at hand."""
    try:
        samples: Any = task.build_data(train=False).val
    except InputError:
        return []
    size = list(network.shape[1:])
    images = [samples[i]["image"] for i in range(min(_IMAGES, len(samples)))]
    return [interpolate(image[None], size, mode="bilinear")[0] for image in images]


def _objects_apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference to the nearest object; infinite if the numbers differ.

    Boxes as a share of the largest coordinate, scores and masks as they are. Equal scores have no
    order, so an object is compared with the nearest one of its label.
    """
    (boxes, scores, labels, *masks), (boxes_b, scores_b, labels_b, *masks_b) = ours, theirs
    if len(boxes) != len(boxes_b):
        return math.inf
    if not len(boxes):
        return 0.0
    cost = (boxes[:, None] - boxes_b).abs().amax(-1) / max(1.0, boxes.abs().max().item())
    cost = torch.maximum(cost, (scores[:, None] - scores_b).abs()).nan_to_num(nan=math.inf)
    cost = cost.masked_fill(labels[:, None] != labels_b, math.inf)
    worst = max(cost.amin(0).max().item(), cost.amin(1).max().item())
    nearest = cost.argmin(1)
    for a, b in zip(masks, masks_b, strict=True):
        worst = max(worst, _largest_difference(a, b[nearest]))
    return worst


class _Graph(nn.Module):
    """A graph in the place of a task's model."""

    def __init__(
        self, network: Network, run: Runner, dynamic: Sequence[str], precision: str
    ) -> None:
        super().__init__()
        self.network, self.run, self.half_inputs = network, run, precision == "float16"
        self.any_batch, self.any_size = "batch" in dynamic, "size" in dynamic

    def _outputs(self, x: Tensor) -> Sequence[Tensor]:
        if not self.any_size and tuple(x.shape[-2:]) != self.network.shape[1:]:
            raise InputError(f"the graph takes {self.network.shape[1:]} pixels only")
        return [out.float() for out in self.run(x.half() if self.half_inputs else x)]

    def forward(self, images: Any) -> Any:
        """What the task's own model returns in eval mode."""
        if not self.network.batched:
            names = self.network.outputs
            return [
                {
                    k: v.long() if k == "labels" else v
                    for k, v in zip(names, self._outputs(x), strict=True)
                }
                for x in images
            ]
        parts = [images] if self.any_batch else images.split(1)
        return torch.cat([self._outputs(part)[0] for part in parts])


@torch.no_grad()
def accuracy(
    source: Source,
    task: Task,
    network: Network,
    run: Runner,
    dynamic: Sequence[str],
    *,
    precision: str,
) -> dict[str, Any] | str:
    """The task's leading metric of eager and of the graph on labelled samples.

    On every n-th sample, 1,000 at most: a run's own, or for other weights those that the recipe
    values name.

    Returns:
        `metric`, `samples`, `eager` and `graph`; or a sentence that says why there are none.
    """
    try:
        data = _labelled(source, task)
        samples = _spread(data.val)
        figures = []
        for model in (task.model, _Graph(network, run, dynamic, precision)):
            task.model, own = model, task.model
            try:
                batches = Batches(
                    samples,
                    data.val_collate or data.collate,
                    batch_size=source.recipe.options.data.batch_size,
                    workers=0,
                    train=False,
                    on_error="skip",
                )
                found = task.evaluate(iter(batches))
            finally:
                task.model = own
            if not found:
                raise InputError("no labelled sample could be read")
            figures.append(found[task.metric])
    except InputError as error:
        return str(error)
    count = len(samples)
    return {"metric": task.metric, "samples": count, "eager": figures[0], "graph": figures[1]}


def _labelled(source: Source, task: Task) -> TaskData:
    """Samples with the model's labels; those of published weights have no order to compare."""
    if source.weights is not None:
        return task.build_data(train=False)
    options = source.recipe.options
    if not options.model.pretrained and options.model.checkpoint is None:
        raise InputError("an untrained model has none")
    if options.data.root is None and not options.data.name:
        raise InputError("give labelled images as data.root=FOLDER")
    own, task.labels = task.labels, ()
    try:
        data = task.build_data(train=False)
    finally:
        task.labels = own
    if len(data.labels) != len(own) or has_other_labels(options.model.checkpoint, data.labels):
        raise InputError(
            f"the data's {len(data.labels)} classes are not the {len(own)} of {source.title}"
        )
    return data


def _spread(samples: Any) -> Any:
    step = -(-len(samples) // _SAMPLES)
    return torch.utils.data.Subset(samples, range(0, len(samples), step)) if step > 1 else samples


@torch.no_grad()
def race(
    network: Network, run: Runner, *, precision: str = "float32", pairs: int = 7
) -> tuple[float, float, float]:
    """Median milliseconds of eager and graph on one image, and the median ratio of pairs."""
    x = torch.rand(network.shape) if not network.batched else torch.randn(1, *network.shape)
    y = x.half() if precision == "float16" else x
    steps: tuple[Callable[[], Any], ...] = (lambda: network.model(x), lambda: run(y))
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
