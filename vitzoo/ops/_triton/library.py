"""The kernels as torch operators: one node each for compilers, with their own derivative.

In eager mode `attend_rectangles` and `attend_tiles` go past the operators: on the way through
torch's dispatcher, its derivatives and its checks a call takes longer than most kernels run.
"""

# Annotations are evaluated: torch reads the operators' schemas from them.
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitzoo.ops._triton.launch import (
    AXIAL,
    DENSE,
    NO_BIAS,
    TABLE,
    Call,
    Rectangles,
    axial_gradients,
    axial_terms,
)
from vitzoo.ops._triton.tile_launch import TileCall, Tiles

_AXIS = 9


def _rectangles(
    axes: list[int],
    neighbors: bool,
    bias: Optional[Tensor],  # noqa: UP045
    height: Optional[Tensor],  # noqa: UP045
    k_fill: Optional[Tensor],  # noqa: UP045
) -> Rectangles:
    kind = NO_BIAS
    if height is not None:
        kind = AXIAL
    elif bias is not None:
        kind = TABLE if neighbors else DENSE
    return Rectangles(
        (tuple(axes[:_AXIS]), tuple(axes[_AXIS:])), neighbors, kind, k_fill is not None
    )


def _results(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Memory of an attention's output and log-sum-exp; also what a compiler takes them to be."""
    return q.new_empty(*q.shape[:4], v.shape[-1]), q.new_empty(q.shape[:4], dtype=torch.float32)


def _through_operators(*tensors: Any) -> bool:
    """Whether something beside autograd must see the call: a compiler, a mode, a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in tensors)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


@torch.library.custom_op("vitzoo::rectangles", mutates_args=())
def rectangles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    height: Optional[Tensor],  # noqa: UP045
    width: Optional[Tensor],  # noqa: UP045
    k_fill: Optional[Tensor],  # noqa: UP045
    v_fill: Optional[Tensor],  # noqa: UP045
    axes: list[int],
    neighbors: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, head_dim of v) and log-sum-exp (B, H, W, heads).

    `height` and `width` are tables (2 * window - 1, head_dim) of axial terms.
    """
    return _rectangles_forward(q, k, v, bias, height, width, k_fill, v_fill, axes, neighbors, scale)


rectangles.register_fake(_results)


def _rectangles_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *extras, axes, neighbors, scale = rest
    r = _rectangles(axes, neighbors, extras[0], extras[1], extras[3])
    if r.bias == AXIAL:
        extras[1:3] = axial_terms(r, q, extras[1:3])
    out, lse = _results(q, k, v)
    Call(r, q, k, v, extras, scale).forward(out, lse).run(q.device)
    return out, lse


@torch.library.custom_op("vitzoo::rectangles_backward", mutates_args=())
def rectangles_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    height: Optional[Tensor],  # noqa: UP045
    width: Optional[Tensor],  # noqa: UP045
    k_fill: Optional[Tensor],  # noqa: UP045
    v_fill: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    axes: list[int],
    neighbors: bool,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, bias, height, width, k_fill, v_fill, without those not given."""
    given = (q, k, v, bias, height, width, k_fill, v_fill)
    return _rectangles_backward(d_out, d_lse, given, out, lse, axes, neighbors, scale)


def _rectangles_backward(
    d_out: Tensor,
    d_lse: Tensor,
    given: Any,
    out: Tensor,
    lse: Tensor,
    axes: list[int],
    neighbors: bool,
    scale: float,
) -> list[Tensor]:
    q, k, v, *extras = given
    bias, *tables = extras[:3]
    r = _rectangles(axes, neighbors, bias, tables[0], extras[3])
    if r.bias == AXIAL:
        # Terms are twice the size of q and soon made again.
        extras[1:3] = axial_terms(r, q, tables)
    d_out, d_lse = d_out.contiguous(), d_lse.contiguous()
    call = Call(r, q, k, v, extras, scale)
    found = call.buffers()
    call.queries((out, lse, d_out, d_lse), found).run(q.device)
    call.keys(lse, d_out, found).run(q.device)
    heads = q.shape[3]
    gradients = [found.q, found.k, found.v]
    if r.bias == DENSE:
        sums, shares = call.dense_bias(lse, d_out, found.delta)
        sums.run(q.device)
        gradients.append(shares.sum(0).to(bias.dtype))
    if found.table is not None:
        table = found.table.unflatten(0, (-1, heads)).sum(0)
        table = table[:, : bias.shape[1], : bias.shape[2]]
        gradients.append(table.to(bias.dtype).contiguous())
    if r.bias == AXIAL:
        gradients += axial_gradients(r, q, tables, found)
    if found.k_fill is not None and found.v_fill is not None:
        gradients.append(_summed(found.k_fill, heads, q.shape[-1], q.dtype))
        gradients.append(_summed(found.v_fill, heads, v.shape[-1], q.dtype))
    return gradients


def _summed(shares: Tensor, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return shares.unflatten(0, (-1, heads)).sum(0)[:, :width].to(dtype).contiguous()


@rectangles_backward.register_fake
def _(d_out, d_lse, q, k, v, bias, height, width, k_fill, v_fill, *_: Any):  # type: ignore[no-untyped-def]
    given = (q, k, v, bias, height, width, k_fill, v_fill)
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


class _Rectangles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _rectangles_forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        found = iter(
            _rectangles_backward(
                d_out, d_lse, tensors, out, lse, ctx.axes, ctx.neighbors, ctx.scale
            )
        )
        return *(None if x is None else next(found) for x in tensors), None, None, None


def attend_rectangles(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`rectangles`, by the shortest way that serves."""
    if _through_operators(*inputs):
        return rectangles(*inputs)
    return _Rectangles.apply(*inputs)


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
    return _tiles_forward(q, k, v, lists, bounds, reach, grid, scale)


tiles.register_fake(_results)


def _call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> TileCall:
    lists, bounds, reach, grid, scale = rest
    tables = [lists if x is None else x for x in (lists, bounds, reach)]
    return TileCall(_tiles(q, k, lists, bounds, grid), (q, k, v), tables, scale)


def _tiles_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    out, lse = _results(*inputs[:3])
    _call(*inputs).forward(out, lse).run(out.device)
    return out, lse


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
    call = _call(q, k, v, lists, bounds, reach, grid, scale)
    return _tiles_backward(call, d_out, d_lse, out, lse)


def _tiles_backward(
    call: TileCall, d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, d_lse = d_out.contiguous(), d_lse.contiguous()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in call.maps)
    delta = torch.empty_like(lse)
    call.queries((out, lse, d_out, d_lse), d_q, delta).run(out.device)
    call.keys((lse, d_out, delta), d_k, d_v).run(out.device)
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


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _tiles_forward(*inputs)
        _keep_tiles(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        call = _call(*tensors, ctx.grid, ctx.scale)
        found = _tiles_backward(call, d_out, d_lse, out, lse)
        return *found, None, None, None, None, None


def attend_tiles(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`tiles`, by the shortest way that serves."""
    if _through_operators(*inputs):
        return tiles(*inputs)
    return _Tiles.apply(*inputs)
