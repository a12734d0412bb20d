"""Self-attention inside groups of points."""

from __future__ import annotations

from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import Linear
from vitzoo.ops.grouped import grouped_attention


@register_notrace_module
class GroupAttention(nn.Module):
    """Multi-head attention inside groups of consecutive points of a frame.

    The position is added to what queries and keys are made of, not to the values.

    Args:
        dim: channels in and out.
        num_heads: heads; divides `dim`.
        group_size: points of a group; owns no parameter, so it can change later.
    """

    def __init__(self, dim: int, num_heads: int, group_size: int, **factory: Any) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.group_size = group_size
        self.qk = Linear(dim, 2 * dim, **factory)
        self.v = Linear(dim, dim, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor, position: Tensor, frame_offsets: Tensor) -> Tensor:
        """Points and their position encoding (P, C), frame offsets (B + 1,) -> (P, C)."""
        q, k = self.qk(x + position).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        out = grouped_attention(q, k, v, group_size=self.group_size, frame_offsets=frame_offsets)
        return self.proj(out.flatten(-2))
