"""Which tokens attend to which, predicted for each image (Sparsifiner).

Tokens are (B, N, C): the class token, then the patches of a (rows, columns) grid in raster order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.attention.choices import make_choice
from vitzoo.attention.layers import Linear, untouched
from vitzoo.ops import topk_mask
from vitzoo.ops._sides import pieces, smaller, symbolic

Grid = tuple[int, int]


@register_notrace_function
def token_resize(trained: Grid, grid: Grid, like: Tensor) -> Tensor | None:
    """The linear map (N, trained N) from a table of token positions to one of another patch grid.

    Bicubic without antialiasing, as the authors resize `pos_embed`; the class row passes through.
    One matrix serves all tables of a network; None if the grids are equal.

    Args:
        trained, grid: rows and columns of patches.
        like: a tensor on the device to use.
    """
    # Of an unknown grid a matrix in any case: of the trained one it is the identity.
    if not symbolic(*grid) and tuple(trained) == tuple(grid):
        return None
    patches = trained[0] * trained[1]
    units = torch.eye(patches, device=like.device).view(1, patches, *trained)
    columns = F.interpolate(units, size=tuple(grid), mode="bicubic", align_corners=False)
    matrix = F.pad(columns[0].flatten(1).t(), (1, 0, 1, 0))
    return matrix + F.pad(matrix.new_ones(1, 1), (0, patches, 0, matrix.shape[0] - 1))


@register_notrace_function
def resize_token_table(table: Tensor, resize: Tensor | None) -> Tensor:
    """Apply what `token_resize` returned to a table (trained N, D)."""
    return table if resize is None else (resize @ table.to(resize.dtype)).to(table.dtype)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What decides which connections are kept (paper section 3).

    Attributes:
        keep_rate: connections of a query over the number of tokens; a budget, rounded up.
        score_threshold: keep the connections that score above it instead of a budget.
        top_coefficients: basis coefficients kept per query; None keeps those above the threshold.
        coefficient_threshold: used where `top_coefficients` is None; 0 keeps all.
        basis_threshold: basis entries up to this magnitude count as zero.
        token_factor: tokens over rows of the basis, at the trained size.
        channel_factor: head_dim over the predictor's width.
        shared_tables: one table both reduces the tokens and is the basis.
        prune_rows: pruned tokens attend to nothing; False leaves their (unread) rows.
    """

    keep_rate: float = 0.25
    score_threshold: float | None = None
    top_coefficients: int | None = 8
    coefficient_threshold: float = 0.05
    basis_threshold: float = 0.02
    token_factor: float = 6
    channel_factor: int = 2
    shared_tables: bool = False
    prune_rows: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {self.keep_rate}")
        if self.score_threshold is not None and self.score_threshold <= 0:
            raise ValueError(f"score_threshold must be positive, got {self.score_threshold}")


class Connectivity(NamedTuple):
    """What the predictor says of one block.

    `basis` (K, N) or (B, 1, K, N), `coefficients` (B, heads, N-1, K), `score` (B, heads, N-1, N),
    `mask` boolean (B, heads, N, N) with the class token's full row first.
    """

    basis: Tensor
    coefficients: Tensor
    score: Tensor
    mask: Tensor


def clear_dead(x: Tensor, live: Tensor) -> Tensor:
    """Zeros in place of the patch rows of x (B, N, ...) that `live` (B, N-1) does not mark."""
    alive = F.pad(live, (1, 0), value=True)
    return x.masked_fill(~alive.view(*alive.shape, *(1,) * (x.dim() - 2)), 0.0)


def share(rate: float, tokens: int) -> int:
    """ceil(rate * tokens); of an unknown number in integers, which every graph format has."""
    if not symbolic(tokens):
        return math.ceil(rate * tokens)
    exact = Fraction(rate).limit_denominator(10_000)
    return pieces(exact.numerator * tokens, exact.denominator)


class ConnectivityPredictor(nn.Module):
    """Scores all connections of a block by low-rank attention and keeps the best (section 3.2).

    The keys are reduced to K rows, each query weighs them, and a K x N basis turns the weights back
    into a score for every token. Both tables belong to token positions; at other sizes they are
    resized on the patch grid and K stays.

    Args:
        dim: channels.
        num_heads: heads, which share the weights.
        grid_size: patch grid (rows, columns) of the trained size.
        sparsity: what is kept.
    """

    def __init__(
        self, dim: int, num_heads: int, grid_size: Grid, *, sparsity: Sparsity, **factory: Any
    ) -> None:
        super().__init__()
        head_dim, tokens = dim // num_heads, grid_size[0] * grid_size[1] + 1
        width, rows = head_dim // sparsity.channel_factor, int(tokens // sparsity.token_factor)
        if width < 1 or rows < 1:
            raise ValueError(
                f"channel_factor {sparsity.channel_factor} and token_factor"
                f" {sparsity.token_factor} leave nothing of {head_dim} channels and {tokens} tokens"
            )
        self.sparsity = sparsity
        # The number of heads, where the head's width would be usual: as the authors train it.
        self.scale = num_heads**-0.5
        self.proj_n = nn.Parameter(torch.empty(tokens, rows, **factory))
        if sparsity.shared_tables:
            self.proj_back_n = self.proj_n
        else:
            self.proj_back_n = nn.Parameter(torch.empty(tokens, rows, **factory))
        self.proj_c_q = Linear(head_dim, width, **factory)
        self.proj_c_k = Linear(head_dim, width, **factory)
        self.init_tables()

    def init_tables(self) -> None:
        """Truncated normal of 0.02, as the authors' code."""
        trunc_normal_(self.proj_n, std=0.02)
        if not self.sparsity.shared_tables:
            trunc_normal_(self.proj_back_n, std=0.02)

    def set_tables(self, resize: Tensor | None) -> None:
        """Resize both tables for good."""
        for name in ("proj_n", "proj_back_n"):
            table = getattr(self, name)
            resized = resize_token_table(table.detach(), resize)
            setattr(self, name, nn.Parameter(resized, requires_grad=table.requires_grad))
        if self.sparsity.shared_tables:
            self.proj_back_n = self.proj_n

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        resize: Tensor | None = None,
        kept: Tensor | None = None,
        live: Tensor | None = None,
        left: int | None = None,
        signed: bool = False,
    ) -> Connectivity:
        """Predict a block's connections.

        Args:
            q, k: (B, N, heads, head_dim), unscaled.
            resize: from `token_resize`, where the image has not the trained size.
            kept: positions (B, N-1) of the patch tokens that are left, if pruning removed some.
            live: mask (B, N-1) of the patch tokens that are left, if pruning masks them.
            left: their number in each image, which bounds the budget; None without pruning.
            signed: use the raw basis and all coefficients (the reconstruction phase).
        """
        table, back = (
            resize_token_table(table, resize) for table in (self.proj_n, self.proj_back_n)
        )
        budget = self._budget(table.shape[0], left)
        if kept is not None:
            rows = F.pad(kept + 1, (1, 0))
            table, back = table[rows], back[rows]
        if live is not None:
            table = table * F.pad(live, (1, 0), value=True)[..., None]
        basis = back.transpose(-2, -1)
        if kept is not None:
            basis = basis[:, None]
        if not signed:
            basis = F.threshold(basis.abs(), self.sparsity.basis_threshold, 0.0)
        logits = self._logits(q, k, table)
        if live is not None:
            logits = clear_dead(logits.transpose(1, 2), live).transpose(1, 2)
        coefficients = logits.softmax(dim=-1)
        if not signed:
            coefficients = self._sparse_coefficients(coefficients, tied=live is not None)
        # Head by head: one product of so many short rows takes twice as long on the CPU.
        score = coefficients @ basis.expand(*coefficients.shape[:2], -1, -1)
        mask = self._connect(score.detach(), budget, live)
        return Connectivity(basis, coefficients[:, :, 1:], score[:, :, 1:], mask)

    def _logits(self, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        """scale * (Wq q + bq) . sum_n (Wk k_n + bk) table_n, for a table (N, K) or (B, N, K).

        Summed over the tokens first, and both weights multiplied into the K sums: nothing of N rows
        is copied but the queries.

        Returns:
            (B, heads, N, K).
        """
        if not (untouched(self.proj_c_q) and untouched(self.proj_c_k)):
            q, k = self.proj_c_q(q) * self.scale, self.proj_c_k(k)
            sums = (table.transpose(-2, -1) @ k.flatten(2)).unflatten(-1, k.shape[2:])
            return q.transpose(1, 2) @ sums.permute(0, 2, 3, 1)
        weight = torch.cat([self.proj_c_q.weight, self.proj_c_q.bias[:, None]], dim=1) * self.scale
        sums = (table.transpose(-2, -1) @ k.flatten(2)).unflatten(-1, k.shape[2:])
        keys = F.linear(sums, weight.t() @ self.proj_c_k.weight)
        keys = keys + table.sum(-2)[..., None, None] * (self.proj_c_k.bias @ weight)
        folded, offset = keys.permute(0, 2, 3, 1).split((q.shape[-1], 1), dim=2)
        return q.transpose(1, 2) @ folded + offset

    def _sparse_coefficients(self, coefficients: Tensor, *, tied: bool) -> Tensor:
        top, threshold = self.sparsity.top_coefficients, self.sparsity.coefficient_threshold
        if top is None:
            return F.threshold(coefficients, threshold, 0.0) if threshold > 0 else coefficients
        # The coefficients of a masked token are all equal. Nothing reads what it attends to, but
        # with torch's choice among equals the rows are the authors' too.
        backend = "reference" if tied else "auto"
        count = min(top, coefficients.shape[-1])
        chosen = make_choice(lambda: topk_mask(coefficients.detach(), count, backend=backend))
        # A product is vectorised where torch.where is not.
        return coefficients * chosen

    def _connect(self, score: Tensor, budget: int, live: Tensor | None) -> Tensor:
        """Boolean (B, heads, N, N) from the scores (the class token's own are not used)."""
        if live is not None:
            dead = F.pad(~live, (1, 0), value=False)
            score = score.masked_fill(dead[:, None, None], float("-inf"))
        threshold = self.sparsity.score_threshold

        def choose() -> Tensor:
            mask = score > threshold if threshold is not None else topk_mask(score, budget)
            if live is not None and self.sparsity.prune_rows:
                mask = mask & F.pad(live, (1, 0), value=True)[:, None, :, None]
            mask[:, :, 0] = True
            return mask

        return make_choice(choose)

    def _budget(self, tokens: int, left: int | None) -> int:
        """Keys per query: a share of all tokens, but no more than the patch tokens that are left.

        The authors' module keeps a budget that shrank for one image for all later ones; this does
        not.
        """
        budget = share(self.sparsity.keep_rate, tokens)
        return budget if left is None else smaller(budget, left)
