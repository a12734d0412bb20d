"""Gradients of `rectangles.forward`: of queries, of keys and values, of a dense bias.

Nothing is added atomically, so results repeat bit for bit. What several programs share (bias
tables, constant keys) is written once per program and summed afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.inner import gradient_step, load_fill, load_rows, product, store_rows
from vitzoo.ops._triton.rectangles import (
    AXIAL,
    DENSE,
    TABLE,
    key_chunk,
    logits_of,
    offsets,
    query_axis,
    query_tile,
    row_numbers,
    split_program,
    spread_terms,
)


@triton.jit
def table_step(
    d_logits, members, member,
    AXES: tl.constexpr, SUB: tl.constexpr, PITCH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the logits' gradients by coordinate difference, (BLOCK_Y, BLOCK_X).

    Pairs are regrouped as (query row, key row) by (query column, key column); one product with 0
    and 1 then sums over equal differences of columns, one over equal differences of rows.
    """
    KEY_X: tl.constexpr = min(PITCH, BLOCK_N)
    KEY_Y: tl.constexpr = BLOCK_N // KEY_X
    pairs = tl.reshape(d_logits, [SUB[0], SUB[1], KEY_Y, KEY_X])
    pairs = tl.reshape(tl.permute(pairs, [0, 2, 1, 3]), [SUB[0] * KEY_Y, SUB[1] * KEY_X])
    # Members of the first row and column of the tile and of the chunk: they step by one.
    x = tl.arange(0, SUB[1] * KEY_X)
    y = tl.arange(0, SUB[0] * KEY_Y)
    step_x = x % KEY_X - x // KEY_X + (tl.min(member[1], 0) - tl.min(members[1], 0))
    step_y = y % KEY_Y - y // KEY_Y + (tl.min(member[0], 0) - tl.min(members[0], 0))
    by_x = (step_x + AXES[1][6] - 1)[:, None] == tl.arange(0, BLOCK_X)[None, :]
    by_y = tl.arange(0, BLOCK_Y)[:, None] == (step_y + AXES[0][6] - 1)[None, :]
    by_column = tl.dot(pairs, by_x.to(tl.float32), input_precision=PRECISION)
    return tl.dot(by_y.to(tl.float32), by_column, input_precision=PRECISION)


@triton.jit
def queries(
    pointers, bias_strides, q_strides, k_strides, v_strides, sizes, scale,
    AXES: tl.constexpr, SUB: tl.constexpr, PITCH: tl.constexpr, NEIGHBORS: tl.constexpr,
    BIAS: tl.constexpr, FILL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and this tile's share of a table's and of the constants'."""
    q_map, k_map, v_map, bias, rows_map, columns_map, k_fill, v_fill = pointers[0]
    out_map, lse_map, d_out_map, d_lse_map = pointers[1]
    d_q, delta_map, d_rows_map, d_columns_map, d_table, d_k_fill, d_v_fill = pointers[2]
    head, image, unit_y, unit_x, sub_y, sub_x = split_program(
        tl.program_id(0), sizes, AXES[0][0], AXES[1][0], SUB
    )
    firsts, members, at, valid, unit_q, ends, classes = query_tile(
        unit_y, unit_x, sub_y, sub_x, sizes, AXES, SUB, NEIGHBORS, BLOCK_M
    )
    q = load_rows(q_map, offsets(image, at[0], at[1], head, q_strides), valid, D, BLOCK_D)
    numbers = row_numbers(image, at[0], at[1], head, sizes[0], sizes[1], sizes[2])
    lse = tl.load(lse_map + numbers, mask=valid, other=float("inf"))
    d_out = load_rows(d_out_map, numbers * DV, valid, DV, BLOCK_DV)
    out = load_rows(out_map, numbers * DV, valid, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    delta -= tl.load(d_lse_map + numbers, mask=valid, other=0.0)
    tl.store(delta_map + numbers, delta, mask=valid)
    terms = (0.0, 0.0)
    if BIAS == AXIAL:
        rows = load_rows(rows_map, numbers * AXES[0][5], valid, AXES[0][5], BLOCK_W)
        columns = load_rows(columns_map, numbers * AXES[1][5], valid, AXES[1][5], BLOCK_W)
        d_rows = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
        d_columns = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    if BIAS == TABLE:
        table = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    if FILL:
        k_constant = load_fill(k_fill, head, D, BLOCK_D)
        v_constant = load_fill(v_fill, head, DV, BLOCK_DV)
        outside_weights = tl.zeros([BLOCK_M], tl.float32)
        outside_logits = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, AXES[0][5] * PITCH, BLOCK_N):
        j, member, place, exists, inside = key_chunk(
            start, firsts, ends, classes, sizes, AXES, PITCH, NEIGHBORS, BLOCK_N
        )
        k = load_rows(
            k_map, offsets(image, place[0], place[1], head, k_strides), inside, D, BLOCK_D
        )
        v = load_rows(
            v_map, offsets(image, place[0], place[1], head, v_strides), inside, DV, BLOCK_DV
        )
        if FILL:
            k = tl.where(inside[:, None], k, k_constant[None, :])
            v = tl.where((exists & (inside == 0))[:, None], v_constant[None, :], v)
        if BIAS == AXIAL:
            terms = spread_terms(rows, columns, j, BLOCK_W)
        logits = logits_of(
            q, k, bias, bias_strides, terms, head, members, member, unit_q,
            j[0] * AXES[1][5] + j[1], ends, valid[:, None] & exists[None, :], scale,
            AXES, NEIGHBORS, BIAS,
        )  # fmt: skip
        weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total += product(d_logits.to(k.dtype), k)
        if BIAS == AXIAL:
            lanes = tl.arange(0, BLOCK_W)
            grads = d_logits.to(rows.dtype)
            d_rows += product(grads, (j[0][:, None] == lanes[None, :]).to(rows.dtype))
            d_columns += product(grads, (j[1][:, None] == lanes[None, :]).to(rows.dtype))
        if BIAS == TABLE:
            table += table_step(
                d_logits, members, member, AXES, SUB, PITCH, BLOCK_N, BLOCK_Y, BLOCK_X, PRECISION
            )
        if FILL:
            outside = (exists & (inside == 0))[None, :]
            outside_weights += tl.sum(tl.where(outside, weights, 0.0), 1)
            outside_logits += tl.sum(tl.where(outside, d_logits, 0.0), 1)
    store_rows(d_q, numbers * D, valid, total * scale, D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    if BIAS == AXIAL:
        store_rows(d_rows_map, numbers * AXES[0][5], valid, d_rows, AXES[0][5], BLOCK_W)
        store_rows(d_columns_map, numbers * AXES[1][5], valid, d_columns, AXES[1][5], BLOCK_W)
    if BIAS == TABLE:
        at = tl.arange(0, BLOCK_Y)[:, None] * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
        tl.store(d_table + pid * (BLOCK_Y * BLOCK_X) + at, table)
    if FILL:
        d_constant = tl.sum(outside_logits[:, None] * q.to(tl.float32), 0) * scale
        tl.store(d_k_fill + pid * BLOCK_D + tl.arange(0, BLOCK_D), d_constant)
        d_constant = tl.sum(outside_weights[:, None] * d_out.to(tl.float32), 0)
        tl.store(d_v_fill + pid * BLOCK_DV + tl.arange(0, BLOCK_DV), d_constant)


@triton.jit
def attending(first, past, end, length, units, AXIS: tl.constexpr, NEIGHBORS: tl.constexpr):
    """First query that attends to keys first..past-1, and one past the last."""
    if NEIGHBORS:
        low = tl.where(first < AXIS[6], 0, first - AXIS[6] // 2)
        high = tl.where(past > end - AXIS[6], end, past + AXIS[6] // 2)
        return low, high
    else:
        low = tl.maximum(first + AXIS[3] - AXIS[5] + AXIS[1], 0) // AXIS[1]
        high = tl.minimum((past - 1 + AXIS[3]) // AXIS[1], units - 1)
        return (
            tl.maximum(low * AXIS[0] - AXIS[2], 0),
            tl.minimum((high + 1) * AXIS[0] - AXIS[2], length),
        )


@triton.jit
def key_tile(unit, sub, length, AXIS: tl.constexpr, SUB: tl.constexpr, NEIGHBORS: tl.constexpr):
    """First key of a tile, one past its last, one past the last of its class, the class."""
    if NEIGHBORS:
        first, end, remainder = query_axis(unit, length, AXIS, NEIGHBORS)
        past = tl.minimum(tl.minimum(first + sub + SUB, first + AXIS[0]), end)
        return first + sub, past, end, remainder
    else:
        first = unit * AXIS[1] - AXIS[8]
        past = tl.minimum(tl.minimum(first + sub + SUB, first + AXIS[1]), length)
        return first + sub, past, length, unit * 0


@triton.jit
def axial_term(terms, numbers, p_q, p_k, met, AXIS: tl.constexpr):
    """The terms of pairs of queries and keys, picked one by one."""
    unit = (p_q + AXIS[2]) // AXIS[0]
    j = p_k[None, :] - (unit * AXIS[1] - AXIS[3])[:, None]
    met = met & (j >= 0) & (j < AXIS[5])
    found = tl.load(terms + numbers[:, None] * AXIS[5] + j, mask=met, other=0.0)
    return found.to(tl.float32)


@triton.jit
def keys(
    pointers, bias_strides, q_strides, k_strides, v_strides, sizes, scale,
    AXES: tl.constexpr, SUB: tl.constexpr, CHUNKS: tl.constexpr, NEIGHBORS: tl.constexpr,
    BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEY_SIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: all queries that attend to it, in order."""
    q_map, k_map, v_map, bias, rows_map, columns_map = pointers[0]
    lse_map, d_out_map, delta_map, d_k, d_v = pointers[1]
    head, image, unit_y, unit_x, sub_y, sub_x = split_program(
        tl.program_id(0), sizes, KEY_SIDES[0], KEY_SIDES[1], SUB
    )
    first_y, past_y, end_y, class_y = key_tile(unit_y, sub_y, sizes[3], AXES[0], SUB[0], NEIGHBORS)
    first_x, past_x, end_x, class_x = key_tile(unit_x, sub_x, sizes[4], AXES[1], SUB[1], NEIGHBORS)
    lanes = tl.arange(0, BLOCK_N)
    key_y, key_x = first_y + lanes // SUB[1], first_x + lanes % SUB[1]
    held = (key_y >= 0) & (key_y < past_y) & (key_x >= 0) & (key_x < past_x)
    place_y, place_x = class_y + key_y * AXES[0][7], class_x + key_x * AXES[1][7]
    k = load_rows(k_map, offsets(image, place_y, place_x, head, k_strides), held, D, BLOCK_D)
    v = load_rows(v_map, offsets(image, place_y, place_x, head, v_strides), held, DV, BLOCK_DV)
    unit_k = (sub_y + lanes // SUB[1]) * AXES[1][5] + sub_x + lanes % SUB[1]
    low_y, high_y = attending(first_y, past_y, end_y, sizes[1], sizes[5], AXES[0], NEIGHBORS)
    low_x, high_x = attending(first_x, past_x, end_x, sizes[2], sizes[6], AXES[1], NEIGHBORS)
    width = tl.maximum(high_x - low_x, 1)
    total_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for chunk in range(CHUNKS):
        steps = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
        y, x = low_y + steps // width, low_x + steps % width
        valid = (y < high_y) & (x < high_x)
        at_y, at_x = class_y + y * AXES[0][7], class_x + x * AXES[1][7]
        q = load_rows(q_map, offsets(image, at_y, at_x, head, q_strides), valid, D, BLOCK_D)
        numbers = row_numbers(image, at_y, at_x, head, sizes[0], sizes[1], sizes[2])
        lse = tl.load(lse_map + numbers, mask=valid, other=float("inf"))
        delta = tl.load(delta_map + numbers, mask=valid, other=0.0)
        d_out = load_rows(d_out_map, numbers * DV, valid, DV, BLOCK_DV)
        exists = valid[:, None] & held[None, :]
        terms = (0.0, 0.0)
        if BIAS == AXIAL:
            terms = (
                axial_term(rows_map, numbers, y, key_y, exists, AXES[0]),
                axial_term(columns_map, numbers, x, key_x, exists, AXES[1]),
            )
        inside_y, inside_x = (y + AXES[0][2]) % AXES[0][0], (x + AXES[1][2]) % AXES[1][0]
        unit_q = inside_y * AXES[1][0] + inside_x
        logits = logits_of(
            q, k, bias, bias_strides, terms, head, (y, x), (key_y, key_x), unit_q, unit_k,
            (end_y, end_x), exists, scale, AXES, NEIGHBORS, BIAS,
        )  # fmt: skip
        weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total_v += product(tl.trans(weights.to(d_out.dtype)), d_out)
        total_k += product(tl.trans(d_logits.to(q.dtype)), q)
    numbers = row_numbers(image, place_y, place_x, head, sizes[0], sizes[3], sizes[4])
    store_rows(d_k, numbers * D, held, total_k * scale, D, BLOCK_D)
    store_rows(d_v, numbers * DV, held, total_v, DV, BLOCK_DV)


@triton.jit
def dense_bias(
    pointers, bias_strides, q_strides, k_strides, v_strides, sizes, scale, count,
    AXES: tl.constexpr, SUB: tl.constexpr, PITCH: tl.constexpr, FILL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of a window's bias: the sum over every SLOTS-th of `count` windows of all images.

    The grid is (tiles of queries x heads, chunks of keys, slots).
    """
    q_map, k_map, v_map, bias, k_fill, v_fill, lse_map, d_out_map, delta_map, d_bias = pointers
    side: tl.constexpr = AXES[1][0]
    head, _image, _y, _x, sub_y, sub_x = split_program(
        tl.program_id(0), sizes, AXES[0][0], side, SUB
    )
    start = tl.program_id(1) * BLOCK_N
    if FILL:
        k_constant = load_fill(k_fill, head, D, BLOCK_D)
        v_constant = load_fill(v_fill, head, DV, BLOCK_DV)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    unit = tl.program_id(2)
    while unit < count:
        image, unit_y, unit_x = (
            unit // (sizes[5] * sizes[6]),
            unit // sizes[6] % sizes[5],
            unit % sizes[6],
        )
        firsts, members, at, valid, unit_q, ends, classes = query_tile(
            unit_y, unit_x, sub_y, sub_x, sizes, AXES, SUB, False, BLOCK_M
        )
        j, member, place, exists, inside = key_chunk(
            start, firsts, ends, classes, sizes, AXES, PITCH, False, BLOCK_N
        )
        q = load_rows(q_map, offsets(image, at[0], at[1], head, q_strides), valid, D, BLOCK_D)
        k = load_rows(
            k_map, offsets(image, place[0], place[1], head, k_strides), inside, D, BLOCK_D
        )
        v = load_rows(
            v_map, offsets(image, place[0], place[1], head, v_strides), inside, DV, BLOCK_DV
        )
        if FILL:
            k = tl.where(inside[:, None], k, k_constant[None, :])
            v = tl.where((exists & (inside == 0))[:, None], v_constant[None, :], v)
        numbers = row_numbers(image, at[0], at[1], head, sizes[0], sizes[1], sizes[2])
        lse = tl.load(lse_map + numbers, mask=valid, other=float("inf"))
        delta = tl.load(delta_map + numbers, mask=valid, other=0.0)
        d_out = load_rows(d_out_map, numbers * DV, valid, DV, BLOCK_DV)
        logits = logits_of(
            q, k, bias, bias_strides, (0.0, 0.0), head, members, member, unit_q,
            j[0] * side + j[1], ends, valid[:, None] & exists[None, :], scale, AXES, False, DENSE,
        )  # fmt: skip
        _weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total += d_logits
        unit += tl.num_programs(2)
    lanes = tl.arange(0, BLOCK_M)
    at_q = (sub_y + lanes // SUB[1]) * side + sub_x + lanes % SUB[1]
    real = (
        (lanes < SUB[0] * SUB[1])
        & (sub_y + lanes // SUB[1] < side)
        & (sub_x + lanes % SUB[1] < side)
    )
    at_k = start + tl.arange(0, BLOCK_N)
    j_y, j_x = at_k // PITCH, at_k % PITCH
    real = real[:, None] & (j_y < side)[None, :] & (j_x < side)[None, :]
    slot = tl.program_id(2).to(tl.int64) * sizes[0] + head
    at = (
        slot * (side * side * side * side)
        + at_q[:, None] * (side * side)
        + (j_y * side + j_x)[None, :]
    )
    tl.store(d_bias + at, total, mask=real)
