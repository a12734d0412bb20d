"""NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001): neighborhood attention, plain and dilated.

Every block attends to the keys around a query; DiNAT alternates with dilated neighborhoods, which
own no parameter and change with the task (`set_dilations`). DiNAT_s is the same over Swin's
patches; the isotropic models keep one map of stride 16. Follows
github.com/SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (MIT): `classification/` and, for
the dense version, `detection/` and `segmentation/`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vitzoo.attention.layers import (
    Linear,
    Mlp,
    add_mlp,
    conv_channels_last,
    pad_image_to_multiple,
    pad_to_multiple,
)
from vitzoo.attention.neighborhood import NeighborhoodAttention
from vitzoo.backbones._build import StateDict, build_backbone, rename, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.backbones._staged import Stage, StagedBackbone
from vitzoo.zoo.entries import DataConfig, tag_arguments, timm_configs
from vitzoo.zoo.entries.nat import ENTRIES

NORM_EPS = 1e-5
# One pattern per stage, repeated along the stage's blocks.
Dilations = Sequence[Sequence[int]]


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, and a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        conv: Any = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1, **factory)
        self.conv1 = conv(in_chans, dim // 2)
        self.conv2 = conv(dim // 2, dim)
        self.norm = LayerNorm2d(dim, eps=NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.conv2(self.conv1(x)))


class PatchStem(nn.Module):
    """Non-overlapping patches and a LayerNorm; the image is padded to multiples of the patch."""

    def __init__(self, in_chans: int, dim: int, *, patch_size: int = 4, **factory: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **factory)
        self.norm = LayerNorm2d(dim, eps=NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / patch), ceil(W / patch))."""
        x = pad_image_to_multiple(x, self.patch_size)
        return self.norm(self.conv(x.contiguous(memory_format=torch.channels_last)))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 without bias, then a LayerNorm; odd sides round up."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **factory)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""
        return self.norm(conv_channels_last(x, self.reduction))


class PatchMerge(nn.Module):
    """Swin's merging of 2x2 cells: LayerNorm over the four, then a linear layer without bias."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim, eps=NORM_EPS, **factory)
        self.reduction = Linear(4 * in_dim, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""
        x = pad_to_multiple(x, 2)
        # The checkpoints' order: down a column of cells first.
        cells = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(cells, dim=-1)))


class Block(nn.Module):
    """Neighborhood attention and MLP, each with its residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)

        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.attn = NeighborhoodAttention(dim, num_heads, kernel_size, **factory)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return add_mlp(x, self.norm2, self.mlp, self.ls2, self.drop_path)


# The tables of the authors' detection and segmentation configurations.
_DENSE_MIDDLE = (1, 3, 1, 5, 1, 7)
_ADE20K_MIDDLE = (1, 2, 1, 3, 1, 4)
_ADE20K_640_MIDDLE = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
DILATIONS: dict[str, Dilations] = {
    "coco": ((1, 28), (1, 7, 1, 14), _DENSE_MIDDLE, (1, 3)),
    "ade20k": ((1, 16), (1, 4, 1, 8), _ADE20K_MIDDLE, (1, 2)),
    "ade20k_640": ((1, 20), (1, 5, 1, 10), _ADE20K_640_MIDDLE, (1, 2)),
    # Of DiNAT-L with kernels of 11, on all three tasks.
    "mask2former": ((1, 14, 1), (1, 4, 1, 7), (*(1, 2, 1, 3) * 4, 1, 3), (1,)),
}
# DiNAT_s has two blocks in the second stage, where DiNAT has four.
SWIN_DILATIONS: dict[str, Dilations] = {
    "coco": ((1, 28), (1, 14), _DENSE_MIDDLE, (1, 3)),
    "ade20k": ((1, 16), (1, 8), _ADE20K_MIDDLE, (1, 2)),
    "ade20k_640": ((1, 20), (1, 10), _ADE20K_640_MIDDLE, (1, 2)),
}


def _fit(dilations: Dilations, depths: Sequence[int]) -> Dilations:
    """A table's patterns for stages that may be fewer or shorter."""
    return [tuple(pattern[:depth]) for pattern, depth in zip(dilations, depths, strict=False)]


def _as_pattern(given: Any, most: int) -> tuple[int, ...] | None:
    """The dilations as plain numbers; None if they are none for a stage of `most` blocks."""
    try:
        found = tuple(operator.index(dilation) for dilation in given)
    except TypeError:
        return None
    return found if 1 <= len(found) <= most and min(found) >= 1 else None


class DilatedBackbone(StagedBackbone):
    """Base of the models whose dilations change at run time.

    A constructor ends with `_finish_dilated(...)`.
    """

    dilation_tables: dict[str, Dilations]

    def _finish_dilated(
        self,
        make_output_norm: Any,
        tables: Mapping[str, Dilations],
        dilations: str | Dilations,
    ) -> None:
        self._finish(make_output_norm)
        depths = [len(group) for group in self.attention_groups()]
        self.dilation_tables = dict(tables)
        if not isinstance(dilations, str):
            dilations = _fit(dilations, depths)
        self.set_dilations(dilations)
        # After set_dilations, which says so if there is no table of that name.
        built = tables[dilations] if isinstance(dilations, str) else dilations
        self.dilation_tables["built"] = built

    def attention_groups(self) -> list[list[NeighborhoodAttention]]:
        """The attention modules that one pattern of dilations covers: a stage's."""
        return [_attention(stage) for stage in self.stages]

    def set_dilations(self, dilations: str | Dilations) -> None:
        """Change the dilations of all blocks; they own no parameter.

        Args:
            dilations: one pattern per stage, repeated along the stage's blocks, or the name of a
                table: `built` (the constructor's) and, where the authors published them, `coco`,
                `ade20k` (512 pixels), `ade20k_640` and `mask2former`.

        Raises:
            ValueError: unknown name, a pattern missing or longer than its stage, or a dilation
                that is no whole number from 1 up.
        """
        stages = self.attention_groups()
        if isinstance(dilations, str):
            if dilations not in self.dilation_tables:
                known = ", ".join(self.dilation_tables) or "none"
                raise ValueError(f"no dilation table {dilations!r} for this model; known: {known}")
            dilations = _fit(self.dilation_tables[dilations], [len(stage) for stage in stages])
        if not hasattr(dilations, "__len__") or len(dilations) != len(stages):
            raise ValueError(f"{len(stages)} stages take a list of dilations each, got {dilations}")
        patterns = []
        for i, (given, modules) in enumerate(zip(dilations, stages, strict=True)):
            pattern = _as_pattern(given, len(modules))
            if pattern is None:
                most = len(modules)
                raise ValueError(
                    f"stage {i} takes a list of 1 to {most} dilations from 1 up, got {given}"
                )
            patterns.append(pattern)
        for pattern, modules in zip(patterns, stages, strict=True):
            for module, dilation in zip(modules, cycle(pattern), strict=False):
                module.dilation = dilation

    def init_weights(self) -> None:
        """Linear layers and bias tables from a truncated normal of 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, NeighborhoodAttention):
                trunc_normal_(module.rpb, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative position bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


def _attention(stage: nn.Module) -> list[NeighborhoodAttention]:
    return [m for m in stage.modules() if isinstance(m, NeighborhoodAttention)]


class NAT(DilatedBackbone):
    """NAT, DiNAT or DiNAT_s for classification, or the dense version.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier.
        depths: blocks per stage.
        embed_dims: channels per stage.
        num_heads: heads per stage.
        kernel_size: keys per axis.
        dilations: see `set_dilations`.
        mlp_ratio: hidden width of the MLPs over the channels.
        layer_scale: initial scale of the residual branches; None leaves it out.
        swin_patches: stem and downsampling of DiNAT_s.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, linear from 0.
        global_pool: pooling of the head.
        dense: build the dense version (see the base class).
        norm_indices: its stages with an output norm.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 4, 6, 5),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: str | Dilations = ((1,), (1,), (1,), (1,)),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        swin_patches: bool = False,
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
        make_stem: Any = PatchStem if swin_patches else ConvStem
        make_downsample: Any = PatchMerge if swin_patches else ConvDownsample
        self.stem = make_stem(in_chans, embed_dims[0], **factory)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, embed_dims, num_heads, strict=True)):
            block: Any = partial(
                Block,
                dim,
                heads,
                kernel_size=kernel_size,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                **factory,
            )
            downsample = make_downsample(embed_dims[i - 1], dim, **factory) if i else nn.Identity()
            stages.append(Stage(downsample, [block(drop_path=next(rates)) for _ in range(depth)]))
        self.stages = nn.Sequential(*stages)
        output_norm = partial(LayerNorm2d, eps=NORM_EPS, **factory)
        self.norm = nn.Identity() if dense else output_norm(self.num_features)
        self.head = ClassifierHead(
            self.num_features,
            self.num_classes,
            pool_type="" if dense else global_pool,
            drop_rate=drop_rate,
            **factory,
        )
        self._finish_dilated(output_norm, SWIN_DILATIONS if swin_patches else DILATIONS, dilations)


class IsotropicNAT(DilatedBackbone):
    """NAT or DiNAT on one map of stride 16, without position embedding.

    Every block is a stage of its own, so that timm's feature surface counts blocks.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: heads.
        dilations: a sequence of one pattern, repeated along the blocks.
        in_chans, num_classes, kernel_size, mlp_ratio, drop_rate, drop_path_rate, global_pool: as
            in `NAT`.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 12,
        patch_size: int = 16,
        kernel_size: int = 7,
        dilations: Dilations = ((1,),),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            channels=(embed_dim,) * depth,
            strides=(patch_size,) * depth,
            in_chans=in_chans,
            num_classes=num_classes,
            dense=False,
            norm_indices=(),
        )
        factory = {"device": device, "dtype": dtype}
        self.stem = PatchStem(in_chans, embed_dim, patch_size=patch_size, **factory)
        block: Any = partial(
            Block, embed_dim, num_heads, kernel_size=kernel_size, mlp_ratio=mlp_ratio, **factory
        )
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.stages = nn.Sequential(
            *(Stage(nn.Identity(), [block(drop_path=rate)]) for rate in rates)
        )
        self.norm = LayerNorm2d(embed_dim, eps=NORM_EPS, **factory)
        self.head = ClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory
        )
        self._finish_dilated(LayerNorm2d, {}, dilations)

    def attention_groups(self) -> list[list[NeighborhoodAttention]]:
        """All attention modules as one group."""
        return [_attention(self.stages)]


def _fit_bias_tables(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Bias tables of another kernel size, interpolated to the model's (bicubic)."""
    wanted = {name: p.shape for name, p in model.named_parameters() if name.endswith(".rpb")}
    fitted = dict(state_dict)
    for name, shape in wanted.items():
        table = state_dict.get(name)
        if table is not None and table.shape[1:] != shape[1:]:
            resized = F.interpolate(table[None].float(), size=shape[1:], mode="bicubic")
            fitted[name] = resized[0].to(table.dtype)
    return fitted


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The numbers that tell one NAT or DiNAT from another; no heads: 32 channels each."""

    depths: tuple[int, ...]
    dim: int
    mlp_ratio: float
    params: int
    gmacs: float | None = None
    layer_scale: float | None = None
    dilations: Dilations = ((1,),) * 4
    kernel_size: int = 7
    swin_patches: bool = False
    input_size: tuple[int, int, int] = (3, 224, 224)

    @property
    def isotropic(self) -> bool:
        """Whether all blocks work on one map."""
        return len(self.depths) == 1

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Channels double from stage to stage."""
        return tuple(self.dim * 2**i for i in range(len(self.depths)))

    def arguments(self) -> dict[str, Any]:
        """Arguments of `NAT` or `IsotropicNAT`."""
        shared = {
            "kernel_size": self.kernel_size,
            "mlp_ratio": self.mlp_ratio,
            "dilations": self.dilations,
        }
        if self.isotropic:
            return shared | {
                "depth": self.depths[0],
                "embed_dim": self.dim,
                "num_heads": self.dim // _HEAD_DIM,
            }
        return shared | {
            "depths": self.depths,
            "embed_dims": self.embed_dims,
            "num_heads": tuple(dim // _HEAD_DIM for dim in self.embed_dims),
            "layer_scale": self.layer_scale,
            "swin_patches": self.swin_patches,
        }


_HEAD_DIM = 32
_SIZE_384 = (3, 384, 384)
# Dilations that make a neighborhood span each map of a 224 (384) pixel image.
_AT_224 = ((1, 8), (1, 4), (1, 2), (1,))
_AT_384 = ((1, 13), (1, 6), (1, 3), (1,))
_mini = partial(Variant, depths=(3, 4, 6, 5), dim=64, mlp_ratio=3, params=19_984_174, gmacs=2.73)
_tiny = partial(Variant, depths=(3, 4, 18, 5), dim=64, mlp_ratio=3, params=27_901_582, gmacs=4.3)
_small = partial(Variant, depths=(3, 4, 18, 5), dim=96, mlp_ratio=2, gmacs=7.8)
_base = partial(
    Variant,
    depths=(3, 4, 18, 5),
    dim=128,
    mlp_ratio=2,
    layer_scale=1e-5,
    params=89_769_652,
    gmacs=13.7,
)
_large = partial(Variant, depths=(3, 4, 18, 5), dim=192, mlp_ratio=2)
_swin = partial(Variant, depths=(2, 2, 18, 2), mlp_ratio=4, swin_patches=True, dilations=_AT_224)
_iso_small = partial(Variant, depths=(12,), dim=384, mlp_ratio=4, params=21_999_736, gmacs=4.3)
_iso_base = partial(Variant, depths=(12,), dim=768, mlp_ratio=4, params=86_465_800, gmacs=16.9)
VARIANTS = {
    "vz_nat_mini": _mini(),
    "vz_nat_tiny": _tiny(),
    "vz_nat_small": _small(layer_scale=1e-5, params=50_743_297),
    "vz_nat_base": _base(),
    "vz_dinat_mini": _mini(dilations=_AT_224),
    "vz_dinat_tiny": _tiny(dilations=_AT_224),
    "vz_dinat_small": _small(dilations=_AT_224, params=50_719_681),
    "vz_dinat_base": _base(dilations=_AT_224),
    "vz_dinat_large": _large(dilations=_AT_224, params=200_943_514, gmacs=30.6),
    "vz_dinat_large_384": _large(
        dilations=_AT_384, params=200_943_514, gmacs=89.7, input_size=_SIZE_384
    ),
    "vz_dinat_large_384_11x11": _large(
        dilations=_AT_224, params=201_144_250, gmacs=92.4, kernel_size=11, input_size=_SIZE_384
    ),
    "vz_dinat_s_tiny": _swin(depths=(2, 2, 6, 2), dim=96, params=28_288_354, gmacs=4.5),
    "vz_dinat_s_small": _swin(dim=96, params=49_606_258, gmacs=8.7),
    "vz_dinat_s_base": _swin(dim=128, params=87_768_224, gmacs=15.4),
    "vz_dinat_s_large": _swin(dim=192, params=196_532_476, gmacs=34.5),
    "vz_dinat_s_large_384": _swin(
        dim=192, params=196_532_476, gmacs=101.5, dilations=_AT_384, input_size=_SIZE_384
    ),
    "vz_nat_iso_small": _iso_small(dilations=((1,),)),
    "vz_nat_iso_base": _iso_base(dilations=((1,),)),
    "vz_dinat_iso_small": _iso_small(dilations=((1, 2),)),
    "vz_dinat_iso_base": _iso_base(dilations=((1, 2),)),
}

default_cfgs = generate_default_cfgs(
    timm_configs(
        {
            name: DataConfig(
                first_conv="stem.conv"
                if variant.swin_patches or variant.isotropic
                else "stem.conv1",
                classifier="head.fc",
                input_size=variant.input_size,
                reduction=16 if variant.isotropic else 32,
                crop_pct=1.0 if variant.input_size == _SIZE_384 else 0.875,
                licence="mit",
            )
            for name, variant in VARIANTS.items()
        },
        ENTRIES,
    )
)

_AUTHORS_NAMES = (
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    # The isotropic models have no stages.
    (r"^layers\.(\d+)\.", r"stages.\1.blocks.0."),
)

# transformers/models/{nat,dinat}/modeling_{nat,dinat}.py, up to its version 4; the authors' hub
# repositories hold such files.
_TRANSFORMERS_NAMES = (
    (r"^(?:nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.levels\.", "levels."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def _from_transformers(state_dict: StateDict) -> StateDict:
    """Names of Hugging Face's transformers -> the authors'; other files as they are."""
    if not any(".attention.self.query." in name for name in state_dict):
        return state_dict
    found: StateDict = {}
    state_dict = rename(state_dict, _TRANSFORMERS_NAMES)
    for name, value in state_dict.items():
        if name.endswith(".layer_scale_parameters"):
            block = name.removesuffix("layer_scale_parameters")
            found |= {f"{block}gamma1": value[0], f"{block}gamma2": value[1]}
        elif ".attn.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            # Of a torn file the shape will say that something is missing.
            joined = torch.cat([state_dict[part] for part in parts if part in state_dict])
            found[name.replace(".query.", ".qkv.")] = joined
        elif ".attn.key." not in name and ".attn.value." not in name:
            found[name] = value
    return found


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Authors' or transformers' names -> ours; tables of another kernel size are interpolated."""
    state_dict = _from_transformers(unwrap(state_dict))
    # A level ends with the downsampling to the next; here a stage starts with it.
    moved = {
        re.sub(r"^(?:levels|layers)\.(\d+)\.downsample\.", _next_stage, name): value
        for name, value in state_dict.items()
    }
    return _fit_bias_tables(rename(moved, _AUTHORS_NAMES), model)


def _next_stage(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) + 1}.downsample."


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    variant = VARIANTS[name]
    arguments = variant.arguments()
    arguments |= tag_arguments(ENTRIES, name, kwargs.get("pretrained_cfg")) | kwargs
    if variant.isotropic:
        arguments.setdefault("out_indices", (-1,))
    return build_backbone(
        IsotropicNAT if variant.isotropic else NAT,
        name,
        pretrained,
        checkpoint_filter_fn,
        **arguments,
    )


for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="nat",
            channels=_variant.embed_dims,
            strides=(16,) if _variant.isotropic else (4, 8, 16, 32),
            input_size=_variant.input_size,
            params=_variant.params,
            gmacs=_variant.gmacs,
            paper="2209.15001" if "dinat" in _name or "iso" in _name else "2204.07143",
            code="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
            code_licence="MIT",
        ),
        _build,
        module=__name__,
    )
