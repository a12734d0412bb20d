"""Self-attention over the connections that a predictor chooses (Sparsifiner).

Tokens are (B, N, C): the class token, then the patches of a grid in raster order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.attention.choices import make_choice
from vitzoo.attention.connectivity import (
    Connectivity,
    ConnectivityPredictor,
    Grid,
    Sparsity,
    clear_dead,
)
from vitzoo.attention.layers import Linear, Mlp
from vitzoo.ops import attention, attention_weights, topk_mask
from vitzoo.ops._sides import symbolic


class AttentionRecord(NamedTuple):
    """An attention block's output and all that losses and statistics read.

    `connectivity` is None where there is no predictor; `masked_attention` holds the weights that
    were used and `attention` those without a mask, both (B, heads, N, N); `live` (B, N-1) marks the
    patch tokens left after the block, None for all.
    """

    out: Tensor
    connectivity: Connectivity | None
    masked_attention: Tensor
    attention: Tensor
    live: Tensor | None


@register_notrace_module
class SparseAttention(nn.Module):
    """Self-attention over predicted connections; the class token attends to every token.

    Args:
        dim: channels in and out.
        num_heads: heads; divides `dim`.
        grid_size: patch grid (rows, columns) of the trained size.
        sparsity: which connections are kept; None keeps all and builds no predictor.
        qkv_bias: bias of the projection.
        proj_drop: dropout after the output projection.

    Attributes:
        reconstruct: train the predictor to reconstruct dense attention: in train mode the mask is
            not applied and the predictor uses its signed basis.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Grid,
        *,
        sparsity: Sparsity | None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.reconstruct = False
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mask_predictor = None
        if sparsity is not None:
            self.mask_predictor = ConnectivityPredictor(
                dim, num_heads, grid_size, sparsity=sparsity, **factory
            )

    def forward(self, x: Tensor, resize: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C) for all tokens; `resize` as `token_resize` returns it."""
        q, k, v = self._qkv(x)
        mask = None
        if self.mask_predictor is not None and not self._reconstructing:
            # The mask is detached: no gradient would reach the predictor.
            with torch.no_grad():
                mask = self.mask_predictor(q, k, resize=resize).mask
        return self._project(attention(q, k, v, mask=mask))

    def remaining(
        self,
        x: Tensor,
        resize: Tensor | None,
        kept: Tensor,
        *,
        removed: int,
        keep: int | None,
        bounded: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention among the tokens that pruning left; `detailed` says the same with a mask.

        The class token also sees the removed ones, whose keys and values count as zero there: one
        key of zeros stands for all of them, its logit raised by the logarithm of their number.

        Args:
            x: class token and the patch tokens that are left (B, 1 + n, C).
            resize: as `token_resize` returns it.
            kept: their positions (B, n), ascending.
            removed: how many patch tokens are gone.
            keep: how many of them stay after this block; None for all.
            bounded: an earlier block prunes, so that the tokens left bound the budget.

        Returns:
            (B, 1 + n, C), and the indices (B, keep) into the n tokens of those that stay, ascending
            (None for all).
        """
        if self.mask_predictor is None:
            raise ValueError("pruned tokens need a predictor")
        q, k, v = self._qkv(x)
        n = kept.shape[1]
        with torch.no_grad():
            left = n if bounded else None
            mask = self.mask_predictor(q, k, resize=resize, kept=kept, left=left).mask
        bias = None
        if symbolic(removed) or removed:
            # The stand-in is the last key; only the class row is connected to it.
            mask = F.pad(mask, (0, 1))
            mask[:, :, 0, -1] = True
            k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v))
            # Not math.log, which would fix an unknown size in the graph. None removed gives -inf.
            exact = torch.promote_types(q.dtype, torch.float32)
            logit = torch.scalar_tensor(removed, dtype=exact, device=q.device).log()
            bias = torch.cat([q.new_zeros(n + 1), logit[None].to(q.dtype)])
        out = self._project(attention(q, k, v, bias=bias, mask=mask))
        if keep is None:
            return out, None
        weights = attention_weights(q[:, :1], k, bias=bias)[:, :, 0, 1 : n + 1]
        token_score = weights.detach().mean(1)
        stay = make_choice(lambda: token_score.topk(keep, sorted=False).indices.sort().values)
        return out, stay

    def detailed(
        self,
        x: Tensor,
        resize: Tensor | None = None,
        live: Tensor | None = None,
        *,
        left: int | None = None,
        keep: int | None = None,
    ) -> AttentionRecord:
        """Attention with masks in place of removed tokens, and everything computed on the way.

        Args:
            x: (B, N, C), all tokens.
            resize: as `token_resize` returns it.
            live: mask (B, N-1) of the patch tokens that pruning left.
            left: their number in each image; None without pruning.
            keep: how many of them stay after this block; None for all.
        """
        q, k, v = self._qkv(x)
        if live is not None:
            q, k, v = (clear_dead(t, live) for t in (q, k, v))
        found, mask = None, None
        if self.mask_predictor is not None:
            signed = self._reconstructing
            found = self.mask_predictor(q, k, resize=resize, live=live, left=left, signed=signed)
            mask = None if signed else found.mask
        dense = attention_weights(q, k)
        used = dense if mask is None else attention_weights(q, k, mask=mask)
        out = self._project(attention(q, k, v, mask=mask))
        if keep is not None:
            token_score = used[:, :, 0, 1:].mean(1)
            if live is not None:
                token_score = token_score.masked_fill(~live, float("-inf"))
            live = make_choice(lambda: topk_mask(token_score, keep))
        return AttentionRecord(out, found, used, dense, live)

    @property
    def _reconstructing(self) -> bool:
        return self.reconstruct and self.training

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def _project(self, x: Tensor) -> Tensor:
        """(B, N, heads, head_dim) -> (B, N, C)."""
        return self.proj_drop(self.proj(x.flatten(2)))


class SparseBlock(nn.Module):
    """Attention and MLP, each behind a norm and with its residual divided by `skip_scale`."""

    def __init__(
        self,
        dim: int,
        attn: SparseAttention,
        *,
        mlp_ratio: float,
        norm_eps: float,
        skip_scale: float,
        proj_drop: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.skip_scale = skip_scale

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + (branch if self.skip_scale == 1 else branch / self.skip_scale)

    def forward(self, x: Tensor, resize: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `resize` is for the tables of token positions."""
        x = self._add(x, self.attn(self.norm1(x), resize))
        return self._add(x, self.mlp(self.norm2(x)))

    def remaining(
        self,
        x: Tensor,
        resize: Tensor | None,
        kept: Tensor,
        removed: int,
        keep: int | None,
        bounded: bool,
    ) -> tuple[Tensor, Tensor]:
        """`forward` on the tokens at positions `kept` (B, n), of which `keep` stay after it."""
        out, stay = self.attn.remaining(
            self.norm1(x), resize, kept, removed=removed, keep=keep, bounded=bounded
        )
        x = self._add(x, out)
        if stay is not None:
            kept = kept.gather(1, stay)
            rows = F.pad(stay + 1, (1, 0))
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        return self._add(x, self.mlp(self.norm2(x))), kept

    def detailed(
        self,
        x: Tensor,
        resize: Tensor | None,
        live: Tensor | None,
        left: int | None,
        keep: int | None,
    ) -> tuple[Tensor, AttentionRecord]:
        """`forward` with masked tokens, and the attention's record."""
        record = self.attn.detailed(self.norm1(x), resize, live, left=left, keep=keep)
        x = self._add(x, record.out)
        x = self._add(x, self.mlp(self.norm2(x)))
        if record.live is not None:
            alive = F.pad(record.live, (1, 0), value=True)
            x = x.masked_fill(~alive[..., None], 0.0)
        return x, record
