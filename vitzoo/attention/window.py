"""Self-attention inside the windows of a map."""

from __future__ import annotations

from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import Linear
from vitzoo.ops import window_attention


@register_notrace_module
class WindowAttention(nn.Module):
    """Multi-head attention in non-overlapping windows of a (B, H, W, C) map, any H and W.

    A map that the window does not divide is taken as padded with zeros on the right and bottom
    before the projection, unmasked: a padded token is the projection's bias (DaViT, Swin's dense
    versions, HiLo).

    Args:
        dim: channels in and out.
        num_heads: heads; divides `dim`.
        window_size: side of a window in tokens; owns no parameter, so it can change later.
        qkv_bias: bias of the projection.
        scale: factor on the logits, head_dim ** -0.5 if None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.window_size = window_size
        self.scale = scale
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = window_attention(
            q,
            k,
            v,
            window_size=self.window_size,
            fill=projected_zero(self.qkv.bias, k, v),
            scale=self.scale,
        )
        return self.proj(out.flatten(-2))


def projected_zero(qkv_bias: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value (heads, head_dim) that a joint projection [q | k | v] gives a zero token."""
    heads, k_dim, v_dim = k.shape[-2], k.shape[-1], v.shape[-1]
    if qkv_bias is None:
        return k.new_zeros(heads, k_dim), v.new_zeros(heads, v_dim)
    _, k_bias, v_bias = qkv_bias.split((heads * k_dim, heads * k_dim, heads * v_dim))
    return k_bias.unflatten(0, (heads, k_dim)), v_bias.unflatten(0, (heads, v_dim))
