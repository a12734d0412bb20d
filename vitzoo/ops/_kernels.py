"""Entries of the `triton` backends: why one cannot serve, and its lazy call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Backend
from vitzoo.ops._half import computed_dtype
from vitzoo.ops._onednn import needs_derivatives, records_gradient
from vitzoo.ops._proven import why_not_proven
from vitzoo.ops._sides import exporting

_WIDEST_HEAD = 64
# Offsets inside an image and numbers of queries have 32 bits.
_LARGEST_REACH = 2**31
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return _settings()[0]


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return _settings()[1]


@lru_cache(maxsize=1)
def _settings() -> tuple[bool, bool]:
    """Whether Triton is installed, whether its interpreter is asked for (CPU, very slow)."""
    return find_spec("triton") is not None, os.environ.get("TRITON_INTERPRET") == "1"


def lanes(dtype: torch.dtype, *, plain: bool = False) -> int:
    """Tokens of a kernel's tile; the kernels' digest does not know it: a change wants a new proof.

    Args:
        dtype: exact float32 products need many registers.
        plain: whether the tile is full and its logits are products alone, with no mask or bias of
            pairs; only then larger tiles are faster (docs/decisions.md, "Few warps").
    """
    return 64 if plain and dtype != torch.float32 else 32


def why_not_triton(q: Tensor, k: Tensor, v: Tensor, *, one_map: bool = False) -> str | None:
    """What holds for every operator: package, device, mode, dtype, shapes.

    Args:
        q, k, v: the operator's.
        one_map: whether queries and keys must be the same tokens.
    """
    if not _has_triton():
        return "the package triton is not installed; it comes with torch's CUDA builds."
    if q.device.type != "cuda" and not (_interpreted() and q.device.type == "cpu"):
        return f"its kernels run on CUDA devices, the tensors are on {q.device.type}."
    if not q.device == k.device == v.device:
        return "q, k and v lie on different devices."
    if exporting():
        return "an exported graph is to run without triton."
    if needs_derivatives():
        return "function transforms and forward-mode derivatives need torch's own operators."
    if q.dtype not in _DTYPES or computed_dtype(q) not in _DTYPES:
        return f"its kernels take float32, float16 and bfloat16, got {q.dtype}."
    if not torch.is_autocast_enabled(q.device.type) and not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}."
    return _why_not_shapes(q, k, v, one_map=one_map)


def _why_not_shapes(q: Tensor, k: Tensor, v: Tensor, *, one_map: bool) -> str | None:
    tokens = slice(None, -2) if one_map else slice(None, 1 if q.dim() == 5 else 0)
    if (
        not q.dim() == k.dim() == v.dim()
        or k.shape[:-1] != v.shape[:-1]
        or q.shape[-2:] != k.shape[-2:]
        or q.shape[tokens] != k.shape[tokens]
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        return f"its kernels broadcast nothing, and q, k and v are {shapes}."
    widest = max(q.shape[-1], v.shape[-1])
    if widest > _WIDEST_HEAD:
        return f"its kernels take a head_dim of at most {_WIDEST_HEAD}, got {widest}."
    if any(_reach(x) >= _LARGEST_REACH for x in (q, k, v)):
        return "its kernels take images, or sequences, of less than 2^31 numbers."
    if math.prod(q.shape[:-1]) >= _LARGEST_REACH:
        return "its kernels number fewer than 2^31 queries of all heads."
    return None


def _reach(x: Tensor) -> int:
    """Numbers from the first to the last of an image (B, H, W, ...) or a sequence (N, ...)."""
    inner = range(1 if x.dim() == 5 else 0, x.dim())
    if x.stride(-1) != 1:
        # It will be copied.
        return math.prod(x.shape[i] for i in inner)
    return sum((x.shape[i] - 1) * x.stride(i) for i in inner)


def triton_backend(
    operator: str,
    why_not: Callable[..., str | None] | None = None,
    auto_skip: Callable[..., str | None] | None = None,
    *,
    one_map: bool = False,
    exact_pays: bool = False,
) -> Backend:
    """The `triton` backend of an operator.

    Args:
        operator: its name.
        why_not: adds the operator's own limits.
        one_map: whether its queries and keys are the same tokens.
        auto_skip: adds where another backend was measured to be faster.
        exact_pays: whether its exact float32 products beat the portable path's, too; tensor cores
            make none, so that only saved copies speak for them (`benchmarks/gpu.md`).
    """

    def run(*args: Any, **kwargs: Any) -> Tensor:
        from vitzoo.ops import _triton_backends

        return getattr(_triton_backends, operator)(*args, **kwargs)

    def objection(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> str | None:
        reason = why_not_triton(q, k, v, one_map=one_map)
        if reason is None and why_not is not None:
            reason = why_not(q, k, v, *args, **kwargs)
        return reason

    def skip(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
        if q.device.type != "cuda":
            return "Triton's interpreter is for tests."
        if computed_dtype(q) == torch.float32 and not exact_pays:
            return "in float32 the portable path was measured to be as fast or faster."
        reason = None if auto_skip is None else auto_skip(q, *args, **kwargs)
        if reason is not None:
            return reason
        given = [q, *args, *kwargs.values()]
        flat = [x for y in given for x in (y if isinstance(y, tuple) else (y,))]
        needs_grad = records_gradient(*(x for x in flat if isinstance(x, Tensor)))
        return why_not_proven(operator, computed_dtype(q), needs_grad, q.device.index or 0)

    return Backend("triton", run, objection, skip)
