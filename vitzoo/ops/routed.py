"""Attention from each region of a map to the regions that were chosen for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._kernels import triton_backend
from vitzoo.ops._onednn import needs_derivatives, records_gradient
from vitzoo.ops._products import (
    Grid,
    attend_cells,
    attend_masked,
    flat_numbers,
    pick,
    products_lose,
    why_not_products,
)
from vitzoo.ops._sides import exporting, symbolic
from vitzoo.ops.attention import attention_portable, attention_reference

# Up to this many tokens, if a query sees at least this share of the regions, one attention over the
# whole map under a mask is faster than picking.
_MASKED_TOKENS = 256
_MASKED_SHARE = 0.25
# Picked keys at a time: larger blocks leave the cache, and the C library maps each afresh.
_PIECE_BYTES = 16 << 20


def check_regions(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, region_grid: Grid) -> None:
    """Raise ValueError where the arguments do not fit together."""
    rows, cols = region_grid
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 5:
            raise ValueError(
                f"routed_attention takes (B, H, W, heads, head_dim); {name} has {x.dim()} axes"
            )
        if x.shape[1] % rows or x.shape[2] % cols:
            raise ValueError(
                f"a grid of {rows} x {cols} regions does not divide {name}, "
                f"{x.shape[1]} x {x.shape[2]}"
            )
    if regions.dim() != 3 or regions.shape[1] != rows * cols:
        raise ValueError(
            f"regions must be (B, {rows * cols}, chosen) for a grid of {rows} x {cols}, "
            f"got {tuple(regions.shape)}"
        )


def split_regions(x: Tensor, region_grid: Grid) -> Tensor:
    """(B, H, W, heads, d) -> (B, regions, tokens of a region, heads, d), both row-major."""
    B, H, W, heads, d = x.shape
    rows, cols = region_grid
    x = x.reshape(B, rows, H // rows, cols, W // cols, heads, d).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def join_regions(x: Tensor, region_grid: Grid, H: int, W: int) -> Tensor:
    """The inverse of `split_regions`."""
    rows, cols = region_grid
    x = x.reshape(-1, rows, cols, H // rows, W // cols, *x.shape[-2:]).transpose(2, 3)
    return x.reshape(-1, H, W, *x.shape[-2:])


def routed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    *,
    region_grid: Grid,
    weights: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One query region after the other, its chosen regions picked out by number."""
    check_regions(q, k, v, regions, region_grid)
    queries, keys, values = (split_regions(x, region_grid) for x in (q, k, v))
    image = torch.arange(q.shape[0], device=q.device)[:, None]
    out = []
    for i in range(queries.shape[1]):
        chosen_keys = keys[image, regions[:, i]]  # (B, chosen, tokens, heads, d)
        chosen_values = values[image, regions[:, i]]
        if weights is not None:
            factor = weights[:, i, :, None, None, None].to(v.dtype)
            chosen_keys, chosen_values = chosen_keys * factor, chosen_values * factor
        out.append(
            attention_reference(
                queries[:, i], chosen_keys.flatten(1, 2), chosen_values.flatten(1, 2), scale=scale
            )
        )
    return join_regions(torch.stack(out, 1), region_grid, *q.shape[1:3])


def routed_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    *,
    region_grid: Grid,
    weights: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Masked over the whole map where that is small, else over regions picked by number."""
    if symbolic(*q.shape[1:3]):
        # One graph of every size: nothing may depend on the sides.
        return _picked(q, k, v, regions, region_grid, scale, weights)
    check_regions(q, k, v, regions, region_grid)
    if weights is not None:
        return _picked(q, k, v, regions, region_grid, scale, weights)
    if _masking_pays(q, k, regions):
        return _masked(q, k, v, regions, region_grid, scale)
    if torch.compiler.is_compiling() or exporting() or needs_derivatives():
        # A compiler decides by itself what it computes again in backward.
        return _picked(q, k, v, regions, region_grid, scale)
    return _Picked.apply(q, k, v, regions, region_grid, scale)


def _masking_pays(q: Tensor, k: Tensor, regions: Tensor) -> bool:
    tokens = max(q.shape[1] * q.shape[2], k.shape[1] * k.shape[2])
    return tokens <= _MASKED_TOKENS and regions.shape[2] >= _MASKED_SHARE * regions.shape[1]


def _mask(q: Tensor, k: Tensor, regions: Tensor, region_grid: Grid) -> Tensor:
    """(B, queries, keys), 0 where a query's region chose the key's, else -inf."""
    B, H, W = q.shape[:3]
    p, (rows, cols) = regions.shape[1], region_grid
    mask = torch.full((B, p, p), float("-inf"), dtype=q.dtype, device=q.device)
    mask = mask.scatter(-1, regions, 0.0).view(B, p, rows, 1, cols, 1)
    # Along the keys first: the second, larger copy then has long rows.
    mask = mask.expand(-1, -1, -1, k.shape[1] // rows, -1, k.shape[2] // cols)
    # All lengths in full: of an empty batch none can be inferred.
    keys = k.shape[1] * k.shape[2]
    mask = mask.reshape(B, rows, 1, cols, 1, keys)
    return mask.expand(-1, -1, H // rows, -1, W // cols, -1).reshape(B, H * W, keys)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, regions: Tensor, region_grid: Grid, scale: float | None
) -> Tensor:
    """Every token against every token; what was not chosen gets no weight."""
    mask = _mask(q, k, regions, region_grid)[:, None]
    out = attention_portable(*(x.flatten(1, 2) for x in (q, k, v)), bias=mask, scale=scale)
    return out.unflatten(1, q.shape[1:3])


def _picked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    region_grid: Grid,
    scale: float | None,
    weights: Tensor | None = None,
) -> Tensor:
    queries, keys, values = (split_regions(x, region_grid).flatten(0, 1) for x in (q, k, v))
    numbers = flat_numbers(regions)
    tokens = keys.shape[1]
    keys, values = pick(keys, numbers), pick(values, numbers)
    if weights is not None:
        factor = weights.flatten(0, 1).repeat_interleave(tokens, dim=1)[..., None, None].to(v.dtype)
        keys, values = keys * factor, values * factor
    out = attention_portable(queries, keys, values, scale=scale)
    return join_regions(out, region_grid, *q.shape[1:3])


class _Picked(torch.autograd.Function):
    """Keeps q, k, v and the numbers for backward, and picks there again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        regions: Tensor,
        region_grid: Grid,
        scale: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, regions)
        ctx.region_grid, ctx.scale = region_grid, scale
        queries, keys, values = (split_regions(x, region_grid).flatten(0, 1) for x in (q, k, v))
        out = [
            attention_portable(part, pick(keys, numbers), pick(values, numbers), scale=scale)
            for part, numbers in _pieces(queries, flat_numbers(regions), keys)
        ]
        return join_regions(_joined(out), region_grid, *q.shape[1:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, regions = ctx.saved_tensors
        grid = ctx.region_grid
        if torch.is_grad_enabled():
            # Somebody will differentiate the gradients.
            out = _picked(q, k, v, regions, grid, ctx.scale)
            wanted = [x for x in (q, k, v) if x.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
            return (*(next(found) if x.requires_grad else None for x in (q, k, v)), *[None] * 3)
        queries, keys, values, grad = (
            split_regions(x, grid).flatten(0, 1) for x in (q, k, v, grads[0])
        )
        d_queries = []
        d_keys, d_values = keys.new_zeros(keys.shape), values.new_zeros(values.shape)
        at = 0
        for part, numbers in _pieces(queries, flat_numbers(regions), keys):
            inputs = [part, pick(keys, numbers), pick(values, numbers)]
            inputs = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = attention_portable(*inputs, scale=ctx.scale)
            d_part, d_picked_keys, d_picked_values = torch.autograd.grad(
                out, inputs, grad[at : at + len(part)].to(out.dtype)
            )
            at += len(part)
            d_queries.append(d_part)
            for total, picked in ((d_keys, d_picked_keys), (d_values, d_picked_values)):
                cells = picked.reshape(-1, *total.shape[1:])
                total.index_add_(0, numbers.flatten(), cells)
        d_q = join_regions(_joined(d_queries), grid, *q.shape[1:3])
        d_k, d_v = (join_regions(x, grid, *k.shape[1:3]) for x in (d_keys, d_values))
        return d_q, d_k, d_v, None, None, None


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _pieces(queries: Tensor, numbers: Tensor, keys: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Query regions and their region numbers, so many at a time as _PIECE_BYTES of keys allow."""
    picked = math.prod(keys.shape[1:]) * numbers.shape[1] * keys.element_size()
    size = max(1, _PIECE_BYTES // picked)
    return list(zip(queries.split(size), numbers.split(size), strict=True))


def _why_not_triton(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, weights: Tensor | None = None, **kwargs: Any
) -> str | None:
    if weights is not None:
        return "its kernels take no weights of regions."
    return None


def routed_attention_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    *,
    region_grid: Grid,
    weights: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `portable`, from batched products and a softmax in place."""
    check_regions(q, k, v, regions, region_grid)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not _masking_pays(q, k, regions):
        return attend_cells(q, k, v, region_grid, scale, regions)
    mask = _mask(q, k, regions, region_grid)
    out = attend_masked(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask, scale)
    return out.unflatten(1, q.shape[1:3])


def _products_why_not(
    q: Tensor, k: Tensor, v: Tensor, regions: Tensor, *, weights: Tensor | None = None, **_: Any
) -> str | None:
    if weights is not None:
        return "They have no weights of regions."
    return why_not_products(q, k, v)


def _products_auto_skip(
    q: Tensor, k: Tensor, v: Tensor, regions: Tensor, *, region_grid: Grid, **_: Any
) -> str | None:
    return None if _masking_pays(q, k, regions) else products_lose(q, region_grid)


def _prefers_masking(
    q: Tensor, k: Tensor, v: Tensor, regions: Tensor, **options: Any
) -> str | None:
    if records_gradient(q, k, v) and _masking_pays(q, k, regions):
        return "a training step on so small a map is faster under a mask."
    return None


ROUTED_ATTENTION = Operator(
    "routed_attention",
    [
        triton_backend("routed_attention", _why_not_triton, _prefers_masking),
        Backend(
            "products",
            routed_attention_products,
            why_not=_products_why_not,
            auto_skip=_products_auto_skip,
        ),
        Backend("portable", routed_attention_portable),
        Backend("reference", routed_attention_reference),
    ],
)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    *,
    region_grid: Grid,
    weights: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every query attends to all tokens of the regions that were chosen for its own region.

    The second level of bi-level routing attention (arXiv 2303.08810, section 3.2). A map is cut
    into rows x cols equal rectangles; all heads and all queries of a region share its choice.

    Args:
        q: (B, H, W, heads, head_dim); the grid divides H and W.
        k, v: (B, H', W', heads, head_dim), cut by the same grid; H' and W' are H and W unless keys
            were pooled, and v's head_dim may differ.
        regions: (B, rows * cols, chosen), numbers of the chosen regions, row-major, without
            repetition; their order does not matter.
        region_grid: (rows, cols).
        weights: (B, rows * cols, chosen), factors on the keys and values of each chosen region
            (soft routing); None for 1.
        scale: factor on q k^T; head_dim ** -0.5 if None.
        backend: `auto`, `triton`, `products` (inference in float32 on a CPU), `portable` or
            `reference`.

    Returns:
        (B, H, W, heads, head_dim of v).

    Raises:
        ValueError: the grid does not divide a map, or `regions` does not fit the grid.
    """
    return ROUTED_ATTENTION(
        q,
        k,
        v,
        regions,
        region_grid=region_grid,
        weights=weights,
        scale=scale,
        backend=backend,
    )
