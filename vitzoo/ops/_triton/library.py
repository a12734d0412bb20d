"""The kernels as torch operators: one node each for compilers, with their own derivative."""

# Annotations are evaluated: torch reads the operators' schemas from them.
from typing import Any, Optional

import torch
from torch import Tensor

from vitzoo.ops._triton import launch, tile_launch
from vitzoo.ops._triton.launch import AXIAL, DENSE, NO_BIAS, TABLE, Rectangles
from vitzoo.ops._triton.tile_launch import Tiles

_AXIS = 9


def _rectangles(
    axes: list[int],
    neighbors: bool,
    bias: Optional[Tensor],  # noqa: UP045
    rows: Optional[Tensor],  # noqa: UP045
    k_fill: Optional[Tensor],  # noqa: UP045
) -> Rectangles:
    kind = NO_BIAS
    if rows is not None:
        kind = AXIAL
    elif bias is not None:
        kind = TABLE if neighbors else DENSE
    return Rectangles(
        (tuple(axes[:_AXIS]), tuple(axes[_AXIS:])), neighbors, kind, k_fill is not None
    )


def _results(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Memory of an attention's output and log-sum-exp; also what a compiler takes them to be."""
    return q.new_empty(*q.shape[:4], v.shape[-1]), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op("vitzoo::rectangles", mutates_args=())
def rectangles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    rows: Optional[Tensor],  # noqa: UP045
    columns: Optional[Tensor],  # noqa: UP045
    k_fill: Optional[Tensor],  # noqa: UP045
    v_fill: Optional[Tensor],  # noqa: UP045
    axes: list[int],
    neighbors: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, head_dim of v) and log-sum-exp (B, H, W, heads)."""
    r = _rectangles(axes, neighbors, bias, rows, k_fill)
    out, lse = _results(q, k, v)
    extras = (bias, rows, columns, k_fill, v_fill)
    launch.forward(r, q, k, v, extras, out, lse, scale).run(q.device)
    return out, lse


rectangles.register_fake(_results)


@torch.library.custom_op("vitzoo::rectangles_backward", mutates_args=())
def rectangles_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    rows: Optional[Tensor],  # noqa: UP045
    columns: Optional[Tensor],  # noqa: UP045
    k_fill: Optional[Tensor],  # noqa: UP045
    v_fill: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    axes: list[int],
    neighbors: bool,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, bias, rows, columns, k_fill, v_fill, without those not given."""
    r = _rectangles(axes, neighbors, bias, rows, k_fill)
    extras = (bias, rows, columns, k_fill, v_fill)
    d_out, d_lse = d_out.contiguous(), d_lse.contiguous()
    found = launch.allocate(r, q, k, v, rows)
    saved = (out, lse, d_out, d_lse)
    launch.queries(r, q, k, v, extras, saved, found, scale).run(q.device)
    launch.keys(r, q, k, v, extras, lse, d_out, found, scale).run(q.device)
    heads = q.shape[3]
    gradients = [found.q, found.k, found.v]
    if r.bias == DENSE and bias is not None:
        call, shares = launch.dense_bias(r, q, k, v, extras, lse, d_out, found.delta, scale)
        call.run(q.device)
        gradients.append(shares.sum(0).to(bias.dtype))
    if found.table is not None and bias is not None:
        table = found.table.unflatten(0, (-1, heads)).sum(0)
        table = table[:, : bias.shape[1], : bias.shape[2]]
        gradients.append(table.to(bias.dtype).contiguous())
    if found.rows is not None and found.columns is not None:
        gradients += [found.rows, found.columns]
    if found.k_fill is not None and found.v_fill is not None:
        gradients.append(_summed(found.k_fill, heads, q.shape[-1], q.dtype))
        gradients.append(_summed(found.v_fill, heads, v.shape[-1], q.dtype))
    return gradients


def _summed(shares: Tensor, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return shares.unflatten(0, (-1, heads)).sum(0)[:, :width].to(dtype).contiguous()


@rectangles_backward.register_fake
def _(d_out, d_lse, q, k, v, bias, rows, columns, k_fill, v_fill, *_: Any):  # type: ignore[no-untyped-def]
    given = (q, k, v, bias, rows, columns, k_fill, v_fill)
    return [x.new_empty(x.shape) for x in given if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.axes, ctx.neighbors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _derivative(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    found = iter(
        rectangles_backward(d_out, d_lse, *tensors, out, lse, ctx.axes, ctx.neighbors, ctx.scale)
    )
    gradients = [None if x is None else next(found) for x in tensors]
    return *gradients, None, None, None


rectangles.register_autograd(_derivative, setup_context=_keep)


def _tiles(
    q: Tensor,
    k: Tensor,
    lists: Tensor,
    bounds: Optional[Tensor],  # noqa: UP045
    grid: list[int],
) -> Tiles:
    rows, columns = grid
    cells = []
    for x in (q, k):
        # In one row of runs, `columns` is the most tokens of a run.
        height, width = (
            (1, columns)
            if bounds is not None
            else (
                x.shape[1] // rows,
                x.shape[2] // columns,
            )
        )
        cells.append((height, width, height * width))
    return Tiles(*cells, columns, lists.shape[1], lists.shape[2], bounds is not None)


@torch.library.custom_op("vitzoo::tiles", mutates_args=())
def tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    bounds: Optional[Tensor],  # noqa: UP045
    reach: Optional[Tensor],  # noqa: UP045
    grid: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, head_dim of v) and log-sum-exp (B, H, W, heads).

    `lists` (B, cells, length) int32 name cells of keys, -1 for none. Cells are those of a grid
    (rows, columns); with `bounds` (2, cells) and `reach` (cells,), runs of tokens of one row, of
    which `grid[1]` is the most.
    """
    t = _tiles(q, k, lists, bounds, grid)
    out, lse = _results(q, k, v)
    tables = [lists if x is None else x for x in (lists, bounds, reach)]
    tile_launch.forward(t, (q, k, v), tables, out, lse, scale).run(q.device)
    return out, lse


tiles.register_fake(_results)


@torch.library.custom_op("vitzoo::tiles_backward", mutates_args=())
def tiles_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    bounds: Optional[Tensor],  # noqa: UP045
    reach: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    grid: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    t = _tiles(q, k, lists, bounds, grid)
    d_out, d_lse = d_out.contiguous(), d_lse.contiguous()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    tables = [lists if x is None else x for x in (lists, bounds, reach)]
    saved = (out, lse, d_out, d_lse)
    tile_launch.queries(t, (q, k, v), tables, saved, d_q, delta, scale).run(q.device)
    saved = (lse, d_out, delta)
    tile_launch.keys(t, (q, k, v), tables, saved, d_k, d_v, scale).run(q.device)
    return d_q, d_k, d_v


@tiles_backward.register_fake
def _(d_out, d_lse, q, k, v, *_: Any):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep_tiles(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.grid, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _derivative_of_tiles(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    found = tiles_backward(d_out, d_lse, *ctx.saved_tensors, ctx.grid, ctx.scale)
    return *found, None, None, None, None, None


tiles.register_autograd(_derivative_of_tiles, setup_context=_keep_tiles)
