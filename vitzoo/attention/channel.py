"""Attention between the channels of a head, linear in the number of tokens."""

from __future__ import annotations

from typing import Any, TypeVar

from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import Linear, untouched
from vitzoo.ops import channel_attention
from vitzoo.ops.channel import AxisScale, channel_attention_folds, folded_channel_attention

T = TypeVar("T")


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
        axis_scale: AxisScale = "head_dim" if self.mixes == "query" else "tokens"
        if self._folds(x):
            weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
            out = folded_channel_attention(
                x.flatten(1, 2),
                self._in_order(*zip(weights, biases, strict=True)),
                self.proj.weight,
                self.proj.bias,
                heads=self.num_heads,
                axis_scale=axis_scale,
            )
            return out.view(x.shape)
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        out = channel_attention(*self._in_order(*qkv.unbind(2)), axis_scale=axis_scale)
        return self.proj(out.flatten(-2)).view(x.shape)

    def _folds(self, x: Tensor) -> bool:
        qkv, proj = self.qkv, self.proj
        if not (untouched(qkv) and untouched(proj)) or qkv.bias is None or proj.bias is None:
            return False
        parameters = (qkv.weight, qkv.bias, proj.weight, proj.bias)
        return channel_attention_folds(x, self.num_heads, *parameters)

    def _in_order(self, q: T, k: T, v: T) -> tuple[T, T, T]:
        """What makes the channel map, twice, and what it mixes."""
        return (k, v, q) if self.mixes == "query" else (q, k, v)
