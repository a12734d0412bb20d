"""HaloNet: attention inside blocks with a halo (arXiv 2103.12731).

Two of the three networks of that name; the third is `uhalonet.py`.

- timm's HaloNets, ResNets and RegNets with halo attention in some blocks: timm's own configurations
  (timm 1.0.31, `timm/models/byoanet.py`, Apache-2.0) with the zoo's attention inside. timm's files
  load as they are, and any size runs, where timm takes multiples of the block only.
- the paper's H0 to H7. No code or weights of the authors are known; the reading here gives the
  paper's parameter counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from timm.layers import DropPath, make_divisible
from timm.models import generate_default_cfgs
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import (
    BottleneckBlock,
    ByoBlockCfg,
    ByobNet,
    ByoModelCfg,
    LayerFn,
    SelfAttnBlock,
    expand_blocks_cfg,
)
from torch import Tensor, nn

from vitzoo.attention.conv_bn import ResidualConvBn, fuse_conv_bn
from vitzoo.attention.halo import HaloAttention
from vitzoo.backbones._build import StateDict, build_backbone, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.zoo.entries import DataConfig, timm_configs
from vitzoo.zoo.entries.halonet import ENTRIES


def _fit_groups(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Block arguments whose channel groups divide the bottleneck, for narrow networks."""
    base = kwargs["in_chs" if kwargs.get("bottle_in") else "out_chs"]
    width = make_divisible(base * kwargs["bottle_ratio"])
    return kwargs | {"group_size": math.gcd(kwargs["group_size"] or 0, width)}


class Bottleneck(BottleneckBlock):
    """timm's bottleneck with the residual's sum inside its last convolution."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**_fit_groups(kwargs))
        self.conv3_1x1: nn.Module = ResidualConvBn(self.conv3_1x1, self.drop_path, self.act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        branch = self.conv2b_kxk(self.conv2_kxk(self.conv1_1x1(x)))
        shortcut = None if self.shortcut is None else self.shortcut(x)
        return self.conv3_1x1(self.attn(branch), shortcut)


class HaloBottleneck(SelfAttnBlock):
    """timm's attention bottleneck with the residual's sum inside its last convolution."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**_fit_groups(kwargs))
        self.conv3_1x1: nn.Module = ResidualConvBn(self.conv3_1x1, self.drop_path, self.act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        branch = self.self_attn(self.conv2_kxk(self.conv1_1x1(x)))
        shortcut = None if self.shortcut is None else self.shortcut(x)
        return self.conv3_1x1(self.post_attn(branch), shortcut)


class PaperBlock(nn.Module):
    """The paper's block: its values are `value_ratio` times as wide as queries and keys.

    The first block of a stage has a projected shortcut even where the shapes agree: only so do the
    parameter counts come out.

    Args:
        in_chs: channels in.
        out_chs: channels out.
        stride: of the attention and of the shortcut.
        bottle_ratio: width of queries and keys over `out_chs`.
        value_ratio: width of the values over that of queries and keys.
        first: whether the block begins a stage.
        drop_path_rate: stochastic depth of the branch.
        layers: timm's layer factories, the attention among them.
        downsample, dilation, group_size, drop_block: timm's arguments that this block ignores.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        stride: int,
        bottle_ratio: float,
        value_ratio: float,
        first: bool,
        drop_path_rate: float,
        layers: LayerFn,
        downsample: str,
        dilation: tuple[int, int],
        group_size: int | None,
        drop_block: Any,
        **factory: Any,
    ) -> None:
        super().__init__()
        width = make_divisible(out_chs * bottle_ratio)
        value_width = make_divisible(width * value_ratio)
        conv_bn = layers.conv_norm_act
        self.shortcut = (
            conv_bn(in_chs, out_chs, 1, stride=stride, apply_act=False, **factory)
            if first
            else nn.Identity()
        )
        self.conv1_1x1 = conv_bn(in_chs, width, 1, **factory)
        heads = layers.self_attn.keywords["num_heads"]
        self.self_attn = layers.self_attn(
            width, value_width, stride=stride, dim_head=width // heads, **factory
        )
        self.post_attn = layers.norm_act(value_width, **factory)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.act = layers.act(inplace=True)
        self.conv3_1x1 = ResidualConvBn(
            conv_bn(value_width, out_chs, 1, apply_act=False, **factory), self.drop_path, self.act
        )

    def init_weights(self, zero_init_last: bool = False) -> None:
        """timm's hook, called after every convolution has been initialised."""
        if zero_init_last:
            nn.init.zeros_(self.conv3_1x1.bn.weight)
        self.self_attn.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        branch = self.post_attn(self.self_attn(self.conv1_1x1(x)))
        return self.conv3_1x1(branch, self.shortcut(x))


class HaloNet(ByobNet):
    """timm's ByobNet with halo attention for maps of any size.

    Args:
        cfg: timm's description of the network.
        num_classes: outputs of the classifier.
        depths: blocks per stage; a stage of several kinds of blocks keeps its last ones.
        embed_dims: channels per stage.
        num_heads: heads of the halo attention per stage.
        dense: no classifier; `forward` returns the maps of all strides, 2 to 32.
        norm_indices: must be empty: the family has no output norms.
        **kwargs: of ByobNet: `in_chans`, `global_pool`, `drop_rate`, `drop_path_rate`, fields of
            `cfg`, ...

    Raises:
        ValueError: output norms were asked for, or arguments do not fit the stages.
    """

    def __init__(
        self,
        cfg: ByoModelCfg,
        *,
        num_classes: int = 1000,
        depths: Sequence[int] | None = None,
        embed_dims: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        dense: bool = False,
        norm_indices: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        if norm_indices:
            raise ValueError(
                f"HaloNet has no output norms: norm_indices must be (), got {tuple(norm_indices)}"
            )
        if dense:
            num_classes, kwargs["global_pool"] = 0, ""
        super().__init__(
            _with_our_blocks(cfg, depths, embed_dims, num_heads), num_classes=num_classes, **kwargs
        )
        self.dense = dense
        fuse_conv_bn(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond biases and one-dimensional ones: none."""
        return set()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes); in the dense version the list of all maps."""
        if self.dense:
            return self.forward_intermediates(x, intermediates_only=True)
        return super().forward(x)


def _with_our_blocks(
    cfg: ByoModelCfg,
    depths: Sequence[int] | None,
    embed_dims: Sequence[int] | None,
    num_heads: Sequence[int] | None,
) -> ByoModelCfg:
    """timm's configuration with the zoo's blocks, and other depths, channels and heads."""
    stages = [expand_blocks_cfg(stage) for stage in cfg.blocks]
    for name, given in (("depths", depths), ("embed_dims", embed_dims), ("num_heads", num_heads)):
        if given is not None and len(given) != len(stages):
            raise ValueError(f"{name} needs {len(stages)} numbers, one per stage, got {given}")
    changed = []
    for i, blocks in enumerate(stages):
        if depths is not None:
            missing = max(0, depths[i] - len(blocks))
            blocks = [blocks[0]] * missing + blocks[len(blocks) - min(depths[i], len(blocks)) :]
        width = None if embed_dims is None else embed_dims[i]
        heads = None if num_heads is None else num_heads[i]
        changed.append(
            tuple(_our_block(b, cfg, width, heads, first=j == 0) for j, b in enumerate(blocks))
        )
    return replace(cfg, blocks=tuple(changed), self_attn_layer=None, self_attn_kwargs={})


def _our_block(
    block: ByoBlockCfg, cfg: ByoModelCfg, width: int | None, heads: int | None, *, first: bool
) -> ByoBlockCfg:
    if width is not None:
        block = replace(block, c=width)
    if block.type == "bottle":
        return replace(block, type=partial(Bottleneck))
    if (block.self_attn_layer or cfg.self_attn_layer) != "halo":
        return block
    arguments = cfg.self_attn_kwargs if block.self_attn_kwargs is None else block.self_attn_kwargs
    if heads is not None:
        arguments = arguments | {"num_heads": heads}
    kind = (
        partial(HaloBottleneck) if block.type == "self_attn" else partial(block.type, first=first)
    )
    return replace(block, type=kind, self_attn_layer=HaloAttention, self_attn_kwargs=arguments)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """timm's configuration under timm's name, and what is known of the network."""

    config: str
    channels: tuple[int, ...]
    params: int
    gmacs: float | None
    size: int = 256
    fixed: bool = False
    crop_pct: float = 0.95
    first_conv: str = "stem.conv1.conv"

    def model_cfg(self) -> ByoModelCfg:
        """timm's description."""
        return model_cfgs[self.config]


@dataclass(frozen=True, kw_only=True)
class PaperVariant:
    """A row of the paper's table: rv and rb are the widths of values and of the bottleneck's end
    over that of the queries, `final` the channels of a last 1x1 convolution, 0 for none.
    """

    block: int
    halo: int
    rv: float
    rb: float
    depths: tuple[int, int, int, int]
    final: int
    size: int
    params: int
    gmacs: float | None = None
    fixed: bool = False
    crop_pct: float = 0.875
    first_conv: str = "stem.conv1.conv"

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the maps at strides 2 to 32."""
        *stages, last = (int(self.rb * width) for width in (64, 128, 256, 512))
        return (64, *stages, self.final or last)

    def model_cfg(self) -> ByoModelCfg:
        """The same as a ByobNet."""
        stages = zip(self.depths, (64, 128, 256, 512), (4, 8, 8, 8), (1, 2, 2, 2), strict=True)
        blocks = tuple(
            ByoBlockCfg(
                type=partial(PaperBlock, value_ratio=self.rv),
                d=depth,
                c=int(self.rb * width),
                s=stride,
                br=1 / self.rb,
                self_attn_layer="halo",
                self_attn_kwargs={
                    "block_size": self.block,
                    "halo_size": self.halo,
                    "num_heads": heads,
                },
            )
            for depth, width, heads, stride in stages
        )
        return ByoModelCfg(
            blocks=blocks,
            stem_chs=64,
            stem_type="7x7",
            stem_pool="maxpool",
            num_features=self.final,
        )


_RESNET = (256, 512, 1024, 2048)
VARIANTS: dict[str, Variant | PaperVariant] = {
    "vz_halonet26t": Variant(
        config="halonet26t", channels=(64, *_RESNET), params=12_480_288, gmacs=3.19
    ),
    "vz_halonet50ts": Variant(
        config="halonet50ts",
        channels=(64, *_RESNET),
        params=22_733_280,
        gmacs=5.30,
        crop_pct=0.94,
    ),
    "vz_sehalonet33ts": Variant(
        config="sehalonet33ts",
        channels=(32, 256, 512, 1024, 1280),
        params=13_691_712,
        gmacs=3.55,
        crop_pct=0.94,
    ),
    "vz_eca_halonext26ts": Variant(
        config="eca_halonext26ts",
        channels=(64, *_RESNET),
        params=10_756_885,
        gmacs=2.44,
        crop_pct=0.94,
    ),
    "vz_haloregnetz_b": Variant(
        config="haloregnetz_b",
        channels=(32, 48, 96, 192, 1536),
        params=11_680_072,
        gmacs=1.97,
        size=224,
        crop_pct=0.94,
        first_conv="stem.conv",
    ),
    "vz_halo2botnet50ts_256": Variant(
        config="halo2botnet50ts",
        channels=(32, *_RESNET),
        params=22_635_360,
        gmacs=5.02,
        fixed=True,
    ),
    "vz_lamhalobotnet50ts_256": Variant(
        config="lamhalobotnet50ts",
        channels=(32, *_RESNET),
        params=22_569_824,
        gmacs=None,
        fixed=True,
    ),
    "vz_halonet_h1_timm": Variant(
        config="halonet_h1", channels=(64, 64, 128, 256, 512), params=8_100_056, gmacs=3.00
    ),
    "vz_halonet_h0": PaperVariant(
        block=8, halo=3, rv=1, rb=0.5, depths=(3, 3, 7, 3), final=0, size=256, params=5_502_248
    ),
    "vz_halonet_h1": PaperVariant(
        block=8, halo=3, rv=1, rb=1, depths=(3, 3, 10, 3), final=0, size=256, params=8_105_576
    ),
    "vz_halonet_h2": PaperVariant(
        block=8, halo=3, rv=1, rb=1.25, depths=(3, 3, 11, 3), final=0, size=256, params=9_405_608
    ),
    "vz_halonet_h3": PaperVariant(
        block=10,
        halo=3,
        rv=1,
        rb=1.5,
        depths=(3, 3, 12, 3),
        final=1024,
        size=320,
        params=11_842_792,
    ),
    "vz_halonet_h4": PaperVariant(
        block=12, halo=2, rv=1, rb=3, depths=(3, 3, 12, 3), final=1280, size=384, params=19_103_464
    ),
    "vz_halonet_h5": PaperVariant(
        block=14,
        halo=2,
        rv=2.5,
        rb=2,
        depths=(3, 3, 23, 3),
        final=1536,
        size=448,
        params=30_718_952,
    ),
    "vz_halonet_h6": PaperVariant(
        block=8,
        halo=4,
        rv=3,
        rb=2.75,
        depths=(3, 3, 24, 3),
        final=1536,
        size=512,
        params=43_458_280,
    ),
    "vz_halonet_h7": PaperVariant(
        block=10,
        halo=3,
        rv=4,
        rb=3.5,
        depths=(3, 3, 26, 3),
        final=2048,
        size=600,
        params=67_434_728,
    ),
}

default_cfgs = generate_default_cfgs(
    timm_configs(
        {
            name: DataConfig(
                first_conv=variant.first_conv,
                classifier="head.fc",
                input_size=(3, variant.size, variant.size),
                crop_pct=variant.crop_pct,
                fixed_input_size=variant.fixed,
                licence="apache-2.0",
            )
            for name, variant in VARIANTS.items()
        },
        ENTRIES,
    )
)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """timm's names are ours; a trainer's wrapper is taken off."""
    return unwrap(state_dict)


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    kwargs.setdefault("out_indices", (0, 1, 2, 3, 4))
    return build_backbone(
        HaloNet,
        name,
        pretrained,
        checkpoint_filter_fn,
        model_cfg=VARIANTS[name].model_cfg(),
        **kwargs,
    )


_FIXED = "The last stage's attention (BoTNet) has relative tables for one map size only."
_NEVER_EMPTY = "timm's own layers inside (BoTNet, ECA) take no empty batch."


def _limits(variant: Variant | PaperVariant) -> dict[str, str]:
    limits = {"any_size": _FIXED} if variant.fixed else {}
    if variant.fixed or variant.model_cfg().attn_layer == "eca":
        limits["empty_batch"] = _NEVER_EMPTY
    return limits


for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="halonet",
            channels=_variant.channels,
            strides=(2, 4, 8, 16, 32),
            input_size=(3, _variant.size, _variant.size),
            params=_variant.params,
            gmacs=_variant.gmacs,
            paper="2103.12731",
            code="https://github.com/huggingface/pytorch-image-models",
            code_licence="Apache-2.0",
            fixed_input_size=_variant.fixed,
            limits=MappingProxyType(_limits(_variant)),
        ),
        _build,
        module=__name__,
    )
