"""Self-attention over the neighborhood of every position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import Linear
from vitzoo.ops._sides import symbolic
from vitzoo.ops.neighborhood import neighborhood_attention
from vitzoo.ops.neighborhood.symbolic import neighborhood_attention_symbolic


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention with a relative position bias, any H and W (NAT, DiNAT).

    A side shorter than kernel_size * dilation is padded with zeros on the right or bottom before
    the projection, unmasked, as natten did up to 0.15, where the published models were trained.

    Args:
        dim: channels in and out.
        num_heads: heads; divides `dim`.
        kernel_size: keys per axis, odd.
        dilation: distance between neighboring keys; owns no parameter, so it can change later.
        qkv_bias: bias of the projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        *,
        dilation: int = 1,
        qkv_bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        rows = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, rows, rows, **factory))
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        H, W = x.shape[1:3]
        if symbolic(H, W):
            return self.proj(self._of_any_size(x).flatten(-2))
        reach = self.kernel_size * self.dilation
        bottom, right = max(reach - H, 0), max(reach - W, 0)
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = neighborhood_attention(
            q, k, v, kernel_size=self.kernel_size, dilation=self.dilation, bias=self.rpb
        )
        if bottom or right:
            out = out[:, :H, :W]
        return self.proj(out.flatten(-2))

    def _of_any_size(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, heads, head_dim), under export with unknown sides."""
        H, W = x.shape[1:3]
        # One row and one column stand for all padding.
        q, k, v = (
            self.qkv(F.pad(x, (0, 0, 0, 1, 0, 1))).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        )
        return neighborhood_attention_symbolic(
            q,
            k,
            v,
            sides=(H, W),
            kernel_size=(self.kernel_size, self.kernel_size),
            dilation=(self.dilation, self.dilation),
            bias=self.rpb,
        )
