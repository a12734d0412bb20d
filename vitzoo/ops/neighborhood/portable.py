"""Neighborhood attention by tiles of queries that share one rectangle of keys.

A map is cut into strips of columns. A strip of keys is as wide as the neighborhoods of its queries
together, so neighbouring strips overlap; in it the keys of a tile of rows are contiguous memory.
Each row of tiles is then one batched product, one softmax over the rectangle (what carries the bias
also masks the keys outside a query's own neighborhood) and one more product. A dilated map is a
batch of undilated ones, one for each pair of remainders. Backward computes the probabilities again:
nothing larger than the map is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._half import widen_where_slow, without_autocast
from vitzoo.ops._onednn import needs_derivatives, records_gradient, why_not_apart
from vitzoo.ops._sides import exporting
from vitzoo.ops.neighborhood._tiles import Axis, Pair, axes, classes
from vitzoo.ops.neighborhood.flat import neighborhood_attention_flat

# Bytes of logits at a time, and of weights: what stays in the cache, and below what an allocator
# maps afresh.
_CHUNK_BYTES = 8 << 20
# Rows of a map up to which low tiles are faster on a CPU (docs/decisions.md, "Tiles over strips").
_FEW_ROWS_FORWARD, _FEW_ROWS_BACKWARD = 64, 32


@lru_cache(maxsize=64)
def _entries(y: Axis, x: Axis, i: int, device: torch.device) -> Tensor:
    """Where row i of tiles finds its bias in a table flattened with a masked row and column.

    (strips, queries of a tile, keys of its rectangle), flattened. Kept between calls: the same few
    maps come back in every block.
    """
    with torch.inference_mode(False):
        rows_y, rows_x = y.rows(device)[i], x.rows(device)
        found = rows_y[:, None, :, None] * (2 * x.kernel_size) + rows_x[:, None, :, None, :]
        return found.flatten().int()


class Table:
    """The bias table spread over the rectangles of each row of tiles, -inf where masked."""

    def __init__(self, bias: Tensor | None, y: Axis, x: Axis, like: Tensor) -> None:
        rows = (2 * y.kernel_size - 1, 2 * x.kernel_size - 1)
        table = like.new_zeros(1, *rows) if bias is None else bias.to(like.dtype)
        self.learned = bias is not None
        # Sums over the batch and over all queries: never in half precision.
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.table = F.pad(table, (0, 1, 0, 1), value=float("-inf"))
        self.y, self.x = y, x
        self.spread: dict[int, Tensor] = {}

    def __getitem__(self, i: int) -> Tensor:
        """(heads or 1, strips, queries of a tile, keys of its rectangle) for row i of tiles."""
        i = self.y.like(i)
        if i not in self.spread:
            where = _entries(self.y, self.x, i, self.table.device)
            found = self.table.flatten(1).index_select(1, where)
            shape = (self.x.count, self.y.tile * self.x.tile, self.y.span * self.x.span)
            self.spread[i] = found.unflatten(1, shape)
        return self.spread[i]

    def collect(self, spread: dict[int, Tensor], i: int, d_logits: Tensor) -> None:
        """Add the logits' gradients (strips, queries, keys) of row i of tiles to `spread`."""
        heads = self.table.shape[0]
        total = d_logits.view(-1, heads, self.x.count, *d_logits.shape[1:]).sum(0, dtype=self.wide)
        i = self.y.like(i)
        if i not in spread:
            spread[i] = torch.zeros_like(self[i], dtype=self.wide)
        spread[i][:, :, : total.shape[2]] += total

    def gradient(self, spread: dict[int, Tensor]) -> Tensor:
        """Gradient of the bias from the gradients of what `__getitem__` gave."""
        marks_y, marks_x = (
            F.one_hot(axis.rows(self.table.device), 2 * axis.kernel_size).to(self.wide)
            for axis in (self.y, self.x)
        )
        total = torch.zeros_like(self.table, dtype=self.wide)
        for i, grad in spread.items():
            grad = grad.unflatten(-1, (self.y.span, self.x.span))
            grad = grad.unflatten(2, (self.y.tile, self.x.tile)).permute(0, 2, 4, 1, 3, 5)
            by_column = grad.flatten(1, 2).flatten(2) @ marks_x.flatten(0, 2)
            total += marks_y[i].flatten(0, 1).T @ by_column
        return total[:, :-1, :-1]


def _columns(maps: Tensor, tile: int) -> list[Tensor]:
    """Views (..., heads, count, H, columns, d) of maps (..., H, W, heads, d).

    All strips as wide as a tile, and behind them what is left of the map, if anything.
    """
    full, rest = divmod(maps.shape[-3], tile)
    views = []
    if full:
        tiled = maps[..., : full * tile, :, :].unflatten(-3, (full, tile))
        views.append(tiled.movedim((-2, -4), (-5, -4)))
    if rest:
        views.append(maps[..., full * tile :, :, :].movedim(-2, -4).unsqueeze(-4))
    return views


def _query_strips(columns: Sequence[Tensor], strips: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What `_columns` gave, each beside its part of strips (..., heads, count, H, tile, d)."""
    first = 0
    for here in columns:
        last = first + here.shape[-4]
        if here.shape[-4] == strips.shape[-4] and here.shape[-2] == strips.shape[-2]:
            yield here, strips
        else:
            yield here, strips[..., first:last, :, : here.shape[-2], :]
        first = last


def _key_strips(maps: Tensor, strips: Tensor, axis: Axis) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching views of maps (..., H, W, heads, d) and strips (..., heads, count, H, span, d)."""
    for i in range(axis.count):
        columns = slice(axis.start(i), axis.start(i) + axis.span)
        yield maps[..., columns, :, :].movedim(-2, -4), strips[..., i, :, :, :]


class _Strips:
    """The strips of a batch of maps, and the rectangles of their tiles.

    Strips are matrices (strips, positions, d), one below the other: (..., heads, count) strips of
    whole columns, whose positions run row by row.
    """

    def __init__(self, q: Tensor, y: Axis, x: Axis, scale: float) -> None:
        self.y, self.x = y, x
        self.lead, self.heads = q.shape[:-4], q.shape[-2]
        self.scale = scale
        # Scores and weights of the rows of tiles in turn: they stay in the cache.
        self._buffers: Tensor | None = None

    def _new(self, maps: Tensor, width: int, *, zero: bool) -> Tensor:
        size = (*self.lead, self.heads, self.x.count, self.y.length, width, maps.shape[-1])
        return maps.new_zeros(size) if zero else maps.new_empty(size)

    def queries(self, maps: Tensor) -> Tensor:
        """Maps -> strips as wide as a tile."""
        # The last strip may hang over the map's end.
        strips = self._new(maps, self.x.tile, zero=self.x.length % self.x.tile != 0)
        for here, there in _query_strips(_columns(maps, self.x.tile), strips):
            there.copy_(here)
        return _as_matrices(strips)

    def keys(self, maps: Tensor) -> Tensor:
        """Maps -> strips as wide as a rectangle of keys."""
        strips = self._new(maps, self.x.span, zero=False)
        for here, there in _key_strips(maps, strips, self.x):
            there.copy_(here)
        return _as_matrices(strips)

    def zero_keys(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Strips of zeros for the gradient of keys or values, and the same as matrices."""
        strips = self._new(maps, self.x.span, zero=True)
        return strips, _as_matrices(strips)

    def query_tiles(self, strips: Tensor) -> tuple[Tensor, ...]:
        """(strips, queries, d) of each row of tiles; the last may have fewer rows."""
        return strips.split(self.y.tile * self.x.tile, 1)

    def key_tiles(self, strips: Tensor) -> list[Tensor]:
        """(strips, keys, d) of each row of tiles."""
        width, keys = self.x.span, self.y.span * self.x.span
        return [strips.narrow(1, self.y.start(i) * width, keys) for i in range(self.y.count)]

    def places(self, maps: Tensor) -> list[tuple[Tensor, ...]]:
        """What each row of tiles covers of the maps, as `_columns` cuts them."""
        rows = (view.split(self.y.tile, -3) for view in _columns(maps, self.x.tile))
        return list(zip(*rows, strict=True))

    def write(self, places: tuple[Tensor, ...], tiles: Tensor) -> None:
        """Write (strips, queries, d) of one row of tiles to its places."""
        rows = places[0].shape[-3]
        shape = (*self.lead, self.heads, self.x.count, rows, self.x.tile, tiles.shape[-1])
        for here, there in _query_strips(places, tiles.view(shape)):
            here.copy_(there)

    def weights(self, q: Tensor, k: Tensor, spread: Tensor) -> Tensor:
        """Probabilities (strips, queries, keys) of one row of tiles, gone at the next call."""
        shape = (2, *q.shape[:2], k.shape[1])
        if self._buffers is None or self._buffers.shape != shape:
            self._buffers = q.new_empty(shape)
        # Not in place: torch's softmax then takes up to half as long again on rows that no vector
        # divides.
        logits, weights = self._buffers
        # With beta 0 what the buffer holds is not read.
        torch.baddbmm(logits, q, k.transpose(1, 2), beta=0, alpha=self.scale, out=logits)
        if spread.shape[2] > q.shape[1]:
            # A tile that hangs over the lower end has fewer rows.
            spread = spread[:, :, : q.shape[1]]
        logits.view(-1, self.heads, self.x.count, *logits.shape[1:]).add_(spread)
        return torch.softmax(logits, -1, out=weights)


def _as_matrices(strips: Tensor) -> Tensor:
    """(..., H, width, d) -> (strips, H * width, d)."""
    return strips.flatten(-3, -2).flatten(0, -3)


def _chunks(q: Tensor, y: Axis, x: Axis) -> Iterator[slice]:
    """Slices of the batch whose logits fit `_CHUNK_BYTES`."""
    B = q.shape[0]
    per_map = y.tile * y.span * x.count * x.tile * x.span * q.element_size()
    step = max(1, _CHUNK_BYTES // (per_map * q.shape[1] * q.shape[2] * q.shape[-2]))
    yield from (slice(b, b + step) for b in range(0, B, step))


def _axes(maps: Tensor, kernel_size: Pair, few_rows_up_to: int) -> tuple[Axis, Axis]:
    return axes(maps, kernel_size, few_rows_up_to=few_rows_up_to if maps.is_cpu else 0)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
) -> Tensor:
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    for maps in zip(*(classes(t, dilation) for t in (q, k, v, out)), strict=True):
        y, x = _axes(maps[0], kernel_size, _FEW_ROWS_FORWARD)
        table = Table(bias, y, x, q)
        for images in _chunks(maps[0], y, x):
            q_maps, k_maps, v_maps, out_maps = (t[images] for t in maps)
            strips = _Strips(q_maps, y, x, scale)
            rows = zip(
                strips.query_tiles(strips.queries(q_maps)),
                strips.key_tiles(strips.keys(k_maps)),
                strips.key_tiles(strips.keys(v_maps)),
                strips.places(out_maps),
                strict=True,
            )
            for i, (queries, keys, values, places) in enumerate(rows):
                weights = strips.weights(queries, keys, table[i])
                strips.write(places, torch.bmm(weights, values))
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    grad_bias = q.new_zeros(0) if bias is None else torch.zeros_like(bias)
    all_maps = (q, k, v, grad, dq, dk, dv)
    for maps in zip(*(classes(t, dilation) for t in all_maps), strict=True):
        y, x = _axes(maps[0], kernel_size, _FEW_ROWS_BACKWARD)
        table = Table(bias, y, x, q)
        spread: dict[int, Tensor] = {}
        for images in _chunks(maps[0], y, x):
            _backward_chunk(tuple(t[images] for t in maps), table, spread, scale)
        if bias is not None:
            grad_bias += table.gradient(spread).to(bias.dtype)
    return dq, dk, dv, grad_bias


def _backward_chunk(
    maps: tuple[Tensor, ...], table: Table, spread: dict[int, Tensor], scale: float
) -> None:
    """Add a few images' gradients to the last three of `maps` and to `spread`."""
    q_maps, k_maps, v_maps, grad_maps, dq_maps, dk_maps, dv_maps = maps
    strips = _Strips(q_maps, table.y, table.x, scale)
    (dk_strips, dks), (dv_strips, dvs) = strips.zero_keys(k_maps), strips.zero_keys(v_maps)
    rows = zip(
        strips.query_tiles(strips.queries(q_maps)),
        strips.query_tiles(strips.queries(grad_maps)),
        strips.key_tiles(strips.keys(k_maps)),
        strips.key_tiles(strips.keys(v_maps)),
        strips.places(dq_maps),
        strips.key_tiles(dks),
        strips.key_tiles(dvs),
        strict=True,
    )
    for i, (q, grad, k, v, places, dk, dv) in enumerate(rows):
        weights = strips.weights(q, k, table[i])
        d_logits = torch.ops.aten._softmax_backward_data(
            torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype
        )
        # Products into fresh memory: the CPU's batched product is slow with strided outputs.
        strips.write(places, torch.bmm(d_logits, k).mul_(scale))
        dk.add_(torch.bmm(d_logits.transpose(1, 2), q * scale))
        dv.add_(torch.bmm(weights.transpose(1, 2), grad))
        if table.learned:
            table.collect(spread, i, d_logits)
    for d_maps, d_strips in ((dk_maps, dk_strips), (dv_maps, dv_strips)):
        for here, there in _key_strips(d_maps, d_strips, table.x):
            here.add_(there)


# One node in a compiled graph: its loops depend on the map's size, not on its contents.
@torch.library.custom_op("vitzoo::neighborhood_tiles", mutates_args=())
def _tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    with without_autocast(q):
        return _forward(q, k, v, bias, kernel_size, dilation, scale)


@_tiles.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *options: Sequence[int] | float
) -> Tensor:
    return v.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op("vitzoo::neighborhood_tiles_backward", mutates_args=())
def _tiles_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        return _backward(grad, q, k, v, bias, kernel_size, dilation, scale)


@_tiles_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *options: Sequence[int] | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias = ctx.saved_tensors
    *grads, grad_bias = _tiles_backward(grad, q, k, v, bias, *ctx.options)
    return (*grads, None if bias is None else grad_bias, None, None, None)


_tiles.register_autograd(_gradients, setup_context=_save)


@widen_where_slow
def neighborhood_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Pair,
    dilation: Pair = (1, 1),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Maps only, by tiles."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale == 0:
        # A product in half precision that is taken zero times leaves its memory as it was.
        q, scale = q * 0, 1.0
    if exporting() or needs_derivatives():
        # An exported graph must run where this package is not installed; torch's own operators also
        # have all derivatives.
        return neighborhood_attention_flat(q, k, v, bias, kernel_size, dilation, scale)
    if not records_gradient(q, k, v, bias) and why_not_apart(q, k, v, bias) is None:
        # The way to an operator of our own takes torch as long as a small product.
        with without_autocast(q):
            return _forward(q, k, v, bias, kernel_size, dilation, scale)
    return _tiles(q, k, v, bias, kernel_size, dilation, scale)
