"""A graph run again: what it computes, how fast, and what it costs on a labelled set."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.engine.evaluate import Source
from vitzoo.engine.graphs import Runner
from vitzoo.engine.loaders import Batches
from vitzoo.engine.traced import Network
from vitzoo.errors import InputError
from vitzoo.tasks import Task

logger = logging.getLogger("vitzoo.export")

_OTHER_SIZES = ((64, 64), (224, 224), (97, 131), (256, 320), (333, 250))
# Labelled samples that an export is evaluated on at most.
_SAMPLES = 1000


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
    network: Network, run: Runner, dynamic: Sequence[str], *, half: bool
) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Largest difference to eager over max(1, largest value) on fresh inputs, and their shapes.

    Objects are compared with the nearest of the other side: equal scores have no order.
    """
    worst, shapes = 0.0, []
    for x in fresh_inputs(network, dynamic):
        expected = network.model(x)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        found = [out.float() for out in run(x.half() if half else x)]
        difference = _apart if network.batched else _objects_apart
        worst = max(worst, difference([out.float() for out in expected], found))
        shapes.append(tuple(x.shape))
    return worst, tuple(shapes)


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        worst = max(worst, (a - b).abs().max().item() / max(1.0, a.abs().max().item()))
    return worst


def _objects_apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The same of boxes, scores, labels and, if any, masks; infinite if the numbers differ."""
    (boxes, scores, labels, *masks), (boxes_b, scores_b, labels_b, *masks_b) = ours, theirs
    if len(boxes) != len(boxes_b):
        return float("inf")
    if not len(boxes):
        return 0.0
    cost = (boxes[:, None] - boxes_b).abs().amax(-1) / max(1.0, boxes.abs().max().item())
    cost = torch.maximum(cost, (scores[:, None] - scores_b).abs())
    cost = cost.masked_fill(labels[:, None] != labels_b, float("inf"))
    worst = max(cost.amin(0).max().item(), cost.amin(1).max().item())
    nearest = cost.argmin(1)
    for a, b in zip(masks, masks_b, strict=True):
        worst = max(worst, (a - b[nearest]).abs().max().item())
    return worst


class _Graph(nn.Module):
    """A graph in the place of a task's model."""

    def __init__(self, network: Network, run: Runner, dynamic: Sequence[str], half: bool) -> None:
        super().__init__()
        self.network, self.run, self.half_inputs = network, run, half
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
    source: Source, task: Task, network: Network, run: Runner, dynamic: Sequence[str], *, half: bool
) -> dict[str, Any] | None:
    """The task's leading metric of eager and of the graph on the run's labelled set.

    On every n-th sample, 1,000 at most; None without a run, without its data, or where the graph
    has one size and the images have others.
    """
    if source.weights is None:
        return None
    try:
        data = task.build_data(train=False)
        samples = _spread(data.val)
        figures = []
        for model in (task.model, _Graph(network, run, dynamic, half)):
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
                figures.append(task.evaluate(iter(batches))[task.metric])
            finally:
                task.model = own
    except InputError as error:
        logger.warning("not evaluated on labelled samples: %s", error)
        return None
    count = len(samples)
    return {"metric": task.metric, "samples": count, "eager": figures[0], "graph": figures[1]}


def _spread(samples: Any) -> Any:
    step = -(-len(samples) // _SAMPLES)
    return torch.utils.data.Subset(samples, range(0, len(samples), step)) if step > 1 else samples


@torch.no_grad()
def race(
    network: Network, run: Runner, *, half: bool, pairs: int = 7
) -> tuple[float, float, float]:
    """Median milliseconds of eager and graph on one image, and the median ratio of pairs."""
    x = torch.rand(network.shape) if not network.batched else torch.randn(1, *network.shape)
    y = x.half() if half else x
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
