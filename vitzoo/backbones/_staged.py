"""What every backbone of several stages shares: timm's model surface and the dense version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Stage(nn.Module):
    """A downsampler and its blocks.

    In and out are NCHW views of channels-last memory, as timm's feature wrappers expect; between
    blocks a map is (B, H, W, C), so no block pays for a permutation.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x.permute(0, 2, 3, 1))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class StagedBackbone(nn.Module):
    """Base of the hierarchical families.

    A family's constructor calls `super().__init__(...)`, builds `stem` (image -> NCHW map),
    `stages` (an nn.Sequential of NCHW -> NCHW), `norm` (applied to the last map, Identity where the
    head norms after pooling) and `head` (timm's ClassifierHead or NormMlpClassifierHead), and ends
    with `_finish(...)`.

    With `dense=True` the model is the authors' backbone for dense prediction: no classifier, an
    output norm on each stage of `norm_indices`, and `forward` returns the list of all stages' NCHW
    maps. The normed map only leaves: the next stage reads the raw one.
    """

    output_norm_name: ClassVar[str] = "norm{}"

    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        in_chans: int,
        num_classes: int,
        dense: bool,
        norm_indices: Sequence[int],
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = 0 if dense else num_classes
        self.num_features = self.head_hidden_size = channels[-1]
        self.dense = dense
        self.norm_indices = tuple(sorted(norm_indices)) if dense else ()
        unknown = [i for i in self.norm_indices if not 0 <= i < len(channels)]
        if unknown:
            raise ValueError(f"norm_indices {unknown} are not stages 0 to {len(channels) - 1}")
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": chs, "reduction": stride, "module": f"stages.{i}"}
            for i, (chs, stride) in enumerate(zip(channels, strides, strict=True))
        ]

    def _finish(self, make_output_norm: Callable[[int], nn.Module]) -> None:
        """Build the dense version's output norms (modules on NCHW maps) and initialise."""
        for i in self.norm_indices:
            *path, leaf = self.output_norm_name.format(i).split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(leaf, make_output_norm(self.feature_info[i]["num_chs"]))
        self.init_weights()

    def init_weights(self) -> None:
        """The reference's initialisation; the family overrides it."""
        raise NotImplementedError

    def output_norm(self, stage: int) -> nn.Module | None:
        """The dense version's norm of a stage, if it has one."""
        if stage not in self.norm_indices:
            return None
        return self.get_submodule(self.output_norm_name.format(stage))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> last map (B, C, H / stride, W / stride), unpooled."""
        return self.final_features(self.stages(self.stem(x)))

    def final_features(self, x: Tensor) -> Tensor:
        """From the last stage's map to what `forward_features` returns: the final norm."""
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map -> logits (B, num_classes), or pooled features with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes); in the dense version the list of all stages' maps."""
        if self.dense:
            return self.forward_intermediates(x, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Stage outputs as timm's contract has it.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n stages (int), these stages (sequence), or all (None).
            norm: apply the final norm to the last stage's map.
            stop_early: do not run stages past the last one asked for.
            output_fmt: only `NCHW`.
            intermediates_only: leave out the final features.

        Returns:
            List of NCHW maps, or (final features, list). Maps of the dense version have passed
            their output norms.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        maps = []
        stages = self.stages[: last + 1] if stop_early else self.stages
        final = len(self.stages) - 1
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in wanted:
                output_norm = self.output_norm(i)
                if output_norm is None and norm and i == final:
                    output_norm = self.norm
                maps.append(x if output_norm is None else output_norm(x))
        if intermediates_only:
            return maps
        return (self.final_features(x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages after the last one asked for; returns the indices kept."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
            if hasattr(self.head, "norm"):
                self.head.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then stages (coarse) or downsamplers and blocks."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond biases and one-dimensional ones."""
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc  # type: ignore[return-value]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes leave features, `global_pool=''` leaves the map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)  # type: ignore[operator]
