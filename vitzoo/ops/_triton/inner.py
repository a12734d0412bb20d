"""What all kernels share: rows of a tensor, one step of the softmax, one step of its gradient.

Logits are kept in base 2: the factor log2(e) is part of the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def offsets(image, y, x, head, strides):
    """Offsets of rows in a map.

    From a base in 64 bits, because a batch of large maps passes 2^31 numbers; one image of it does
    not (`why_not_triton`), and 64 bits for every row would be a fifth of all instructions.
    """
    base = image.to(tl.int64) * strides[0] + head * strides[3]
    return base + (y * strides[1] + x * strides[2])


@triton.jit
def row_numbers(image, y, x, head, heads, H, W):
    """Row numbers in a contiguous (B, H, W, heads) tensor, in 64 bits as above."""
    return image.to(tl.int64) * (H * W * heads) + head + (y * W + x) * heads


@triton.jit
def load_rows(start, rows, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) numbers at 64-bit offsets `rows`; zero where not valid or past WIDTH."""
    lanes = tl.arange(0, BLOCK)
    mask = valid[:, None]
    if WIDTH != BLOCK:
        mask = mask & (lanes < WIDTH)[None, :]
    return tl.load(start + rows[:, None] + lanes[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(start, rows, valid, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`."""
    lanes = tl.arange(0, BLOCK)
    mask = valid[:, None] & (lanes < WIDTH)[None, :]
    tl.store(start + rows[:, None] + lanes[None, :], x.to(start.dtype.element_ty), mask=mask)


@triton.jit
def load_fill(start, head, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The constant key or value of a head."""
    lanes = tl.arange(0, BLOCK)
    return tl.load(start + head * WIDTH + lanes, mask=lanes < WIDTH, other=0.0)


@triton.jit
def product(a, b):
    """a b in float32; float32 inputs are not rounded."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def softmax_step(logits, values, total, top, out):
    """Take more keys into the sum `total` of weights under the maximum `top`, and into `out`."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    # Without any key so far the maximum is -inf, and -inf - -inf is not a number.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None] + product(weights.to(values.dtype), values)
    return total, new_top, out


@triton.jit
def finish(total, top, out):
    """Output and log-sum-exp (natural) of a row of queries."""
    base = tl.where(top == float("-inf"), 0.0, top)
    # Lanes that hold no query divide by nothing.
    total = tl.where(total == 0, 1.0, total)
    return out / total[:, None], (base + tl.log2(total)) / LOG2_E


@triton.jit
def rows_of_output(saved, numbers, valid, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Log-sum-exp, out . d_out - d_lse, and d_out of queries; saved is (out, lse, both gradients).

    Rows that are not valid get an infinite sum: their weights are zero.
    """
    out_map, lse_map, d_out_map, d_lse_map = saved
    lse = tl.load(lse_map + numbers, mask=valid, other=float("inf"))
    d_out = load_rows(d_out_map, numbers * DV, valid, DV, BLOCK_DV)
    out = load_rows(out_map, numbers * DV, valid, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    return lse, delta - tl.load(d_lse_map + numbers, mask=valid, other=0.0), d_out


@triton.jit
def rows_of_gradient(saved, numbers, valid, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The same from (lse, d_out, delta), once `delta` is stored."""
    lse_map, d_out_map, delta_map = saved
    lse = tl.load(lse_map + numbers, mask=valid, other=float("inf"))
    delta = tl.load(delta_map + numbers, mask=valid, other=0.0)
    return lse, delta, load_rows(d_out_map, numbers * DV, valid, DV, BLOCK_DV)


@triton.jit
def gradient_step(logits, lse, delta, d_out, values):
    """Weights, and the gradient of the logits, of queries (rows) and keys (columns)."""
    weights = tl.exp2(logits - lse[:, None] * LOG2_E)
    d_weights = product(d_out, tl.trans(values))
    return weights, weights * (d_weights - delta[:, None])
