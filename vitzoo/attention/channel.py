"""Attention between the channels of a head, linear in the number of tokens."""

from __future__ import annotations

from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import Linear
from vitzoo.ops import channel_attention


@register_notrace_module
class ChannelAttention(nn.Module):
    """DaViT's channel attention on a (B, H, W, C) map (arXiv 2204.03645, section 3.2).

    Args:
        dim: channels in and out.
        num_heads: channel groups; divides `dim`.
        qkv_bias: bias of the projection.
        mixes: what the channel map mixes. `query` is DaViT: the map comes from k and v and is
            scaled by head_dim ** -0.5. `value` is Florence-2's: from q and k, scaled by the number
            of tokens ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        mixes: str = "query",
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        if mixes not in ("query", "value"):
            raise ValueError(f"mixes must be 'query' or 'value', got {mixes!r}")
        self.num_heads = num_heads
        self.mixes = mixes
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(2)
        if self.mixes == "query":
            out = channel_attention(k, v, q, axis_scale="head_dim")
        else:
            out = channel_attention(q, k, v, axis_scale="tokens")
        return self.proj(out.flatten(-2)).view(x.shape)
