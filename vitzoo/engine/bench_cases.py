"""Shapes that operators are timed and checked at, and the usual ways to write each of them.

A written-out form copies the keys of every tile of queries beside them (`gathered`) and then
attends: `eager` with products and a softmax whose probabilities are kept, `gather_sdpa` with
torch's fused attention. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo import ops
from vitzoo.ops.grouped import group_tables
from vitzoo.ops.neighborhood.reference import neighbors
from vitzoo.ops.routed import join_regions, split_regions
from vitzoo.ops.window import join_windows, split_windows

# Queries, keys and values of tiles (tiles, tokens, heads, d), bias or None, and the way back.
Gathered = tuple[Tensor, Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an operator.

    Attributes:
        operator: its name in `vitzoo.ops`.
        label: the shape in words.
        shapes: of the leaves, by argument name; `height` and `width` make the axial bias,
            `k_fill` and `v_fill` the constant outside a map.
        settings: the other keyword arguments.
        tokens: queries of the whole batch.
        bars: (written-out form, direction) -> least ratio in float32 on the CPU.
    """

    operator: str
    label: str
    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: int
    bars: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def leaves(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Normal tensors that require gradients; a linear layer's weight as initialised."""
        generator = torch.Generator(device).manual_seed(seed)
        found = {
            name: torch.randn(shape, generator=generator, device=device)
            for name, shape in self.shapes.items()
        }
        for name, scale in (("weight", 0.05), ("height", 0.2), ("width", 0.2)):
            if name in found:
                found[name] *= scale
        return {n: t.to(dtype).requires_grad_() for n, t in found.items()}

    def on(self, device: torch.device | str) -> Case:
        """The same call with its settings on a device."""
        settings = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.settings.items()
        }
        return replace(self, settings=settings)

    def run(self, leaves: Mapping[str, Tensor], form: str = "auto") -> Tensor:
        """The operator by a backend's name, or a written-out form by its own."""
        given: dict[str, Any] = dict(leaves)
        if "height" in given:
            given["axial_bias"] = (given.pop("height"), given.pop("width"))
        if "k_fill" in given:
            given["fill"] = (given.pop("k_fill"), given.pop("v_fill"))
        given |= self.settings
        if form == "eager" and self.operator in WRITTEN:
            return WRITTEN[self.operator](**given)
        if form in FORMS:
            q, k, v, bias, back = GATHERED[self.operator](**given)
            return back(ops.attention(q, k, v, bias=bias, backend=FORMS[form]))
        return getattr(ops, self.operator)(**given, backend=form)

    @property
    def forms(self) -> tuple[str, ...]:
        """The written-out forms that this operator has, and the reference."""
        if self.operator in WRITTEN:
            return ("eager", "reference")
        return (*(FORMS if self.operator in GATHERED else ()), "reference")

    def least_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all inputs read once and the output written once."""
        sizes = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        out = sizes.get("v", sizes.get("x", 0))
        if "weight" in self.shapes:
            out = self.tokens * self.shapes["weight"][0]
        return (sum(sizes.values()) + out) * torch.finfo(dtype).bits // 8


FORMS = {"eager": "reference", "gather_sdpa": "portable"}


def _gather_windows(q: Tensor, k: Tensor, v: Tensor, *, window_size: int) -> Gathered:
    H, W = q.shape[1:3]
    pad = (0, 0, 0, 0, 0, -W % window_size, 0, -H % window_size)
    tiles = [split_windows(F.pad(t, pad), window_size) for t in (q, k, v)]
    bias = None
    if any(pad):
        inside = F.pad(q.new_ones(1, H, W, 1, 1), pad)
        outside = split_windows(inside, window_size)[:, None, None, :, 0, 0] == 0
        bias = torch.zeros_like(outside, dtype=q.dtype).masked_fill(outside, -torch.inf)
        bias = bias.repeat(q.shape[0], 1, 1, 1)

    def back(out: Tensor) -> Tensor:
        return join_windows(out, window_size, H + pad[-1], W + pad[-3])[:, :H, :W]

    return *tiles, bias, back  # type: ignore[return-value]


def _gather_halo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    halo_size: int,
    axial_bias: tuple[Tensor, Tensor],
) -> Gathered:
    """As timm does, for sides that the block divides: unfold, and a bias of the scores' size."""
    H, W = q.shape[1:3]
    window = block_size + 2 * halo_size
    queries = split_windows(q, block_size)

    def unfold(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, *[halo_size] * 4))
        x = x.unfold(1, window, block_size).unfold(2, window, block_size)
        return x.permute(0, 1, 2, 5, 6, 3, 4).reshape(-1, window * window, *x.shape[3:5])

    key, query = (torch.arange(side, device=q.device) for side in (window, block_size))
    steps = key - query[:, None]
    by_row, by_column = (table[window - 1 + steps] for table in axial_bias)
    tiles = queries.unflatten(1, (block_size, block_size))
    rows = torch.einsum("tyxnd,yjd->tnyxj", tiles, by_row)[..., None]
    columns = torch.einsum("tyxnd,xid->tnyxi", tiles, by_column)[..., None, :]
    bias = (rows + columns).flatten(4).flatten(2, 3)
    return queries, unfold(k), unfold(v), bias, lambda out: join_windows(out, block_size, H, W)


def _gather_neighbors(
    q: Tensor, k: Tensor, v: Tensor, *, kernel_size: int, bias: Tensor | None = None
) -> Gathered:
    """Every query beside its own keys."""
    B, H, W, heads, _ = q.shape
    ys, rows_y = neighbors(H, kernel_size, 1, q.device)
    xs, rows_x = neighbors(W, kernel_size, 1, q.device)
    at = (slice(None), ys[:, None, :, None], xs[None, :, None, :])
    keys, values = (t[at].flatten(3, 4).flatten(0, 2) for t in (k, v))
    table = None
    if bias is not None:
        table = bias[:, rows_y[:, None, :, None], rows_x[None, :, None, :]].flatten(3).flatten(1, 2)
        table = table.transpose(0, 1)[:, :, None].repeat(B, 1, 1, 1)
    return q.reshape(-1, 1, heads, q.shape[-1]), keys, values, table, lambda out: out.view(v.shape)


def expanded_keys(
    k: Tensor, v: Tensor, regions: Tensor, region_grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Keys and values of every query region, (B * regions, chosen tokens, heads, d) each."""
    keys, values = split_regions(k, region_grid), split_regions(v, region_grid)
    B, p, tokens, heads, d = keys.shape
    chosen = regions.shape[-1]
    joined = torch.cat([keys, values], dim=-1).flatten(3)
    index = regions[..., None, None].expand(-1, -1, -1, tokens, 2 * heads * d)
    picked = torch.gather(joined[:, None].expand(-1, p, -1, -1, -1), 2, index)
    keys, values = picked.view(B * p, chosen * tokens, heads, 2 * d).split(d, dim=-1)
    return keys, values


def _gather_regions(
    q: Tensor, k: Tensor, v: Tensor, *, regions: Tensor, region_grid: tuple[int, int]
) -> Gathered:
    """BiFormer's own: keys and values expanded once per query region."""
    keys, values = expanded_keys(k, v, regions, region_grid)
    queries = split_regions(q, region_grid).flatten(0, 1)
    return queries, keys, values, None, lambda out: join_regions(out, region_grid, *q.shape[1:3])


def _gather_groups(
    q: Tensor, k: Tensor, v: Tensor, *, group_size: int, frame_offsets: Tensor
) -> Gathered:
    token, holds, slot = group_tables(frame_offsets, len(q), group_size)
    tiles = (t[token] for t in (q, k, v))
    bias = torch.zeros_like(holds, dtype=q.dtype).masked_fill(~holds, -torch.inf)[:, None, None]
    return *tiles, bias, lambda out: out.flatten(0, 1)[slot]  # type: ignore[return-value]


def _channel_eager(q: Tensor, k: Tensor, v: Tensor, *, axis_scale: str) -> Tensor:
    """As timm's DaViT does, with head_dim's scale: all in the dtype of the inputs."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5).transpose(-2, -1) @ k).softmax(dim=-1)
    return (weights @ v.transpose(-2, -1)).permute(0, 3, 1, 2)


WRITTEN = {"channel_attention": _channel_eager}
GATHERED: dict[str, Callable[..., Gathered]] = {
    "window_attention": _gather_windows,
    "halo_attention": _gather_halo,
    "neighborhood_attention": _gather_neighbors,
    "routed_attention": _gather_regions,
    "grouped_attention": _gather_groups,
}


def window(
    H: int,
    W: int,
    *,
    heads: int = 3,
    d: int = 32,
    batch: int = 1,
    size: int = 7,
    shift: int = 0,
    biased: bool = False,
    filled: bool = False,
) -> Case:
    """Windows of size x size; shifted, with a bias, with a constant outside only to be checked."""
    extra: dict[str, tuple[int, ...]] = {"bias": (heads, size**2, size**2)} if biased else {}
    extra |= dict.fromkeys(("k_fill", "v_fill"), (heads, d)) if filled else {}
    kind = f"{f'shift {shift}, ' * (shift > 0)}{'bias, ' * biased}{'constant, ' * filled}"
    return Case(
        operator="window_attention",
        label=f"{batch} x {H}x{W}, windows {size}x{size}, {kind}{heads} heads of {d}",
        shapes=_qkv(batch, H, W, heads, d) | extra,
        settings={"window_size": size} | ({"shift": shift} if shift else {}),
        tokens=batch * H * W,
    )


def halo(
    H: int,
    W: int,
    *,
    heads: int = 8,
    d: int = 16,
    batch: int = 1,
    border: str = "zero",
    **bars: float,
) -> Case:
    """Blocks of 8 with a halo of 3 and an axial bias: 64 queries to 196 keys."""
    filled = dict.fromkeys(("k_fill", "v_fill"), (heads, d)) if border == "constant" else {}
    other = {} if border == "zero" else {"border": border}
    return Case(
        operator="halo_attention",
        label=f"{batch} x {H}x{W}, blocks 8 + 3, axial bias, "
        f"{f'border {border}, ' if other else ''}{heads} heads of {d}",
        shapes=_qkv(batch, H, W, heads, d) | {"height": (27, d), "width": (27, d)} | filled,
        settings={"block_size": 8, "halo_size": 3} | other,
        tokens=batch * H * W,
        bars={("eager", direction): bar for direction, bar in bars.items()},
    )


def neighborhood(
    H: int,
    W: int,
    *,
    heads: int = 2,
    d: int = 32,
    batch: int = 1,
    biased: bool = True,
    dilation: int = 1,
    **bars: float,
) -> Case:
    """Kernel 7, with a bias table as in NAT, or without as in natten."""
    table = {"bias": (heads, 13, 13)} if biased else {}
    kind = f"{'bias, ' * biased}{f'dilation {dilation}, ' * (dilation > 1)}"
    return Case(
        operator="neighborhood_attention",
        label=f"{batch} x {H}x{W}, kernel 7, {kind}{heads} heads of {d}",
        shapes=_qkv(batch, H, W, heads, d) | table,
        settings={"kernel_size": 7} | ({"dilation": dilation} if dilation > 1 else {}),
        tokens=batch * H * W,
        bars={("eager", direction): bar for direction, bar in bars.items()},
    )


def routed(
    side: int, *, grid: int, chosen: int, heads: int, batch: int = 1, d: int = 32, **bars: float
) -> Case:
    """A grid of regions, each attending to the same number of them."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(batch, grid**2, grid**2, generator=generator)
    return Case(
        operator="routed_attention",
        label=f"{batch} x {side}x{side}, {chosen} of {grid}x{grid} regions, {heads} heads of {d}",
        shapes=_qkv(batch, side, side, heads, d),
        settings={
            "regions": scores.topk(chosen, dim=-1).indices,
            "region_grid": (grid, grid),
        },
        tokens=batch * side * side,
        bars={("gather_sdpa", direction): bar for direction, bar in bars.items()},
    )


def grouped(*counts: int, heads: int = 8, d: int = 16, group: int = 144) -> Case:
    """Frames of so many tokens in groups."""
    offsets = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
    total = int(offsets[-1])
    return Case(
        operator="grouped_attention",
        label=f"{' + '.join(map(str, counts))} tokens, groups of {group}, {heads} heads of {d}",
        shapes=dict.fromkeys("qkv", (total, heads, d)),
        settings={"group_size": group, "frame_offsets": offsets},
        tokens=total,
    )


def attention(tokens: int, *, heads: int = 6, d: int = 64, batch: int = 1) -> Case:
    """Dense attention."""
    return Case(
        operator="attention",
        label=f"{batch} x {tokens} tokens, {heads} heads of {d}",
        shapes=dict.fromkeys("qkv", (batch, tokens, heads, d)),
        tokens=batch * tokens,
    )


def channel(tokens: int, *, heads: int = 3, d: int = 32, batch: int = 1) -> Case:
    """DaViT's attention between channels."""
    return Case(
        operator="channel_attention",
        label=f"{batch} x {tokens} tokens, {heads} heads of {d}",
        shapes=dict.fromkeys("qkv", (batch, tokens, heads, d)),
        settings={"axis_scale": "head_dim"},
        tokens=batch * tokens,
    )


def linear(rows: int, dim: int, out: int) -> Case:
    """A linear layer with bias."""
    return Case(
        operator="linear",
        label=f"{rows} x {dim} -> {out}",
        shapes={"x": (rows, dim), "weight": (out, dim), "bias": (out,)},
        tokens=rows,
    )


def _qkv(B: int, H: int, W: int, heads: int, d: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys("qkv", (B, H, W, heads, d))


# Odd sizes, on which a form has to agree with the reference before it is timed; with each kind of
# bias and border, and tiles of every size that the kernels cut.
ODD = {
    "window": (
        window(7, 9),
        window(13, 30, batch=2),
        window(13, 17, batch=2, shift=3, biased=True),
        window(9, 18, size=8, d=24, biased=True, filled=True),
    ),
    "halo": (
        halo(7, 9),
        halo(13, 30, batch=2),
        halo(9, 21, border="mask", d=32, heads=3),
        halo(9, 21, border="constant", d=24, heads=2),
    ),
    "neighborhood": (
        neighborhood(7, 9),
        neighborhood(13, 30, batch=2),
        neighborhood(15, 23, dilation=2, heads=3),
        neighborhood(9, 11, biased=False, d=16),
    ),
    "routed": (
        routed(14, grid=7, chosen=16, heads=2),
        routed(33, grid=3, chosen=2, heads=1),
        routed(24, grid=3, chosen=2, heads=3),
    ),
    "grouped": (grouped(5, 0, 31, group=9), grouped(300, 7)),
    "attention": (attention(49), attention(131, batch=2)),
    "channel": (channel(63), channel(390, batch=2)),
    "linear": (linear(63, 96, 288), linear(3137, 96, 100)),
}
