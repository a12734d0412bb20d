"""Merging of neighbouring tokens of a map at learned, fractional positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._onednn import needs_derivatives
from vitzoo.ops._sides import exporting

# Shapes: B batch, H W input map, h w output map, P = kernel_size^2 points of a merged token,
# C channels in, D channels out. The corners of a bilinear sample are (2, 2).


def _check(x: Tensor, offset: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Kernel size and the sides of the output map."""
    kernel_size = weight.shape[-1]
    h, w = x.shape[1] // kernel_size, x.shape[2] // kernel_size
    expected = (x.shape[0], h, w, 2 * kernel_size**2)
    if tuple(offset.shape) != expected:
        raise ValueError(
            f"offset of a map {tuple(x.shape)} merged {kernel_size}x{kernel_size} "
            f"must have the shape {expected}, got {tuple(offset.shape)}"
        )
    return kernel_size, h, w


def _positions(offset: Tensor, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """Offsets (B, h, w, 2P) -> sampled (y, x) of every point, (B, h, w, P, 2)."""
    _, h, w, _ = offset.shape
    k = kernel_size
    rows = torch.arange(h * k, device=offset.device, dtype=dtype).view(h, 1, k, 1)
    columns = torch.arange(w * k, device=offset.device, dtype=dtype).view(1, w, 1, k)
    grid = torch.stack(torch.broadcast_tensors(rows, columns), dim=-1).flatten(2, 3)
    return grid + offset.to(dtype).unflatten(-1, (k * k, 2))


def _corners(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Indices (..., 2) of the two pixels around each position on one axis, and their weights.

    A pixel outside the map weighs nothing, so that samples fade to zero over one pixel.
    """
    low = position.floor()
    fraction = position - low
    # Clamped as integers: a diverged offset must not turn into an address.
    index = low.long().clamp(-2, length).unsqueeze(-1) + torch.arange(2, device=position.device)
    inside = (index >= 0) & (index < length)
    weight = torch.stack((1 - fraction, fraction), dim=-1) * inside
    return index.clamp(0, length - 1), weight


def _bilinear(offset: Tensor, kernel_size: int, H: int, W: int, dtype: torch.dtype) -> tuple:
    """Flat pixel indices y * W + x and weights of every point's corners, (B, h, w, P, 2, 2)."""
    # Half precision cannot hold a position: bfloat16 steps by half a pixel beyond 64.
    dtype = torch.promote_types(dtype, torch.float32)
    y, x = _positions(offset, kernel_size, dtype).unbind(-1)
    (y_index, y_weight), (x_index, x_weight) = _corners(y, H), _corners(x, W)
    index = y_index[..., :, None] * W + x_index[..., None, :]
    return index, y_weight[..., :, None] * x_weight[..., None, :]


def deformable_merge_reference(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Sample every point from its four corners, then weigh points and channels."""
    kernel_size, _, _ = _check(x, offset, weight)
    B, H, W, _ = x.shape
    index, corner_weight = _bilinear(offset, kernel_size, H, W, x.dtype)
    batch = torch.arange(B, device=x.device).view(B, 1, 1, 1, 1, 1)
    corners = x.flatten(1, 2)[batch, index]  # (B, h, w, P, 2, 2, C)
    samples = (corners * corner_weight[..., None].to(x.dtype)).sum((-3, -2))
    merged = torch.einsum("bhwpc,dcp->bhwd", samples, weight.flatten(2).to(x.dtype))
    return merged if bias is None else merged + bias.to(x.dtype)


def deformable_merge_portable(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """An embedding bag of four rows per point, then one linear layer over points and channels."""
    kernel_size, h, w = _check(x, offset, weight)
    B, H, W, C = x.shape
    index, corner_weight = _bilinear(offset, kernel_size, H, W, x.dtype)
    first_row = torch.arange(0, B * H * W, H * W, device=x.device).view(B, 1, 1, 1, 1, 1)
    rows, pixels = (index + first_row).view(-1, 4), x.reshape(B * H * W, C)
    corner_weight = corner_weight.to(x.dtype).view(-1, 4)
    if exporting() or needs_derivatives():
        # ONNX knows bags as a loop with a step for each, and OpenVINO does not convert it. A bag
        # has no derivative but the first in reverse mode.
        samples = (pixels[rows] * corner_weight[..., None]).sum(1)
    else:
        samples = F.embedding_bag(rows, pixels, per_sample_weights=corner_weight, mode="sum")
    by_point = weight.permute(0, 2, 3, 1).flatten(1)  # (D, P * C)
    samples = samples.view(B, h, w, kernel_size**2 * C)
    return F.linear(samples, by_point.to(x.dtype), None if bias is None else bias.to(x.dtype))


def deformable_merge_torchvision(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """torchvision's deformable convolution of version 1, on the map with channels first."""
    from torchvision.ops import deform_conv2d

    kernel_size, _, _ = _check(x, offset, weight)
    out = deform_conv2d(
        x.permute(0, 3, 1, 2),
        offset.permute(0, 3, 1, 2).to(x.dtype),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        stride=kernel_size,
    )
    return out.permute(0, 2, 3, 1)


DEFORMABLE_MERGE = Operator(
    "deformable_merge",
    [
        Backend("portable", deformable_merge_portable),
        Backend("torchvision", deformable_merge_torchvision),
        Backend("reference", deformable_merge_reference),
    ],
)


def deformable_merge(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Merge blocks of kernel_size x kernel_size tokens sampled at offset positions.

    A deformable convolution (version 1, one offset group) whose stride is its kernel's side and
    that has no padding: LIT's token merging (arXiv 2105.14217, section 3.3). Samples are bilinear;
    outside the map there are zeros. Rows and columns that do not fill a block are dropped, except
    where an offset reaches them.

    Args:
        x: map (B, H, W, C).
        offset: in pixels of x, (B, H // kernel_size, W // kernel_size, 2 * kernel_size^2); channel
            2p shifts point p = row * kernel_size + column down, channel 2p + 1 to the right.
        weight: (D, C, kernel_size, kernel_size).
        bias: (D,) or None.
        backend: `auto`, `portable`, `torchvision` or `reference`.

    Returns:
        (B, H // kernel_size, W // kernel_size, D).

    Raises:
        ValueError: the offsets do not fit the map and the kernel.
    """
    return DEFORMABLE_MERGE(x, offset, weight, bias, backend=backend)
