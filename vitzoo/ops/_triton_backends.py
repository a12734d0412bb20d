"""The operators' `triton` backends: arguments of `vitzoo.ops` in, kernels' arguments out.

Beside the kernels' folder and not in it: torch.compile does not trace into files below `_triton`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._kernels import lanes
from vitzoo.ops._triton.library import attend_rectangles, attend_tiles
from vitzoo.ops.grouped import check_groups, group_spans
from vitzoo.ops.routed import check_regions

Pair = tuple[Tensor, Tensor]


def _prepare(*maps: Tensor) -> list[Tensor]:
    """Cast under autocast, as torch casts for its own attention; head_dim contiguous."""
    device = maps[0].device.type
    if torch.is_autocast_enabled(device):
        maps = tuple(x.to(torch.get_autocast_dtype(device)) for x in maps)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in maps]


def _constants(fill: Pair | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if fill is None:
        return None, None
    return fill[0].to(like.dtype).contiguous(), fill[1].to(like.dtype).contiguous()


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    shift: int = 0,
    bias: Tensor | None = None,
    fill: Pair | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`vitzoo.ops.window_attention`; with `return_lse` also the log-sum-exp (B, H, W, heads)."""
    q, k, v = _prepare(q, k, v)
    before = (window_size - shift) % window_size
    # Every position of a partial window exists where it holds a constant.
    reach = 0 if fill is None else window_size
    axis = [window_size, window_size, before, before, reach, window_size, 1, 1, before]
    if bias is not None:
        tokens = window_size**2
        bias = bias.expand(q.shape[3], tokens, tokens)
    out, lse = attend_rectangles(
        q, k, v, bias, None, None, *_constants(fill, k), [*axis, *axis], False, _scale(q, scale)
    )
    return (out, lse) if return_lse else out


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`vitzoo.ops.neighborhood_attention` on maps; with `return_lse` also the log-sum-exp."""
    q, k, v = _prepare(q, k, v)
    most = lanes(q.dtype)
    sides = (1, most) if kernel_size[0] == 1 else (8, most // 8)
    axes: list[int] = []
    for side, kernel, step in zip(sides, kernel_size, dilation, strict=True):
        axes += [side, side, 0, 0, 0, side + kernel - 1, kernel, step, 0]
    if bias is not None:
        bias = bias.contiguous()
    out, lse = attend_rectangles(
        q, k, v, bias, None, None, None, None, axes, True, _scale(q, scale)
    )
    return (out, lse) if return_lse else out


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    axial_bias: Pair | None = None,
    border: str = "zero",
    fill: Pair | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`vitzoo.ops.halo_attention`; with `return_lse` also the log-sum-exp."""
    q, k, v = _prepare(q, k, v)
    window, side = block_size + 2 * halo_size, block_size // stride
    reach = 0 if border == "mask" else halo_size
    axis = [side, block_size, 0, halo_size, reach, window, 1, 1, 0]
    height = width = None
    if axial_bias is not None:
        height, width = (table.to(q.dtype).contiguous() for table in axial_bias)
    out, lse = attend_rectangles(
        q, k, v, None, height, width, *_constants(fill, k), [*axis, *axis], False, _scale(q, scale)
    )
    return (out, lse) if return_lse else out


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    *,
    region_grid: tuple[int, int],
    weights: None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`vitzoo.ops.routed_attention` without weights; with `return_lse` also the log-sum-exp."""
    check_regions(q, k, v, regions, region_grid)
    q, k, v = _prepare(q, k, v)
    lists = regions.int().contiguous()
    out, lse = attend_tiles(q, k, v, lists, None, None, list(region_grid), _scale(q, scale))
    return (out, lse) if return_lse else out


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    frame_offsets: Tensor,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`vitzoo.ops.grouped_attention`; with `return_lse` also the log-sum-exp (tokens, heads)."""
    check_groups(q, group_size, frame_offsets)
    q, k, v = _prepare(q, k, v)
    first, past, reach = group_spans(frame_offsets, q.shape[0], group_size)
    own = torch.arange(len(first), device=q.device)
    # A group that is not full also attends to the end of the one before.
    lists = torch.stack([own, torch.where(reach < first, own - 1, -1)], dim=1)
    bounds = torch.stack([first, past]).int()
    maps = (x[None, None] for x in (q, k, v))
    grid, factor = [1, group_size], _scale(q, scale)
    out, lse = attend_tiles(*maps, lists[None].int(), bounds, reach.int(), grid, factor)
    return (out[0, 0], lse[0, 0]) if return_lse else out[0, 0]
