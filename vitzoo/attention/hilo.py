"""HiLo attention: local windows for high frequencies, pooled keys for low ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import Linear, pad_to_multiple
from vitzoo.attention.window import projected_zero
from vitzoo.ops import attention, window_attention


@register_notrace_module
class HiLo(nn.Module):
    """HiLo attention on a (B, H, W, C) map of any H and W (arXiv 2205.13213, section 4.1).

    The first heads (Hi-Fi) attend inside windows; the others (Lo-Fi) attend from every token to the
    windows' averages. A map that the window does not divide is taken as padded with zeros on the
    right and bottom, unmasked: for Hi-Fi a padded token is the projection's bias, for Lo-Fi the
    averages of border windows shrink towards zero.

    Args:
        dim: channels in and out.
        num_heads: heads of both parts together; divides `dim`.
        window_size: side of a window in tokens; with 1 all heads are Lo-Fi, which is then ordinary
            attention. Owns no parameter, so it can change later, to and from any size above 1.
        alpha: share of Lo-Fi heads, int(num_heads * alpha) of them.
        qkv_bias: biases of the projections.
        scale: factor on the logits, head_dim ** -0.5 if None.

    Raises:
        ValueError: the heads do not divide the channels, alpha is not in [0, 1], or the window has
            no tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 2,
        *,
        alpha: float = 0.9,
        qkv_bias: bool = True,
        scale: float | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.window_size = window_size
        self.scale = scale
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low_dim = dim // num_heads * self.low_heads
        high_dim = dim - low_dim
        if self.low_heads:
            self.l_q = Linear(dim, low_dim, bias=qkv_bias, **factory)
            self.l_kv = Linear(dim, 2 * low_dim, bias=qkv_bias, **factory)
            self.l_proj = Linear(low_dim, low_dim, **factory)
        if self.high_heads:
            self.h_qkv = Linear(dim, 3 * high_dim, bias=qkv_bias, **factory)
            self.h_proj = Linear(high_dim, high_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), Hi-Fi channels before Lo-Fi ones."""
        if not self.high_heads:
            return self._low(x)
        if not self.low_heads:
            return self._high(x)
        return torch.cat((self._high(x), self._low(x)), dim=-1)

    def _high(self, x: Tensor) -> Tensor:
        q, k, v = self.h_qkv(x).unflatten(-1, (3, self.high_heads, -1)).unbind(-3)
        out = window_attention(
            q,
            k,
            v,
            window_size=self.window_size,
            fill=projected_zero(self.h_qkv.bias, k, v),
            scale=self.scale,
        )
        return self.h_proj(out.flatten(-2))

    def _low(self, x: Tensor) -> Tensor:
        q = self.l_q(x).flatten(1, 2).unflatten(-1, (self.low_heads, -1))
        pooled = _window_means(x, self.window_size)
        k, v = self.l_kv(pooled).flatten(1, 2).unflatten(-1, (2, self.low_heads, -1)).unbind(2)
        out = attention(q, k, v, scale=self.scale)
        return self.l_proj(out.flatten(-2)).unflatten(1, x.shape[1:3])


def _window_means(x: Tensor, window_size: int) -> Tensor:
    """Averages over windows of a (B, H, W, C) map; zeros outside count as tokens."""
    if window_size == 1:
        return x
    x = pad_to_multiple(x, window_size)
    return F.avg_pool2d(x.permute(0, 3, 1, 2), window_size).permute(0, 2, 3, 1)
