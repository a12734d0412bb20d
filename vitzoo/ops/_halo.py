"""Halo attention's sizes and its fast path; the definition is in `halo.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo._processor import mkl_on_amd
from vitzoo.ops._half import computed_dtype, widen_where_slow
from vitzoo.ops._onednn import needs_derivatives, records_gradient
from vitzoo.ops._sides import exporting, pieces, unknown

Border = Literal["zero", "mask", "constant"]
Pair = tuple[Tensor, Tensor]

# Scores of a chunk on the CPU: glibc maps tensors over 32 MB afresh at every call, and the page
# faults then cost more than the arithmetic. Smaller still, the buffers stay in the caches.
_CPU_CHUNK_BYTES = 4 * 2**20
_GPU_CHUNK_BYTES = 2**30
# Queries that are made ready for several chunks at once, in fewer calls.
_CPU_QUERY_BYTES = 8 * 2**20
# On AMD's processors MKL multiplies values up to this wide in a quarter of the time the other way
# round; on Intel's that takes up to four times as long.
_NARROW_ON_AMD = 12


@dataclass(frozen=True)
class Geometry:
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
        return pieces(self.H, self.block)

    @property
    def columns(self) -> int:
        return pieces(self.W, self.block)

    def chunks(self, queries: Tensor, width: int) -> Iterator[tuple[slice, slice, int]]:
        """Images, some of their block rows, and how many of those at a time.

        The scores of so many rows and the queries of all, `width` wide, fit in the budgets of the
        queries' device; a single row may pass them.
        """
        on_cpu = queries.device.type == "cpu"
        budget = _CPU_CHUNK_BYTES if on_cpu else _GPU_CHUNK_BYTES
        row = self.heads * self.columns * self.queries**2 * queries.element_size()
        score_bytes = row * self.window**2
        if score_bytes * self.rows <= budget:
            images = max(1, budget // (score_bytes * self.rows))
            for start in range(0, self.B, images):
                yield slice(start, min(start + images, self.B)), slice(0, self.rows), self.rows
            return
        step = max(1, budget // score_bytes)
        rows = step * max(1, _CPU_QUERY_BYTES // (row * width * step)) if on_cpu else step
        for image in range(self.B):
            for start in range(0, self.rows, rows):
                yield slice(image, image + 1), slice(start, min(start + rows, self.rows)), step


def geometry(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    axial_bias: Pair | None,
    border: str,
    fill: Pair | None,
) -> Geometry:
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
    expected = (pieces(H, stride), pieces(W, stride))
    if tuple(q.shape[1:3]) != expected:
        raise ValueError(
            f"keys on a {H}x{W} map at stride {stride} need queries on {expected[0]}x{expected[1]},"
            f" got {q.shape[1]}x{q.shape[2]}"
        )
    found = Geometry(B, H, W, heads, block_size, halo_size, stride)
    if axial_bias is not None:
        table = (2 * found.window - 1, q.shape[-1])
        for part in axial_bias:
            if tuple(part.shape) != table:
                raise ValueError(
                    f"axial_bias needs two tables of shape {table}, got {tuple(part.shape)}"
                )
    return found


def _pad_heads_first(x: Tensor, g: Geometry, fill: Tensor | None, *, in_place: bool) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, H', W', d), the map that all windows lie in."""
    bottom = g.rows * g.block - g.H + g.halo
    right = g.columns * g.block - g.W + g.halo
    pads = (0, 0, g.halo, right, g.halo, bottom)
    x = x.permute(0, 3, 1, 2, 4)
    if in_place:
        ys, xs = slice(g.halo, g.halo + g.H), slice(g.halo, g.halo + g.W)
        padded = x.new_empty(*x.shape[:2], g.H + g.halo + bottom, g.W + g.halo + right, x.shape[-1])
        padded[:, :, ys, xs] = x
        outside = x.new_zeros(()) if fill is None else fill[:, None, None]
        # Only the border is filled: the map itself is most of it.
        for side in (slice(0, g.halo), slice(g.halo + g.H, None)):
            padded[:, :, side] = outside
        for side in (slice(0, g.halo), slice(g.halo + g.W, None)):
            padded[:, :, ys, side] = outside
        return padded
    padded = F.pad(x, pads)
    if fill is not None:
        border = F.pad(x.new_zeros(g.H, g.W, 1), pads, value=1.0)
        padded = padded + border * fill.to(x.dtype)[:, None, None]
    return padded


def _window_pair(k: Tensor, v: Tensor, g: Geometry, fill: Pair | None, *, in_place: bool) -> Pair:
    """Views of the padded maps as (B, rows, heads, columns, window, window, d)."""
    k_fill, v_fill = (None, None) if fill is None else fill
    keys, values = (
        _pad_heads_first(x, g, constant, in_place=in_place)
        .unfold(2, g.window, g.block)
        .unfold(3, g.window, g.block)
        .permute(0, 2, 1, 3, 5, 6, 4)
        for x, constant in ((k, k_fill), (v, v_fill))
    )
    return keys, values


def _blocks(q: Tensor, g: Geometry) -> Tensor:
    """(B, H / stride, W / stride, heads, d) -> (B, rows, heads, columns, side, side, d)."""
    s = g.queries
    bottom, right = g.rows * s - q.shape[1], g.columns * s - q.shape[2]
    if unknown(bottom, right) or bottom or right:
        q = F.pad(q, (0, 0, 0, 0, 0, right, 0, bottom))
    return q.unflatten(2, (g.columns, s)).unflatten(1, (g.rows, s)).permute(0, 1, 5, 3, 2, 4, 6)


def _read_rows(tables: Pair, window: int, side: int) -> Tensor:
    """Rows of two tables (2 * window - 1, d) that `side` queries read, one below the other."""
    # Not the first ones: a key is at most side - 1 before its query.
    return torch.cat([table[window - side :] for table in tables])


def _axial_terms(q: Tensor, read: Tensor, window: int) -> Pair:
    """q . table, read along the diagonals.

    Args:
        q: (blocks, side, side, d), unscaled.
        read: from `_read_rows`; a table is indexed by window - 1 + key - query.
        window: side of a window.

    Returns:
        Terms of the key's row and of its column, both (blocks, side, side, window).
    """
    blocks, side = q.shape[:2]
    products = (q @ read.t()).unflatten(-1, (2, -1)).contiguous()
    width = products.shape[-1]
    by_column, by_row, by_block = 2 * width, 2 * width * side, 2 * width * side * side
    shape = (blocks, side, side, window)
    rows = products.as_strided(shape, (by_block, by_row - 1, by_column, 1), side - 1)
    columns = products.as_strided(shape, (by_block, by_row, by_column - 1, 1), width + side - 1)
    return rows, columns


def _missing(side: int, blocks: int, g: Geometry, border: Border, like: Tensor) -> Tensor | None:
    """Logit terms (blocks, window) that remove the positions that do not exist; None if all do."""
    reach = 0 if border == "mask" else g.halo
    if reach == g.halo and not unknown(side) and blocks * g.block == side:
        return None
    start = torch.arange(blocks, device=like.device)[:, None] * g.block - g.halo
    position = start + torch.arange(g.window, device=like.device)
    missing = (position < -reach) | (position >= side + reach)
    # Two of these and the logit itself stay finite, in the dtype that autocast computes in, too.
    return missing.to(like.dtype) * (torch.finfo(computed_dtype(like)).min / 4)


def _selector(window: int, like: Tensor) -> Tensor:
    """(window^2, 2 * window): one-hot row and one-hot column of each key."""
    eye = torch.eye(window, dtype=like.dtype, device=like.device)
    return torch.cat([eye.repeat_interleave(window, 0), eye.repeat(window, 1)], dim=1)


class _Scratch:
    """Buffers that the chunks of one call share where no gradient needs them afterwards."""

    def __init__(self, selector: Tensor | None, *, reuse: bool) -> None:
        self.reuse = reuse
        self.selector = selector
        self._keys: Tensor | None = None
        self._scores: Tensor | None = None

    def keys(self, windows: Tensor) -> Tensor:
        """(..., window, window, d) -> (N, window^2, d + 2 * window) with the selector appended."""
        *lead, w, _, d = windows.shape
        count = math.prod(lead)
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


@widen_where_slow
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
    g = geometry(q, k, v, block_size, halo_size, stride, axial_bias, border, fill)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    missing = _missing(g.H, g.rows, g, border, q), _missing(g.W, g.columns, g, border, q)
    # Not a comparison of pairs: torch 2.11 cannot compile a tensor's with None.
    unmasked = missing[0] is None and missing[1] is None
    selector = None if axial_bias is None and unmasked else _selector(g.window, k)
    recorded = records_gradient(q, k, v, *(axial_bias or ()), *(fill or ()))
    table = None if axial_bias is None else _read_rows(axial_bias, g.window, g.queries).to(q.dtype)
    augment = partial(_augmented_queries, g=g, table=table, missing=missing, scale=scale)
    if recorded or torch.compiler.is_compiling() or needs_derivatives():
        # Gradients need all scores anyway, and a compiled batch may be symbolic: one chunk.
        windows = _window_pair(k, v, g, fill, in_place=False)
        queries = augment(_blocks(q, g), rows=slice(None))
        out = _attend(queries, *windows, g.queries, _Scratch(selector, reuse=False))
    else:
        out = _in_chunks(_blocks(q, g), k, v, g, fill, augment, selector)
    # Not slices: their symbolic lengths are minima, which nest from block to block.
    return out.flatten(3, 4).flatten(1, 2).narrow(1, 0, q.shape[1]).narrow(2, 0, q.shape[2])


def _in_chunks(
    blocks: Tensor,
    k: Tensor,
    v: Tensor,
    g: Geometry,
    fill: Pair | None,
    augment: Callable[..., Tensor],
    selector: Tensor | None,
) -> Tensor:
    """What `_attend` returns for all blocks, with buffers for a part of them."""
    side = g.queries
    out = v.new_empty(g.B, g.rows, side, g.columns, side, g.heads, v.shape[-1])
    scratch = _Scratch(selector, reuse=True)
    padded = None
    width = blocks.shape[-1] + (0 if selector is None else selector.shape[-1])
    for images, rows, step in g.chunks(blocks, width):
        if images != padded:
            padded = images
            keys, values = _window_pair(k[images], v[images], g, fill, in_place=True)
        part = blocks[images, rows]
        queries = augment(part, rows=rows)
        steps = (
            queries.split(step * len(queries) // part.shape[1]),
            *(x.split(step, 1) for x in (keys[:, rows], values[:, rows], out[images, rows])),
        )
        for some_queries, some_keys, some_values, result in zip(*steps, strict=True):
            result.copy_(_attend(some_queries, some_keys, some_values, side, scratch))
    return out


def _attend(queries: Tensor, keys: Tensor, values: Tensor, side: int, scratch: _Scratch) -> Tensor:
    """One chunk of blocks of side x side queries.

    Returns:
        (images, rows, side, columns, side, heads, d), the order of a map.
    """
    weights = scratch.softmax_of_product(queries, scratch.keys(keys))
    lead, d = values.shape[:4], values.shape[-1]
    flat = values.reshape(weights.shape[0], weights.shape[2], d)
    # An exported graph is for other processors, too.
    narrow = d <= _NARROW_ON_AMD and flat.device.type == "cpu" and not exporting()
    if narrow and mkl_on_amd():
        attended = torch.bmm(flat.transpose(1, 2), weights.transpose(1, 2))
        return attended.view(*lead, d, side, side).permute(0, 1, 5, 3, 6, 2, 4)
    attended = torch.bmm(weights, flat).view(*lead, side, side, d)
    return attended.permute(0, 1, 4, 3, 5, 2, 6)


def _augmented_queries(
    q: Tensor,
    *,
    g: Geometry,
    table: Tensor | None,
    missing: tuple[Tensor | None, Tensor | None],
    rows: slice,
    scale: float,
) -> Tensor:
    """[scale * q, row terms, column terms] as (N, side^2, d').

    q is (images, block rows, heads, block columns, side, side, d), the blocks of `rows`; `table`
    is what `_read_rows` gave, None without a bias.
    """
    lead = q.shape[:4]
    q = q.reshape(-1, g.queries, g.queries, q.shape[-1])
    parts = [q * scale]
    if table is not None or missing[0] is not None or missing[1] is not None:
        if table is not None:
            terms = list(_axial_terms(q, table, g.window))
        else:
            terms = [q.new_zeros(*q.shape[:-1], g.window)] * 2
        for axis, absent in enumerate(missing):
            if absent is None:
                continue
            absent = absent[rows, None, None] if axis == 0 else absent
            absent = absent.expand(*lead, g.window).reshape(-1, 1, 1, g.window)
            terms[axis] = terms[axis] + absent
        parts += terms
    joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return joined.flatten(1, 2)
