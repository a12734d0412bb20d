"""Attention between channels: the softmax runs over the channels of a head, the sum over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._folding import may_fold
from vitzoo.ops._half import widen_where_slow, without_autocast

AxisScale = Literal["head_dim", "tokens"]


def _scale(q: Tensor, axis_scale: AxisScale, scale: float | None) -> float:
    if scale is not None:
        return scale
    if axis_scale not in ("head_dim", "tokens"):
        raise ValueError(f"axis_scale must be 'head_dim' or 'tokens', got {axis_scale!r}")
    return (q.shape[-1] if axis_scale == "head_dim" else q.shape[1]) ** -0.5


def channel_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, axis_scale: AxisScale, scale: float | None = None
) -> Tensor:
    """The definition: one einsum for the channel map, one to mix the values."""
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bnhi,bnhj->bhij", q.to(exact), k.to(exact))
    logits = logits * _scale(q, axis_scale, scale)
    return torch.einsum("bhij,bnhj->bnhi", logits.softmax(-1).to(v.dtype), v)


@widen_where_slow
def channel_attention_portable(
    q: Tensor, k: Tensor, v: Tensor, *, axis_scale: AxisScale, scale: float | None = None
) -> Tensor:
    """Two batched products per head."""
    scale = _scale(q, axis_scale, scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.dtype == torch.float16:
        # The sum runs over all tokens and is not divided by their number: it can pass 65504.
        with without_autocast(q):
            logits = (q.float() * scale).transpose(-2, -1) @ k.float()
    else:
        logits = (q * scale).transpose(-2, -1) @ k
    weights = logits.softmax(-1).to(v.dtype)
    return (v @ weights.transpose(-2, -1)).transpose(1, 2)


CHANNEL_ATTENTION = Operator(
    "channel_attention",
    [
        Backend("portable", channel_attention_portable),
        Backend("reference", channel_attention_reference),
    ],
)


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis_scale: AxisScale,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[n, i] = sum_j softmax_j(scale * sum_m q[m, i] k[m, j]) v[n, j], head by head.

    The cost is linear in the number of tokens (DaViT, arXiv 2204.03645, section 3.2). DaViT's
    checkpoints build the map from k and v and mix q with it: call `channel_attention(k, v, q)`.

    Args:
        q, k, v: (B, N, heads, head_dim), N all tokens of an image.
        axis_scale: which length gives the scale, `head_dim` (DaViT) or `tokens` (Florence-2);
            its power -1/2 is taken.
        scale: overrides `axis_scale`.
        backend: `auto`, `portable` or `reference`.

    Returns:
        (B, N, heads, head_dim).

    Raises:
        ValueError: `axis_scale` is neither of the two words.
    """
    return CHANNEL_ATTENTION(q, k, v, axis_scale=axis_scale, scale=scale, backend=backend)


def channel_attention_folds(x: Tensor, heads: int, *parameters: Tensor) -> bool:
    """Whether `folded_channel_attention` may stand for the layer on x (B, H, W, C), and pays."""
    if not may_fold(("channel_attention",), x, *parameters):
        return False
    tokens, width = x.shape[1] * x.shape[2], x.shape[3]
    plain = tokens * (4 * width + 2 * width // heads)
    folded = 2 * (tokens * width + width * width + width * width // heads)
    # Products of few rows run slower: it has to be a clear gain.
    return 4 * folded <= 3 * plain


def folded_channel_attention(
    x: Tensor,
    projections: Sequence[tuple[Tensor, Tensor]],
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    heads: int,
    axis_scale: AxisScale,
) -> Tensor:
    """`channel_attention` with the projections before and after it, most of it on C x C matrices.

    The channel map needs sums over tokens of products of two projections, so it follows from the
    sum of x x^T alone; and mixing channels, being linear in a token, is one matrix together with
    the projections around it. Two products per token are left of four, and none is C x 3 C wide.

    Args:
        x: (B, N, C).
        projections: weight (C, C) and bias (C,) of q, k and v as `channel_attention` names them.
        out_weight, out_bias: (C, C) and (C,), applied to the heads side by side.
        heads: of the attention.
        axis_scale: as for `channel_attention`.

    Returns:
        (B, N, C).
    """
    B, N, C = x.shape
    d = C // heads
    queries, keys, (v_weight, v_bias) = projections
    mean = x.mean(1)
    # Around the mean the sums are smaller, and so is what rounding takes from them. What follows
    # subtracts large numbers, but has few: it is taken in double precision.
    centred = x - mean[:, None]
    spread, mean = (centred.transpose(1, 2) @ centred).double(), mean.double()
    q_weight, q_bias = (parameter.double() for parameter in queries)
    k_weight, k_bias = (parameter.double() for parameter in keys)
    logits = q_weight.unflatten(0, (heads, d)) @ _per_head(F.linear(spread, k_weight), heads)
    q_mean, k_mean = F.linear(mean, q_weight, q_bias), F.linear(mean, k_weight, k_bias)
    logits += N * q_mean.view(B, heads, d, 1) * k_mean.view(B, heads, 1, d)
    scale = (d if axis_scale == "head_dim" else N) ** -0.5
    weights = (logits * scale).softmax(-1).to(x.dtype)
    mixed = (weights @ v_weight.unflatten(0, (heads, d))).flatten(1, 2)
    mixed_bias = (weights @ v_bias.view(heads, d, 1)).flatten(1)
    bias = F.linear(mixed_bias, out_weight, out_bias)
    return torch.baddbmm(bias[:, None], x, (out_weight @ mixed).transpose(1, 2))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(B, n, heads * d) -> (B, heads, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
