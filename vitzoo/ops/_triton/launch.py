"""What a launch of the `rectangles` kernels consists of: grid, arguments, tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._kernels import lanes

Axis = tuple[int, ...]

NO_BIAS, DENSE, TABLE, AXIAL = range(4)
# Programs that share the sum of a dense bias's gradient.
_SLOTS = 32


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Launch:
    """One kernel call; `module.kernel` is looked up when it runs."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    def function(self) -> Any:
        """The kernel."""
        import importlib

        return getattr(importlib.import_module(f"vitzoo.ops._triton.{self.module}"), self.kernel)

    def run(self, device: torch.device) -> None:
        """Run it on a device's current stream; an empty grid is nothing to do."""
        if 0 in self.grid:
            return
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.function()[self.grid](*self.arguments, **self.constants, **self.options)
        else:
            self.function()[self.grid](*self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Rectangles:
    """Units of one call: `rectangles.AXIS_Y` and `AXIS_X`, and the kind of bias."""

    axes: tuple[Axis, Axis]
    neighbors: bool
    bias: int
    fill: bool

    def units(self, q: Tensor) -> tuple[int, int]:
        """Units down and across the map of queries."""
        found = []
        for length, axis in zip(q.shape[1:3], self.axes, strict=True):
            side, _, before, *_, dilation, _ = axis
            if self.neighbors:
                longest = -(-length // dilation)
                found.append(dilation * -(-longest // side))
            else:
                found.append(-(-(length + before) // side))
        return found[0], found[1]

    def sizes(self, q: Tensor, k: Tensor) -> tuple[int, ...]:
        """The kernels' `sizes`."""
        keys = self.axes[0][5] * self.pitch
        return (q.shape[3], *q.shape[1:3], *k.shape[1:3], *self.units(q), keys)

    def sides(self, *, of_keys: bool) -> tuple[int, int]:
        """Rows and columns of a unit of queries, or of the keys that no other unit holds."""
        which = 1 if of_keys and not self.neighbors else 0
        return self.axes[0][which], self.axes[1][which]

    @property
    def pitch(self) -> int:
        """Distance of key rows in a chunk: a power of two where sums are regrouped by row."""
        span = self.axes[1][5]
        return power_of_two(span, 1) if self.bias == TABLE else span

    @property
    def overlaps(self) -> bool:
        """Whether units share keys that are not regrouped (halos)."""
        return not self.neighbors and self.axes[0][5] > self.axes[0][1]


def schedule(q: Tensor, kernel: str, constants: dict[str, Any], *, biased: bool) -> dict[str, int]:
    """Triton's options for a program, such that no architecture runs out of registers."""
    if q.dtype == torch.float32:
        wide = max(constants["BLOCK_D"], constants["BLOCK_DV"]) > 32
        many = wide or constants.get("BIAS") == AXIAL
        options = {"num_warps": 8 if many else 4, "num_stages": 1}
    else:
        large = constants["BLOCK_M"] * constants["BLOCK_N"] > 1024
        stages = 2 if kernel == "forward" else 1
        options = {"num_warps": 8 if biased and large else 4, "num_stages": stages}
    # The assembler stops at 80 to 168 of its own accord and spills a word or two there.
    return options if torch.version.hip else options | {"maxnreg": 255}


def sub_rectangle(sides: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most `most` tokens of a unit."""
    across = min(sides[1], most)
    return min(sides[0], max(1, most // across)), across


def blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head dimensions, and what they are padded to."""
    d, d_v = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": d_v, "BLOCK_D": power_of_two(d), "BLOCK_DV": power_of_two(d_v)}


def _programs(q: Tensor, r: Rectangles, sides: tuple[int, int], sub: tuple[int, int]) -> int:
    down, across = r.units(q)
    tiles = -(-sides[0] // sub[0]) * -(-sides[1] // sub[1])
    return q.shape[0] * q.shape[3] * down * across * tiles


def _common(
    r: Rectangles, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Any, ...]:
    strides = (0, 0, 0)
    if r.bias == DENSE and bias is not None:
        tokens = r.axes[0][5] * r.axes[1][5]
        strides = bias.expand(q.shape[3], tokens, tokens).stride()
    maps = tuple(x.stride()[:4] for x in (q, k, v))
    return strides, *maps, r.sizes(q, k), scale


def _present(instead: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    """Kernels take some pointer where nothing will be read or written."""
    return tuple(instead if x is None else x for x in given)


def _given(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor | None]) -> Any:
    """(q, k, v, bias), (row and column terms), (constant k and v)."""
    bias, rows, columns, k_fill, v_fill = _present(q, *extras)
    return (q, k, v, bias), (rows, columns), (k_fill, v_fill)


def _tile(r: Rectangles, q: Tensor) -> dict[str, Any]:
    most = most_keys = lanes(q.dtype)
    wide_table = r.bias == TABLE and r.axes[0][6] > 8
    if q.dtype == torch.float32 and (wide_table or r.bias == AXIAL):
        # Sums over a wide table, and terms by row and column, take the registers of half the
        # queries. A table's sums need eight pairs of rows: more keys make up for the queries.
        most = most // 2
        most_keys = most_keys * 2 if wide_table else most_keys
    sub = sub_rectangle(r.sides(of_keys=False), most)
    keys = min(most_keys, power_of_two(r.axes[0][5] * r.pitch))
    return {
        "AXIS_Y": r.axes[0],
        "AXIS_X": r.axes[1],
        "SUB": sub,
        "PITCH": r.pitch,
        "BLOCK_M": power_of_two(sub[0] * sub[1]),
        "BLOCK_N": keys,
    }


def forward(
    r: Rectangles, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor | None],
    out: Tensor, lse: Tensor, scale: float,
) -> Launch:  # fmt: skip
    """Launch of `rectangles.forward`; extras are bias, row and column terms, constant k and v."""
    tile = _tile(r, q)
    grid = (_programs(q, r, r.sides(of_keys=False), tile["SUB"]),)
    pointers = (*_given(q, k, v, extras), (out, lse))
    constants = {
        **tile,
        "NEIGHBORS": r.neighbors,
        "BIAS": r.bias,
        "FILL": r.fill,
        **blocks(q, v),
        "BLOCK_W": power_of_two(r.axes[0][5]),
    }
    arguments = (pointers, *_common(r, q, k, v, extras[0], scale))
    options = schedule(q, "forward", constants, biased=r.bias != NO_BIAS)
    return Launch("rectangles", "forward", grid, arguments, constants, options)


@dataclass
class Gradients:
    """Buffers of the backward kernels; sums over programs are still to be made."""

    q: Tensor
    k: Tensor
    v: Tensor
    delta: Tensor
    rows: Tensor | None
    columns: Tensor | None
    table: Tensor | None
    k_fill: Tensor | None
    v_fill: Tensor | None


def allocate(r: Rectangles, q: Tensor, k: Tensor, v: Tensor, terms: Tensor | None) -> Gradients:
    """Buffers for `queries` and `keys`."""
    sub = _tile(r, q)["SUB"]
    programs = _programs(q, r, r.sides(of_keys=False), sub)

    def shares(*shape: int) -> Tensor:
        return q.new_empty(programs, *shape, dtype=torch.float32)

    table = tuple(power_of_two(2 * axis[6] - 1) for axis in r.axes)
    sizes = blocks(q, v)
    return Gradients(
        q=q.new_empty(q.shape),
        k=k.new_empty(k.shape),
        v=v.new_empty(v.shape),
        delta=q.new_empty(q.shape[:4], dtype=torch.float32),
        rows=None if terms is None else torch.empty_like(terms),
        columns=None if terms is None else torch.empty_like(terms),
        table=shares(*table) if r.bias == TABLE else None,
        k_fill=shares(sizes["BLOCK_D"]) if r.fill else None,
        v_fill=shares(sizes["BLOCK_DV"]) if r.fill else None,
    )


def queries(
    r: Rectangles, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor | None],
    saved: Sequence[Tensor], found: Gradients, scale: float,
) -> Launch:  # fmt: skip
    """Launch of `rectangles_backward.queries`; saved are out, lse and the two gradients."""
    d_terms = _present(q, found.rows, found.columns)
    shares = _present(q, found.table, found.k_fill, found.v_fill)
    own = (found.q, found.delta)
    pointers = (_given(q, k, v, extras), tuple(saved), own, d_terms, shares)
    tile = _tile(r, q)
    constants = {
        **tile,
        "NEIGHBORS": r.neighbors,
        "BIAS": r.bias,
        "FILL": r.fill,
        **blocks(q, v),
        "BLOCK_W": power_of_two(r.axes[0][5]),
        "BLOCK_Y": power_of_two(2 * r.axes[0][6] - 1),
        "BLOCK_X": power_of_two(2 * r.axes[1][6] - 1),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    arguments = (pointers, *_common(r, q, k, v, extras[0], scale))
    grid = (_programs(q, r, r.sides(of_keys=False), tile["SUB"]),)
    options = schedule(q, "queries", constants, biased=r.bias != NO_BIAS)
    return Launch("rectangles_backward", "queries", grid, arguments, constants, options)


@lru_cache(maxsize=256)
def _most_queries(
    axis: Axis, neighbors: bool, units: int, sub: int, queries: int, keys: int
) -> int:
    """The most queries that attend to one tile of keys, along one axis (see `attending`)."""
    side, step, q_before, k_before, _, span, kernel, dilation, key_before = axis
    most = 1
    if neighbors:
        for length in {-(-queries // dilation), queries // dilation}:
            for first in range(0, length, sub):
                past = min(first + sub, length)
                low = 0 if first < kernel else first - kernel // 2
                high = length if past > length - kernel else past + kernel // 2
                most = max(most, high - low)
        return most
    for unit in range(units):
        for start in range(0, step, sub):
            first = unit * step - key_before + start
            past = min(first + sub, (unit + 1) * step - key_before, keys)
            low = max(first + k_before - span + step, 0) // step * side - q_before
            high = (min((past - 1 + k_before) // step, units - 1) + 1) * side - q_before
            most = max(most, min(high, queries) - max(low, 0))
    return most


def keys(
    r: Rectangles, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor | None],
    lse: Tensor, d_out: Tensor, found: Gradients, scale: float,
) -> Launch:  # fmt: skip
    """Launch of `rectangles_backward.keys`."""
    sides = r.sides(of_keys=True)
    # Small tiles where units overlap: fewer of the queries of a neighbouring unit are of no use.
    sub = sub_rectangle(sides, lanes(q.dtype))
    if r.overlaps:
        sub = min(sides[0], 4), min(sides[1], 4)
    units = r.units(q)
    per_axis = [
        _most_queries(r.axes[i], r.neighbors, units[i], sub[i], q.shape[1 + i], k.shape[1 + i])
        for i in range(2)
    ]
    most = per_axis[0] * per_axis[1]
    block = min(lanes(q.dtype), power_of_two(most))
    constants = {
        "AXIS_Y": r.axes[0],
        "AXIS_X": r.axes[1],
        "SUB": sub,
        "NEIGHBORS": r.neighbors,
        "BIAS": r.bias,
        **blocks(q, v),
        "KEY_SIDES": sides,
        "BLOCK_M": block,
        "BLOCK_N": power_of_two(sub[0] * sub[1]),
    }
    maps, terms, _ = _given(q, k, v, extras)
    pointers = (maps, terms, (lse, d_out, found.delta), (found.k, found.v))
    arguments = (pointers, *_common(r, q, k, v, extras[0], scale), most)
    grid = (_programs(q, r, sides, sub),)
    options = schedule(q, "keys", constants, biased=r.bias != NO_BIAS)
    return Launch("rectangles_backward", "keys", grid, arguments, constants, options)


def dense_bias(
    r: Rectangles, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor | None],
    lse: Tensor, d_out: Tensor, delta: Tensor, scale: float,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """Launch of `rectangles_backward.dense_bias`, and the shares (slots, heads, side^2, side^2)."""
    tile = _tile(r, q)
    side, heads = r.axes[0][0], q.shape[3]
    down, across = r.units(q)
    count = q.shape[0] * down * across
    tiles = -(-side // tile["SUB"][0]) * -(-side // tile["SUB"][1])
    chunks = -(-side * r.pitch // tile["BLOCK_N"])
    slots = min(_SLOTS, count)
    shares = q.new_empty(slots, heads, side**2, side**2, dtype=torch.float32)
    maps, _, fills = _given(q, k, v, extras)
    pointers = (maps, fills, (lse, d_out, delta), shares)
    arguments = (pointers, *_common(r, q, k, v, extras[0], scale), count)
    constants = {**tile, "FILL": r.fill, **blocks(q, v)}
    grid = (heads * tiles, chunks, slots)
    options = schedule(q, "dense_bias", constants, biased=True)
    call = Launch("rectangles_backward", "dense_bias", grid, arguments, constants, options)
    return call, shares
