"""Backends from packages that may be there, natten and xformers; imported by the call that asks.

They have to be asked for by name: neither has been timed against the zoo's own on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Backend
from vitzoo.ops._onednn import records_gradient
from vitzoo.ops._sides import exporting

_HALVES = (torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def _installed(package: str) -> bool:
    return _found(package)


@lru_cache(maxsize=2)
def _found(package: str) -> bool:
    return find_spec(package) is not None


def _missing(package: str) -> str | None:
    if not _installed(package):
        return f"the package {package} is not installed: pip install vitzoo[{package}]."
    if exporting():
        return f"an exported graph is to run without {package}."
    return None


def _not_by_itself(*args: Any, **kwargs: Any) -> str | None:
    return "it is used where it is asked for by name."


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    """Whether natten was built with its CUDA kernels."""
    import natten

    return bool(natten.HAS_LIBNATTEN)


def _why_not_natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> str | None:
    reason = _missing("natten")
    if reason is not None:
        return reason
    if bias is not None:
        return "natten computes no bias."
    if kernel_size[1] == 1:
        return "natten takes kernels of more than one key."
    if scale == 0:
        return "natten takes a scale of 0 for none given."
    if q.numel() == 0:
        return "natten takes no empty batch."
    if q.dtype not in (torch.float32, *_HALVES):
        return f"natten takes float32, float16 and bfloat16, got {q.dtype}."
    if q.device.type == "cuda":
        if not _has_kernels():
            return "natten was installed without its CUDA kernels."
        if q.shape[-1] % 8 or v.shape[-1] % 8:
            return f"natten takes multiples of 8 as head_dim, got {q.shape[-1]} and {v.shape[-1]}."
        return None
    if records_gradient(q, k, v):
        return f"natten gives no gradients on {q.device.type}."
    d = q.shape[-1]
    if d != v.shape[-1] or d < 8 or d & (d - 1):
        return (
            f"natten takes one power of two from 8 on as head_dim on {q.device.type}, "
            f"got {d} and {v.shape[-1]}."
        )
    return None


def _natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    bias: None = None,
    scale: float | None = None,
) -> Tensor:
    from natten import functional

    if kernel_size[0] > 1:
        return functional.na2d(q, k, v, kernel_size, dilation=dilation, scale=scale)
    # A kernel of one row is a line to natten; other rows are other images.
    lines = (x.flatten(0, 1) for x in (q, k, v))
    out = functional.na1d(*lines, kernel_size[1], dilation=dilation[1], scale=scale)
    return out.unflatten(0, q.shape[:2])


def natten_backend() -> Backend:
    """The `natten` backend of neighborhood_attention."""
    return Backend("natten", _natten, _why_not_natten, _not_by_itself)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: None = None,
    mask: None = None,
    scale: float | None = None,
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, scale=scale)


def xformers_backend(
    portable: Callable[..., Tensor], why_not: Callable[..., str | None]
) -> Backend:
    """The `xformers` backend of an operator whose portable form is one batch of dense attention.

    Args:
        portable: takes `attend`, which replaces `attention_portable`; no bias or mask is passed.
        why_not: the operator's own limits, a bias and a mask among them.
    """

    def objection(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> str | None:
        reason = _missing("xformers")
        if reason is None and q.device.type != "cuda":
            reason = f"xformers runs on CUDA devices, the tensors are on {q.device.type}."
        return reason or why_not(q, k, v, **kwargs)

    return Backend("xformers", partial(portable, attend=_attend), objection, _not_by_itself)
