"""LookupViT: a few compressed tokens do the work for many (arXiv 2407.12753).

Written from the paper: there is no official code and there are no weights. What the paper leaves
open is decided in `docs/decisions.md`. Parameter names are timm's ViT's where a part has a
counterpart there, so that a ViT's weights serve as a start (`checkpoint_filter_fn`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    register_notrace_module,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitzoo.attention import pad_image_to_multiple
from vitzoo.attention.lookup import LookupBlock
from vitzoo.attention.positions import resample_positions
from vitzoo.backbones._build import StateDict, build_backbone, rename, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.zoo.entries import DataConfig, timm_configs
from vitzoo.zoo.entries.lookupvit import ENTRIES

_NORM_EPS = 1e-6
_COMPRESSED_SIZE = 5


@register_notrace_module
class PatchEmbed(nn.Module):
    """Patches to tokens; the image is padded right and bottom to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **factory: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / patch), ceil(W / patch), C)."""
        x = pad_image_to_multiple(x, self.patch_size)
        return self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


@register_notrace_module
class TokenSets(nn.Module):
    """From patch tokens to the two sets, each with its positions; knows the compressed grid.

    Attributes:
        compressed_size: side of the compressed grid unless a call names another.
        compressed_sizes: sides to draw from in training; empty for a fixed grid.
        table_side: side of the position table, which bounds them.
        drawn: the side drawn for this training step.
    """

    def __init__(
        self, compressed_size: int, compressed_sizes: Sequence[int], *, table_side: int
    ) -> None:
        super().__init__()
        self.table_side = table_side
        for size in (compressed_size, *compressed_sizes):
            self.check_size(size)
        self.compressed_size = compressed_size
        self.compressed_sizes = tuple(compressed_sizes)
        self.drawn: int | None = None

    def check_size(self, size: int) -> None:
        """Refuse a side that the position table cannot serve."""
        if not 1 <= size <= self.table_side:
            raise ValueError(
                f"compressed size {size} is not between 1 and {self.table_side}, the side of the "
                "position table"
            )

    def size(self, asked: int | None) -> int:
        """The side of the compressed grid for this call."""
        if asked is not None:
            self.check_size(asked)
            return asked
        if not (self.training and self.compressed_sizes):
            return self.compressed_size
        if self.drawn is None:
            raise ValueError(
                f"training with compressed_sizes={self.compressed_sizes}: call "
                "draw_compressed_size(step) before each step"
            )
        return self.drawn

    def forward(
        self, tokens: Tensor, pos_embed: Tensor, compressed_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, H, W, C), table (1, L, C) -> lookup tokens (B, H, W, C), compressed (B, M, C)."""
        side = self.size(compressed_size)
        grid = tokens.shape[1:3]
        small = [min(side, grid[0]), min(side, grid[1])]
        lookup = tokens + resample_positions(pos_embed, *grid)
        table = pos_embed.unflatten(1, (math.isqrt(pos_embed.shape[1]), -1))
        compressed = resize_map(tokens, small) + resize_map(table, small)
        return lookup, compressed.flatten(1, 2)


def resize_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of (B, H, W, C), pixel centres aligned, no antialiasing."""
    resized = F.interpolate(
        x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


class LookupViT(nn.Module):
    """LookupViT for classification, with stride-16 maps after any block.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier.
        img_size: side of the image whose grid the position table is for, or a pair of equal ones;
            any size runs.
        patch_size: side of a patch in pixels.
        embed_dim: width of both token sets.
        depth: number of blocks.
        num_heads: heads.
        mlp_ratio: hidden width of the compressed tokens' MLP over `embed_dim`.
        lookup_mlp_ratio: hidden width of the lookup tokens' MLP over `embed_dim`.
        compressed_size: side of the compressed grid, 5 or that of a smaller position table unless
            given; at small inputs that of the lookup grid.
        compressed_sizes: sides to draw from in training, see `draw_compressed_size`.
        reuse: see `vitzoo.ops.lookup_infuse`.
        pool: what the classifier reads, the mean of `both` sets or of the `compressed` one.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, linear from 0.
        global_pool: pooling of the head.

    Raises:
        ValueError: a compressed size outside 1 to the side of the position table, an `img_size`
            that is not square, or an unknown `reuse` or `pool`.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        compressed_size: int | None = None,
        compressed_sizes: Sequence[int] = (),
        reuse: str = "logits",
        pool: str = "both",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if pool not in ("both", "compressed"):
            raise ValueError(f"pool must be 'both' or 'compressed', got {pool!r}")
        factory = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.pool = pool
        self.grad_checkpointing = False
        sides = {img_size} if isinstance(img_size, int) else set(img_size)
        if len(sides) != 1:
            raise ValueError(f"the position table is square, img_size {img_size} is not")
        table_side = -(-sides.pop() // patch_size)
        if compressed_size is None:
            compressed_size = min(_COMPRESSED_SIZE, table_side)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, **factory)
        self.pos_embed = nn.Parameter(torch.empty(1, table_side**2, embed_dim, **factory))
        self.token_sets = TokenSets(compressed_size, compressed_sizes, table_side=table_side)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            LookupBlock(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                lookup_mlp_ratio=lookup_mlp_ratio,
                reuse=reuse,
                drop_path=rate,
                **factory,
            )
            for rate in rates
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        norm = partial(nn.LayerNorm, embed_dim, eps=_NORM_EPS, **factory)
        self.norm = norm()
        self.norm_lookup = norm()
        self.head = ClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory
        )
        if pool == "compressed":
            for module in self._unread_by_compressed_pool():
                module.requires_grad_(False)
        self.init_weights()

    def _unread_by_compressed_pool(self) -> list[nn.Module]:
        """Modules from which nothing follows that a classifier of the compressed tokens reads."""
        last: Any = self.blocks[-1]
        return [last.infuse, last.norm_lookup, last.mlp_lookup, self.norm_lookup]

    def init_weights(self) -> None:
        """As timm's ViT: linear layers and positions from a truncated normal of 0.02."""
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_compressed_size(self, size: int) -> None:
        """Use a compressed grid of `size` x `size` tokens from now on; weights stay as they are."""
        self.token_sets.check_size(size)
        self.token_sets.compressed_size = size

    @torch.jit.ignore
    def begin_update(self, update: int) -> None:
        """What the training loop calls before an optimiser update: draw, if there is a choice."""
        if self.token_sets.compressed_sizes:
            self.draw_compressed_size(update)

    def draw_compressed_size(self, step: int) -> int:
        """Draw one of `compressed_sizes` for a training step, and return it.

        The draw depends on `step` alone: all ranks agree without a word, a resumed run repeats it,
        and the forward passes of an accumulated step share it. Evaluation is not touched.

        Raises:
            ValueError: the model was built without `compressed_sizes`.
        """
        if not self.token_sets.compressed_sizes:
            raise ValueError("the model was built without compressed_sizes")
        self.token_sets.drawn = random.Random(step).choice(self.token_sets.compressed_sizes)
        return self.token_sets.drawn

    def _run(self, block: nn.Module, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, lookup, compressed)
        return block(lookup, compressed)

    def _final(self, lookup: Tensor, compressed: Tensor) -> Tensor:
        """The NCHW map whose average is the mean over the pooled token sets."""
        mean = self.norm(compressed).mean(dim=1)[:, None, None, :]
        if self.pool == "compressed":
            return mean.expand_as(lookup).permute(0, 3, 1, 2)
        return (0.5 * (self.norm_lookup(lookup) + mean)).permute(0, 3, 1, 2)

    def forward_features(self, x: Tensor, compressed_size: int | None = None) -> Tensor:
        """Images (B, in_chans, H, W) -> the map (B, C, H / 16, W / 16) that the head pools.

        Each position holds half its normed lookup token and half the mean of the normed
        compressed tokens, so that average pooling gives the mean of the two sets' means. With
        `pool="compressed"` it is the latter mean everywhere. For dense use take
        `forward_intermediates`.
        """
        lookup, compressed = self.token_sets(self.patch_embed(x), self.pos_embed, compressed_size)
        for block in self.blocks:
            lookup, compressed = self._run(block, lookup, compressed)
        return self._final(lookup, compressed)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`forward_features` -> logits (B, num_classes), or pooled features with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor, compressed_size: int | None = None) -> Tensor:
        """Logits (B, num_classes); `compressed_size` overrides the model's for this call.

        Raises:
            ValueError: it is outside 1 to the side of the position table.
        """
        return self.forward_head(self.forward_features(x, compressed_size))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = True,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        compressed_size: int | None = None,
    ) -> Any:
        """Lookup tokens after chosen blocks, as stride-16 maps.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n blocks (int), these blocks (sequence), or all (None).
            norm: apply the final norm of the lookup tokens to every map.
            stop_early: do not run blocks past the last one asked for.
            output_fmt: only `NCHW`.
            intermediates_only: leave out the final features.
            compressed_size: overrides the model's for this call.

        Returns:
            List of maps (B, C, H / 16, W / 16), or (final features, list).

        Raises:
            ValueError: another `output_fmt`, or a compressed size as in `forward`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        lookup, compressed = self.token_sets(self.patch_embed(x), self.pos_embed, compressed_size)
        maps = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            lookup, compressed = self._run(block, lookup, compressed)
            if i in wanted:
                out = self.norm_lookup(lookup) if norm else lookup
                maps.append(out.permute(0, 3, 1, 2))
        if intermediates_only:
            return maps
        return self._final(lookup, compressed), maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks after the last one asked for; returns the indices kept."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        if self.pool == "compressed" and any(p.requires_grad for p in self.parameters()):
            # Maps read them; a model that was frozen as a whole stays frozen.
            for module in self._unread_by_compressed_pool():
                module.requires_grad_()
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm_lookup = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            # Only the classifier reads the compressed tokens' norm.
            self.norm = nn.Identity()  # type: ignore[assignment]
            self.reset_classifier(0, "")
        return wanted

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: embedding, then blocks."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond biases and one-dimensional ones."""
        return {"pos_embed"}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes leave features, `global_pool=''` leaves the map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The numbers that tell one LookupViT from another; heads are of 64 channels."""

    embed_dim: int
    depth: int
    num_heads: int
    params: int
    gmacs: float


VARIANTS = {
    "vz_lookupvit_small": Variant(
        embed_dim=384, depth=12, num_heads=6, params=34_508_392, gmacs=2.18
    ),
    "vz_lookupvit_base": Variant(
        embed_dim=768, depth=12, num_heads=12, params=136_255_720, gmacs=8.47
    ),
    "vz_lookupvit_large": Variant(
        embed_dim=1024, depth=24, num_heads=16, params=480_868_328, gmacs=29.71
    ),
}

default_cfgs = generate_default_cfgs(
    timm_configs(
        {
            name: DataConfig(
                first_conv="patch_embed.proj", classifier="head.fc", reduction=16, crop_pct=0.9
            )
            for name in VARIANTS
        },
        ENTRIES,
    )
)

# timm's ViT -> LookupViT. Blocks, patch embedding and positions keep their names.
_VIT_NAMES = (
    (r"^(?:fc_)?norm\.", "norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Our own checkpoints as they are; a plain ViT's become a start.

    Of a ViT in timm's names the patch embedding, the position table, each block (as the heavy
    step), the final norm and the classifier are taken; the class token and its position are
    dropped. New parameters start so that the model is a ViT on the compressed tokens: gathering
    copies the block's own attention, infusion and the lookup tokens' MLP add zero at first.
    Position tables of another grid are resized.
    """
    state_dict = unwrap(state_dict)
    if "cls_token" in state_dict:
        state_dict = _from_vit(rename(state_dict, _VIT_NAMES), model)
    table, wanted = state_dict.get("pos_embed"), model.get_parameter("pos_embed")
    if table is not None and table.shape[1] != wanted.shape[1]:
        side = math.isqrt(wanted.shape[1])
        state_dict["pos_embed"] = resample_abs_pos_embed(table, [side] * 2, num_prefix_tokens=0)
    return state_dict


def _from_vit(vit: StateDict, model: nn.Module) -> StateDict:
    vit = {name: value for name, value in vit.items() if name != "cls_token"}
    side = math.isqrt(vit["pos_embed"].shape[1])
    vit["pos_embed"] = vit["pos_embed"][:, -(side**2) :]
    start = {name: vit[f"norm.{name}"] for name in ("weight", "bias") if f"norm.{name}" in vit}
    vit |= {f"norm_lookup.{name}": value for name, value in start.items()}
    ours = model.state_dict()
    for i in range(len(model.blocks)):  # type: ignore[arg-type]
        block = f"blocks.{i}."
        if f"{block}attn.qkv.weight" not in vit:
            continue
        for name in ("weight", "bias"):
            q, k, v = vit[f"{block}attn.qkv.{name}"].chunk(3)
            vit[f"{block}gather.q.{name}"] = q
            vit[f"{block}gather.kv.{name}"] = torch.cat([k, v])
            vit[f"{block}gather.proj.{name}"] = vit[f"{block}attn.proj.{name}"]
            vit[f"{block}infuse.v.{name}"] = v
            for norm in ("gather.norm_compressed", "gather.norm_lookup", "infuse.norm"):
                vit[f"{block}{norm}.{name}"] = vit[f"{block}norm1.{name}"]
            vit[f"{block}norm_lookup.{name}"] = vit[f"{block}norm2.{name}"]
            vit[f"{block}mlp_lookup.fc1.{name}"] = ours[f"{block}mlp_lookup.fc1.{name}"]
            for zero in ("infuse.proj", "mlp_lookup.fc2"):
                vit[f"{block}{zero}.{name}"] = torch.zeros_like(ours[f"{block}{zero}.{name}"])
    return vit


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    variant = VARIANTS[name]
    arguments = {
        "embed_dim": variant.embed_dim,
        "depth": variant.depth,
        "num_heads": variant.num_heads,
        **kwargs,
    }
    arguments.setdefault("out_indices", _quarters(arguments["depth"]))
    return build_backbone(
        LookupViT,
        name,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter", "norm": True},
        **arguments,
    )


def _quarters(depth: int) -> tuple[int, ...]:
    """The blocks that end the four quarters of the net."""
    return tuple(sorted({max(depth * i // 4, 1) - 1 for i in range(1, 5)}))


_OTHER_WRAPPERS = ("features_list", "features_dict", "features_hook", "features_fx")
_ONLY_GETTER = (
    "Blocks hand on two token sets and the maps are normed, so features_only goes through "
    "forward_intermediates (timm's getter, also the default of timm's ViT)."
)

for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="lookupvit",
            channels=(_variant.embed_dim,) * 4,
            strides=(16,) * 4,
            params=_variant.params,
            gmacs=_variant.gmacs,
            paper="2407.12753",
            code="the paper (no official code)",
            code_licence="none",
            limits=MappingProxyType(dict.fromkeys(_OTHER_WRAPPERS, _ONLY_GETTER)),
        ),
        _build,
        module=__name__,
    )
