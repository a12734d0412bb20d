"""Bi-level routing attention and the full attention that goes with it (arXiv 2303.08810)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.choices import make_choice
from vitzoo.attention.layers import Linear, conv_channels_last, untouched
from vitzoo.ops import attention, linear, routed_attention
from vitzoo.ops._derived import kept_views
from vitzoo.ops._onednn import records_gradient, why_not_onednn
from vitzoo.ops._sides import crop, larger, pieces, smaller, symbolic

Pool = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]
# Up to so many tokens a region's q and k are averaged; of a larger one the input is, and projected.
_FEW_TOKENS = 16


def _local_conv(dim: int, kernel_size: int, **factory: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory)


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Attention from each region of a (B, H, W, C) map to its best-matching regions; any H and W.

    The map is cut into a fixed number of regions, whose size follows the input. The mean query of a
    region is compared with the mean keys of all; the tokens of its `top_k` best are the keys of its
    queries, and a depthwise convolution of v is added. Logits are scaled by the whole query width,
    qk_dim ** -0.5, as the published weights were trained.

    A map that the regions do not divide is padded on the right and bottom, unmasked. `pad_after`
    says where: False pads the input with zeros, so that a padded token is the projection's bias and
    counts in the region means; True pads q, k and v with zeros, leaves padding out of the means
    and out of the convolution, and takes regions of floor(H / n_win) x floor(W / n_win) tokens, as
    many as it needs.

    Args:
        dim: channels in and out.
        num_heads: heads; divides `dim` and `qk_dim`.
        n_win: regions per side; owns no parameter, so it can change later.
        top_k: regions that a query sees.
        qk_dim: channels of q and k; `dim` if None.
        lepe_kernel: side of the convolution on v.
        kv_pool: pooling of each region's keys and values: to `kv_size` tokens a side (`ada_*`), or
            with kernel and stride `kv_size`.
        kv_size: see `kv_pool`.
        soft_routing: multiply keys and values by the softmax of the chosen regions' scores.
        diff_routing: let gradients through the scores.
        param_routing: a linear layer on mean queries and keys; needs `diff_routing`.
        pad_after: see above.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        n_win: int = 7,
        top_k: int = 4,
        qk_dim: int | None = None,
        lepe_kernel: int = 5,
        kv_pool: Pool = "identity",
        kv_size: int = 1,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        pad_after: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.qk_dim = qk_dim or dim
        if dim % num_heads or self.qk_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} and {self.qk_dim} channels")
        if not 1 <= top_k <= n_win**2:
            raise ValueError(f"top_k must be 1 to {n_win**2} (n_win squared), got {top_k}")
        if diff_routing and not soft_routing:
            raise ValueError("diff_routing has an effect with soft_routing only")
        if param_routing and not diff_routing:
            raise ValueError("param_routing trains through diff_routing only")
        self.num_heads = num_heads
        self.n_win = n_win
        self.top_k = top_k
        self.scale = self.qk_dim**-0.5
        self.soft_routing = soft_routing
        self.diff_routing = diff_routing
        self.pad_after = pad_after
        self.pool = _region_pool(kv_pool, kv_size)
        self.qkv = Linear(dim, 2 * self.qk_dim + dim, **factory)
        self.router = Linear(self.qk_dim, self.qk_dim, **factory) if param_routing else None
        self.lepe = _local_conv(dim, lepe_kernel, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        H, W = x.shape[1:3]
        (rows, height), (cols, width) = self._cut(H), self._cut(W)
        bottom, right = rows * height - H, cols * width - W
        # Not `unknown`: regions ask for numbers anyway, and torch.compile took longer without
        # branches (docs/decisions.md, "Operators").
        pads = (0, 0, 0, right, 0, bottom) if symbolic(H, W) or bottom or right else None
        if pads and not self.pad_after:
            x = F.pad(x, pads)
        qk, v_map = self._project(x)
        regions, weights = self.route(x, qk, (height, width))
        v = v_map
        if pads and self.pad_after:
            qk, v = F.pad(qk, pads), F.pad(v, pads)
        grid = (rows, cols)
        q, k = qk.chunk(2, dim=-1)
        k, v = self._pool_regions(k, grid), self._pool_regions(v, grid)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        out = routed_attention(
            q, k, v, regions, region_grid=grid, weights=weights, scale=self.scale
        )
        out = out.flatten(-2)
        if pads is None:
            return self.proj(conv_channels_last(v_map, self.lepe, add=out))
        local = conv_channels_last(v_map, self.lepe)
        return self.proj(crop(out, 0, H, 0, W) + crop(local, 0, H, 0, W))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k side by side, and v; in inference on a CPU v has memory of its own.

        The convolution would copy a part of a joint projection.
        """
        weight = self.qkv.weight
        apart = untouched(self.qkv) and not records_gradient(x, weight)
        if not apart or why_not_onednn(x, weight) is not None:
            return self.qkv(x).split((2 * self.qk_dim, x.shape[-1]), dim=-1)
        qk, v, qk_bias, v_bias = self._parts()
        return linear(x, qk, qk_bias), linear(x, v, v_bias)

    def _parts(self) -> tuple[Tensor, ...]:
        """The projection's weight for q and k, for v, and the two biases."""
        split = 2 * self.qk_dim
        return kept_views(
            lambda weight, bias: (weight[:split], weight[split:], bias[:split], bias[split:]),
            (self.qkv.weight, self.qkv.bias),
            split,
        )

    def route(self, x: Tensor, qk: Tensor, region: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Numbers (B, regions, top_k) of the chosen regions, and their weights in soft routing.

        Args:
            x: (B, H, W, C), the input of the projection.
            qk: (B, H, W, 2 * qk_dim), what the projection made of it.
            region: height and width of a region in tokens.
        """
        with torch.set_grad_enabled(self.diff_routing and torch.is_grad_enabled()):
            q, k = self._region_qk(x, qk, region).chunk(2, dim=-1)
            if self.router is not None:
                q, k = self.router(q), self.router(k)
            scores = (q * self.scale) @ k.transpose(1, 2)
            # A map smaller than n_win has fewer regions where padding comes after the projection.
            top_k = smaller(self.top_k, scores.shape[-1])
            regions = make_choice(lambda: scores.topk(top_k, dim=-1).indices)
            if not self.soft_routing:
                return regions, None
            return regions, scores.gather(-1, regions).softmax(dim=-1)

    def _region_qk(self, x: Tensor, qk: Tensor, region: tuple[int, int]) -> Tensor:
        """Mean q and k of the regions, side by side: (B, regions, 2 * qk_dim)."""
        if not symbolic(*region) and region[0] * region[1] <= _FEW_TOKENS:
            return _region_means(qk, region).flatten(1, 2)
        # The mean of a projection is the projection of the mean, at a fraction of the reading.
        means = _region_means(x, region).flatten(1, 2)
        if not untouched(self.qkv):
            return self.qkv(means)[..., : 2 * self.qk_dim]
        weight, _, bias, _ = self._parts()
        return linear(means, weight, bias)

    def _cut(self, length: int) -> tuple[int, int]:
        """Number of regions along a side, and tokens of each."""
        if self.pad_after:
            tokens = larger(1, length // self.n_win)
            return pieces(length, tokens), tokens
        return self.n_win, pieces(length, self.n_win)

    def _pool_regions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, H, W, C) -> (B, rows * h', cols * w', C), each region pooled by itself."""
        if self.pool is None:
            return x
        B, H, W, C = x.shape
        rows, cols = grid
        x = x.reshape(B, rows, H // rows, cols, W // cols, C).permute(0, 1, 3, 5, 2, 4)
        x = self.pool(x.flatten(0, 2)).unflatten(0, (B, rows, cols))
        return x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


def _region_means(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Means of x (B, H, W, C) over regions, (B, rows, cols, C); the last ones may be cut off."""
    if not symbolic(*region):
        means = F.avg_pool2d(x.permute(0, 3, 1, 2), region, ceil_mode=True, count_include_pad=False)
        return means.permute(0, 2, 3, 1)
    # A pooling's window is a number in a graph; a sum's is not.
    B, H, W, C = x.shape
    (rows, height), (cols, width) = (
        (pieces(n, size), size) for n, size in zip((H, W), region, strict=True)
    )
    x = F.pad(x, (0, 0, 0, cols * width - W, 0, rows * height - H))
    sums = x.reshape(B, rows, height, cols, width, C).sum((2, 4))
    down, across = (
        (length - torch.arange(count, device=x.device) * size).clamp(max=size).to(x.dtype)
        for length, count, size in ((H, rows, height), (W, cols, width))
    )
    return sums / (down[:, None] * across)[..., None]


def _region_pool(kind: Pool, size: int) -> nn.Module | None:
    pools: dict[str, Any] = {
        "ada_avgpool": nn.AdaptiveAvgPool2d,
        "ada_maxpool": nn.AdaptiveMaxPool2d,
        "avgpool": nn.AvgPool2d,
        "maxpool": nn.MaxPool2d,
    }
    if kind == "identity" or (kind in ("avgpool", "maxpool") and size == 1):
        return None
    if kind not in pools:
        raise ValueError(f"kv_pool must be one of identity, {', '.join(pools)}, got {kind!r}")
    return pools[kind](size)


@register_notrace_module
class AttentionLePE(nn.Module):
    """Full attention over a (B, H, W, C) map plus a depthwise convolution; any H and W.

    Args:
        dim: channels in and out.
        num_heads: heads; divides `dim`.
        lepe_kernel: side of the convolution.
        lepe_on: what is convolved, the layer's `input` or its `value`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        lepe_kernel: int = 5,
        lepe_on: Literal["input", "value"] = "input",
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        if lepe_on not in ("input", "value"):
            raise ValueError(f"lepe_on must be 'input' or 'value', got {lepe_on!r}")
        self.num_heads = num_heads
        self.lepe_on = lepe_on
        self.qkv = Linear(dim, 3 * dim, bias=False, **factory)
        self.lepe = _local_conv(dim, lepe_kernel, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        qkv = self.qkv(x)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        local = x if self.lepe_on == "input" else qkv.chunk(3, dim=-1)[2]
        out = attention(q, k, v).reshape(x.shape)
        return self.proj(conv_channels_last(local, self.lepe, add=out))
