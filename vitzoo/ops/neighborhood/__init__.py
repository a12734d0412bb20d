"""Neighborhood attention: every query attends to the keys around it, on lines and on maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._half import computed_dtype
from vitzoo.ops._kernels import triton_backend
from vitzoo.ops._onednn import records_gradient
from vitzoo.ops._optional import natten_backend
from vitzoo.ops.neighborhood.portable import neighborhood_attention_portable
from vitzoo.ops.neighborhood.reference import neighborhood_attention_reference


def _why_not_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Sequence[int],
    bias: Tensor | None = None,
    **_: Any,
) -> str | None:
    if max(kernel_size) > 25:
        return f"its kernels take a kernel_size of at most 25, got {max(kernel_size)}."
    if kernel_size[0] == 1 and bias is not None and bias.requires_grad:
        return "its kernels give no gradient for the bias of a line."
    wide = computed_dtype(q) == torch.float32 and q.shape[-1] > 32 and bias is not None
    if wide and records_gradient(q, k, v, bias):
        return "its float32 gradients with a bias run out of registers for a head_dim over 32."
    return None


NEIGHBORHOOD_ATTENTION = Operator(
    "neighborhood_attention",
    [
        triton_backend("neighborhood_attention", _why_not_triton, one_map=True, exact_pays=True),
        natten_backend(),
        Backend("portable", neighborhood_attention_portable),
        Backend("reference", neighborhood_attention_reference),
    ],
)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every query attends to exactly kernel_size keys per axis (NAT, arXiv 2204.07143; DiNAT).

    With dilation, the positions with one remainder form a class, and a query attends to members of
    its own class only. Its keys are `kernel_size` members in a row, centred on the query and
    shifted where they would leave the axis.

    Args:
        q, k, v: (B, N, heads, head_dim) or (B, H, W, heads, head_dim); v's head_dim may differ.
        kernel_size: keys per axis, odd; one number, or one per axis.
        dilation: distance between neighboring keys; one number, or one per axis.
        bias: (heads, 2 * kernel_size - 1) or (heads, 2 * kernel_size - 1, 2 * kernel_size - 1);
            entry (key member - query member) + kernel_size - 1 is added to the logits.
        scale: factor on q k^T; head_dim ** -0.5 if None.
        backend: `auto`, `triton`, `natten` (no bias), `portable` or `reference`.

    Returns:
        The shape of q with v's head_dim.

    Raises:
        ValueError: a side is shorter than kernel_size * dilation, a kernel is even, or a shape does
            not fit.
    """
    if q.dim() not in (4, 5):
        raise ValueError(
            "neighborhood_attention takes (B, N, heads, head_dim) or (B, H, W, heads, head_dim), "
            f"got {q.dim()} dimensions"
        )
    for name, x in (("k", k), ("v", v)):
        if x.shape[:-1] != q.shape[:-1]:
            raise ValueError(f"{name} {tuple(x.shape)} lies on another map than q {tuple(q.shape)}")
    axes = q.dim() - 3
    kernel = _per_axis(kernel_size, axes, "kernel_size")
    steps = _per_axis(dilation, axes, "dilation")
    _check(q.shape[1:-2], kernel, steps, q.shape[-2], bias)
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    if axes == 2:
        return NEIGHBORHOOD_ATTENTION(
            q, k, v, kernel_size=kernel, dilation=steps, bias=bias, **options
        )
    # A line is a map of one row.
    out = NEIGHBORHOOD_ATTENTION(
        q[:, None],
        k[:, None],
        v[:, None],
        kernel_size=(1, *kernel),
        dilation=(1, *steps),
        bias=None if bias is None else bias[:, None],
        **options,
    )
    return out[:, 0]


def _per_axis(value: int | Sequence[int], axes: int, what: str) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or any(v < 1 for v in values):
        raise ValueError(f"{what} must be {axes} positive numbers or one for all, got {value}")
    return values


def _check(
    sides: Sequence[int],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    heads: int,
    bias: Tensor | None,
) -> None:
    for side, size, step in zip(sides, kernel, dilation, strict=True):
        if size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {size}")
        if side < size * step:
            raise ValueError(
                f"a side of {side} is shorter than kernel_size {size} * dilation {step} = "
                f"{size * step}; pad the input (before its projection) or dilate less"
            )
    shape = (heads, *(2 * size - 1 for size in kernel))
    if bias is not None and tuple(bias.shape) != shape:
        raise ValueError(f"bias must have shape {shape}, got {tuple(bias.shape)}")
