"""The dtype that a call computes in: autocast's, or float32 where halves are slow.

On CPUs without instructions for half precision torch emulates every product, many times slower than
in float32: there it pays to widen the inputs, and the sums are better too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._sides import traced_by_export

# Keys of torch.cpu.get_capabilities() on x86 and ARM.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def computed_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where that is on, else that of x."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which products keep their operands' dtypes, as buffers of a dtype need it."""
    # The meta device has no autocast. Not `is_autocast_available`: torch 2.11 cannot compile it.
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


@torch.compiler.assume_constant_result
def _multiplies(dtype: torch.dtype) -> bool:
    return _has_instructions(dtype)


@lru_cache(maxsize=4)
def _has_instructions(dtype: torch.dtype) -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(key, False) for key in _INSTRUCTIONS[dtype])


def slow_products(x: Tensor) -> bool:
    """Whether products of x are better made in float32; an export keeps the dtype."""
    if x.device.type != "cpu" or x.dtype not in _INSTRUCTIONS:
        return False
    return not traced_by_export() and not _multiplies(x.dtype)


def _wide(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(_wide(x) for x in given)
    return given.float() if isinstance(given, Tensor) and given.is_floating_point() else given


def widened(attend: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`attend` with all tensors in float32, its result in the dtype of the third, the values."""
    with without_autocast(args[0]):
        out = attend(*_wide(args), **{name: _wide(x) for name, x in kwargs.items()})
    return out.to(args[2].dtype)


def widen_where_slow(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let an implementation of (q, k, v, ...) compute in float32 where halves are slow."""

    @wraps(attend)
    def run(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        if slow_products(q):
            return widened(attend, q, k, v, **kwargs)
        return attend(q, k, v, **kwargs)

    return run
