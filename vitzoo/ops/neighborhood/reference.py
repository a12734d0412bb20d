"""Neighborhood attention as defined: every query gathers its own keys."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[int, int]


def neighbors(
    length: int, kernel_size: int, dilation: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys of every position of an axis, and the rows of the bias table that they meet.

    The positions with one remainder by `dilation` form a class. Member p of a class of M attends to
    `kernel_size` members in a row: centred on p, shifted where that would leave the axis.

    Returns:
        Positions and table rows, (length, kernel_size) each.
    """
    position = torch.arange(length, device=device)
    remainder, member = position % dilation, position // dilation
    count = (length - 1 - remainder) // dilation + 1
    first = torch.minimum((member - kernel_size // 2).clamp(min=0), count - kernel_size)
    attended = first[:, None] + torch.arange(kernel_size, device=device)
    rows = attended - member[:, None] + kernel_size - 1
    return remainder[:, None] + attended * dilation, rows


def neighborhood_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Pair,
    dilation: Pair = (1, 1),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Maps only: gather kernel_size keys per query, softmax over them."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ys, rows_y = neighbors(q.shape[1], kernel_size[0], dilation[0], q.device)
    xs, rows_x = neighbors(q.shape[2], kernel_size[1], dilation[1], q.device)
    at = (slice(None), ys[:, None, :, None], xs[None, :, None, :])
    logits = torch.einsum("bhwnd,bhwyxnd->bhwnyx", q * scale, k[at])
    if bias is not None:
        found = bias[:, rows_y[:, None, :, None], rows_x[None, :, None, :]]
        logits = logits + found.permute(1, 2, 0, 3, 4).to(logits.dtype)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bhwnyx,bhwyxnd->bhwnd", weights, v[at])
