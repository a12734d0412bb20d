"""What a launch of the `rectangles` kernels consists of: grid, arguments, tiles.

All of it but the tensors follows from their layouts and is kept (`Plan`): worked out at every call
it takes longer than many a kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitzoo.ops._kernels import lanes

Axis = tuple[int, ...]

NO_BIAS, DENSE, TABLE, AXIAL = range(4)
# Programs that share the sum of a dense bias's gradient, and of the tables' of axial terms.
_SLOTS = 32
_TERM_SLOTS = 256
# The assembler stops at 80 to 168 of its own accord and spills a word or two there.
_ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


class Layout(NamedTuple):
    """What a kernel is chosen by, of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def layout(x: Tensor) -> Layout:
    """Of a tensor."""
    return Layout(tuple(x.shape), x.stride(), x.dtype)


@dataclass(frozen=True)
class Plan:
    """A launch without its tensors; `module.kernel` is imported when it first runs.

    Attributes:
        numbers: the arguments that follow the pointers.
    """

    module: str
    kernel: str
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    def function(self) -> Any:
        """The kernel."""
        return getattr(import_module(f"vitzoo.ops._triton.{self.module}"), self.kernel)


@dataclass(frozen=True)
class Launch:
    """One kernel call."""

    plan: Plan
    pointers: tuple[Any, ...]

    def run(self, device: torch.device) -> None:
        """Run it on a device's current stream; an empty grid is nothing to do."""
        plan = self.plan
        if 0 in plan.grid:
            return
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._start()
        else:
            self._start()

    def _start(self) -> None:
        plan = self.plan
        call = plan.function()[plan.grid]
        call(*self.pointers, *plan.numbers, **plan.constants, **plan.options)


@dataclass(frozen=True)
class Rectangles:
    """Units of one call: `rectangles.AXIS_Y` and `AXIS_X`, and the kind of bias."""

    axes: tuple[Axis, Axis]
    neighbors: bool
    bias: int
    fill: bool

    def units(self, q: Layout) -> tuple[int, int]:
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

    def sizes(self, q: Layout, k: Layout, pitch: int) -> tuple[int, ...]:
        """The kernels' `sizes`; key rows of a unit are `pitch` lanes apart."""
        keys = self.axes[0][5] * pitch
        return (q.shape[3], *q.shape[1:3], *k.shape[1:3], *self.units(q), keys)

    def lanes(self, dtype: torch.dtype) -> int:
        """Tokens of a tile, at most."""
        plain = not self.neighbors and not self.overlaps and self.bias == NO_BIAS
        return lanes(dtype, plain=plain)

    def sides(self, *, of_keys: bool) -> tuple[int, int]:
        """Rows and columns of a unit of queries, or of the keys that no other unit holds."""
        which = 1 if of_keys and not self.neighbors else 0
        return self.axes[0][which], self.axes[1][which]

    def pitch(self, kernel: str) -> int:
        """Lanes between key rows of a unit: a power of two where sums are regrouped by row."""
        span = self.axes[1][5]
        return power_of_two(span, 1) if self.bias == TABLE and kernel == "queries" else span

    @property
    def overlaps(self) -> bool:
        """Whether units share keys that are not regrouped (halos)."""
        return not self.neighbors and self.axes[0][5] > self.axes[0][1]


def schedule(q: Layout, kernel: str, constants: dict[str, Any]) -> dict[str, int]:
    """Triton's options for a program: as few warps as keep every number in registers.

    A warp more costs up to half of the speed on an H200, a spill more than that
    (docs/decisions.md, "Few warps"); `tests/ops/triton_compile.py` shows what spills.
    """
    bias = constants.get("BIAS", DENSE if kernel == "dense_bias" else NO_BIAS)
    wide = max(constants["BLOCK_D"], constants["BLOCK_DV"]) > 32
    sums = kernel == "queries" and (bias == AXIAL or (bias == TABLE and constants["AXIS_Y"][6] > 8))
    if q.dtype == torch.float32:
        options = {"num_warps": 8 if wide or bias == AXIAL else 4, "num_stages": 1}
    elif constants["BLOCK_M"] * constants["BLOCK_N"] <= 1024:
        fill = constants.get("FILL", False)
        many = wide or sums or fill or bias == DENSE
        most = (wide and bias in (DENSE, TABLE)) or (sums and fill)
        # A stage of keys on the way takes registers that sums over a table need.
        stages = 1 if bias == TABLE and kernel != "forward" else 2
        options = {"num_warps": 4 if most else 2 if many else 1, "num_stages": stages}
    elif kernel == "forward":
        options = {"num_warps": 2, "num_stages": 2}
    else:
        options = {"num_warps": 4, "num_stages": 1}
    return options | _ALL_REGISTERS


def sub_rectangle(sides: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most `most` tokens of a unit."""
    across = min(sides[1], most)
    return min(sides[0], max(1, most // across)), across


def blocks(q: Layout, v: Layout) -> dict[str, int]:
    """Head dimensions, and what they are padded to."""
    d, d_v = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": d_v, "BLOCK_D": power_of_two(d), "BLOCK_DV": power_of_two(d_v)}


def _programs(q: Layout, r: Rectangles, sides: tuple[int, int], sub: tuple[int, int]) -> int:
    down, across = r.units(q)
    tiles = -(-sides[0] // sub[0]) * -(-sides[1] // sub[1])
    return q.shape[0] * q.shape[3] * down * across * tiles


def _present(instead: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    """Kernels take some pointer where nothing will be read or written."""
    return tuple(instead if x is None else x for x in given)


def _given(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor | None]) -> Any:
    """(q, k, v, bias), (row and column terms), (constant k and v)."""
    bias, rows, columns, k_fill, v_fill = _present(q, *extras)
    return (q, k, v, bias), (rows, columns), (k_fill, v_fill)


class Call:
    """One attention: its units, tensors and what else its kernels are given.

    Args:
        r: the units.
        q, k, v: (B, H, W, heads, head_dim).
        extras: bias, row and column terms, constant k and v, each or None.
        scale: of the logits.
    """

    def __init__(
        self,
        r: Rectangles,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extras: Sequence[Tensor | None],
        scale: float,
    ) -> None:
        self.r, self.q, self.scale = r, q, scale
        self.given = _given(q, k, v, extras)
        strides = (0, 0, 0)
        if r.bias == DENSE and extras[0] is not None:
            tokens = r.axes[0][5] * r.axes[1][5]
            strides = extras[0].expand(q.shape[3], tokens, tokens).stride()
        self.layouts = (layout(q), layout(k), layout(v), strides)

    def plan(self, kernel: str) -> Plan:
        """Of a kernel, as first worked out for such layouts."""
        return _plan(kernel, self.r, *self.layouts, self.scale)

    def forward(self, out: Tensor, lse: Tensor) -> Launch:
        """Launch of `rectangles.forward`."""
        return Launch(self.plan("forward"), ((*self.given, (out, lse)),))

    def queries(self, saved: Sequence[Tensor], found: Gradients) -> Launch:
        """Launch of `rectangles_backward.queries`; saved are out, lse and the two gradients."""
        d_terms = _present(self.q, found.rows, found.columns)
        shares = _present(self.q, found.table, found.k_fill, found.v_fill)
        own = (found.q, found.delta)
        pointers = (self.given, tuple(saved), own, d_terms, shares)
        return Launch(self.plan("queries"), (pointers,))

    def keys(self, lse: Tensor, d_out: Tensor, found: Gradients) -> Launch:
        """Launch of `rectangles_backward.keys`."""
        maps, terms, _ = self.given
        pointers = (maps, terms, (lse, d_out, found.delta), (found.k, found.v))
        return Launch(self.plan("keys"), (pointers,))

    def dense_bias(self, lse: Tensor, d_out: Tensor, delta: Tensor) -> tuple[Launch, Tensor]:
        """Launch of `rectangles_backward.dense_bias`; the shares (slots, heads, side^2, side^2)."""
        plan, side = self.plan("dense_bias"), self.r.axes[0][0]
        heads, slots = self.q.shape[3], plan.grid[2]
        shares = self.q.new_empty(slots, heads, side**2, side**2, dtype=torch.float32)
        maps, _, fills = self.given
        return Launch(plan, ((maps, fills, (lse, d_out, delta), shares),)), shares

    def buffers(self) -> Gradients:
        """For the backward kernels to write."""
        q, (maps, (rows, columns), _) = self.q, self.given
        axial, programs = self.r.bias == AXIAL, self.plan("queries").grid[0]
        constants = self.plan("queries").constants

        def shares(*names: str) -> Tensor:
            return q.new_empty(programs, *(constants[n] for n in names), dtype=torch.float32)

        return Gradients(
            q=q.new_empty(q.shape),
            k=q.new_empty(maps[1].shape),
            v=q.new_empty(maps[2].shape),
            delta=q.new_empty(q.shape[:4], dtype=torch.float32),
            rows=torch.empty_like(rows) if axial else None,
            columns=torch.empty_like(columns) if axial else None,
            table=shares("BLOCK_Y", "BLOCK_X") if self.r.bias == TABLE else None,
            k_fill=shares("BLOCK_D") if self.r.fill else None,
            v_fill=shares("BLOCK_DV") if self.r.fill else None,
        )


def axial_terms(r: Rectangles, q: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Terms (B, H, W, heads, window) of queries by the row and by the column of a key."""
    plan = _term_plan("forward", r, layout(q))
    rows, columns = (q.new_empty(*q.shape[:4], axis[5]) for axis in r.axes)
    Launch(plan, ((q, tuple(tables), (rows, columns)),)).run(q.device)
    return rows, columns


def axial_gradients(
    r: Rectangles, q: Tensor, tables: Sequence[Tensor], found: Gradients
) -> list[Tensor]:
    """Gradients of the two tables; adds to that of q."""
    plan = _term_plan("backward", r, layout(q))
    block = plan.constants["BLOCK_R"], plan.constants["BLOCK_D"]
    shares = tuple(q.new_empty(*plan.grid, *block, dtype=torch.float32) for _ in tables)
    d_terms = (found.rows, found.columns)
    Launch(plan, ((q, tuple(tables), d_terms, found.q, shares),)).run(q.device)
    sums = (
        share.sum(0)[: t.shape[0], : t.shape[1]] for share, t in zip(shares, tables, strict=True)
    )
    return [x.to(q.dtype).contiguous() for x in sums]


@lru_cache(maxsize=4096)
def _term_plan(kernel: str, r: Rectangles, q: Layout) -> Plan:
    sides, windows = (tuple(axis[i] for axis in r.axes) for i in (0, 5))
    rows = q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3]
    block = 32
    constants = {
        "SIDES": sides,
        "WINDOWS": windows,
        "D": q.shape[-1],
        "BLOCK_M": block,
        "BLOCK_D": power_of_two(q.shape[-1]),
        "BLOCK_R": power_of_two(2 * max(windows) - 1),
    }
    programs = -(-rows // block)
    grid = (programs if kernel == "forward" else min(programs, _TERM_SLOTS),)
    numbers = (q.strides[:4], (q.shape[3], q.shape[1], q.shape[2], rows))
    large = constants["BLOCK_R"] * constants["BLOCK_D"] > 512
    warps = (8 if large else 4) if q.dtype == torch.float32 else 4 if large else 1
    options = {"num_warps": warps, "num_stages": 2} | _ALL_REGISTERS
    return Plan("terms", kernel, grid, numbers, constants, options)


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


def _tile(r: Rectangles, q: Layout, kernel: str) -> dict[str, Any]:
    most = most_keys = r.lanes(q.dtype)
    wide_table = r.bias == TABLE and r.axes[0][6] > 8
    if q.dtype == torch.float32 and (wide_table or r.bias == AXIAL):
        # Sums over a wide table, and terms by row and column, take the registers of half the
        # queries. A table's sums need eight pairs of rows: more keys make up for the queries.
        most = most // 2
        most_keys = most_keys * 2 if wide_table else most_keys
    sub = sub_rectangle(r.sides(of_keys=False), most)
    pitch = r.pitch(kernel)
    keys = min(most_keys, power_of_two(r.axes[0][5] * pitch))
    return {
        "AXIS_Y": r.axes[0],
        "AXIS_X": r.axes[1],
        "SUB": sub,
        "PITCH": pitch,
        "BLOCK_M": power_of_two(sub[0] * sub[1]),
        "BLOCK_N": keys,
    }


def _key_tile(r: Rectangles, q: Layout) -> dict[str, Any]:
    sides, lanes = r.sides(of_keys=True), r.lanes(q.dtype)
    # Small tiles where units overlap: fewer of the queries of a neighbouring unit are of no use.
    sub = sub_rectangle(sides, lanes)
    if r.overlaps:
        sub = min(sides[0], 4), min(sides[1], 4)
    most = lanes if r.neighbors else power_of_two(r.axes[0][0] * r.axes[1][0])
    return {
        "AXIS_Y": r.axes[0],
        "AXIS_X": r.axes[1],
        "SUB": sub,
        "KEY_SIDES": sides,
        "BLOCK_M": min(lanes, most),
        "BLOCK_N": power_of_two(sub[0] * sub[1]),
    }


@lru_cache(maxsize=4096)
def _plan(
    kernel: str,
    r: Rectangles,
    q: Layout,
    k: Layout,
    v: Layout,
    bias_strides: tuple[int, ...],
    scale: float,
) -> Plan:
    of_keys = kernel == "keys"
    tile = _key_tile(r, q) if of_keys else _tile(r, q, kernel)
    constants = {**tile, **blocks(q, v)}
    if kernel != "dense_bias":
        window = power_of_two(r.axes[0][5])
        constants |= {"NEIGHBORS": r.neighbors, "BIAS": r.bias, "BLOCK_W": window}
    if not of_keys:
        constants["FILL"] = r.fill
    if kernel == "queries":
        table = (power_of_two(2 * axis[6] - 1) for axis in r.axes)
        constants |= dict(zip(("BLOCK_Y", "BLOCK_X"), table, strict=True))
        constants["PRECISION"] = "ieee" if q.dtype == torch.float32 else "tf32"
    strides = tuple(x.strides[:4] for x in (q, k, v))
    sizes = r.sizes(q, k, constants.get("PITCH", 1))
    numbers: tuple[Any, ...] = (bias_strides, *strides, sizes, scale)
    grid: tuple[int, ...] = (_programs(q, r, r.sides(of_keys=of_keys), tile["SUB"]),)
    if kernel == "dense_bias":
        down, across = r.units(q)
        count, side = q.shape[0] * down * across, r.axes[0][0]
        tiles = -(-side // tile["SUB"][0]) * -(-side // tile["SUB"][1])
        chunks = -(-side * tile["PITCH"] // tile["BLOCK_N"])
        grid, numbers = (q.shape[3] * tiles, chunks, min(_SLOTS, count)), (*numbers, count)
    module = "rectangles" if kernel == "forward" else "rectangles_backward"
    return Plan(module, kernel, grid, numbers, constants, schedule(q, kernel, constants))
