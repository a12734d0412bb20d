"""Kernels for queries and keys that are rectangles of maps: windows, halos, neighborhoods.

A map is cut into units, one rectangle of queries and one of keys each. `AXIS_Y`, `AXIS_X` say for
rows and columns: (side, step, q_before, k_before, reach, span, kernel, dilation, key_before); two
flat tuples, because triton 3.6 takes none inside another. In a grid of blocks, unit u holds `side`
queries from u * side - q_before and `span` keys from u * step - k_before; keys further than `reach`
outside the map do not exist. With NEIGHBORS, u counts tiles of `side` members within the `dilation`
classes, and a query attends to the `kernel` members around it.

`sizes` is (heads, query rows and columns, key rows and columns, units down and across, key lanes of
a unit): loops end at an argument, because short loops with a known end are unrolled and then spill.
`BIAS` is 0 none, 1 one number per query and key of a unit, 2 a table by coordinate difference, 3 a
term for the row and one for the column of each key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.inner import (
    LOG2_E,
    finish,
    load_fill,
    load_rows,
    offsets,
    product,
    row_numbers,
    softmax_step,
    store_rows,
)

DENSE = tl.constexpr(1)
TABLE = tl.constexpr(2)
AXIAL = tl.constexpr(3)


@triton.jit
def query_axis(unit, length, AXIS: tl.constexpr, NEIGHBORS: tl.constexpr):
    """First query of a unit, one past the last one of its class, the class."""
    if NEIGHBORS:
        remainder = unit % AXIS[7]
        return unit // AXIS[7] * AXIS[0], (length - 1 - remainder) // AXIS[7] + 1, remainder
    else:
        return unit * AXIS[0] - AXIS[2], length, unit * 0


@triton.jit
def key_axis(unit, first, end, AXIS: tl.constexpr, NEIGHBORS: tl.constexpr):
    """First key of a unit."""
    if NEIGHBORS:
        return tl.maximum(tl.minimum(first - AXIS[6] // 2, end - AXIS[5]), 0)
    else:
        return unit * AXIS[1] - AXIS[3]


@triton.jit
def meets(p_q, p_k, end, AXIS: tl.constexpr):
    """Whether queries p_q attend to keys p_k of their class, along one axis."""
    first = tl.maximum(tl.minimum(p_q - AXIS[6] // 2, end - AXIS[6]), 0)
    return (p_k >= first) & (p_k < first + AXIS[6])


@triton.jit
def table_offsets(at, AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr):
    """Offsets whose difference, key minus query, is the place in a head's bias table."""
    return at[0] * (2 * AXIS_X[6] - 1) + at[1]


@triton.jit
def split_program(pid, sizes, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, SUB: tl.constexpr):
    """Head, image, unit (row, column) and first row and column of the tile in its unit."""
    across: tl.constexpr = (SIDE_X + SUB[1] - 1) // SUB[1]
    down: tl.constexpr = (SIDE_Y + SUB[0] - 1) // SUB[0]
    head = pid % sizes[0]
    pid = pid // sizes[0]
    sub = pid % (across * down)
    pid = pid // (across * down)
    unit_x = pid % sizes[6]
    pid = pid // sizes[6]
    sub_y, sub_x = sub // across * SUB[0], sub % across * SUB[1]
    return head, pid // sizes[5], pid % sizes[5], unit_x, sub_y, sub_x


@triton.jit
def logits_of(
    q, k, bias, bias_strides, terms, head, at_q, at_k, unit_q, unit_k, ends, exists, scale,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr, NEIGHBORS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of queries (rows) against keys of their unit; -inf for pairs that do not
    meet.

    at_q, at_k are (rows, columns) of members; unit_q, unit_k numbers inside the unit, for a dense
    bias; terms the (row, column) terms of an axial bias, spread over the pairs.
    """
    logits = product(q, tl.trans(k)) * (scale * LOG2_E)
    met = exists
    if NEIGHBORS:
        met = met & meets(at_q[0][:, None], at_k[0][None, :], ends[0], AXIS_Y)
        met = met & meets(at_q[1][:, None], at_k[1][None, :], ends[1], AXIS_X)
    if BIAS == DENSE:
        at = unit_q[:, None] * bias_strides[1] + unit_k[None, :] * bias_strides[2]
        found = tl.load(bias + head * bias_strides[0] + at, mask=met, other=0.0)
        logits += found.to(tl.float32) * LOG2_E
    if BIAS == TABLE:
        # From the middle of the head's table, where a key is the query itself.
        middle = head * ((2 * AXIS_Y[6] - 1) * (2 * AXIS_X[6] - 1))
        middle += (AXIS_Y[6] - 1) * (2 * AXIS_X[6] - 1) + AXIS_X[6] - 1
        of_keys = table_offsets(at_k, AXIS_Y, AXIS_X)[None, :]
        at = of_keys - table_offsets(at_q, AXIS_Y, AXIS_X)[:, None]
        found = tl.load(bias + middle + at, mask=met, other=0.0)
        logits += found.to(tl.float32) * LOG2_E
    if BIAS == AXIAL:
        logits += (terms[0] + terms[1]) * LOG2_E
    return tl.where(met, logits, float("-inf"))


@triton.jit
def query_tile(
    unit_y, unit_x, sub_y, sub_x, sizes,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    SUB: tl.constexpr, NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The queries of one tile of a unit.

    Returns:
        ((first keys), (ends), (classes)), (members), (map positions), valid, number in the unit.
    """
    first_y, end_y, class_y = query_axis(unit_y, sizes[1], AXIS_Y, NEIGHBORS)
    first_x, end_x, class_x = query_axis(unit_x, sizes[2], AXIS_X, NEIGHBORS)
    lanes = tl.arange(0, BLOCK)
    i_y = sub_y + lanes // SUB[1]
    i_x = sub_x + lanes % SUB[1]
    y, x = first_y + i_y, first_x + i_x
    valid = (lanes < SUB[0] * SUB[1]) & (i_y < AXIS_Y[0]) & (i_x < AXIS_X[0])
    valid = valid & (y >= 0) & (y < end_y) & (x >= 0) & (x < end_x)
    keys_y = key_axis(unit_y, first_y, end_y, AXIS_Y, NEIGHBORS)
    keys_x = key_axis(unit_x, first_x, end_x, AXIS_X, NEIGHBORS)
    at = (class_y + y * AXIS_Y[7], class_x + x * AXIS_X[7])
    inside = i_y * AXIS_X[0] + i_x
    unit = ((keys_y, keys_x), (end_y, end_x), (class_y, class_x))
    return unit, (y, x), at, valid, inside


@triton.jit
def key_chunk(
    start, firsts, ends, classes, sizes,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    PITCH: tl.constexpr, NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys `start` to `start + BLOCK` of a unit whose rows are PITCH apart.

    Returns:
        (rows, columns) in the unit, (members), (map positions), exists, inside the map.
    """
    lanes = start + tl.arange(0, BLOCK)
    j_y, j_x = lanes // PITCH, lanes % PITCH
    y, x = firsts[0] + j_y, firsts[1] + j_x
    within = (j_y < AXIS_Y[5]) & (j_x < AXIS_X[5])
    if NEIGHBORS:
        inside = within & (y < ends[0]) & (x < ends[1])
        exists = inside
    else:
        inside = within & (y >= 0) & (y < sizes[3]) & (x >= 0) & (x < sizes[4])
        exists = within & (y >= -AXIS_Y[4]) & (y < sizes[3] + AXIS_Y[4])
        exists = exists & (x >= -AXIS_X[4]) & (x < sizes[4] + AXIS_X[4])
    at = (classes[0] + y * AXIS_Y[7], classes[1] + x * AXIS_X[7])
    return (j_y, j_x), (y, x), at, exists, inside


@triton.jit
def unit_keys(
    start, unit, image, head, maps, strides, constants, sizes,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    PITCH: tl.constexpr, NEIGHBORS: tl.constexpr, FILL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Keys and values of a chunk of a unit; `unit` is (first keys, ends, classes).

    Returns:
        keys, values, (rows, columns) in the unit, (members), exists, exists outside the map.
    """
    j, member, at, exists, inside = key_chunk(
        start, unit[0], unit[1], unit[2], sizes, AXIS_Y, AXIS_X, PITCH, NEIGHBORS, BLOCK
    )
    k = load_rows(maps[0], offsets(image, at[0], at[1], head, strides[0]), inside, D, BLOCK_D)
    v = load_rows(maps[1], offsets(image, at[0], at[1], head, strides[1]), inside, DV, BLOCK_DV)
    outside = exists & (inside == 0)
    if FILL:
        k = tl.where(inside[:, None], k, constants[0][None, :])
        v = tl.where(outside[:, None], constants[1][None, :], v)
    return k, v, j, member, exists, outside


@triton.jit
def unit_constants(
    fills, head, FILL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The head's constant key and value, if there are."""
    if FILL:
        return load_fill(fills[0], head, D, BLOCK_D), load_fill(fills[1], head, DV, BLOCK_DV)
    else:
        return 0.0, 0.0


@triton.jit
def query_terms(
    maps,
    numbers,
    valid,
    AXIS_Y: tl.constexpr,
    AXIS_X: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Terms of queries by the row and by the column of a key, if there are."""
    if BIAS == AXIAL:
        return (
            load_rows(maps[0], numbers * AXIS_Y[5], valid, AXIS_Y[5], BLOCK_W),
            load_rows(maps[1], numbers * AXIS_X[5], valid, AXIS_X[5], BLOCK_W),
        )
    else:
        return 0.0, 0.0


@triton.jit
def spread_terms(terms, j, BIAS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Axial terms (queries, window) at rows j[0] and columns j[1]: products with 0 and 1."""
    if BIAS == AXIAL:
        lanes = tl.arange(0, BLOCK_W)
        y = product(terms[0], (lanes[:, None] == j[0][None, :]).to(terms[0].dtype))
        x = product(terms[1], (lanes[:, None] == j[1][None, :]).to(terms[1].dtype))
        return y, x
    else:
        return 0.0, 0.0


@triton.jit
def forward(
    pointers, bias_strides, q_strides, k_strides, v_strides, sizes, scale,
    AXIS_Y: tl.constexpr, AXIS_X: tl.constexpr,
    SUB: tl.constexpr, PITCH: tl.constexpr, NEIGHBORS: tl.constexpr,
    BIAS: tl.constexpr, FILL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all keys of its unit."""
    maps, term_maps, fills, written = pointers
    q_map, k_map, v_map, bias = maps
    head, image, unit_y, unit_x, sub_y, sub_x = split_program(
        tl.program_id(0), sizes, AXIS_Y[0], AXIS_X[0], SUB
    )
    unit, members, at, valid, unit_q = query_tile(
        unit_y, unit_x, sub_y, sub_x, sizes, AXIS_Y, AXIS_X, SUB, NEIGHBORS, BLOCK_M
    )
    q = load_rows(q_map, offsets(image, at[0], at[1], head, q_strides), valid, D, BLOCK_D)
    numbers = row_numbers(image, at[0], at[1], head, sizes[0], sizes[1], sizes[2])
    terms = query_terms(term_maps, numbers, valid, AXIS_Y, AXIS_X, BIAS, BLOCK_W)
    constants = unit_constants(fills, head, FILL, D, DV, BLOCK_D, BLOCK_DV)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, sizes[7], BLOCK_N):
        k, v, j, member, exists, _ = unit_keys(
            start, unit, image, head, (k_map, v_map), (k_strides, v_strides), constants, sizes,
            AXIS_Y, AXIS_X, PITCH, NEIGHBORS, FILL, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        logits = logits_of(
            q, k, bias, bias_strides, spread_terms(terms, j, BIAS, BLOCK_W), head, members, member,
            unit_q, j[0] * AXIS_X[5] + j[1], unit[1], exists[None, :], scale,
            AXIS_Y, AXIS_X, NEIGHBORS, BIAS,
        )  # fmt: skip
        total, top, out = softmax_step(logits, v, total, top, out)
    out, lse = finish(total, top, out)
    store_rows(written[0], numbers * DV, valid, out, DV, BLOCK_DV)
    tl.store(written[1] + numbers, lse, mask=valid)
