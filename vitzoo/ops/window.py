"""Attention inside non-overlapping square windows of a map, shifted or not, at any H and W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._kernels import triton_backend
from vitzoo.ops._optional import xformers_backend
from vitzoo.ops._products import attend_cells, products_lose, why_not_products
from vitzoo.ops._sides import copied_if_unknown, crop, overhang, pieces, unknown
from vitzoo.ops.attention import attention_portable, attention_reference

Fill = tuple[Tensor, Tensor]


def _check(q: Tensor, window_size: int, shift: int) -> None:
    if q.dim() != 5:
        raise ValueError(
            f"window_attention takes (B, H, W, heads, head_dim), got {q.dim()} dimensions"
        )
    if window_size < 1 or not 0 <= shift < window_size:
        raise ValueError(
            f"window_size must be positive and shift in [0, {window_size}), got shift {shift}"
        )


def _margins(length: int, window_size: int, shift: int) -> tuple[int, int]:
    """Positions that the window grid covers before and after a side of `length` tokens."""
    before = (window_size - shift) % window_size
    return before, overhang(length + before, window_size)


def _pad_map(x: Tensor, top_left: tuple[int, int], bottom_right: tuple[int, int]) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, top_left[1], bottom_right[1], top_left[0], bottom_right[0]))


def _pad_constant(x: Tensor, inside: Tensor, constant: Tensor, pads: tuple) -> Tensor:
    """Pad a map so that the positions outside hold `constant` (heads, head_dim)."""
    outside = (~inside)[None, :, :, None, None].to(x.dtype)
    return _pad_map(x, *pads) + outside * constant.to(x.dtype)


def split_windows(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, heads, d) with sides that divide -> (B * windows, window_size^2, heads, d)."""
    B, H, W, heads, d = x.shape
    s = window_size
    x = x.reshape(B, H // s, s, W // s, s, heads, d).transpose(2, 3)
    return copied_if_unknown(x).reshape(-1, s * s, heads, d)


def join_windows(x: Tensor, window_size: int, H: int, W: int) -> Tensor:
    """The inverse of `split_windows`."""
    s = window_size
    x = x.reshape(-1, H // s, W // s, s, s, *x.shape[-2:]).transpose(2, 3)
    return copied_if_unknown(x).reshape(-1, H, W, *x.shape[-2:])


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    shift: int = 0,
    bias: Tensor | None = None,
    fill: Fill | None = None,
    scale: float | None = None,
) -> Tensor:
    """One window after the other, cut out by its coordinates."""
    _, H, W, _, _ = q.shape
    k_fill, v_fill = fill if fill is not None else (None, None)
    out = v.new_empty(*q.shape[:4], v.shape[-1])
    offset = shift - window_size if shift else 0
    steps = torch.arange(window_size, device=q.device)
    for y0 in range(offset, H, window_size):
        for x0 in range(offset, W, window_size):
            ys, xs = y0 + steps, x0 + steps
            inside = ((ys >= 0) & (ys < H))[:, None] & ((xs >= 0) & (xs < W))[None]
            at = (slice(None), ys.clamp(0, H - 1)[:, None], xs.clamp(0, W - 1)[None])
            keys, values = k[at].flatten(1, 2), v[at].flatten(1, 2)
            mask: Tensor | None = inside.flatten()[None, None, None]
            if k_fill is not None and v_fill is not None:
                outside = ~inside.flatten()[None, :, None, None]
                keys = torch.where(outside, k_fill.to(k.dtype), keys)
                values = torch.where(outside, v_fill.to(v.dtype), values)
                mask = None
            attended = attention_reference(
                q[at].flatten(1, 2), keys, values, bias=bias, mask=mask, scale=scale
            )
            true_y, true_x = inside.nonzero(as_tuple=True)
            here = attended.unflatten(1, (window_size, window_size))[:, true_y, true_x]
            # Autocast computes in another dtype.
            out[:, ys[true_y], xs[true_x]] = here.to(out.dtype)
    return out


def window_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    shift: int = 0,
    bias: Tensor | None = None,
    fill: Fill | None = None,
    scale: float | None = None,
    attend: Callable[..., Tensor] = attention_portable,
) -> Tensor:
    """Windows become the batch of one dense attention; the map is padded where it must be."""
    H, W = q.shape[1:3]
    margins, (q, k, v), mask = _cover(q, k, v, window_size, shift, fill)
    full_H, full_W = q.shape[1:3]
    out = attend(
        *(split_windows(t, window_size) for t in (q, k, v)), bias=bias, mask=mask, scale=scale
    )
    out = join_windows(out, window_size, full_H, full_W)
    return out if margins is None else crop(out, margins[0], H, margins[1], W)


def _cover(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, shift: int, fill: Fill | None
) -> tuple[tuple[int, int] | None, tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Maps of whole windows, the place of the true ones in them, and what windows may see.

    Returns:
        Top and left margin, or None where nothing is padded; q, k, v; and a mask
        (B * windows, 1, 1, window_size^2), or None where all keys take part.
    """
    B, H, W = q.shape[:3]
    top, bottom = _margins(H, window_size, shift)
    left, right = _margins(W, window_size, shift)
    pads = ((top, left), (bottom, right))
    if not (unknown(H, W) or any(pads[0]) or any(pads[1])):
        return None, (q, k, v), None
    inside = F.pad(torch.ones(H, W, dtype=torch.bool, device=q.device), (left, right, top, bottom))
    q = _pad_map(q, *pads)
    if fill is not None:
        k = _pad_constant(k, inside, fill[0], pads)
        return (top, left), (q, k, _pad_constant(v, inside, fill[1], pads)), None
    mask = split_windows(inside[None, :, :, None, None], window_size)[:, None, None, :, 0, 0]
    maps = (q, _pad_map(k, *pads), _pad_map(v, *pads))
    return (top, left), maps, mask.repeat(B, 1, 1, 1)


def window_attention_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    shift: int = 0,
    bias: Tensor | None = None,
    fill: Fill | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `portable`, from batched products and a softmax in place."""
    H, W = q.shape[1:3]
    margins, (q, k, v), _ = _cover(q, k, v, window_size, shift, fill)
    grid = (q.shape[1] // window_size, q.shape[2] // window_size)
    out = attend_cells(q, k, v, grid, q.shape[-1] ** -0.5 if scale is None else scale)
    return out if margins is None else crop(out, margins[0], H, margins[1], W)


def _why_not_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    shift: int = 0,
    bias: Tensor | None = None,
    fill: Fill | None = None,
    **_: Any,
) -> str | None:
    """Why a backend that takes neither a bias nor a mask cannot serve, or None."""
    if bias is not None:
        return "it takes no bias."
    H, W = q.shape[1:3]
    if fill is None and (shift or unknown(H, W) or H % window_size or W % window_size):
        return "partial windows without a fill need a mask, which it does not take."
    return None


def _products_why_not(
    q: Tensor, k: Tensor, v: Tensor, *, fill: Fill | None = None, **options: Any
) -> str | None:
    # Compilers first: the other question branches on sides.
    reason = why_not_products(q, k, v, *(fill or ()))
    return reason or _why_not_plain(q, k, v, fill=fill, **options)


def _products_auto_skip(q: Tensor, *_: Any, window_size: int, **__: Any) -> str | None:
    H, W = q.shape[1:3]
    return products_lose(q, (pieces(H, window_size), pieces(W, window_size)))


WINDOW_ATTENTION = Operator(
    "window_attention",
    [
        triton_backend("window_attention", one_map=True),
        xformers_backend(window_attention_portable, _why_not_plain),
        Backend(
            "products",
            window_attention_products,
            why_not=_products_why_not,
            auto_skip=_products_auto_skip,
        ),
        Backend("portable", window_attention_portable),
        Backend("reference", window_attention_reference),
    ],
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    shift: int = 0,
    bias: Tensor | None = None,
    fill: Fill | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside non-overlapping windows; H and W need not divide.

    The window grid starts at the top left corner, or `shift` tokens to the right and below it, with
    partial windows on both ends. The positions of a partial window outside the map are left out of
    the softmax, or, with `fill`, are keys and values that hold the same constants everywhere: what
    a network computes that pads with zeros before its projection.

    Args:
        q, k, v: (B, H, W, heads, head_dim); v's head_dim may differ.
        window_size: side of a window in tokens.
        shift: offset of the window grid in tokens, 0 <= shift < window_size.
        bias: added to the logits of every window, broadcastable to
            (heads, window_size^2, window_size^2).
        fill: key and value (heads, head_dim) of the positions outside the map; None masks them.
        scale: factor on q k^T; head_dim ** -0.5 if None.
        backend: `auto`, `triton`, `xformers`, `products` (inference in float32 on a CPU),
            `portable` or `reference`.

    Returns:
        (B, H, W, heads, head_dim of v).

    Raises:
        ValueError: the shift does not lie inside a window, or q is not a map.
    """
    _check(q, window_size, shift)
    return WINDOW_ATTENTION(
        q,
        k,
        v,
        window_size=window_size,
        shift=shift,
        bias=bias,
        fill=fill,
        scale=scale,
        backend=backend,
    )
