"""Record the discrete choices of a forward pass, and run another pass with the same ones.

Two exact implementations of a network with a top-k inside agree to rounding only as long as they
choose alike; a score that differs in its last bit can flip a choice. Comparisons of speed paths,
precisions or batch sizes therefore record the choices of one run and replay them in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

_recorded: list[Tensor] | None = None
_replayed: Iterator[Tensor] | None = None


def make_choice(choose: Callable[[], Tensor]) -> Tensor:
    """The tensor that `choose` returns, or the one to replay; recorded where somebody listens.

    Args:
        choose: makes the choice (indices or a mask) from the layer's scores, without gradient.
    """
    if _recorded is None and _replayed is None:
        return choose()
    chosen = choose()
    if _replayed is not None:
        replayed = next(_replayed, None)
        if replayed is None:
            raise ValueError("this pass makes more choices than were recorded")
        if replayed.shape != chosen.shape:
            raise ValueError(
                f"the recorded choice has shape {tuple(replayed.shape)}, this pass needs "
                f"{tuple(chosen.shape)}"
            )
        chosen = replayed.to(chosen.device)
    if _recorded is not None:
        _recorded.append(chosen.detach().clone())
    return chosen


@contextmanager
def record_choices() -> Iterator[list[Tensor]]:
    """Collect the choices made inside the `with` block, in the order of the layers that made them.

    Eager mode only. Gradient checkpointing makes every choice a second time in backward: keep
    backward outside the block.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@contextmanager
def replay_choices(choices: Sequence[Tensor]) -> Iterator[None]:
    """Use recorded choices, in their order, inside the `with` block.

    Raises:
        ValueError: the pass makes another number of choices, or choices of other shapes.
    """
    global _replayed
    before, _replayed = _replayed, iter(choices)
    try:
        yield
        if next(_replayed, None) is not None:
            raise ValueError(f"this pass makes fewer choices than the {len(choices)} recorded")
    finally:
        _replayed = before
