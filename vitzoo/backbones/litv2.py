"""LITv2: no attention early, HiLo attention late (arXiv 2205.13213).

Two stages of convolutional feed-forward blocks, one of HiLo and one of ordinary attention; the
depthwise convolution inside every feed-forward block carries position; tokens merge at learned
offsets between stages. Follows github.com/ziplab/LITv2 at 7501c86 (Apache-2.0):
`classification/models/litv2.py`, `hilo.py` and, for the dense version,
`detection/mmdet/models/backbones/litv2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vitzoo.attention import Linear, add_mlp, conv_channels_last, pad_image_to_multiple
from vitzoo.attention.hilo import HiLo
from vitzoo.attention.merging import DeformableMerge
from vitzoo.backbones._build import StateDict, build_backbone, rename, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.backbones._staged import Stage, StagedBackbone
from vitzoo.zoo.entries import DataConfig, tag_arguments, timm_configs
from vitzoo.zoo.entries.litv2 import ENTRIES

_NORM_EPS = 1e-5


class Stem(nn.Module):
    """4x4 convolution of stride 4 and a LayerNorm; the image is padded to multiples of 4."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 4, stride=4, **factory)
        self.norm = LayerNorm2d(dim, eps=_NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""
        x = pad_image_to_multiple(x, 4)
        return self.norm(self.conv(x.contiguous(memory_format=torch.channels_last)))


class Downsample(nn.Module):
    """Deformable token merging: 2x2 tokens to one, BatchNorm, GELU; odd sides round down."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.dconv = DeformableMerge(in_dim, dim, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H // 2, W // 2, 2C)."""
        x = self.norm(self.dconv(x).permute(0, 3, 1, 2))
        return self.act(x).permute(0, 2, 3, 1)


@register_notrace_module
class ConvMlp(nn.Module):
    """An MLP with a 3x3 depthwise convolution on its hidden map, ahead of the exact GELU."""

    mixes_tokens = True

    def __init__(self, dim: int, hidden_dim: int, **factory: Any) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.fc1 = Linear(dim, hidden_dim, **factory)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **factory)
        self.fc2 = Linear(hidden_dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.fc2(conv_channels_last(self.fc1(x), self.dwconv, activation="gelu"))


class Block(nn.Module):
    """Attention, if the stage has any, and a convolutional MLP, each with its residual."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        *,
        mlp_ratio: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.attn = attn
        if attn is not None:
            self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return add_mlp(x, self.norm2, self.mlp, self.drop_path)


class LITv2(StagedBackbone):
    """LITv2 for classification, or its dense version.

    The authors' detectors norm stages 1 to 3 of the dense version, their segmenters all four.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier.
        depths: blocks per stage.
        embed_dims: channels per stage.
        num_heads: heads per stage, where a stage has attention.
        window_sizes: HiLo's window per stage, side in tokens; 1 is ordinary attention, 0 none.
            Parameters are the same for every window above 1.
        alpha: HiLo's share of Lo-Fi heads, where the window is above 1.
        mlp_ratio: hidden width of the MLPs over the channels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, linear from 0 over all blocks.
        global_pool: pooling of the head.
        dense: build the dense version (section "Dense" of the base class).
        norm_indices: its stages with an output norm.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        dense: bool = False,
        norm_indices: Sequence[int] = (1, 2, 3),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            channels=embed_dims,
            strides=[4 * 2**i for i in range(len(embed_dims))],
            in_chans=in_chans,
            num_classes=num_classes,
            dense=dense,
            norm_indices=norm_indices,
        )
        factory = {"device": device, "dtype": dtype}
        self.stem = Stem(in_chans, embed_dims[0], **factory)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for i, (depth, dim, heads, window_size) in enumerate(
            zip(depths, embed_dims, num_heads, window_sizes, strict=True)
        ):
            attn: Any = partial(HiLo, dim, heads, window_size, alpha=alpha, **factory)
            blocks = [
                Block(
                    dim,
                    attn() if window_size else None,
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                    **factory,
                )
                for _ in range(depth)
            ]
            downsample = Downsample(embed_dims[i - 1], dim, **factory) if i else nn.Identity()
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        output_norm = partial(LayerNorm2d, eps=_NORM_EPS, **factory)
        # Tokens are normed first and averaged then, the other order than DaViT's.
        self.norm = nn.Identity() if dense else output_norm(self.num_features)
        self.head = ClassifierHead(
            self.num_features,
            self.num_classes,
            pool_type="" if dense else global_pool,
            drop_rate=drop_rate,
            **factory,
        )
        self._finish(output_norm)

    def init_weights(self) -> None:
        """Linear layers from a truncated normal of 0.02, depthwise ones by fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ConvMlp):
                fan_out = module.dwconv.weight[0].numel()
                nn.init.normal_(module.dwconv.weight, std=(2 / fan_out) ** 0.5)
                if module.dwconv.bias is not None:
                    nn.init.zeros_(module.dwconv.bias)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The numbers that tell one LITv2 from another."""

    depths: tuple[int, ...]
    dim: int
    params: int
    gmacs: float
    size: int = 224

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Channels double from stage to stage."""
        return tuple(self.dim * 2**i for i in range(4))

    def arguments(self) -> dict[str, Any]:
        """Arguments of `LITv2`; a head has 32 channels everywhere."""
        return {
            "depths": self.depths,
            "embed_dims": self.embed_dims,
            "num_heads": tuple(dim // 32 for dim in self.embed_dims),
        }


_DEEP = (2, 2, 18, 2)
VARIANTS = {
    "vz_litv2_small": Variant(depths=(2, 2, 6, 2), dim=96, params=27_844_000, gmacs=3.724),
    "vz_litv2_medium": Variant(depths=_DEEP, dim=96, params=48_830_368, gmacs=7.463),
    "vz_litv2_base": Variant(depths=_DEEP, dim=128, params=86_520_704, gmacs=13.172),
    "vz_litv2_base_384": Variant(depths=_DEEP, dim=128, params=86_520_704, gmacs=39.7, size=384),
}


def _data_config(size: int) -> DataConfig:
    config = DataConfig(
        first_conv="stem.conv",
        classifier="head.fc",
        input_size=(3, size, size),
        licence="apache-2.0",
    )
    # The fine-tuned model sees the whole image, squashed to a square.
    return replace(config, crop_pct=1.0, crop_mode="squash") if size == 384 else config


default_cfgs = generate_default_cfgs(
    timm_configs({name: _data_config(v.size) for name, v in VARIANTS.items()}, ENTRIES)
)

_AUTHORS_NAMES = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    # The authors end a stage with the merging that begins ours.
    *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"\.downsample\.norm_layer\.", ".downsample.norm."),
    (r"^layers\.", "stages."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Authors' names, classification's and detectors', -> ours."""
    return rename(unwrap(state_dict), _AUTHORS_NAMES)


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    arguments = VARIANTS[name].arguments()
    arguments |= tag_arguments(ENTRIES, name, kwargs.get("pretrained_cfg"))
    return build_backbone(LITv2, name, pretrained, checkpoint_filter_fn, **(arguments | kwargs))


for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="litv2",
            channels=_variant.embed_dims,
            strides=(4, 8, 16, 32),
            input_size=(3, _variant.size, _variant.size),
            params=_variant.params,
            gmacs=_variant.gmacs,
            odd_sides="down",
            paper="2205.13213",
            code="https://github.com/ziplab/LITv2",
            code_licence="Apache-2.0",
        ),
        _build,
        module=__name__,
    )
