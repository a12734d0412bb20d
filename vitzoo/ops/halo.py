"""Blocked attention with a halo of keys around each block (HaloNet), at any H and W.

A map is cut into blocks anchored at its top left corner. The queries of a block see the window that
reaches `halo_size` tokens further on each side. Window positions outside the map, but within the
halo of it, are border keys; positions further out, which appear where the block does not divide the
map, do not exist.

With window = block_size + 2 * halo_size, the logit of query (iy, ix) of its block, counted in
queries, and key (jy, jx) of its window is
scale * q . k + q . height[window - 1 + jy - iy] + q . width[window - 1 + jx - ix]:
the relative terms take q unscaled, and at stride 2 their index steps by one per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._halo import Border, Pair, geometry, halo_attention_portable
from vitzoo.ops._kernels import triton_backend


def halo_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    axial_bias: Pair | None = None,
    border: Border = "zero",
    fill: Pair | None = None,
    scale: float | None = None,
) -> Tensor:
    """One block after the other, its keys picked by their coordinates."""
    g = geometry(q, k, v, block_size, halo_size, stride, axial_bias, border, fill)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = v.new_empty(*q.shape[:4], v.shape[-1])
    reach = 0 if border == "mask" else halo_size
    steps = torch.arange(-halo_size, block_size + halo_size, device=q.device)
    for y0 in range(0, g.H, block_size):
        for x0 in range(0, g.W, block_size):
            ys, xs = y0 + steps, x0 + steps
            jy, jx = (
                ((p >= -reach) & (p < side + reach)).nonzero()[:, 0]
                for p, side in ((ys, g.H), (xs, g.W))
            )
            keys, values = (
                _gather(x, ys[jy], xs[jx], None if fill is None else fill[i])
                for i, x in enumerate((k, v))
            )
            here = (
                slice(None),
                slice(y0 // stride, (y0 + block_size) // stride),
                slice(x0 // stride, (x0 + block_size) // stride),
            )
            queries = q[here]
            logits = scale * torch.einsum("byxnd,bjind->bnyxji", queries, keys)
            if axial_bias is not None:
                height, width = (table.to(q.dtype) for table in axial_bias)
                iy = torch.arange(queries.shape[1], device=q.device)
                ix = torch.arange(queries.shape[2], device=q.device)
                by_row = height[g.window - 1 + jy - iy[:, None]]
                by_column = width[g.window - 1 + jx - ix[:, None]]
                logits = logits + torch.einsum("byxnd,yjd->bnyxj", queries, by_row)[..., None]
                logits = logits + torch.einsum("byxnd,xid->bnyxi", queries, by_column).unsqueeze(-2)
            weights = logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])
            out[here] = torch.einsum("bnyxji,bjind->byxnd", weights, values)
    return out


def _gather(x: Tensor, ys: Tensor, xs: Tensor, fill: Tensor | None) -> Tensor:
    """(B, H, W, heads, d) at these rows and columns; `fill` or zero outside the map."""
    H, W = x.shape[1:3]
    inside = ((ys >= 0) & (ys < H))[:, None] & ((xs >= 0) & (xs < W))
    found = x[:, ys.clamp(0, H - 1)][:, :, xs.clamp(0, W - 1)]
    outside = x.new_zeros(()) if fill is None else fill.to(x.dtype)
    return torch.where(inside[:, :, None, None], found, outside)


HALO_ATTENTION = Operator(
    "halo_attention",
    [
        triton_backend("halo_attention"),
        Backend("portable", halo_attention_portable),
        Backend("reference", halo_attention_reference),
    ],
)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    axial_bias: Pair | None = None,
    border: Border = "zero",
    fill: Pair | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention from the blocks of a map to the blocks and a halo around them (arXiv 2103.12731).

    Args:
        q: (B, ceil(H / stride), ceil(W / stride), heads, head_dim): every stride-th position.
        k, v: (B, H, W, heads, head_dim); v's head_dim may differ.
        block_size: side of a block in tokens of the key map.
        halo_size: tokens that a window reaches beyond its block on each side.
        stride: step between queries; divides `block_size`.
        axial_bias: tables (height, width) of relative logits, each (2 * window - 1, head_dim) with
            window = block_size + 2 * halo_size, shared by the heads.
        border: what the positions within `halo_size` outside the map hold. `zero`: keys and values
            of zero that take part in the softmax, with their relative logits (timm's HaloNets);
            `mask`: nothing (U-HaloNet); `constant`: `fill`.
        fill: key and value (heads, head_dim) for border='constant'.
        scale: factor on q . k; head_dim ** -0.5 if None.
        backend: `auto`, `triton`, `portable` or `reference`.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), heads, head_dim of v).

    Raises:
        ValueError: sizes that do not fit together, an unknown border or a missing fill.
    """
    # The kernels check nothing themselves.
    geometry(q, k, v, block_size, halo_size, stride, axial_bias, border, fill)
    return HALO_ATTENTION(
        q,
        k,
        v,
        block_size=block_size,
        halo_size=halo_size,
        stride=stride,
        axial_bias=axial_bias,
        border=border,
        fill=fill,
        scale=scale,
        backend=backend,
    )
