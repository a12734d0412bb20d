"""DaViT: dual attention vision transformers (arXiv 2204.03645).

A stage alternates attention inside windows with attention between channels; depthwise convolutions
carry position. Follows github.com/dingmyu/davit at fc79470 (MIT): `timm/models/davit.py` and, for
the dense version, `mmdet/mmdet/models/backbones/davit.py`. Parameter names are those of timm's
port, so timm's files load as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vitzoo.attention import (
    ChannelAttention,
    DepthwiseResidual,
    Mlp,
    WindowAttention,
    add_mlp,
    conv_channels_last,
    pad_image_to_multiple,
    pad_to_multiple,
)
from vitzoo.backbones._build import StateDict, build_backbone, rename, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.backbones._staged import Stage, StagedBackbone
from vitzoo.zoo.entries import DataConfig, tag_arguments, timm_configs
from vitzoo.zoo.entries.davit import ENTRIES

_NORM_EPS = 1e-5


class Stem(nn.Module):
    """7x7 convolution of stride 4 and a LayerNorm; the image is padded to multiples of 4."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **factory)
        self.norm = LayerNorm2d(dim, eps=_NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""
        x = pad_image_to_multiple(x, 4)
        return self.norm(self.conv(x.contiguous(memory_format=torch.channels_last)))


class Downsample(nn.Module):
    """LayerNorm over the input's channels, then a strided convolution; odd sides round up."""

    def __init__(self, in_dim: int, dim: int, *, overlapped: bool = False, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=_NORM_EPS, **factory)
        kernel_size = 3 if overlapped else 2
        self.conv = nn.Conv2d(
            in_dim,
            dim,
            kernel_size,
            stride=2,
            padding=kernel_size // 2 if overlapped else 0,
            **factory,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""
        # The zeros enter after the norm.
        return conv_channels_last(pad_to_multiple(self.norm(x), 2), self.conv)


class Block(nn.Module):
    """Depthwise convolution, attention, depthwise convolution, MLP, each with its residual."""

    def __init__(
        self, dim: int, attn: nn.Module, *, mlp_ratio: float, drop_path: float, **factory: Any
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, dim, eps=_NORM_EPS, **factory)
        self.cpe1 = DepthwiseResidual(dim, **factory)
        self.norm1 = norm()
        self.attn = attn
        self.cpe2 = DepthwiseResidual(dim, **factory)
        self.norm2 = norm()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return add_mlp(x, self.norm2, self.mlp, self.drop_path)


class DaViT(StagedBackbone):
    """DaViT for classification, or its dense version.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier.
        depths: dual blocks (one spatial and one channel block) per stage.
        embed_dims: channels per stage.
        num_heads: heads per stage, of both attentions.
        window_size: side of the spatial windows in tokens.
        mlp_ratio: hidden width of the MLPs over the channels.
        overlapped_patch: downsample with overlapping 3x3 patches instead of 2x2 ones (Florence-2).
        channel_mixes: see `ChannelAttention`.
        named_blocks: name a dual block's halves `spatial_block` and `channel_block`, as timm's
            Florence-2 towers do, instead of 0 and 1.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, linear from 0 over all single blocks.
        global_pool: pooling of the head.
        dense: build the dense version (section "Dense" of the base class).
        norm_indices: its stages with an output norm.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        overlapped_patch: bool = False,
        channel_mixes: str = "query",
        named_blocks: bool = False,
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
        rates = iter(torch.linspace(0, drop_path_rate, 2 * sum(depths), device="cpu").tolist())
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, embed_dims, num_heads, strict=True)):
            block: Any = partial(Block, dim, mlp_ratio=mlp_ratio, **factory)
            dual_blocks = []
            for _ in range(depth):
                window = WindowAttention(dim, heads, window_size, **factory)
                channel = ChannelAttention(dim, heads, mixes=channel_mixes, **factory)
                pair = (block(window, drop_path=next(rates)), block(channel, drop_path=next(rates)))
                dual_blocks.append(_dual_block(*pair, named=named_blocks))
            downsample = (
                Downsample(embed_dims[i - 1], dim, overlapped=overlapped_patch, **factory)
                if i
                else nn.Identity()
            )
            stages.append(Stage(downsample, dual_blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        output_norm = partial(LayerNorm2d, eps=_NORM_EPS, **factory)
        # The average comes before the norm: the other order lost 0.4 points in timm's first port.
        self.head = NormMlpClassifierHead(
            self.num_features,
            self.num_classes,
            pool_type="" if dense else global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.Identity if dense else partial(LayerNorm2d, eps=_NORM_EPS),
            **factory,
        )
        self._finish(output_norm)

    def init_weights(self) -> None:
        """Linear layers from a truncated normal of 0.02; convolutions keep torch's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _dual_block(spatial: nn.Module, channel: nn.Module, *, named: bool) -> nn.Sequential:
    if named:
        return nn.Sequential(OrderedDict(spatial_block=spatial, channel_block=channel))
    return nn.Sequential(spatial, channel)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The numbers that tell one DaViT from another."""

    depths: tuple[int, ...]
    dim: int
    heads: int
    params: int
    gmacs: float | None = None
    input_size: tuple[int, int, int] = (3, 224, 224)
    florence: bool = False

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Channels double from stage to stage."""
        return tuple(self.dim * 2**i for i in range(4))

    def arguments(self) -> dict[str, Any]:
        """Arguments of `DaViT`."""
        arguments: dict[str, Any] = {
            "depths": self.depths,
            "embed_dims": self.embed_dims,
            "num_heads": tuple(self.heads * 2**i for i in range(4)),
        }
        if self.florence:
            arguments |= {
                "window_size": 12,
                "overlapped_patch": True,
                "channel_mixes": "value",
                "named_blocks": True,
            }
        return arguments


_FLORENCE_SIZE = (3, 768, 768)
VARIANTS = {
    "vz_davit_tiny": Variant(depths=(1, 1, 3, 1), dim=96, heads=3, params=28_360_168, gmacs=4.522),
    "vz_davit_small": Variant(depths=(1, 1, 9, 1), dim=96, heads=3, params=49_745_896, gmacs=8.773),
    "vz_davit_base": Variant(
        depths=(1, 1, 9, 1), dim=128, heads=4, params=87_954_408, gmacs=15.474
    ),
    "vz_davit_large": Variant(depths=(1, 1, 9, 1), dim=192, heads=6, params=196_811_752),
    "vz_davit_huge": Variant(depths=(1, 1, 9, 1), dim=256, heads=8, params=348_922_856),
    "vz_davit_giant": Variant(depths=(1, 1, 12, 3), dim=384, heads=12, params=1_406_470_120),
    "vz_davit_base_fl": Variant(
        depths=(1, 1, 9, 1),
        dim=128,
        heads=4,
        params=90_370_048,
        gmacs=190.3,
        input_size=_FLORENCE_SIZE,
        florence=True,
    ),
    "vz_davit_huge_fl": Variant(
        depths=(1, 1, 9, 1),
        dim=256,
        heads=8,
        params=360_636_416,
        gmacs=744.8,
        input_size=_FLORENCE_SIZE,
        florence=True,
    ),
}

default_cfgs = generate_default_cfgs(
    timm_configs(
        {
            name: DataConfig(
                first_conv="stem.conv",
                classifier="head.fc",
                input_size=variant.input_size,
                crop_pct=0.95,
                licence="mit",
            )
            for name, variant in VARIANTS.items()
        },
        ENTRIES,
    )
)

_AUTHORS_NAMES = (
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\bcpe\.0\.", "cpe1."),
    (r"\bcpe\.1\.", "cpe2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^norms\.", "head.norm."),
)
_FLORENCE_NAMES = (
    (r"^convs\.0\.proj\.", "stem.conv."),
    (r"^convs\.0\.norm\.", "stem.norm."),
    (r"^convs\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^convs\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.conv([12])\.fn\.dw\.", r".cpe\1.proj."),
    (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(?:window|channel)_attn\.fn\.", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".mlp."),
)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Authors', mmdet's, Florence-2's or timm's names -> ours (timm's)."""
    state_dict = unwrap(state_dict)
    tower = "vision_tower."
    if any(name.startswith(tower) for name in state_dict):
        found = {
            name.removeprefix(tower): value
            for name, value in state_dict.items()
            if name.startswith(tower)
        }
        return rename(found, _FLORENCE_NAMES)
    return rename(state_dict, _AUTHORS_NAMES)


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    variant = VARIANTS[name]
    arguments = variant.arguments()
    arguments |= tag_arguments(ENTRIES, name, kwargs.get("pretrained_cfg"))
    return build_backbone(
        DaViT,
        name,
        pretrained,
        checkpoint_filter_fn,
        # The towers' files hold no head norm.
        optional=("head.norm.",) if variant.florence else (),
        **(arguments | kwargs),
    )


for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="davit",
            channels=_variant.embed_dims,
            strides=(4, 8, 16, 32),
            input_size=_variant.input_size,
            params=_variant.params,
            gmacs=_variant.gmacs,
            paper="2204.03645",
            code="https://github.com/dingmyu/davit",
            code_licence="MIT",
        ),
        _build,
        module=__name__,
    )
