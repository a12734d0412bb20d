"""A graph that is off: by a top-k choice that rounding decided, or by something worse."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitzoo.attention.choices import record_choices, replay_choices
from vitzoo.engine.graphs import SUFFIXES, Runner, run_graph, write_graph
from vitzoo.engine.parity import Parity, apart, compare, fresh_inputs, outputs_of
from vitzoo.engine.traced import Network, trace


class _Telling(nn.Module):
    """A model that returns its choices after its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with record_choices() as made:
            out = self.model(x)
        # Masks as numbers: not every runtime has booleans as outputs.
        return (*outputs_of(out), *(choice.long() for choice in made))


@torch.no_grad()
def compare_but_for_choices(
    network: Network, run: Runner, to: str, dynamic: Sequence[str], *, bound: float
) -> Parity:
    """As `compare` in float32, and where that is off, whether choices alone explain it.

    The network is then written once more in the format `to`, with its choices as outputs. It must
    agree with eager that is given these choices, and every image of the first graph with eager or
    with the second graph.

    Args:
        network: a classifier, segmenter or maps.
        run: its graph.
        to: the graph's format.
        dynamic: its open sides.
        bound: the largest difference that needs no explanation.

    Returns:
        What is left unexplained as `worst`, and the number of images that other choices explain.
    """
    found = compare(network, run, dynamic)
    relative = bool(network.maps)
    count = len(_chosen(network, torch.zeros(1, *network.shape))[1])
    # No choice makes a value infinite or another shape.
    if found.worst <= bound or not math.isfinite(found.worst) or not count:
        return found
    worst, flipped = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        tell = _telling_graph(network, count, to, dynamic, Path(folder))
        for x in fresh_inputs(network, dynamic):
            eager, own = _chosen(network, x)
            told = list(tell(x))
            telling, choices = told[:-count], told[-count:]
            with replay_choices([a.to(b.dtype) for a, b in zip(choices, own, strict=True)]):
                replayed = outputs_of(network.model(x))
            worst = max(worst, apart(replayed, telling, relative=relative))
            graph = list(run(x))
            for i in range(len(x)):
                image, plain, told_of = (
                    [out[i] for out in side] for side in (graph, eager, telling)
                )
                off = apart(plain, image, relative=relative)
                if off > bound:
                    off = apart(told_of, image, relative=relative)
                    flipped += off <= bound
                worst = max(worst, off)
    return replace(found, worst=worst, flipped=flipped)


def _telling_graph(
    network: Network, count: int, to: str, dynamic: Sequence[str], folder: Path
) -> Runner:
    names = (*network.outputs, *(f"choice_{i}" for i in range(count)))
    telling = replace(network, model=_Telling(network.model).eval(), outputs=names)
    path = folder / f"choices{SUFFIXES[to]}"
    program = trace(telling.model, telling.shape, dynamic)
    write_graph(program, telling, to, path, int8=False, dynamic=dynamic)
    return run_graph(path, to)


def _chosen(network: Network, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Eager's outputs, and the choices behind them."""
    with record_choices() as made:
        out = network.model(x)
    return outputs_of(out), made
