"""LookupViT's two-way cross-attention over one similarity matrix (arXiv 2407.12753, section 3).

M compressed tokens gather from N lookup tokens; later, when the compressed tokens have been
processed, the lookup tokens read from them. Both directions weigh by the same similarity S of shape
(B, heads, M, N), which is small (M <= 100) and therefore kept instead of computed again.
"""

from __future__ import annotations

from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator


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
