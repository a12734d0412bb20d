"""Attention between channels: the softmax runs over the channels of a head, the sum over tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._half import widen_where_slow

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
        autocast = (
            torch.autocast(q.device.type, enabled=False)
            if torch.amp.is_autocast_available(q.device.type)
            else nullcontext()
        )
        with autocast:
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
