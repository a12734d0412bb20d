"""Gradients of `rectangles.forward`: of queries, of keys and values, of a dense bias.

Nothing is added atomically, so results repeat bit for bit. What several programs share (bias
tables, constant keys) is written once per program and summed afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.inner import (
    gradient_step,
    load_rows,
    offsets,
    product,
    row_numbers,
    rows_of_gradient,
    rows_of_output,
    store_rows,
)
from vitzoo.ops._triton.rectangles import (
    AXIAL,
    DENSE,
    TABLE,
    logits_of,
    query_axis,
    query_terms,
    query_tile,
    split_program,
    spread_terms,
    unit_constants,
    unit_keys,
)


@triton.jit
def table_step(
    table, d_logits, members, member,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    SUB: tl.constexpr, PITCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the logits' gradients by coordinate difference.

    Pairs are regrouped as (query row, key row) by (query column, key column); one product with 0
    and 1 then sums over equal differences of columns, one over equal differences of rows.
    """
    KEY_X: tl.constexpr = min(PITCH, d_logits.shape[1])
    KEY_Y: tl.constexpr = d_logits.shape[1] // KEY_X
    pairs = tl.reshape(d_logits, [SUB[0], SUB[1], KEY_Y, KEY_X])
    pairs = tl.reshape(tl.permute(pairs, [0, 2, 1, 3]), [SUB[0] * KEY_Y, SUB[1] * KEY_X])
    # Members of the first row and column of the tile and of the chunk: they step by one.
    x = tl.arange(0, SUB[1] * KEY_X)
    y = tl.arange(0, SUB[0] * KEY_Y)
    step_x = x % KEY_X - x // KEY_X + (tl.min(member[1], 0) - tl.min(members[1], 0))
    step_y = y % KEY_Y - y // KEY_Y + (tl.min(member[0], 0) - tl.min(members[0], 0))
    by_x = (step_x + AXIS_X[6] - 1)[:, None] == tl.arange(0, table.shape[1])[None, :]
    by_y = tl.arange(0, table.shape[0])[:, None] == (step_y + AXIS_Y[6] - 1)[None, :]
    by_column = tl.dot(pairs, by_x.to(tl.float32), input_precision=PRECISION)
    return table + tl.dot(by_y.to(tl.float32), by_column, input_precision=PRECISION)


@triton.jit
def term_step(d_terms, d_logits, j, like):
    """Add the logits' gradients by row and by column of the keys."""
    lanes = tl.arange(0, d_terms[0].shape[1])
    grads = d_logits.to(like.dtype)
    d_rows = product(grads, (j[0][:, None] == lanes[None, :]).to(like.dtype))
    d_columns = product(grads, (j[1][:, None] == lanes[None, :]).to(like.dtype))
    return d_terms[0] + d_rows, d_terms[1] + d_columns


@triton.jit
def outside_step(outside, weights, d_logits, constant):
    """Add weights and gradients of logits of the keys that are constant."""
    d_constant = tl.sum(tl.where(constant[None, :], d_logits, 0.0), 1)
    return outside[0] + tl.sum(tl.where(constant[None, :], weights, 0.0), 1), outside[
        1
    ] + d_constant


@triton.jit
def store_shares(written, q, d_out, table, outside, scale, BIAS: tl.constexpr, FILL: tl.constexpr):
    """This program's shares of the gradients of a table and of the constant key and value."""
    pid = tl.program_id(0).to(tl.int64)
    if BIAS == TABLE:
        y, x = tl.arange(0, table.shape[0]), tl.arange(0, table.shape[1])
        at = y[:, None] * table.shape[1] + x[None, :]
        tl.store(written[0] + pid * table.numel + at, table)
    if FILL:
        weights, logits = outside
        d_key = tl.sum(logits[:, None] * q.to(tl.float32), 0) * scale
        tl.store(written[1] + pid * q.shape[1] + tl.arange(0, q.shape[1]), d_key)
        d_value = tl.sum(weights[:, None] * d_out.to(tl.float32), 0)
        tl.store(written[2] + pid * d_out.shape[1] + tl.arange(0, d_out.shape[1]), d_value)


@triton.jit
def queries(
    pointers, bias_strides, q_strides, k_strides, v_strides, sizes, scale,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    SUB: tl.constexpr, PITCH: tl.constexpr, NEIGHBORS: tl.constexpr,
    BIAS: tl.constexpr, FILL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and this tile's share of a table's and of the constants'."""
    given, saved, written, d_term_maps, shares = pointers
    maps, term_maps, fills = given
    head, image, unit_y, unit_x, sub_y, sub_x = split_program(
        tl.program_id(0), sizes, AXIS_Y[0], AXIS_X[0], SUB
    )
    unit, members, at, valid, unit_q = query_tile(
        unit_y, unit_x, sub_y, sub_x, sizes, AXIS_Y, AXIS_X, SUB, NEIGHBORS, BLOCK_M
    )
    q = load_rows(maps[0], offsets(image, at[0], at[1], head, q_strides), valid, D, BLOCK_D)
    numbers = row_numbers(image, at[0], at[1], head, sizes[0], sizes[1], sizes[2])
    lse, delta, d_out = rows_of_output(saved, numbers, valid, DV, BLOCK_DV)
    tl.store(written[1] + numbers, delta, mask=valid)
    terms = query_terms(term_maps, numbers, valid, AXIS_Y, AXIS_X, BIAS, BLOCK_W)
    constants = unit_constants(fills, head, FILL, D, DV, BLOCK_D, BLOCK_DV)
    d_terms = (tl.zeros([BLOCK_M, BLOCK_W], tl.float32), tl.zeros([BLOCK_M, BLOCK_W], tl.float32))
    outside = (tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32))
    table = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, sizes[7], BLOCK_N):
        k, v, j, member, exists, constant = unit_keys(
            start, unit, image, head, (maps[1], maps[2]), (k_strides, v_strides), constants, sizes,
            AXIS_Y, AXIS_X, PITCH, NEIGHBORS, FILL, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        logits = logits_of(
            q, k, maps[3], bias_strides, spread_terms(terms, j, BIAS, BLOCK_W), head,
            members, member, unit_q, j[0] * AXIS_X[5] + j[1], unit[1],
            valid[:, None] & exists[None, :], scale, AXIS_Y, AXIS_X, NEIGHBORS, BIAS,
        )  # fmt: skip
        weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total += product(d_logits.to(k.dtype), k)
        if BIAS == AXIAL:
            d_terms = term_step(d_terms, d_logits, j, terms[0])
        if BIAS == TABLE:
            table = table_step(
                table, d_logits, members, member, AXIS_Y, AXIS_X, SUB, PITCH, PRECISION
            )
        if FILL:
            outside = outside_step(outside, weights, d_logits, constant)
    store_rows(written[0], numbers * D, valid, total * scale, D, BLOCK_D)
    if BIAS == AXIAL:
        store_rows(d_term_maps[0], numbers * AXIS_Y[5], valid, d_terms[0], AXIS_Y[5], BLOCK_W)
        store_rows(d_term_maps[1], numbers * AXIS_X[5], valid, d_terms[1], AXIS_X[5], BLOCK_W)
    store_shares(shares, q, d_out, table, outside, scale, BIAS, FILL)


@triton.jit
def attending(first, past, end, units, AXIS: tl.constexpr, NEIGHBORS: tl.constexpr):
    """The first member that attends to keys first..past-1, and one past the last; else, units."""
    if NEIGHBORS:
        low = tl.where(first < AXIS[6], 0, first - AXIS[6] // 2)
        high = tl.where(past > end - AXIS[6], end, past + AXIS[6] // 2)
        return low, high
    else:
        low = tl.maximum(first + AXIS[3] - AXIS[5] + AXIS[1], 0) // AXIS[1]
        return low, tl.minimum((past - 1 + AXIS[3]) // AXIS[1] + 1, units)


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
def keys_of_unit(
    unit_y, unit_x, sub_y, sub_x, sizes,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    SUB: tl.constexpr, NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of one tile, and the members, or units, of queries that attend to them.

    Returns:
        (members), (map positions), held, (ends), (classes), (first members or units), (one past
        the last).
    """
    first_y, past_y, end_y, class_y = key_tile(unit_y, sub_y, sizes[3], AXIS_Y, SUB[0], NEIGHBORS)
    first_x, past_x, end_x, class_x = key_tile(unit_x, sub_x, sizes[4], AXIS_X, SUB[1], NEIGHBORS)
    lanes = tl.arange(0, BLOCK)
    y, x = first_y + lanes // SUB[1], first_x + lanes % SUB[1]
    held = (y >= 0) & (y < past_y) & (x >= 0) & (x < past_x)
    at = (class_y + y * AXIS_Y[7], class_x + x * AXIS_X[7])
    low_y, high_y = attending(first_y, past_y, end_y, sizes[5], AXIS_Y, NEIGHBORS)
    low_x, high_x = attending(first_x, past_x, end_x, sizes[6], AXIS_X, NEIGHBORS)
    ends, classes = (end_y, end_x), (class_y, class_x)
    return (y, x), at, held, ends, classes, (low_y, low_x), (high_y, high_x)


@triton.jit
def steps_of(
    lows, highs,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr, NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of queries that attend to a tile of keys: of one rectangle, or of each unit."""
    height, width = tl.maximum(highs[0] - lows[0], 0), tl.maximum(highs[1] - lows[1], 0)
    if NEIGHBORS:
        return tl.cdiv(height * width, BLOCK)
    else:
        return height * width * ((AXIS_Y[0] * AXIS_X[0] + BLOCK - 1) // BLOCK)


@triton.jit
def attending_queries(
    step, lows, highs, ends, classes, member, held, sizes,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr, NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The queries of a step.

    Returns:
        (members), (map positions), valid, number inside the unit; of the keys `member` the (rows,
        columns) in that unit, and which exist there.
    """
    width = tl.maximum(highs[1] - lows[1], 1)
    if NEIGHBORS:
        steps = step * BLOCK + tl.arange(0, BLOCK)
        y, x = lows[0] + steps // width, lows[1] + steps % width
        at = (classes[0] + y * AXIS_Y[7], classes[1] + x * AXIS_X[7])
        return (y, x), at, (y < highs[0]) & (x < highs[1]), y, member, held
    else:
        chunks: tl.constexpr = (AXIS_Y[0] * AXIS_X[0] + BLOCK - 1) // BLOCK
        unit = step // chunks
        unit_y, unit_x = lows[0] + unit // width, lows[1] + unit % width
        inside = step % chunks * BLOCK + tl.arange(0, BLOCK)
        i_y, i_x = inside // AXIS_X[0], inside % AXIS_X[0]
        y, x = unit_y * AXIS_Y[0] - AXIS_Y[2] + i_y, unit_x * AXIS_X[0] - AXIS_X[2] + i_x
        valid = (i_y < AXIS_Y[0]) & (y >= 0) & (y < sizes[1]) & (x >= 0) & (x < sizes[2])
        j_y = member[0] - (unit_y * AXIS_Y[1] - AXIS_Y[3])
        j_x = member[1] - (unit_x * AXIS_X[1] - AXIS_X[3])
        exist = held & (j_y >= 0) & (j_y < AXIS_Y[5]) & (j_x >= 0) & (j_x < AXIS_X[5])
        return (y, x), (y, x), valid, inside, (j_y, j_x), exist


@triton.jit
def keys(
    pointers, bias_strides, q_strides, k_strides, v_strides, sizes, scale,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr, SUB: tl.constexpr, NEIGHBORS: tl.constexpr,
    BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEY_SIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: all queries that attend to it, in order."""
    maps, term_maps, saved, written = pointers
    q_map, k_map, v_map, bias = maps
    head, image, unit_y, unit_x, sub_y, sub_x = split_program(
        tl.program_id(0), sizes, KEY_SIDES[0], KEY_SIDES[1], SUB
    )
    member, place, held, ends, classes, lows, highs = keys_of_unit(
        unit_y, unit_x, sub_y, sub_x, sizes, AXIS_Y, AXIS_X, SUB, NEIGHBORS, BLOCK_N
    )
    k = load_rows(k_map, offsets(image, place[0], place[1], head, k_strides), held, D, BLOCK_D)
    v = load_rows(v_map, offsets(image, place[0], place[1], head, v_strides), held, DV, BLOCK_DV)
    total_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for step in range(steps_of(lows, highs, AXIS_Y, AXIS_X, NEIGHBORS, BLOCK_M)):
        members, at, valid, unit_q, j, exist = attending_queries(
            step, lows, highs, ends, classes, member, held, sizes,
            AXIS_Y, AXIS_X, NEIGHBORS, BLOCK_M,
        )  # fmt: skip
        q = load_rows(q_map, offsets(image, at[0], at[1], head, q_strides), valid, D, BLOCK_D)
        numbers = row_numbers(image, at[0], at[1], head, sizes[0], sizes[1], sizes[2])
        lse, delta, d_out = rows_of_gradient(saved, numbers, valid, DV, BLOCK_DV)
        terms = query_terms(term_maps, numbers, valid, AXIS_Y, AXIS_X, BIAS, BLOCK_W)
        logits = logits_of(
            q, k, bias, bias_strides, spread_terms(terms, j, BIAS, BLOCK_W), head, members, member,
            unit_q, j[0] * AXIS_X[5] + j[1], ends, valid[:, None] & exist[None, :], scale,
            AXIS_Y, AXIS_X, NEIGHBORS, BIAS,
        )  # fmt: skip
        weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total_v += product(tl.trans(weights.to(d_out.dtype)), d_out)
        total_k += product(tl.trans(d_logits.to(q.dtype)), q)
    numbers = row_numbers(image, place[0], place[1], head, sizes[0], sizes[3], sizes[4])
    store_rows(written[0], numbers * D, held, total_k * scale, D, BLOCK_D)
    store_rows(written[1], numbers * DV, held, total_v, DV, BLOCK_DV)


@triton.jit
def store_block(
    d_bias, total, head, sub_y, sub_x, start, sizes,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr, SUB: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """This program's block of its slot's (side^2, side^2) gradient of a window's bias."""
    side: tl.constexpr = AXIS_X[0]
    lanes = tl.arange(0, total.shape[0])
    y, x = sub_y + lanes // SUB[1], sub_x + lanes % SUB[1]
    real = (lanes < SUB[0] * SUB[1]) & (y < side) & (x < side)
    at_k = start + tl.arange(0, total.shape[1])
    j_y, j_x = at_k // PITCH, at_k % PITCH
    real = real[:, None] & (j_y < side)[None, :] & (j_x < side)[None, :]
    slot = tl.program_id(2).to(tl.int64) * sizes[0] + head
    at = slot * (side * side * side * side) + (y * side + x)[:, None] * (side * side)
    tl.store(d_bias + at + (j_y * side + j_x)[None, :], total, mask=real)


@triton.jit
def dense_bias(
    pointers, bias_strides, q_strides, k_strides, v_strides, sizes, scale, count,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    SUB: tl.constexpr, PITCH: tl.constexpr, FILL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of a window's bias: the sum over every SLOTS-th of `count` windows of all images.

    The grid is (tiles of queries x heads, chunks of keys, slots).
    """
    maps, fills, saved, d_bias = pointers
    q_map, k_map, v_map, bias = maps
    head, _image, _y, _x, sub_y, sub_x = split_program(
        tl.program_id(0), sizes, AXIS_Y[0], AXIS_X[0], SUB
    )
    start = tl.program_id(1) * BLOCK_N
    constants = unit_constants(fills, head, FILL, D, DV, BLOCK_D, BLOCK_DV)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    number = tl.program_id(2)
    while number < count:
        image = number // (sizes[5] * sizes[6])
        unit, members, at, valid, unit_q = query_tile(
            number // sizes[6] % sizes[5], number % sizes[6], sub_y, sub_x, sizes,
            AXIS_Y, AXIS_X, SUB, False, BLOCK_M,
        )  # fmt: skip
        k, v, j, member, exists, _ = unit_keys(
            start, unit, image, head, (k_map, v_map), (k_strides, v_strides), constants, sizes,
            AXIS_Y, AXIS_X, PITCH, False, FILL, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        q = load_rows(q_map, offsets(image, at[0], at[1], head, q_strides), valid, D, BLOCK_D)
        numbers = row_numbers(image, at[0], at[1], head, sizes[0], sizes[1], sizes[2])
        lse, delta, d_out = rows_of_gradient(saved, numbers, valid, DV, BLOCK_DV)
        logits = logits_of(
            q, k, bias, bias_strides, (0.0, 0.0), head, members, member, unit_q,
            j[0] * AXIS_X[0] + j[1], unit[1], valid[:, None] & exists[None, :], scale,
            AXIS_Y, AXIS_X, False, DENSE,
        )  # fmt: skip
        _weights, d_logits = gradient_step(logits, lse, delta, d_out, v)
        total += d_logits
        number += tl.num_programs(2)
    store_block(d_bias, total, head, sub_y, sub_x, start, sizes, AXIS_Y, AXIS_X, SUB, PITCH)
