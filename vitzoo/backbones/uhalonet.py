"""U-HaloNet: halo attention in every block of a plain four-stage network.

Follows github.com/OpenGVLab/STM-Evaluation at b62c471 (MIT): `classification/models` and, for the
dense version, `detection/mmdet_custom/models/backbones`. Unlike in HaloNet, keys beyond the border
are masked. The attention is the HaloNet paper's (arXiv 2103.12731).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    LayerScale,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vitzoo.attention import Mlp, add_mlp, conv_channels_last
from vitzoo.attention.conv_bn import conv_bn_act
from vitzoo.attention.halo import MaskedHaloAttention, RelativeTables
from vitzoo.backbones._build import StateDict, build_backbone, rename, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.backbones._staged import Stage, StagedBackbone
from vitzoo.zoo.entries import DataConfig, tag_arguments, timm_configs
from vitzoo.zoo.entries.uhalonet import ENTRIES

_NORM_EPS = 1e-6
_BLOCK_NORM_EPS = 1e-5


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a LayerNorm, a GELU between."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **factory)
        self.norm1 = LayerNorm2d(dim // 2, eps=_NORM_EPS, **factory)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **factory)
        self.norm2 = LayerNorm2d(dim, eps=_NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""
        x = self.act(self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        return self.norm2(self.conv2(x))


class Downsample(nn.Module):
    """The norm that ends the stage before, then a 3x3 convolution of stride 2 and a LayerNorm.

    The dense version has no norm between the stages.
    """

    def __init__(self, in_dim: int, dim: int, *, stage_norm: bool, **factory: Any) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=_NORM_EPS, **factory)
        self.stage_norm = norm(in_dim) if stage_norm else nn.Identity()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **factory)
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""
        return self.norm(conv_channels_last(self.stage_norm(x), self.conv))


class Block(nn.Module):
    """Attention and MLP, both before their scaled residual normed."""

    def __init__(self, dim: int, attn: nn.Module, *, drop_path: float, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_BLOCK_NORM_EPS, **factory)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values=1e-6, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=_BLOCK_NORM_EPS, **factory)
        self.mlp = Mlp(dim, 4 * dim, **factory)
        self.ls2 = LayerScale(dim, init_values=1e-6, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return add_mlp(x, self.norm2, self.mlp, self.ls2, self.drop_path)


@register_notrace_module
class ConvHead(nn.Sequential):
    """1x1 convolution to more channels, BatchNorm, GELU: the last features before pooling."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__(
            nn.Conv2d(in_dim, dim, 1, bias=False, **factory),
            nn.BatchNorm2d(dim, **factory),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        conv, bn, act = self
        return conv_bn_act(x, conv, bn, act=act)


class UHaloNet(StagedBackbone):
    """U-HaloNet for classification, or its dense version.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier.
        depths: blocks per stage.
        embed_dims: channels per stage.
        num_heads: heads per stage.
        block_size: side of the attention's blocks in tokens.
        halo_size: tokens that a window reaches beyond its block; another window than a file's
            interpolates the file's tables.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, linear from 0 over all blocks.
        global_pool: pooling of the head.
        dense: build the dense version (section "Dense" of the base class): no norms between the
            stages.
        norm_indices: its stages with an output norm.
    """

    output_norm_name = "out_norm_{}"

    conv_head: nn.Module

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 9, 2),
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        block_size: int = 7,
        halo_size: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        dense: bool = False,
        norm_indices: Sequence[int] = (0, 1, 2, 3),
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
        attention: Any = partial(
            MaskedHaloAttention, block_size=block_size, halo_size=halo_size, **factory
        )
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, embed_dims, num_heads, strict=True)):
            downsample = (
                Downsample(embed_dims[i - 1], dim, stage_norm=not dense, **factory)
                if i
                else nn.Identity()
            )
            blocks = [
                Block(dim, attention(dim, heads), drop_path=next(rates), **factory)
                for _ in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        output_norm = partial(LayerNorm2d, eps=_NORM_EPS, **factory)
        if dense:
            self.norm, self.conv_head = nn.Identity(), nn.Identity()
        else:
            self.norm = output_norm(embed_dims[-1])
            self.num_features = self.head_hidden_size = int(1.5 * embed_dims[-1])
            self.conv_head = ConvHead(embed_dims[-1], self.num_features, **factory)
        self.head = ClassifierHead(
            self.num_features,
            self.num_classes,
            pool_type="" if dense else global_pool,
            drop_rate=drop_rate,
            **factory,
        )
        self._finish(output_norm)

    def final_features(self, x: Tensor) -> Tensor:
        """The last stage's norm, then more channels for the classifier."""
        return self.conv_head(self.norm(x))

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the stages asked for do not need; the last features count as the head."""
        if prune_head:
            self.conv_head = nn.Identity()
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def init_weights(self) -> None:
        """Truncated normal of 0.02, biases zero; the tables from a normal of the scale."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RelativeTables):
                for table in module():
                    nn.init.normal_(table, std=table.shape[1] ** -0.5)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The numbers that tell one U-HaloNet from another."""

    dim: int
    depth: int
    heads: int
    params: int
    gmacs: float | None = None

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Channels double from stage to stage."""
        return tuple(self.dim * 2**i for i in range(4))

    def arguments(self) -> dict[str, Any]:
        """Arguments of `UHaloNet`."""
        return {
            "depths": (2, 2, self.depth, 2),
            "embed_dims": self.embed_dims,
            "num_heads": tuple(self.heads * 2**i for i in range(4)),
        }


VARIANTS = {
    "vz_uhalonet_micro": Variant(dim=32, depth=9, heads=1, params=4_389_672, gmacs=0.86),
    "vz_uhalonet_tiny": Variant(dim=96, depth=6, heads=3, params=31_523_176, gmacs=5.30),
    "vz_uhalonet_small": Variant(dim=96, depth=18, heads=3, params=52_831_336),
    "vz_uhalonet_base": Variant(dim=128, depth=18, heads=4, params=93_327_336),
}

default_cfgs = generate_default_cfgs(
    timm_configs(
        {
            name: DataConfig(first_conv="stem.conv1", classifier="head.fc", licence="mit")
            for name in VARIANTS
        },
        ENTRIES,
    )
)

_AUTHORS_NAMES = (
    (r"^downsample_layers\.0\.stem\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.stem\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.stem\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.stem\.4\.", "stem.norm2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.(\d+)\.reduction\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.reduction\.1\.", r"stages.\1.downsample.norm."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^stage_norms\.0\.", "stages.1.downsample.stage_norm."),
    (r"^stage_norms\.1\.", "stages.2.downsample.stage_norm."),
    (r"^stage_norms\.2\.", "stages.3.downsample.stage_norm."),
    (r"^stage_norms\.3\.", "norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Authors' names and shapes -> ours; tables are interpolated to the model's window."""
    own = model.state_dict()
    state_dict = rename(unwrap(state_dict), _AUTHORS_NAMES)
    for name, value in state_dict.items():
        if name.endswith(".gamma"):
            state_dict[name] = value.flatten()
        elif name.endswith(("height_rel", "width_rel")) and name in own:
            state_dict[name] = _resize_table(value, own[name].shape[0])
    if getattr(model, "dense", False):
        # The classifier's norms between the stages have no place in the dense version.
        gone = ("norm.", "conv_head.", "head.")
        state_dict = {
            name: value
            for name, value in state_dict.items()
            if not name.startswith(gone) and ".stage_norm." not in name
        }
    return state_dict


def _resize_table(table: Tensor, rows: int) -> Tensor:
    if table.shape[0] == rows:
        return table
    resized = F.interpolate(table.t()[None].float(), rows, mode="linear", align_corners=True)
    return resized[0].t().to(table.dtype)


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    arguments = VARIANTS[name].arguments()
    arguments |= tag_arguments(ENTRIES, name, kwargs.get("pretrained_cfg"))
    return build_backbone(UHaloNet, name, pretrained, checkpoint_filter_fn, **(arguments | kwargs))


for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="uhalonet",
            channels=_variant.embed_dims,
            strides=(4, 8, 16, 32),
            params=_variant.params,
            gmacs=_variant.gmacs,
            paper="2103.12731",
            code="https://github.com/OpenGVLab/STM-Evaluation",
            code_licence="MIT",
        ),
        _build,
        module=__name__,
    )
