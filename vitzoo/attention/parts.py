"""A few images at a time, so that what one layer writes is still in the cache for the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.attention.choices import choices_are_watched
from vitzoo.ops._onednn import why_not_onednn

# Of the input. Hidden maps are three to four times as wide, and several are alive at once.
_PART_BYTES = 2 << 20


class PartedSequential(nn.Sequential):
    """nn.Sequential for layers that treat every image by itself, (B, ...) -> (B, ...).

    In inference on the CPU a large batch passes in parts of up to two megabytes of input. Not
    where somebody listens to layers or their choices: who does expects one call with all images.

    Args:
        layers: as for nn.Sequential.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The layers in turn."""
        count = self._parts(input)
        if count == 1:
            return super().forward(input)
        return torch.cat([nn.Sequential.forward(self, part) for part in input.chunk(count)])

    def _parts(self, x: Any) -> int:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return 1
        if type(x) is not Tensor or x.shape[0] < 2 or x.numel() == 0:
            return 1
        images = max(1, _PART_BYTES // (x[0].numel() * x.element_size()))
        if images >= x.shape[0] or why_not_onednn(x) is not None or choices_are_watched():
            return 1
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.modules() if m is not self):
            return 1
        return -(-x.shape[0] // images)
