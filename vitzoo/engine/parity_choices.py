"""A graph that is off: by a top-k choice that rounding decided, or by something worse."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitzoo.attention.choices import record_choices, replay_choices
from vitzoo.engine.graphs import SUFFIXES, Runner, run_graph, write_graph
from vitzoo.engine.parity import Parity, apart, compare, fresh_inputs
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
        return (*_outputs(out), *(choice.long() for choice in made))


@dataclass(frozen=True)
class _Pass:
    """What the three sides make of the same images: lists of outputs."""

    graph: Sequence[Tensor]
    eager: Sequence[Tensor]
    telling: Sequence[Tensor]
    replayed: Sequence[Tensor]


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
        What is left unexplained as `worst`, and the number of images with other choices.
    """
    found = compare(network, run, dynamic)
    if found.worst <= bound or not _choices(network, torch.zeros(1, *network.shape)):
        return found
    worst, flipped = 0.0, 0
    for one in _passes(network, run, to, dynamic):
        relative = bool(network.maps)
        worst = max(worst, apart(one.replayed, one.telling, relative=relative))
        for i in range(len(one.graph[0])):
            graph, eager, telling = (
                [out[i] for out in side] for side in (one.graph, one.eager, one.telling)
            )
            own = apart(eager, graph, relative=relative)
            if own > bound:
                own = apart(telling, graph, relative=relative)
                flipped += 1
            worst = max(worst, own)
    return replace(found, worst=worst, flipped=flipped)


def _passes(network: Network, run: Runner, to: str, dynamic: Sequence[str]) -> Iterator[_Pass]:
    count = len(network.outputs)
    with tempfile.TemporaryDirectory() as folder:
        tell = _telling_graph(network, to, dynamic, Path(folder))
        for x in fresh_inputs(network, dynamic):
            own = _choices(network, x)
            told = list(tell(x))
            given = [a.to(b.dtype) for a, b in zip(told[count:], own, strict=True)]
            with replay_choices(given):
                replayed = _outputs(network.model(x))
            yield _Pass(list(run(x)), _outputs(network.model(x)), told[:count], replayed)


def _telling_graph(network: Network, to: str, dynamic: Sequence[str], folder: Path) -> Runner:
    number = len(_choices(network, torch.zeros(1, *network.shape)))
    names = (*network.outputs, *(f"choice_{i}" for i in range(number)))
    telling = replace(network, model=_Telling(network.model).eval(), outputs=names)
    path = folder / f"choices{SUFFIXES[to]}"
    program = trace(telling.model, telling.shape, dynamic)
    write_graph(program, telling, to, path, int8=False, dynamic=dynamic)
    return run_graph(path, to)


def _choices(network: Network, x: Tensor) -> list[Tensor]:
    with record_choices() as made:
        network.model(x)
    return made


def _outputs(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)
