"""Models without memory, built to read their shapes, names and modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What initialisers are made of, timm's truncated normal too.
_FILLS = frozenset(
    getattr(Tensor, name)
    for name in ("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_")
)


class _NothingDrawn(TorchFunctionMode):
    """Pass over initialisers of tensors on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            filled = args[0] if args else given.get("tensor")
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **given)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build modules on the meta device, past the code that initialises their weights.

    For building only: of tensors without memory, steps in place are left out, and with them their
    checks of shapes.
    """
    with torch.device("meta"), _NothingDrawn():
        yield
