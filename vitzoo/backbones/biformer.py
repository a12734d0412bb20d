"""BiFormer: vision transformers with bi-level routing attention (arXiv 2303.08810).

A region of the map attends to the few regions that match it best; the last stage attends to
everything. Follows github.com/rayleizhu/BiFormer at 1697bbb (MIT): `models/biformer.py`, the two
Swin-layout ablations `models/biformer_stl.py` and `models/biformer_stl_nchw.py`, and for the dense
version `semantic_segmentation/models_mm/biformer_mm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

from vitzoo.attention import DepthwiseResidual, Linear, Mlp, add_mlp
from vitzoo.attention.conv_bn import conv_bn_act
from vitzoo.attention.routing import AttentionLePE, BiLevelRoutingAttention
from vitzoo.backbones._build import StateDict, build_backbone, rename, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.backbones._staged import Stage, StagedBackbone
from vitzoo.zoo.entries import DataConfig, timm_configs
from vitzoo.zoo.entries.biformer import ENTRIES
from vitzoo.zoo.errors import WeightsError

_NORM_EPS = 1e-6


@register_notrace_module
class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with BatchNorm, GELU between them; odd sides round up."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **factory)
        self.norm1 = nn.BatchNorm2d(dim // 2, **factory)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **factory)
        self.norm2 = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""
        x = conv_bn_act(x, self.conv1, self.norm1, act=self.act)
        return conv_bn_act(x, self.conv2, self.norm2)


@register_notrace_module
class Downsample(nn.Module):
    """3x3 convolution of stride 2, then BatchNorm; odd sides round up."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""
        return conv_bn_act(x.permute(0, 3, 1, 2), self.conv, self.norm).permute(0, 2, 3, 1)


@register_notrace_module
class PatchStem(nn.Module):
    """Patches of 4x4 pixels and BatchNorm; like the reference, it drops a remainder of pixels."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 4, stride=4, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H // 4, W // 4)."""
        return conv_bn_act(x, self.conv, self.norm)


class PatchMerging(nn.Module):
    """BatchNorm, then patches of 2x2 tokens; like the reference, it drops an odd last row."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim, **factory)
        self.conv = nn.Conv2d(in_dim, dim, 2, stride=2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H // 2, W // 2, C')."""
        return self.conv(self.norm(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Depthwise position encoding (or none), attention and MLP, each with its residual."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        pos_embed: bool,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.pos_embed = DepthwiseResidual(dim, **factory) if pos_embed else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return add_mlp(x, self.norm2, self.mlp, self.drop_path)


class BiFormer(StagedBackbone):
    """BiFormer for classification, or its dense version.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier.
        depths: blocks per stage.
        embed_dims: channels per stage.
        num_heads: heads per stage.
        top_k: regions that a query sees, per stage; None is full attention.
        n_win: regions per side in every routed stage: 7 for classification; the authors take 8 for
            segmentation at 512 and 16 for detection. It changes the function, not the weights.
        mlp_ratio: hidden width of the MLPs over the channels.
        swin_layout: 4x4 patches, 2x2 merging and no position encoding (the `stl` ablations).
        values_apart: the authors' second implementation (`stl_nchw`): padding after the projection
            instead of before, and the last stage's convolution on the values, not on the input.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, linear from 0 over all blocks.
        global_pool: pooling of the head.
        dense: build the dense version (section "Dense" of the base class).
        norm_indices: its stages with an output norm.
    """

    output_norm_name = "extra_norms.{}"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        top_k: Sequence[int | None] = (1, 4, 16, None),
        n_win: int = 7,
        mlp_ratio: float = 3.0,
        swin_layout: bool = False,
        values_apart: bool = False,
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
        self.values_apart = values_apart
        make_stem, make_downsample = (
            (PatchStem, PatchMerging) if swin_layout else (Stem, Downsample)
        )
        self.stem = make_stem(in_chans, embed_dims[0], **factory)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for i, (depth, dim, heads, chosen) in enumerate(
            zip(depths, embed_dims, num_heads, top_k, strict=True)
        ):
            attn: Any = partial(AttentionLePE, lepe_on="value" if values_apart else "input")
            if chosen is not None:
                attn = partial(
                    BiLevelRoutingAttention, n_win=n_win, top_k=chosen, pad_after=values_apart
                )
            block: Any = partial(
                Block, dim, mlp_ratio=mlp_ratio, pos_embed=not swin_layout, **factory
            )
            blocks = [
                block(attn(dim, heads, **factory), drop_path=next(rates)) for _ in range(depth)
            ]
            downsample = make_downsample(embed_dims[i - 1], dim, **factory) if i else nn.Identity()
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity() if dense else nn.BatchNorm2d(embed_dims[-1], **factory)
        self.head = ClassifierHead(
            self.num_features,
            self.num_classes,
            pool_type="" if dense else global_pool,
            drop_rate=drop_rate,
            **factory,
        )
        self._finish(partial(LayerNorm2d, eps=_NORM_EPS, **factory))

    def init_weights(self) -> None:
        """Linear layers from a truncated normal of 0.02; convolutions keep torch's default.

        The second implementation has 1x1 convolutions for linear layers, so there they keep it too.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and not (
                self.values_apart and isinstance(module, Linear)
            ):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The numbers that tell one BiFormer from another."""

    depths: tuple[int, ...]
    dim: int
    params: int
    gmacs: float
    mlp_ratio: float = 3.0
    swin_layout: bool = False
    values_apart: bool = False

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Channels double from stage to stage."""
        return tuple(self.dim * 2**i for i in range(4))

    def arguments(self) -> dict[str, Any]:
        """Arguments of `BiFormer`."""
        return {
            "depths": self.depths,
            "embed_dims": self.embed_dims,
            # Heads of 32 channels where attention is routed; the last stage always has 8.
            "num_heads": (*(dim // 32 for dim in self.embed_dims[:3]), 8),
            "mlp_ratio": self.mlp_ratio,
            "swin_layout": self.swin_layout,
            "values_apart": self.values_apart,
        }


_STL = partial(
    Variant, depths=(2, 2, 6, 2), dim=96, params=28_372_552, mlp_ratio=4.0, swin_layout=True
)
VARIANTS = {
    "vz_biformer_tiny": Variant(depths=(2, 2, 8, 2), dim=64, params=13_142_760, gmacs=2.228),
    "vz_biformer_small": Variant(depths=(4, 4, 18, 4), dim=64, params=25_536_232, gmacs=4.487),
    "vz_biformer_base": Variant(depths=(4, 4, 18, 4), dim=96, params=56_804_968, gmacs=9.795),
    "vz_biformer_stl": _STL(gmacs=4.590),
    "vz_biformer_stl_nchw": _STL(gmacs=4.593, values_apart=True),
}

default_cfgs = generate_default_cfgs(
    timm_configs(
        {
            name: DataConfig(
                first_conv="stem.conv" if variant.swin_layout else "stem.conv1",
                classifier="head.fc",
                licence="mit",
            )
            for name, variant in VARIANTS.items()
        },
        ENTRIES,
    )
)

_STEM_NAMES = (
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.4\.", "stem.norm2."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.norm."),
    (r"^stages\.(\d+)\.(\d+)\.pos_embed\.", r"stages.\1.\2.pos_embed.proj."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
)
_SWIN_STEM_NAMES = (
    (r"^downsample_layers\.0\.0\.", "stem.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.norm."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.conv."),
)
_BLOCK_NAMES = (
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"\battn\.qkv\.qkv\.", "attn.qkv."),
    (r"\battn\.qkv_linear\.", "attn.qkv."),
    (r"\battn\.(?:wo|output_linear)\.", "attn.proj."),
    (r"\battn\.router\.emb\.", "attn.router."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names, of any of the three layouts or a dense version -> ours."""
    state_dict = unwrap(state_dict)
    if not any(name.startswith("downsample_layers.") for name in state_dict):
        return state_dict
    # Both implementations have the same names and shapes here, but are different functions.
    second = any(".attn.output_linear." in name for name in state_dict)
    first = any(".attn.wo." in name for name in state_dict)
    if (second or first) and getattr(model, "values_apart", second) != second:
        raise WeightsError(
            f"the file is of the authors' {'second' if second else 'first'} implementation: build "
            f"the model with values_apart={second} (vz_biformer_stl{'_nchw' * second} is)"
        )
    swin_layout = "downsample_layers.0.3.weight" not in state_dict
    rules = (_SWIN_STEM_NAMES if swin_layout else _STEM_NAMES) + _BLOCK_NAMES
    return {
        # The 1x1 convolutions of `stl_nchw` are linear layers here.
        name: value.flatten(1) if value.shape[2:] == (1, 1) else value
        for name, value in rename(state_dict, rules).items()
    }


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    arguments = {**VARIANTS[name].arguments(), **kwargs}
    return build_backbone(BiFormer, name, pretrained, checkpoint_filter_fn, **arguments)


for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="biformer",
            channels=_variant.embed_dims,
            strides=(4, 8, 16, 32),
            params=_variant.params,
            gmacs=_variant.gmacs,
            paper="2303.08810",
            code="https://github.com/rayleizhu/BiFormer",
            code_licence="MIT",
            odd_sides="all down" if _variant.swin_layout else "up",
            choices="top-k regions of each region, in the first three stages",
        ),
        _build,
        module=__name__,
    )
