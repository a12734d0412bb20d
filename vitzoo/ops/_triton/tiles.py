"""Kernels for queries and keys in numbered cells: chosen regions of a map, groups of a sequence.

A cell is a rectangle of a map cut by a grid or, with RAGGED, tokens `bounds[cell]` to
`bounds[cell + cells]` of one long row. `lists` (images, cells, length) names the cells of keys that
each cell of queries attends to, -1 for none; with RAGGED only to keys from `reach[cell]` on. Small
cells share a tile: lanes count tokens along the list, not cells.

`sizes` is (heads, query rows and columns, key rows and columns, cells of an image, columns of the
grid, length of a list); `q_cell` and `k_cell` are (rows, columns, tokens) of a cell.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.inner import (
    LOG2_E,
    finish,
    gradient_step,
    load_rows,
    offsets,
    product,
    row_numbers,
    rows_of_gradient,
    rows_of_output,
    softmax_step,
    store_rows,
)


@triton.jit
def split_program(cell, sizes, BLOCK: tl.constexpr):
    """Head, image, cell, and the numbers in the cell of a tile's tokens."""
    pid = tl.program_id(0)
    head = pid % sizes[0]
    pid = pid // sizes[0]
    tiles = tl.cdiv(cell[2], BLOCK)
    lanes = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    pid = pid // tiles
    return head, pid // sizes[5], pid % sizes[5], lanes


@triton.jit
def positions(cells, numbers, exists, bounds, cell, sizes, RAGGED: tl.constexpr):
    """Row and column on the map of tokens `numbers` of their cells, and whether they exist."""
    if RAGGED:
        first = tl.load(bounds + cells, mask=exists, other=0)
        past = tl.load(bounds + sizes[5] + cells, mask=exists, other=0)
        return numbers * 0, first + numbers, exists & (first + numbers < past)
    else:
        y = cells // sizes[6] * cell[0] + numbers // cell[1]
        x = cells % sizes[6] * cell[1] + numbers % cell[1]
        return y, x, exists


@triton.jit
def listed_keys(
    start, image, cell, tables, sizes, k_cell, RAGGED: tl.constexpr, BLOCK: tl.constexpr
):
    """Row, column and existence of keys `start` to `start + BLOCK` along a cell's list."""
    lists, bounds, reach = tables
    n = start + tl.arange(0, BLOCK)
    slot = n // k_cell[2]
    exists = slot < sizes[7]
    row = (image.to(tl.int64) * sizes[5] + cell) * sizes[7]
    cells = tl.load(lists + row + slot, mask=exists, other=-1)
    exists = exists & (cells >= 0) & (cells < sizes[5])
    y, x, exists = positions(cells, n % k_cell[2], exists, bounds, k_cell, sizes, RAGGED)
    if RAGGED:
        exists = exists & (x >= tl.load(reach + cell))
    return y, x, exists


@triton.jit
def list_end(cell, tables, sizes, k_cell, RAGGED: tl.constexpr):
    """Where the keys along a cell's list end; only a group that is not full has a second cell."""
    if RAGGED:
        full = tl.load(tables[2] + cell) >= tl.load(tables[1] + cell)
        return tl.where(full, k_cell[2], sizes[7] * k_cell[2])
    else:
        return sizes[7] * k_cell[2]


@triton.jit
def masked_logits(q, k, met, scale):
    """Logits in base 2; -inf for pairs that do not meet."""
    return tl.where(met, product(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))


@triton.jit
def forward(
    pointers, tables, q_strides, k_strides, v_strides, sizes, q_cell, k_cell, scale,
    RAGGED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all keys of its cell's list."""
    q_map, k_map, v_map, out_map, lse_map = pointers
    head, image, cell, i = split_program(q_cell, sizes, BLOCK_M)
    y, x, valid = positions(cell + i * 0, i, i < q_cell[2], tables[1], q_cell, sizes, RAGGED)
    q = load_rows(q_map, offsets(image, y, x, head, q_strides), valid, D, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, list_end(cell, tables, sizes, k_cell, RAGGED), BLOCK_N):
        at_y, at_x, exists = listed_keys(start, image, cell, tables, sizes, k_cell, RAGGED, BLOCK_N)
        k = load_rows(k_map, offsets(image, at_y, at_x, head, k_strides), exists, D, BLOCK_D)
        v = load_rows(v_map, offsets(image, at_y, at_x, head, v_strides), exists, DV, BLOCK_DV)
        logits = masked_logits(q, k, exists[None, :], scale)
        total, top, out = softmax_step(logits, v, total, top, out)
    out, lse = finish(total, top, out)
    numbers = row_numbers(image, y, x, head, sizes[0], sizes[1], sizes[2])
    store_rows(out_map, numbers * DV, valid, out, DV, BLOCK_DV)
    tl.store(lse_map + numbers, lse, mask=valid)


@triton.jit
def queries(
    pointers, tables, q_strides, k_strides, v_strides, sizes, q_cell, k_cell, scale,
    RAGGED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and out . d_out - d_lse for `keys`."""
    maps, saved, written = pointers
    q_map, k_map, v_map = maps
    d_q, delta_map = written
    head, image, cell, i = split_program(q_cell, sizes, BLOCK_M)
    y, x, valid = positions(cell + i * 0, i, i < q_cell[2], tables[1], q_cell, sizes, RAGGED)
    q = load_rows(q_map, offsets(image, y, x, head, q_strides), valid, D, BLOCK_D)
    numbers = row_numbers(image, y, x, head, sizes[0], sizes[1], sizes[2])
    lse, delta, d_out = rows_of_output(saved, numbers, valid, DV, BLOCK_DV)
    tl.store(delta_map + numbers, delta, mask=valid)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, list_end(cell, tables, sizes, k_cell, RAGGED), BLOCK_N):
        at_y, at_x, exists = listed_keys(start, image, cell, tables, sizes, k_cell, RAGGED, BLOCK_N)
        k = load_rows(k_map, offsets(image, at_y, at_x, head, k_strides), exists, D, BLOCK_D)
        v = load_rows(v_map, offsets(image, at_y, at_x, head, v_strides), exists, DV, BLOCK_DV)
        logits = masked_logits(q, k, valid[:, None] & exists[None, :], scale)
        _weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total += product(d_logits.to(k.dtype), k)
    store_rows(d_q, numbers * D, valid, total * scale, D, BLOCK_D)


@triton.jit
def keys(
    pointers, tables, q_strides, k_strides, v_strides, sizes, q_cell, k_cell, scale,
    RAGGED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: all queries whose lists name its cell, in order.

    `tables` is (cells of queries sorted by the cell of keys, where each cell's begin, bounds,
    reach), cells counted through all images.
    """
    maps, saved, written = pointers
    q_map, k_map, v_map = maps
    order, begins, bounds, reach = tables
    head, image, cell, j = split_program(k_cell, sizes, BLOCK_N)
    y, x, held = positions(cell + j * 0, j, j < k_cell[2], bounds, k_cell, sizes, RAGGED)
    k = load_rows(k_map, offsets(image, y, x, head, k_strides), held, D, BLOCK_D)
    v = load_rows(v_map, offsets(image, y, x, head, v_strides), held, DV, BLOCK_DV)
    total_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin = tl.load(begins + image * sizes[5] + cell)
    count = (tl.load(begins + image * sizes[5] + cell + 1) - begin) * q_cell[2]
    for start in range(0, count, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        cells = tl.load(order + begin + n // q_cell[2], mask=n < count, other=0)
        cells = tl.where(n < count, cells - image * sizes[5], 0)
        at_y, at_x, valid = positions(
            cells, n % q_cell[2], n < count, bounds, q_cell, sizes, RAGGED
        )
        q = load_rows(q_map, offsets(image, at_y, at_x, head, q_strides), valid, D, BLOCK_D)
        numbers = row_numbers(image, at_y, at_x, head, sizes[0], sizes[1], sizes[2])
        lse, delta, d_out = rows_of_gradient(saved, numbers, valid, DV, BLOCK_DV)
        met = valid[:, None] & held[None, :]
        if RAGGED:
            first = tl.load(reach + cells, mask=valid, other=0)
            met = met & (x[None, :] >= first[:, None])
        logits = masked_logits(q, k, met, scale)
        weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total_v += product(tl.trans(weights.to(d_out.dtype)), d_out)
        total_k += product(tl.trans(d_logits.to(q.dtype)), q)
    numbers = row_numbers(image, y, x, head, sizes[0], sizes[3], sizes[4])
    store_rows(written[0], numbers * D, held, total_k * scale, D, BLOCK_D)
    store_rows(written[1], numbers * DV, held, total_v, DV, BLOCK_DV)
