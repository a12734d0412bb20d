"""LookupViT's block: gather, process the few, infuse, process the many lightly.

arXiv 2407.12753. There is no official code; the choices that the paper leaves open are listed in
`docs/decisions.md`. The lookup tokens are a map (B, H, W, C), the compressed ones (B, M, C).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import DropPath, register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import Linear, Mlp, add_mlp, untouched
from vitzoo.ops import attention, lookup_gather, lookup_infuse, lookup_similarity
from vitzoo.ops.lookup import folded_gather, folded_infuse, folded_similarity, folds

_NORM_EPS = 1e-6


@register_notrace_module
class Gather(nn.Module):
    """Cross-attention from compressed tokens (queries) to lookup tokens (keys and values)."""

    def __init__(self, dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_compressed = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.norm_lookup = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.q = Linear(dim, dim, **factory)
        self.kv = Linear(dim, 2 * dim, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C), (B, M, C) -> update of the compressed tokens, similarity."""
        q = self.q(self.norm_compressed(compressed)).unflatten(-1, (self.num_heads, -1))
        x = self.norm_lookup(lookup).flatten(1, 2)
        weight, bias = self.kv.weight, self.kv.bias
        if untouched(self.kv) and folds(x.shape[1], q.shape[1], self.num_heads, x, q, weight):
            (k_weight, v_weight), (k_bias, v_bias) = weight.chunk(2), bias.chunk(2)
            similarity = folded_similarity(q, x, k_weight, k_bias)
            return self.proj(folded_gather(similarity, x, v_weight, v_bias)), similarity
        kv = self.kv(x)
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        similarity = lookup_similarity(q, k)
        return self.proj(lookup_gather(similarity, v).flatten(2)), similarity


@register_notrace_module
class Infuse(nn.Module):
    """Values of the compressed tokens for every lookup token, by the similarity of `Gather`."""

    def __init__(self, dim: int, num_heads: int, *, reuse: str, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.reuse = reuse
        self.norm = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.v = Linear(dim, dim, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, lookup: Tensor, compressed: Tensor, similarity: Tensor) -> Tensor:
        """(B, H, W, C), (B, M, C), (B, heads, M, H * W) -> update (B, H, W, C)."""
        v = self.v(self.norm(compressed)).unflatten(-1, (self.num_heads, -1))
        weight, tokens = self.proj.weight, similarity.shape[-1]
        if untouched(self.proj) and folds(tokens, v.shape[1], self.num_heads, lookup, v, weight):
            update = folded_infuse(similarity, v, weight, self.proj.bias, reuse=self.reuse)
            return update.unflatten(1, lookup.shape[1:3])
        update = lookup_infuse(similarity, v, reuse=self.reuse).flatten(2)
        return self.proj(update).unflatten(1, lookup.shape[1:3])


@register_notrace_module
class SelfAttention(nn.Module):
    """ViT's self-attention, with timm's parameter names."""

    def __init__(self, dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, **factory)
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(attention(q, k, v).flatten(2))


class LookupBlock(nn.Module):
    """One block: (lookup map, compressed tokens) -> the same two.

    The compressed tokens gather from the map and pass a whole ViT block (`norm1`, `attn`, `norm2`,
    `mlp`: timm's names, so a ViT's weights fit); then they are infused into the map, which
    passes a narrow MLP and no attention of its own.

    Args:
        dim: width of both token sets.
        num_heads: heads of all three attentions.
        mlp_ratio: hidden width of the compressed tokens' MLP over `dim`.
        lookup_mlp_ratio: hidden width of the lookup tokens' MLP over `dim`.
        reuse: see `vitzoo.ops.lookup_infuse`.
        drop_path: stochastic depth of each of the five residuals.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or `reuse` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        reuse: str = "logits",
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if reuse not in ("logits", "weights"):
            raise ValueError(f"reuse must be 'logits' or 'weights', got {reuse!r}")
        norm = partial(nn.LayerNorm, dim, eps=_NORM_EPS, **factory)
        self.gather = Gather(dim, num_heads, **factory)
        self.norm1 = norm()
        self.attn = SelfAttention(dim, num_heads, **factory)
        self.norm2 = norm()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.infuse = Infuse(dim, num_heads, reuse=reuse, **factory)
        self.norm_lookup = norm()
        self.mlp_lookup = Mlp(dim, int(dim * lookup_mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C), (B, M, C) -> the same shapes."""
        update, similarity = self.gather(lookup, compressed)
        compressed = compressed + self.drop_path(update)
        compressed = compressed + self.drop_path(self.attn(self.norm1(compressed)))
        compressed = add_mlp(compressed, self.norm2, self.mlp, self.drop_path)
        lookup = lookup + self.drop_path(self.infuse(lookup, compressed, similarity))
        lookup = add_mlp(lookup, self.norm_lookup, self.mlp_lookup, self.drop_path)
        return lookup, compressed
