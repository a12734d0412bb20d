"""Attention inside groups of equal size, cut along the token sequences of a batch of frames."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._kernels import triton_backend
from vitzoo.ops._optional import xformers_backend
from vitzoo.ops.attention import attention_portable, attention_reference


def check_groups(q: Tensor, group_size: int, frame_offsets: Tensor) -> None:
    """Raise ValueError where the arguments do not fit together."""
    if q.dim() != 3:
        raise ValueError(
            f"grouped_attention takes (tokens, heads, head_dim), got {q.dim()} dimensions"
        )
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    if frame_offsets.dim() != 1 or len(frame_offsets) < 2:
        raise ValueError(
            "frame_offsets must be (frames + 1,) of at least one frame, "
            f"got shape {tuple(frame_offsets.shape)}"
        )


def grouped_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    frame_offsets: Tensor,
    scale: float | None = None,
) -> Tensor:
    """One frame after the other, one group after the other."""
    check_groups(q, group_size, frame_offsets)
    out = v.new_empty(*q.shape[:2], v.shape[-1])
    for start, end in pairwise(frame_offsets.tolist()):
        for first in range(start, end, group_size):
            last = min(first + group_size, end)
            keys = slice(max(last - group_size, start), last)
            attended = attention_reference(
                q[None, first:last], k[None, keys], v[None, keys], scale=scale
            )
            out[first:last] = attended[0]
    return out


def _frames_of_groups(
    frame_offsets: Tensor, tokens: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Frame and first token of every group, and the number of each frame's first group.

    There are `tokens // group_size + frames` groups, a bound that follows from shapes alone, so
    that nothing waits for the device; those past the last frame's begin past its end.
    """
    counts = frame_offsets.diff()
    first_group = F.pad((counts + group_size - 1) // group_size, (1, 0)).cumsum(0)
    groups = torch.arange(tokens // group_size + len(counts), device=frame_offsets.device)
    frame = torch.searchsorted(first_group[1:], groups, right=True).clamp(max=len(counts) - 1)
    return frame, frame_offsets[frame] + (groups - first_group[frame]) * group_size, first_group


def group_spans(
    frame_offsets: Tensor, tokens: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """First query, one past the last query, and first key of every group.

    Args:
        frame_offsets: (frames + 1,) first token of each frame, and `tokens`.
        tokens: tokens of all frames.
        group_size: tokens of a group.

    Returns:
        Three of (tokens // group_size + frames,); groups that hold nothing end where they begin.
    """
    frame, first, _ = _frames_of_groups(frame_offsets, tokens, group_size)
    past = torch.minimum(first + group_size, frame_offsets[frame + 1])
    first = torch.minimum(first, past)
    return first, past, torch.maximum(past - group_size, frame_offsets[frame])


def group_tables(
    frame_offsets: Tensor, tokens: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Index tables between `tokens` tokens and their groups.

    The groups past the last frame's are not read.

    Args:
        frame_offsets: (frames + 1,) first token of each frame, and `tokens`.
        tokens: tokens of all frames, at least 1.
        group_size: tokens of a group.

    Returns:
        Token of every slot (groups, group_size); whether that slot holds a token, False only in
        frames smaller than a group, same shape; slot of every token (tokens,), in the flattened
        first table.
    """
    device = frame_offsets.device
    counts = frame_offsets.diff()
    frame, first, first_group = _frames_of_groups(frame_offsets, tokens, group_size)
    start = frame_offsets[frame, None]
    place = first[:, None] - start + torch.arange(group_size, device=device)
    # Slots past the end of a frame hold the tokens one group earlier.
    place = torch.where(place < counts[frame, None], place, place - group_size)
    holds = (place >= 0) | (first >= tokens)[:, None]
    token_of_slot = (start + place).clamp(0, tokens - 1)

    token = torch.arange(tokens, device=device)
    frame = torch.searchsorted(frame_offsets[1:], token, right=True).clamp(max=len(counts) - 1)
    slot_of_token = first_group[frame] * group_size + token - frame_offsets[frame]
    return token_of_slot, holds, slot_of_token


def _small_frames(frame_offsets: Tensor, group_size: int) -> bool:
    """Whether a mask is needed; taken for granted where asking would break the graph."""
    if torch.compiler.is_compiling():
        return True
    return bool((frame_offsets.diff() < group_size).any())


def grouped_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    frame_offsets: Tensor,
    scale: float | None = None,
    attend: Callable[..., Tensor] = attention_portable,
) -> Tensor:
    """Groups become the batch of one dense attention; the last group of a frame is filled up."""
    check_groups(q, group_size, frame_offsets)
    if q.shape[0] == 0:
        return v[:0]
    token_of_slot, holds, slot_of_token = group_tables(frame_offsets, q.shape[0], group_size)
    mask = holds[:, None, None] if _small_frames(frame_offsets, group_size) else None
    # index_select, not [...]: its backward adds whole rows.
    gathered = (
        t.index_select(0, token_of_slot.flatten()).unflatten(0, (-1, group_size)) for t in (q, k, v)
    )
    out = attend(*gathered, mask=mask, scale=scale)
    return out.flatten(0, 1).index_select(0, slot_of_token)


def _why_not_xformers(
    q: Tensor, k: Tensor, v: Tensor, *, group_size: int, frame_offsets: Tensor, **_: Any
) -> str | None:
    if _small_frames(frame_offsets, group_size):
        return "frames smaller than a group need a mask, and xformers is asked without."
    return None


GROUPED_ATTENTION = Operator(
    "grouped_attention",
    [
        triton_backend("grouped_attention", one_map=True, exact_pays=True),
        xformers_backend(grouped_attention_portable, _why_not_xformers),
        Backend("portable", grouped_attention_portable),
        Backend("reference", grouped_attention_reference),
    ],
)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    frame_offsets: Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside groups of `group_size` consecutive tokens of the same frame.

    The tokens of all frames lie one frame after the other. A frame's last group, if it is not full,
    attends to the last `group_size` tokens of its frame; a frame smaller than a group to itself.
    No frame sees another, and an empty frame is allowed (FlatFormer, arXiv 2301.08739).

    Args:
        q, k, v: (tokens, heads, head_dim), or (B, tokens, heads, head_dim) for sequences that are
            cut alike; v's head_dim may differ.
        group_size: tokens of a group.
        frame_offsets: (frames + 1,) int64, the first token of each frame and, last, `tokens`.
        scale: factor on q k^T; head_dim ** -0.5 if None.
        backend: `auto`, `triton`, `xformers`, `portable` or `reference`.

    Returns:
        The shape of q with v's head_dim.

    Raises:
        ValueError: q has another rank, or the offsets or the size make no groups.
    """
    if not q.shape[:-1] == k.shape[:-1] == v.shape[:-1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v must be the same tokens and heads, got {shapes}")
    batch = None
    if q.dim() == 4:
        check_groups(q.flatten(0, 1), group_size, frame_offsets)
        if q.shape[0] == 0:
            return v.new_empty(v.shape)
        batch = q.shape[:2]
        frame_offsets = _repeat_frames(frame_offsets, *batch)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out = GROUPED_ATTENTION(
        q,
        k,
        v,
        group_size=group_size,
        frame_offsets=frame_offsets,
        scale=scale,
        backend=backend,
    )
    return out if batch is None else out.unflatten(0, batch)


def _repeat_frames(frame_offsets: Tensor, B: int, tokens: int) -> Tensor:
    """Offsets of B equal sequences that lie one after the other."""
    starts = tokens * torch.arange(B, device=frame_offsets.device)
    frames = (starts[:, None] + frame_offsets[:-1]).flatten()
    return F.pad(frames, (0, 1), value=B * tokens)
