"""The weights of attention by themselves, for losses, token scores and inspection."""

from __future__ import annotations

from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator


def attention_weights_reference(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias), written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * scale
    if bias is not None:
        logits = logits + bias
    if mask is None:
        return logits.softmax(dim=-1)
    # A row of nothing but -inf has NaN weights and gradients: it is left whole and cleared after.
    some = mask.any(-1, keepdim=True)
    weights = logits.masked_fill(~mask & some, float("-inf")).softmax(dim=-1)
    return weights.masked_fill(~some, 0.0)


ATTENTION_WEIGHTS = Operator(
    "attention_weights", [Backend("reference", attention_weights_reference)]
)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """What `attention` weighs the values with.

    Args:
        q: queries (B, N, heads, head_dim).
        k: keys (B, M, heads, head_dim).
        bias: added to the scaled logits, broadcastable to (B, heads, N, M).
        mask: boolean, True where a key takes part, broadcastable to (B, heads, N, M). The weights
            of a query without any key are zeros.
        scale: factor on q k^T; head_dim ** -0.5 if None.
        backend: `auto` or `reference`.

    Returns:
        (B, heads, N, M).
    """
    return ATTENTION_WEIGHTS(q, k, bias=bias, mask=mask, scale=scale, backend=backend)
