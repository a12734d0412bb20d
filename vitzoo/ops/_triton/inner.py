"""What all kernels share: rows of a tensor, one step of the softmax, one step of its gradient.

Logits are kept in base 2: the factor log2(e) is part of the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
def gradient_step(logits, lse, delta, d_out, values):
    """Weights, and the gradient of the logits, of queries (rows) and keys (columns)."""
    weights = tl.exp2(logits - lse[:, None] * LOG2_E)
    d_weights = product(d_out, tl.trans(values))
    return weights, weights * (d_weights - delta[:, None])
