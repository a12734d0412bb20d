"""Values computed from weights, kept for as long as the weights stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vitzoo.ops._onednn import records_gradient, why_not_apart

Value = TypeVar("Value")

# Of a larger tensor at most so many numbers are compared.
_SMALL = 4096
_MOST = 4096


class Derived(Generic[Value]):
    """A cache of what was computed from tensors; it dies with the first of them.

    In-place updates raise a tensor's version, new storage has another address. Writes through
    `.data` or numpy do neither: a number of every row and column is compared, which catches
    optimisers, averages and whole rows written that way, but not single numbers.
    """

    def __init__(self, *, by_contents: bool = True) -> None:
        """Keep values that depend on the sources' numbers, or only on where these lie (views)."""
        self._by_contents = by_contents
        # first source -> (state, probes, value)
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(
        self, sources: Sequence[Tensor], make: Callable[[], Value], setting: Hashable = None
    ) -> Value:
        """The value that `make` computed, made again if a source or the setting may have changed.

        Args:
            sources: what `make` reads, no inference tensors: they have no version.
            make: computes the value.
            setting: what else it reads.
        """
        state = (setting, [(t._version, t.data_ptr(), t.shape) for t in sources])
        probes = [_probe(t) for t in sources] if self._by_contents else []
        known = self._known.get(sources[0])
        if known is None or known[0] != state or not all(map(torch.equal, known[1], probes)):
            known = (state, [probe.clone() for probe in probes], make())
            self._known[sources[0]] = known
        return known[2]

    def drop(self, source: Tensor) -> None:
        """Forget what was computed from `source` and others after it."""
        self._known.pop(source, None)


# Whoever computes from a view asks for its numbers.
_views: Derived[tuple[Tensor, ...]] = Derived(by_contents=False)


def kept_views(
    make: Callable[..., tuple[Tensor, ...]], sources: Sequence[Tensor], setting: Hashable = None
) -> tuple[Tensor, ...]:
    """`make(*sources)`, views of weights; in inference on a CPU the same objects every time.

    What is computed from such a view, as a packed weight, is found again by the object.
    """
    apart = records_gradient(*sources) or why_not_apart(*sources) is not None
    if apart or any(t.is_inference() for t in sources):
        return make(*sources)
    # Views of the weights themselves would keep those, and with them this entry, alive.
    return _views.get(sources, lambda: make(*(t.data for t in sources)), setting)


def _probe(source: Tensor) -> Tensor:
    t = source.detach()
    if t.dim() > 1:
        # In the order of memory, so that nothing is copied.
        t = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).reshape(-1)
    if t.numel() <= _SMALL:
        return t
    # One less than the shorter side of a matrix: every row and, in turn, every column has a number.
    longer = max(len(source), source.numel() // len(source))
    return t[:: max(1, source.numel() // min(longer, _MOST) - 1)]
