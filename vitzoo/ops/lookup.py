"""LookupViT's two-way cross-attention over one similarity matrix (arXiv 2407.12753, section 3).

M compressed tokens gather from N lookup tokens; later, when the compressed tokens have been
processed, the lookup tokens read from them. Both directions weigh by the same similarity S of shape
(B, heads, M, N), which is small (M <= 100) and therefore kept instead of computed again.

The `folded_*` forms serve inference with few compressed tokens: a projection of the N lookup tokens
is applied to the M compressed ones on the other side of the product instead (docs/decisions.md).
"""

from __future__ import annotations

from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._folding import may_fold


def lookup_similarity(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Scaled products of every compressed token with every lookup token.

    Args:
        q: of the compressed tokens (B, M, heads, head_dim).
        k: of the lookup tokens (B, N, heads, head_dim).
        scale: factor on q k^T; head_dim ** -0.5 if None.

    Returns:
        S (B, heads, M, N).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)


def lookup_gather_reference(similarity: Tensor, v: Tensor) -> Tensor:
    """softmax(S) over the lookup tokens, times their values."""
    return (similarity.softmax(dim=-1) @ v.transpose(1, 2)).transpose(1, 2)


def lookup_infuse_reference(similarity: Tensor, v: Tensor, *, reuse: str = "logits") -> Tensor:
    """softmax(S) over the compressed tokens (or over the lookup ones), transposed, times values."""
    weights = similarity.softmax(dim=-2 if reuse == "logits" else -1)
    return (weights.transpose(-2, -1) @ v.transpose(1, 2)).transpose(1, 2)


LOOKUP_GATHER = Operator("lookup_gather", [Backend("reference", lookup_gather_reference)])
LOOKUP_INFUSE = Operator("lookup_infuse", [Backend("reference", lookup_infuse_reference)])


def lookup_gather(similarity: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Lookup tokens -> compressed tokens.

    Args:
        similarity: S (B, heads, M, N) from `lookup_similarity`.
        v: values of the lookup tokens (B, N, heads, value_dim).
        backend: `auto` or `reference`.

    Returns:
        (B, M, heads, value_dim).
    """
    return LOOKUP_GATHER(similarity, v, backend=backend)


def lookup_infuse(
    similarity: Tensor, v: Tensor, *, reuse: str = "logits", backend: str = "auto"
) -> Tensor:
    """Compressed tokens -> lookup tokens, over the similarity of the gathering step.

    Args:
        similarity: the same S (B, heads, M, N).
        v: values of the compressed tokens (B, M, heads, value_dim).
        reuse: `logits` takes a softmax of S over the compressed tokens, so that the weights of a
            lookup token sum to 1; `weights` transposes the gathering weights as they are.
        backend: `auto` or `reference`.

    Returns:
        (B, N, heads, value_dim).

    Raises:
        ValueError: another `reuse`.
    """
    if reuse not in ("logits", "weights"):
        raise ValueError(f"reuse must be 'logits' or 'weights', got {reuse!r}")
    return LOOKUP_INFUSE(similarity, v, reuse=reuse, backend=backend)


def folds(tokens: int, compressed: int, heads: int, *tensors: Tensor) -> bool:
    """Whether the `folded_*` forms may stand for projections and attention, and cost less.

    Args:
        tokens: N, lookup tokens.
        compressed: M, compressed tokens.
        heads: of the attention.
        tensors: input and parameters; the last axis of the first is the width.
    """
    if not may_fold(("lookup_gather", "lookup_infuse"), *tensors):
        return False
    width = tensors[0].shape[-1]
    plain = tokens * width + compressed * tokens
    folded = compressed * width + heads * compressed * tokens
    # Products of few rows run slower: it has to be a clear gain.
    return 4 * folded <= 3 * plain


def folded_similarity(
    q: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, scale: float | None = None
) -> Tensor:
    """`lookup_similarity` with the keys x @ weight^T + bias.

    Args:
        q: of the compressed tokens (B, M, heads, head_dim).
        x: lookup tokens (B, N, C).
        weight, bias: of the keys' projection, (heads * head_dim, C) and (heads * head_dim,).
        scale: factor on q k^T; head_dim ** -0.5 if None.

    Returns:
        S (B, heads, M, N).
    """
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    folded = _per_head(q, weight.unflatten(0, q.shape[2:]))
    similarity = (folded @ x.transpose(1, 2)).unflatten(1, (q.shape[2], q.shape[1]))
    offset = (q * bias.view(q.shape[2:])).sum(-1)
    return similarity.add_(offset.transpose(1, 2)[..., None])


def folded_gather(similarity: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`lookup_gather` of the values x @ weight^T + bias, heads side by side: (B, M, C').

    Args:
        similarity: S (B, heads, M, N).
        x: lookup tokens (B, N, C).
        weight, bias: of the values' projection, (C', C) and (C',).
    """
    B, heads, M, _ = similarity.shape
    C, d = x.shape[-1], len(weight) // heads
    gathered = similarity.softmax(dim=-1).flatten(1, 2) @ x
    gathered = gathered.view(B, heads, M, C).transpose(0, 1).reshape(heads, B * M, C)
    values = gathered @ weight.view(heads, d, C).transpose(1, 2)
    return values.view(heads, B, M, d).permute(1, 2, 0, 3).flatten(2) + bias


def folded_infuse(
    similarity: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, reuse: str = "logits"
) -> Tensor:
    """`lookup_infuse`, heads side by side, then the projection: (B, N, C).

    Args:
        similarity: S (B, heads, M, N).
        v: values of the compressed tokens (B, M, heads, value_dim).
        weight, bias: of the output projection, (C, heads * value_dim) and (C,).
        reuse: see `lookup_infuse`.
    """
    projected = _per_head(v, weight.t().unflatten(0, v.shape[2:]))
    weights = similarity.softmax(dim=-2 if reuse == "logits" else -1)
    return (weights.flatten(1, 2).transpose(1, 2) @ projected).add_(bias)


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, M, heads, d) times weight (heads, d, C), head by head -> (B, heads * M, C)."""
    B, M, heads, d = x.shape
    C = weight.shape[-1]
    out = x.permute(2, 0, 1, 3).reshape(heads, B * M, d) @ weight
    return out.view(heads, B, M, C).transpose(0, 1).reshape(B, heads * M, C)
