"""Which entries of each row are its k largest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._onednn import needs_derivatives, why_not_apart
from vitzoo.ops._sides import exporting, symbolic


def topk_mask_reference(scores: Tensor, k: int) -> Tensor:
    """torch's own selection, scattered into a mask; equal scores fall as torch.topk lets them."""
    chosen = torch.topk(scores, k, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def topk_mask_portable(scores: Tensor, k: int) -> Tensor:
    """Compare with the k-th largest value; of entries that equal it the leftmost are taken."""
    kth = torch.topk(scores, k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    larger = scores > kth
    equal = scores == kth
    room = k - larger.sum(-1, keepdim=True, dtype=torch.int32)
    return larger | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


# What stays in a core's cache together with its partitioned copy. On one thread: after torch's own
# operators its second one waits busily on the other core, and two of Python's gain nothing.
_PART_BYTES = 1 << 20


def _mark_largest(scores: Tensor, k: int) -> Tensor:
    fits = scores.dtype in (torch.float16, torch.bfloat16, torch.float32)
    rows = scores.detach().to(torch.float32 if fits else torch.float64)
    rows = rows.contiguous().view(-1, scores.shape[-1])
    # Floats that are not negative order like their bits, and integers spare numpy looking for NaN.
    bits = rows.view(torch.int32 if fits else torch.int64)
    values = rows if bits.numel() and bits.min() < 0 else bits
    mask = torch.empty(rows.shape, dtype=torch.bool)
    count = max(1, _PART_BYTES // (rows.element_size() * max(1, rows.shape[1])))
    for part, marks in zip(values.split(count), mask.split(count), strict=True):
        _mark_part(part.numpy(), marks.numpy(), k)
    return mask.view(scores.shape)


def _mark_part(values: Any, mask: Any, k: int) -> None:
    """Fill `mask` (rows, N) with the k largest values of each row, both numpy arrays."""
    import numpy as np

    at = values.shape[1] - k
    kth = np.partition(values, at, axis=-1)[:, at, None]
    np.greater_equal(values, kth, out=mask)
    if np.count_nonzero(mask) > k * len(values):
        tied = np.flatnonzero(np.count_nonzero(mask, axis=-1) > k)
        larger, equal = values[tied] > kth[tied], values[tied] == kth[tied]
        room = k - np.count_nonzero(larger, axis=-1)[:, None]
        mask[tied] = larger | (equal & (np.cumsum(equal, axis=-1) <= room))


@torch.library.custom_op("vitzoo::topk_mask_numpy", mutates_args=())
def _topk_mask_numpy(scores: Tensor, k: int) -> Tensor:
    return _mark_largest(scores, k)


@_topk_mask_numpy.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


def topk_mask_numpy(scores: Tensor, k: int) -> Tensor:
    """The portable definition with numpy's partition, which is vectorised where torch's is not."""
    # The way to an operator of our own takes torch as long as the selection of a few rows.
    return (_mark_largest if why_not_apart(scores) is None else _topk_mask_numpy)(scores, k)


def _numpy_why_not(scores: Tensor, k: int) -> str | None:
    if scores.device.type != "cpu":
        return f"numpy works on the CPU, the scores are on {scores.device.type}."
    if exporting():
        return "an exported graph should need nothing but torch."
    if needs_derivatives():
        return "function transforms know torch's own operators only."
    return None


TOPK_MASK = Operator(
    "topk_mask",
    [
        Backend("numpy", topk_mask_numpy, why_not=_numpy_why_not),
        Backend("portable", topk_mask_portable),
        Backend("reference", topk_mask_reference),
    ],
)


def topk_mask(scores: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Mark the k largest entries along the last axis.

    Exactly k per row. Of entries that equal the k-th largest the leftmost are marked, except by
    `reference`, which marks those that torch.topk picks. The mask carries no gradient.

    Args:
        scores: (..., N) without NaN.
        k: entries per row, 1 <= k <= N.
        backend: `auto`, `numpy`, `portable` or `reference`.

    Returns:
        Boolean (..., N).

    Raises:
        ValueError: k is not in 1 to N.
    """
    if not symbolic(k, scores.shape[-1]) and not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be in 1 to {scores.shape[-1]}, got {k}")
    return TOPK_MASK(scores, k, backend=backend)
