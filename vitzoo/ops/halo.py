"""Blocked attention with a halo of keys around each block (HaloNet), at any H and W.

A map is cut into blocks anchored at its top left corner. The queries of a block see the window that
reaches `halo_size` tokens further on each side. Window positions outside the map, but within the
halo of it, are border keys; positions further out, which appear where the block does not divide the
map, do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator

Border = Literal["zero", "mask", "constant"]
Pair = tuple[Tensor, Tensor]

# Scores of a chunk on the CPU. glibc maps tensors over 32 MB afresh at every call, and the page
# faults then cost more than the arithmetic.
_CPU_CHUNK_BYTES = 16 * 2**20
_GPU_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class _Geometry:
    """Sizes of one call: B images of H x W tokens, `rows` x `columns` blocks."""

    B: int
    H: int
    W: int
    heads: int
    block: int
    halo: int
    stride: int

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    @property
    def queries(self) -> int:
        """Side of a block in queries."""
        return self.block // self.stride

    @property
    def rows(self) -> int:
        return -(-self.H // self.block)

    @property
    def columns(self) -> int:
        return -(-self.W // self.block)

    def chunks(self, budget: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
        """Slices of images and of block rows whose scores fit in `budget` bytes."""
        row = self.heads * self.columns * self.queries**2 * self.window**2 * itemsize
        if row * self.rows <= budget:
            step = max(1, budget // (row * self.rows))
            for start in range(0, self.B, step):
                yield slice(start, min(start + step, self.B)), slice(0, self.rows)
            return
        step = max(1, budget // row)
        for image in range(self.B):
            for start in range(0, self.rows, step):
                yield slice(image, image + 1), slice(start, min(start + step, self.rows))


def _geometry(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    axial_bias: Pair | None,
    border: str,
    fill: Pair | None,
) -> _Geometry:
    """Check the arguments and derive the sizes."""
    if q.dim() != 5 or k.dim() != 5 or v.dim() != 5:
        raise ValueError(
            "halo_attention takes maps (B, H, W, heads, head_dim), "
            f"got {q.dim()}, {k.dim()} and {v.dim()} dimensions"
        )
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride:
        raise ValueError(
            "block_size must be positive, halo_size at least 0 and stride a divisor of block_size; "
            f"got block_size {block_size}, halo_size {halo_size}, stride {stride}"
        )
    if border not in ("zero", "mask", "constant"):
        raise ValueError(f"border must be 'zero', 'mask' or 'constant', got {border!r}")
    if (border == "constant") != (fill is not None):
        raise ValueError(
            "`fill` holds the keys and values of border='constant', and only of it; "
            f"got border {border!r} with fill {'given' if fill is not None else 'missing'}"
        )
    B, H, W, heads, _ = k.shape
    expected = (-(-H // stride), -(-W // stride))
    if tuple(q.shape[1:3]) != expected:
        raise ValueError(
            f"keys on a {H}x{W} map at stride {stride} need queries on {expected[0]}x{expected[1]},"
            f" got {q.shape[1]}x{q.shape[2]}"
        )
    found = _Geometry(B, H, W, heads, block_size, halo_size, stride)
    if axial_bias is not None:
        table = (2 * found.window - 1, q.shape[-1])
        for part in axial_bias:
            if tuple(part.shape) != table:
                raise ValueError(
                    f"axial_bias needs two tables of shape {table}, got {tuple(part.shape)}"
                )
    return found


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
    g = _geometry(q, k, v, block_size, halo_size, stride, axial_bias, border, fill)
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
                height, width = axial_bias
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


def _pad_heads_first(x: Tensor, g: _Geometry, fill: Tensor | None) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, H', W', d), the map that all windows lie in."""
    bottom = g.rows * g.block - g.H + g.halo
    right = g.columns * g.block - g.W + g.halo
    pads = (0, 0, g.halo, right, g.halo, bottom)
    padded = F.pad(x.permute(0, 3, 1, 2, 4), pads)
    if fill is not None:
        outside = F.pad(x.new_zeros(g.H, g.W, 1), pads, value=1.0)
        padded = padded + outside * fill.to(x.dtype)[:, None, None]
    return padded


def _windows(padded: Tensor, g: _Geometry) -> Tensor:
    """View of a padded map as (B, heads, rows, columns, window, window, d)."""
    view = padded.unfold(2, g.window, g.block).unfold(3, g.window, g.block)
    return view.permute(0, 1, 2, 3, 5, 6, 4)


def _blocks(q: Tensor, g: _Geometry) -> Tensor:
    """(B, H / stride, W / stride, heads, d) -> (B, heads, rows, columns, side, side, d)."""
    s = g.queries
    q = F.pad(q, (0, 0, 0, 0, 0, g.columns * s - q.shape[2], 0, g.rows * s - q.shape[1]))
    return q.unflatten(2, (g.columns, s)).unflatten(1, (g.rows, s)).permute(0, 5, 1, 3, 2, 4, 6)


def _axial_terms(q: Tensor, tables: Pair, window: int) -> Pair:
    """q . table, read along the diagonals.

    Args:
        q: (blocks, side, side, d), unscaled.
        tables: two of (2 * window - 1, d), indexed by window - 1 + key - query.
        window: side of a window.

    Returns:
        Terms of the key's row and of its column, both (blocks, side, side, window).
    """
    blocks, side = q.shape[:2]
    # The first rows of a table are never read: a key is at most side - 1 before its query.
    read = torch.stack([table[window - side :] for table in tables]).flatten(0, 1)
    products = (q @ read.t()).unflatten(-1, (2, -1)).contiguous()
    width = products.shape[-1]
    by_column, by_row, by_block = 2 * width, 2 * width * side, 2 * width * side * side
    shape = (blocks, side, side, window)
    rows = products.as_strided(shape, (by_block, by_row - 1, by_column, 1), side - 1)
    columns = products.as_strided(shape, (by_block, by_row, by_column - 1, 1), width + side - 1)
    return rows, columns


def _missing(side: int, blocks: int, g: _Geometry, border: Border, like: Tensor) -> Tensor | None:
    """Logit terms (blocks, window) that remove the positions that do not exist; None if all do."""
    reach = 0 if border == "mask" else g.halo
    if (reach == g.halo) and blocks * g.block == side:
        return None
    start = torch.arange(blocks, device=like.device)[:, None] * g.block - g.halo
    position = start + torch.arange(g.window, device=like.device)
    missing = (position < -reach) | (position >= side + reach)
    # Two of these and the logit itself stay finite.
    return missing.to(like.dtype) * (torch.finfo(like.dtype).min / 4)


def _key_selector(window: int, like: Tensor) -> Tensor:
    """(window^2, 2 * window): one-hot row and one-hot column of each key."""
    eye = torch.eye(window, dtype=like.dtype, device=like.device)
    return torch.cat([eye.repeat_interleave(window, 0), eye.repeat(window, 1)], dim=1)


class _Scratch:
    """Buffers that the chunks of one call share where no gradient needs them afterwards."""

    def __init__(self, reuse: bool, selector: Tensor | None) -> None:
        self.reuse = reuse
        self.selector = selector
        self._keys: Tensor | None = None
        self._scores: Tensor | None = None

    def keys(self, windows: Tensor) -> Tensor:
        """(..., window, window, d) -> (N, window^2, d + 2 * window) with the selector appended."""
        *lead, w, _, d = windows.shape
        count = 1
        for size in lead:
            count *= size
        if self.selector is None:
            return windows.reshape(count, w * w, d)
        if not self.reuse:
            flat = windows.reshape(count, w * w, d)
            return torch.cat([flat, self.selector.expand(count, -1, -1)], dim=-1)
        if self._keys is None or self._keys.shape[0] < count:
            self._keys = windows.new_empty(count, w * w, d + self.selector.shape[-1])
            self._keys[..., d:] = self.selector
        keys = self._keys[:count]
        keys.view(*lead, w, w, -1)[..., :d] = windows
        return keys

    def softmax_of_product(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q k^T) of (N, queries, d) and (N, keys, d)."""
        if not self.reuse:
            return torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        count = q.shape[0]
        if self._scores is None or self._scores.shape[0] < count:
            self._scores = q.new_empty(count, q.shape[1], k.shape[1])
        scores = torch.bmm(q, k.transpose(1, 2), out=self._scores[:count])
        return torch.softmax(scores, -1, out=scores)


def halo_attention_portable(
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
    """A few block rows at a time, relative logits and masks inside one product.

    With q' = [scale * q, row terms, column terms] and k' = [k, one-hot row, one-hot column] the
    product q' k' holds content and relative logits, and no (queries, keys) bias is ever built. A
    position that does not exist takes a large negative term with its row or column.
    """
    g = _geometry(q, k, v, block_size, halo_size, stride, axial_bias, border, fill)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_blocks = _blocks(q, g)
    k_fill, v_fill = fill if fill is not None else (None, None)
    k_windows = _windows(_pad_heads_first(k, g, k_fill), g)
    v_windows = _windows(_pad_heads_first(v, g, v_fill), g)
    missing = (
        _missing(g.H, g.rows, g, border, q),
        _missing(g.W, g.columns, g, border, q),
    )
    plain = axial_bias is None and missing == (None, None)
    compiling = torch.compiler.is_compiling()
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (q, k, v, *(axial_bias or ()), *(fill or ()))
    )
    scratch = _Scratch(
        reuse=not (needs_grad or compiling),
        selector=None if plain else _key_selector(g.window, k),
    )
    if compiling:  # one chunk: the batch may be symbolic
        chunks = [(slice(None), slice(None))]
    else:
        budget = _CPU_CHUNK_BYTES if q.device.type == "cpu" else _GPU_CHUNK_BYTES
        chunks = list(g.chunks(budget, q.element_size()))
    outs = []
    for images, rows in chunks:
        part = q_blocks[images, :, rows]
        queries = part.reshape(-1, g.queries, g.queries, part.shape[-1])
        queries = _augmented_queries(
            queries, part.shape[:4], g, axial_bias, missing, rows=rows, scale=scale
        )
        keys = scratch.keys(k_windows[images, :, rows])
        weights = scratch.softmax_of_product(queries, keys)
        values = v_windows[images, :, rows].reshape(-1, g.window**2, v.shape[-1])
        attended = torch.bmm(weights, values)
        outs.append(attended.view(*part.shape[:-1], v.shape[-1]))
    return _join(outs, g)[:, : q.shape[1], : q.shape[2]]


def _augmented_queries(
    q: Tensor,
    lead: torch.Size,
    g: _Geometry,
    axial_bias: Pair | None,
    missing: tuple[Tensor | None, Tensor | None],
    *,
    rows: slice,
    scale: float,
) -> Tensor:
    """[scale * q, row terms, column terms] as (N, side^2, d'), from q (N, side, side, d).

    `lead` is (images, heads, block rows, block columns), of which N is the product.
    """
    parts = [q * scale]
    if axial_bias is not None or missing != (None, None):
        if axial_bias is not None:
            terms = list(_axial_terms(q, axial_bias, g.window))
        else:
            terms = [q.new_zeros(*q.shape[:-1], g.window)] * 2
        for axis, absent in enumerate(missing):
            if absent is None:
                continue
            absent = absent[rows, None] if axis == 0 else absent[None]
            absent = absent.expand(*lead, g.window).reshape(-1, 1, 1, g.window)
            terms[axis] = terms[axis] + absent
        parts += terms
    joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return joined.flatten(1, 2)


def _join(outs: list[Tensor], g: _Geometry) -> Tensor:
    """Chunks (images, heads, rows, columns, side, side, d) -> (B, H', W', heads, d)."""
    strips = [out.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2) for out in outs]
    if len(strips) == 1:
        return strips[0]
    if strips[0].shape[1] == g.rows * g.queries:
        return torch.cat(strips)
    per_image = len(strips) // g.B
    images = [torch.cat(strips[i : i + per_image], 1) for i in range(0, len(strips), per_image)]
    return torch.cat(images)


HALO_ATTENTION = Operator(
    "halo_attention",
    [
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

    With window = block_size + 2 * halo_size, the logit of query (iy, ix) of its block, counted in
    queries, and key (jy, jx) of its window is
    scale * q . k + q . height[window - 1 + jy - iy] + q . width[window - 1 + jx - ix]:
    the relative terms take q unscaled, and at stride 2 their index steps by one per query.

    Args:
        q: (B, ceil(H / stride), ceil(W / stride), heads, head_dim), the positions that `stride`
            divides.
        k, v: (B, H, W, heads, head_dim); v's head_dim may differ.
        block_size: side of a block in tokens of the key map.
        halo_size: tokens that a window reaches beyond its block on each side.
        stride: step between queries; divides `block_size`.
        axial_bias: tables (height, width), each (2 * window - 1, head_dim), shared by the heads;
            None for no relative logits.
        border: what the positions within `halo_size` outside the map hold. `zero`: keys and values
            of zero that take part in the softmax, with their relative logits (timm's HaloNets);
            `mask`: nothing (U-HaloNet); `constant`: `fill`.
        fill: key and value (heads, head_dim) for border='constant'.
        scale: factor on q . k; head_dim ** -0.5 if None.
        backend: `auto`, `portable` or `reference`.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), heads, head_dim of v).

    Raises:
        ValueError: sizes that do not fit together, an unknown border or a missing fill.
    """
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
