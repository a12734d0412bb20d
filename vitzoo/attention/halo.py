"""Self-attention in blocks with a halo, on channels-first and channels-last maps."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import make_divisible, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from vitzoo.attention.layers import Linear, conv_channels_last, pad_to_multiple, plain_convolution
from vitzoo.ops import halo_attention, linear
from vitzoo.ops._derived import kept_views


class RelativeTables(nn.Module):
    """Embeddings of row and column offsets between a window's keys and a block's queries.

    Args:
        window_size: side of the key window; the tables have 2 * window_size - 1 rows.
        head_dim: width of a query head.
    """

    def __init__(self, window_size: int, head_dim: int, **factory: Any) -> None:
        super().__init__()
        shape = (2 * window_size - 1, head_dim)
        self.height_rel = nn.Parameter(torch.empty(shape, **factory))
        self.width_rel = nn.Parameter(torch.empty(shape, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of the attention's scale."""
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The tables (height, width)."""
        return self.height_rel, self.width_rel


@register_notrace_module
class HaloAttention(nn.Module):
    """HaloNet's attention on a (B, C, H, W) map of any size, without an output projection.

    Takes timm's arguments and holds timm's parameters, so that it stands in a ByobNet; its maps are
    channels-last in memory.

    Args:
        dim: channels in.
        dim_out: channels out, `dim` if None; a value head has dim_out / num_heads.
        feat_size: taken because timm's blocks pass it, and not used.
        stride: 1, or 2 to keep every second query per side.
        num_heads: heads; divides `dim_out`.
        dim_head: width of query and key heads; from `qk_ratio` if None.
        block_size: side of a block in tokens.
        halo_size: tokens that a window reaches beyond its block.
        qk_ratio: width of all query heads over `dim_out`, before rounding to a multiple of 8.
        qkv_bias: bias of the projections.
        avg_down: stride by averaging the output of full attention; also where 2 does not divide
            `block_size`.
        scale_pos_embed: scale the relative logits like the content.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        *,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if dim_out % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim_out} channels")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.num_heads = num_heads
        self.head_dim = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.scale_pos_embed = scale_pos_embed
        pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = 1 if pooled else stride
        qk_dim = num_heads * self.head_dim
        self.q = nn.Conv2d(dim, qk_dim, 1, stride=self.query_stride, bias=qkv_bias, **factory)
        # Head by head: the key's channels, then the value's.
        self.kv = nn.Conv2d(dim, qk_dim + dim_out, 1, bias=qkv_bias, **factory)
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, self.head_dim, **factory)
        self.pool = (
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normals: fan-in for the projections, the scale for the tables."""
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=projection.in_channels**-0.5)
        self.pos_embed.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride))."""
        q = self.q(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))
        kv = self.kv(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))
        k, v = kv[..., : self.head_dim], kv[..., self.head_dim :]
        height, width = self.pos_embed()
        if self.scale_pos_embed:
            height, width = height * self.head_dim**-0.5, width * self.head_dim**-0.5
        out = halo_attention(
            q,
            k,
            v,
            block_size=self.block_size,
            halo_size=self.halo_size,
            stride=self.query_stride,
            axial_bias=(height, width),
        )
        return self.pool(out.flatten(-2).permute(0, 3, 1, 2))


@register_notrace_module
class MaskedHaloAttention(nn.Module):
    """U-HaloNet's attention on a (B, H, W, C) map: keys beyond the border are masked.

    A map that the block does not divide is padded with zeros on the right and bottom before the
    projections; those tokens are keys like others, only the halo beyond them is masked.

    Args:
        dim: channels in and out.
        num_heads: heads; divides `dim`.
        block_size: side of a block in tokens.
        halo_size: tokens that a window reaches beyond its block.
    """

    def __init__(
        self, dim: int, num_heads: int, *, block_size: int = 7, halo_size: int = 3, **factory: Any
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.q = Linear(dim, dim, bias=False, **factory)
        # A 1x1 convolution in the published files; applied as a linear layer.
        self.kv = nn.Conv2d(dim, 2 * dim, 1, bias=False, **factory)
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, self.head_dim, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        H, W = x.shape[1:3]
        x = pad_to_multiple(x, self.block_size)
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        kv = self._project(x).unflatten(-1, (self.num_heads, 2, -1))
        out = halo_attention(
            q,
            kv[..., 0, :],
            kv[..., 1, :],
            block_size=self.block_size,
            halo_size=self.halo_size,
            axial_bias=self.pos_embed(),
            border="mask",
        )
        return self.proj(out.flatten(-2)[:, :H, :W])

    def _project(self, x: Tensor) -> Tensor:
        if not plain_convolution(self.kv):
            return conv_channels_last(x, self.kv)
        (weight,) = kept_views(lambda weight: (weight.flatten(1),), (self.kv.weight,))
        return linear(x, weight, None)
