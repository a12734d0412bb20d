"""Kernels for axial bias terms: what a query adds to the logits by the row and column of a key.

The term of query i of a block for key j of its window is q . table[window - 1 + j - i], so products
with the whole table are stored, and read back, shifted by the query's place in its block.

`sizes` is (heads, rows, columns, rows of q in all); `SIDES` and `WINDOWS` are queries of a block
and keys of a window along the two axes. Tables and terms come as (by row, by column).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.inner import load_rows, offsets, product, store_rows


@triton.jit
def query_rows(start, sizes, BLOCK: tl.constexpr):
    """Row numbers in a contiguous (B, H, W, heads) map, image, row, column, head, and validity."""
    # Divisions in 64 bits are calls; there are fewer than 2^31 rows.
    numbers = start + tl.arange(0, BLOCK)
    pixel = numbers // sizes[0]
    row = pixel // sizes[2]
    image = row // sizes[1]
    head = numbers - pixel * sizes[0]
    y, x = row - image * sizes[1], pixel - row * sizes[2]
    return numbers.to(tl.int64), image, y, x, head, numbers < sizes[3]


@triton.jit
def shifted(numbers, place, valid, WINDOW: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where the product with each entry of the table lies among a query's terms, and if at all."""
    entry = tl.arange(0, BLOCK_R)
    key = entry[None, :] - (WINDOW - 1) + place[:, None]
    return numbers[:, None] * WINDOW + key, valid[:, None] & (key >= 0) & (key < WINDOW)


@triton.jit
def load_table(
    table, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A table of 2 * WINDOW - 1 entries, zero beyond."""
    entry = tl.arange(0, BLOCK_R)
    return load_rows(table, entry * D, entry < 2 * WINDOW - 1, D, BLOCK_D)


@triton.jit
def forward(
    pointers, q_strides, sizes, SIDES: tl.constexpr, WINDOWS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Terms of a tile of queries."""
    q_map, tables, written = pointers
    start = tl.program_id(0) * BLOCK_M
    numbers, image, y, x, head, valid = query_rows(start, sizes, BLOCK_M)
    q = load_rows(q_map, offsets(image, y, x, head, q_strides), valid, D, BLOCK_D)
    by_row = product(q, tl.trans(load_table(tables[0], WINDOWS[0], D, BLOCK_R, BLOCK_D)))
    at, mask = shifted(numbers, y % SIDES[0], valid, WINDOWS[0], BLOCK_R)
    tl.store(written[0] + at, by_row.to(q.dtype), mask=mask)
    by_column = product(q, tl.trans(load_table(tables[1], WINDOWS[1], D, BLOCK_R, BLOCK_D)))
    at, mask = shifted(numbers, x % SIDES[1], valid, WINDOWS[1], BLOCK_R)
    tl.store(written[1] + at, by_column.to(q.dtype), mask=mask)


@triton.jit
def backward(
    pointers, q_strides, sizes, SIDES: tl.constexpr, WINDOWS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of q; this program's shares of the tables' gradients."""
    q_map, tables, d_terms, d_q_map, shares = pointers
    of_rows = load_table(tables[0], WINDOWS[0], D, BLOCK_R, BLOCK_D)
    of_columns = load_table(tables[1], WINDOWS[1], D, BLOCK_R, BLOCK_D)
    total_rows = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total_columns = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    step = tl.num_programs(0) * BLOCK_M
    start = tl.program_id(0) * BLOCK_M
    while start < sizes[3]:
        numbers, image, y, x, head, valid = query_rows(start, sizes, BLOCK_M)
        q = load_rows(q_map, offsets(image, y, x, head, q_strides), valid, D, BLOCK_D)
        at, mask = shifted(numbers, y % SIDES[0], valid, WINDOWS[0], BLOCK_R)
        d_row = tl.load(d_terms[0] + at, mask=mask, other=0.0)
        at, mask = shifted(numbers, x % SIDES[1], valid, WINDOWS[1], BLOCK_R)
        d_column = tl.load(d_terms[1] + at, mask=mask, other=0.0)
        d_q = load_rows(d_q_map, numbers * D, valid, D, BLOCK_D).to(tl.float32)
        d_q += product(d_row, of_rows) + product(d_column, of_columns)
        store_rows(d_q_map, numbers * D, valid, d_q, D, BLOCK_D)
        total_rows += product(tl.trans(d_row), q)
        total_columns += product(tl.trans(d_column), q)
        start += step
    entry, lanes = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    own = tl.program_id(0) * BLOCK_R * BLOCK_D
    at = own + entry[:, None] * BLOCK_D + lanes[None, :]
    tl.store(shares[0] + at, total_rows)
    tl.store(shares[1] + at, total_columns)
