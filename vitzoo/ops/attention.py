"""Scaled dot-product attention on sequences, with an additive bias or a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._half import slow_products, widened
from vitzoo.ops._onednn import needs_derivatives, records_gradient
from vitzoo.ops._sides import exporting
from vitzoo.ops.attention_weights import attention_weights_reference

# Up to so many keys, a training step is faster with products and a softmax that keeps its result.
_FEW_KEYS = 64
# Blocks along the second and third axis of a CUDA grid, which count the batch.
_LARGEST_BATCH = 65_535


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, written out."""
    weights = attention_weights_reference(q, k, bias=bias, mask=mask, scale=scale)
    # A bias in float32 keeps the weights of halves in it.
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention; written out where its backward on the CPU is slow, and
    for the derivatives that it lacks."""
    if needs_derivatives():
        return attention_reference(q, k, v, bias=bias, mask=mask, scale=scale)
    if (
        q.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and records_gradient(q, k, v, bias)
    ):
        if slow_products(q):
            return widened(attention_portable, q, k, v, bias=bias, mask=mask, scale=scale)
        learned_bias = bias is not None and bias.requires_grad
        if q.dtype != torch.float32 or k.shape[1] <= _FEW_KEYS or learned_bias:
            return attention_reference(q, k, v, bias=bias, mask=mask, scale=scale)
    # A graph is to hold for any batch.
    if q.device.type == "cuda" and not exporting() and q.shape[0] > _LARGEST_BATCH:
        return _in_pieces(q, k, v, bias, mask, scale)
    attend = bias
    on_cpu = q.device.type == "cpu" and q.dtype == torch.float32
    # Graph formats know no bits.
    if mask is not None and bias is None and on_cpu and not exporting():
        attend = _minus_infinity(mask)
    elif mask is not None:
        attend = mask if bias is None else bias.masked_fill(~mask, float("-inf"))
    if attend is not None and attend.dim() < 4:
        # The fused CPU kernel turns down masks of three dimensions.
        attend = attend[(None,) * (4 - attend.dim())]
    if attend is not None and attend.dtype != torch.bool:
        attend = attend.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=attend, scale=scale
    )
    return out.transpose(1, 2)


def _in_pieces(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float | None
) -> Tensor:
    """A batch of windows of large images, over what torch's CUDA kernels can number."""
    out = []
    for start in range(0, q.shape[0], _LARGEST_BATCH):
        piece = slice(start, start + _LARGEST_BATCH)
        of_pairs = {
            name: x[piece] if x is not None and x.dim() == 4 and x.shape[0] > 1 else x
            for name, x in (("bias", bias), ("mask", mask))
        }
        out.append(attention_portable(q[piece], k[piece], v[piece], **of_pairs, scale=scale))
    return torch.cat(out)


def _minus_infinity(mask: Tensor) -> Tensor:
    """0 where the mask is True, else -inf, in float32.

    By the bits of -inf: torch's own conversion branches at every element and takes three times as
    long, on the CPU as long as the attention itself.
    """
    bits = mask.view(torch.int8).sub(1).to(torch.int32).bitwise_and_(_BITS_OF_MINUS_INFINITY)
    return bits.view(torch.float32)


_BITS_OF_MINUS_INFINITY = -(1 << 23)

ATTENTION = Operator(
    "attention",
    [Backend("portable", attention_portable), Backend("reference", attention_reference)],
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention of every query over every key.

    Args:
        q: queries (B, N, heads, head_dim).
        k: keys (B, M, heads, head_dim).
        v: values (B, M, heads, value_dim).
        bias: added to the scaled logits, broadcastable to (B, heads, N, M).
        mask: boolean, True where a key takes part, broadcastable to (B, heads, N, M). A query
            without any key gives zeros.
        scale: factor on q k^T; head_dim ** -0.5 if None.
        backend: `auto`, `portable` or `reference`.

    Returns:
        (B, N, heads, value_dim).
    """
    return ATTENTION(q, k, v, bias=bias, mask=mask, scale=scale, backend=backend)
