"""Sparsifiner: vision transformers whose attention keeps few connections (arXiv 2303.13755).

A plain DeiT or LV-ViT in which every block predicts, for each image, which tokens attend to which.
Follows github.com/lim142857/Sparsifiner at 9a11e26 (MIT): `src/models/sparsifiner.py` and
`src/models/sparsifiner_lvvit.py`. Parameter names are those of timm's ViT, so DeiT's files load
into the body; the predictor is `blocks.i.attn.mask_predictor`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from timm.layers import register_notrace_module, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from vitzoo.attention.connectivity import (
    Grid,
    Sparsity,
    resize_token_table,
    share,
    token_resize,
)
from vitzoo.attention.conv_bn import conv_bn_act
from vitzoo.attention.layers import Linear, pad_image_to_multiple
from vitzoo.attention.sparse import AttentionRecord, SparseAttention, SparseBlock
from vitzoo.backbones._build import StateDict, build_backbone, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.ops._sides import smaller
from vitzoo.zoo.entries import DataConfig, timm_configs
from vitzoo.zoo.entries.sparsifiner import ENTRIES

logger = logging.getLogger("vitzoo.backbones")

PATCH_SIZE = 16
Phase = Literal["attn_recon", "attn_self_distill", "cls_distill", "cls", "joint"]
# The parts that a phase trains: predictor, body.
PHASES: dict[Phase | None, tuple[bool, bool]] = {
    None: (False, True),
    "attn_recon": (True, False),
    "attn_self_distill": (True, False),
    "cls_distill": (False, True),
    "cls": (False, True),
    "joint": (True, True),
}


class PatchEmbed(nn.Module):
    """16x16 patches of an image that is padded with zeros on the right and bottom (DeiT)."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, PATCH_SIZE, stride=PATCH_SIZE, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 16), ceil(W / 16))."""
        return self.proj(pad_image_to_multiple(x, PATCH_SIZE))


@register_notrace_module
class ConvPatchEmbed(nn.Module):
    """Three convolutions at half the size, then 8x8 patches (LV-ViT's `4_2`)."""

    def __init__(self, in_chans: int, dim: int, *, width: int = 64, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(width, **factory)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(width, **factory)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(width, **factory)
        self.act = nn.ReLU()
        self.proj = nn.Conv2d(width, dim, PATCH_SIZE // 2, stride=PATCH_SIZE // 2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 16), ceil(W / 16))."""
        x = pad_image_to_multiple(x, PATCH_SIZE)
        x = conv_bn_act(x, self.conv1, self.bn1, act=self.act)
        x = conv_bn_act(x, self.conv2, self.bn2, act=self.act)
        x = conv_bn_act(x, self.conv3, self.bn3, act=self.act)
        return self.proj(x)


@dataclass(frozen=True)
class Details:
    """What one forward pass computes beyond the logits.

    Attributes:
        logits: (B, num_classes), as `forward` returns them.
        features: what the token distillation compares: normed patch tokens (B, N-1, C), of LV-ViT
            the auxiliary head's logits (B, N-1, num_classes).
        live: mask (B, N-1) of the patch tokens that pruning left; None without pruning.
        blocks: one record per block, if asked for.
    """

    logits: Tensor
    features: Tensor
    live: Tensor | None
    blocks: tuple[AttentionRecord, ...] = ()

    def sparsity(self) -> dict[str, Tensor]:
        """Share of zeros in basis, coefficients and mask, averaged over the blocks."""

        def zeros(name: str) -> Tensor:
            found = [getattr(block.connectivity, name) for block in self.blocks]
            return torch.stack([(x == 0).float().mean() for x in found]).mean()

        return {name: zeros(name) for name in ("basis", "coefficients", "mask")}


@register_notrace_module
class AuxHead(Linear):
    """LV-ViT's classifier of patch tokens; in eval mode it has a say in the image's logits."""

    def forward(self, input: Tensor, logits: Tensor | None = None) -> Tensor:
        """Patch tokens (B, N-1, C) -> their logits, or the image's (B, num_classes) with a share.

        A leaf for torch.fx, because train and eval mode differ inside.
        """
        if logits is None:
            return super().forward(input)
        return logits if self.training else logits + 0.5 * super().forward(input).amax(1)


class Sparsifiner(nn.Module):
    """DeiT or LV-ViT with predicted sparse attention; timm's surface of a ViT.

    Any image size: the image is padded to multiples of 16, and the tables that belong to token
    positions (`pos_embed`, the predictors') are resized from the grid of `img_size`.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier.
        img_size: the size (or height and width) that the position tables are made for.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the transformer.
        norm_eps: of all norms.
        conv_stem: embed patches by LV-ViT's convolutions.
        skip_scale: divides both residual branches.
        aux_head: classify patch tokens too; in eval mode half of their largest logits is added.
            The head learns from distillation only, so fine-tuning on labels alone goes without.
        predictor: False builds the dense model, the start and the teacher of training.
        sparsity: which connections are kept, with `keep_rate` in place of its own if that is given.
        keep_rate: share of the tokens that a query attends to, one for all blocks or one per block.
        pruning_blocks: blocks that prune patch tokens by the class token's attention.
        token_keep_rate: share of the patch tokens that such a block leaves, per block; one number b
            means b in the second quarter of the blocks, b^2 in the third, b^3 in the last.
        drop_rate: dropout before the classifier.
        pos_drop_rate, proj_drop_rate: dropout of the embedded tokens and of both branches.
        drop_path_rate: stochastic depth of the last block, linear from 0.
        global_pool: `token`, `avg`, `max`, `avgmax`, or `` for none.

    Attributes:
        phase: see `set_phase`.
        train_output: what `forward` returns in train mode: `logits`, or the `Details` that losses
            need, of the `tokens` or also of all blocks' `attention`. A wrapper for several
            processes only sees `forward`.
    """

    # Any, because indexing an nn.ModuleList gives mypy no `Block`.
    blocks: Any
    norm: nn.Module

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        conv_stem: bool = False,
        skip_scale: float = 1.0,
        aux_head: bool = False,
        predictor: bool = True,
        sparsity: Sparsity | dict[str, Any] | None = None,
        keep_rate: float | Sequence[float] | None = None,
        pruning_blocks: Sequence[int] = (),
        token_keep_rate: float | Sequence[float] = 1.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False
        self.phase: Phase | None = None
        self.train_output: Literal["logits", "tokens", "attention"] = "logits"
        if pruning_blocks and (aux_head or not predictor):
            raise ValueError(
                "pruning_blocks need a predictor, and no auxiliary head, which reads every token"
            )
        self.token_keep_rates = _token_keep_rates(token_keep_rate, pruning_blocks, depth)
        self.grid_size = tuple(-(-side // PATCH_SIZE) for side in to_2tuple(img_size))
        self.patch_embed = (ConvPatchEmbed if conv_stem else PatchEmbed)(
            in_chans, embed_dim, **factory
        )
        tokens = math.prod(self.grid_size) + 1
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **factory))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        attention: Any = partial(
            SparseAttention,
            embed_dim,
            num_heads,
            self.grid_size,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop_rate,
            **factory,
        )
        block: Any = partial(
            SparseBlock,
            embed_dim,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            skip_scale=skip_scale,
            proj_drop=proj_drop_rate,
            **factory,
        )
        settings = _per_block(sparsity, keep_rate, depth) if predictor else [None] * depth
        self.blocks = nn.ModuleList(
            block(attention(sparsity=own), drop_path=rate)
            for own, rate in zip(settings, rates, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.has_aux_head = aux_head
        self._build_heads(**factory)
        shared = {"num_chs": embed_dim, "reduction": PATCH_SIZE}
        self.feature_info = [{"module": f"blocks.{i}", **shared} for i in range(depth)]
        self.init_weights()
        self.set_phase(None)

    def _build_heads(self, **factory: Any) -> None:
        self.head: nn.Module = nn.Identity()
        self.aux_head: AuxHead | None = None
        if self.num_classes > 0:
            self.head = nn.Linear(self.embed_dim, self.num_classes, **factory)
            if self.has_aux_head:
                self.aux_head = AuxHead(self.embed_dim, self.num_classes, **factory)
        for head in (self.head, self.aux_head):
            if head is not None:
                head.apply(_init_linear)

    def init_weights(self) -> None:
        """Linear layers and token tables from a truncated normal of 0.02, biases zero."""
        self.apply(_init_linear)
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)

    def set_phase(self, phase: Phase | None) -> None:
        """Prepare for a phase of the authors' training, or for plain use (None).

        Sets which parameters require gradients (`PHASES`), and in `attn_recon` makes train mode
        dense, so that the predictor learns to reconstruct the body's own attention; no token leaves
        then, in evaluation neither.

        Raises:
            ValueError: no such phase.
        """
        if phase not in PHASES:
            known = ", ".join(str(name) for name in PHASES)
            raise ValueError(f"unknown phase {phase!r}; known: {known}")
        self.phase = phase
        predictor, body = PHASES[phase]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(predictor if ".mask_predictor." in name else body)
        if self.aux_head is not None:
            # Only token distillation reaches it.
            self.aux_head.requires_grad_(phase in ("cls_distill", "joint"))
        for block in self.blocks:
            block.attn.reconstruct = phase == "attn_recon"

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid, Tensor | None]:
        """Images -> tokens (B, 1 + patches, C), their patch grid, and the resize of the tables."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        resize = token_resize(self.grid_size, grid, self.pos_embed)
        patches = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), patches], dim=1)
        tokens = tokens + resize_token_table(self.pos_embed[0], resize)
        return self.pos_drop(tokens), grid, resize

    def _pruning_blocks(self) -> dict[int, float]:
        """Block -> share of the patch tokens it leaves; the authors' `attn_recon` prunes none."""
        return {} if self.phase == "attn_recon" else self.token_keep_rates

    def _keep(self, block: int, left: int, patches: int) -> int | None:
        """Patch tokens that a block leaves of `left`, None if it prunes none."""
        rate = self._pruning_blocks().get(block)
        return None if rate is None else smaller(left, share(rate, patches))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(function, *arguments)
        return function(*arguments)

    def _run(
        self, x: Tensor, resize: Tensor | None, *, count: int, wanted: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The first `count` blocks.

        Returns tokens (zeros where they were pruned), the same after the blocks `wanted`, and the
        mask of the patch tokens that are left (None without pruning).
        """
        first = min(self._pruning_blocks(), default=count)
        found = []
        for i, block in enumerate(self.blocks[: min(first, count)]):
            x = self._call(block, x, resize)
            if i in wanted:
                found.append(x)
        if first >= count:
            return x, found, None
        patches = x.shape[1] - 1
        kept = torch.arange(patches, device=x.device).expand(x.shape[0], -1)
        for i in range(first, count):
            left = kept.shape[1]
            keep = self._keep(i, left, patches)
            remaining = self.blocks[i].remaining
            # Behind the first pruning block, whether or not that removed any.
            bounded = i > first
            x, kept = self._call(remaining, x, resize, kept, patches - left, keep, bounded)
            if i in wanted:
                found.append(_scatter(x, kept, patches))
        live = torch.zeros(x.shape[0], patches, dtype=torch.bool, device=x.device)
        return _scatter(x, kept, patches), found, live.scatter(1, kept, True)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normed tokens (B, 1 + patches, C), unpooled."""
        x, _, resize = self._embed(x)
        return self.norm(self._run(x, resize, count=len(self.blocks))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits (B, num_classes), or pooled features with `pre_logits`."""
        pooled = self.head_drop(global_pool_nlc(x, pool_type=self.global_pool))
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        return logits if self.aux_head is None else self.aux_head(x[:, 1:], logits)

    def forward(self, x: Tensor) -> Tensor | Details:
        """Images (B, in_chans, H, W) -> logits (B, num_classes); see `train_output`."""
        if self.training and self.train_output != "logits":
            return self.forward_details(x, attention=self.train_output == "attention")
        return self.forward_head(self.forward_features(x))

    def forward_details(self, x: Tensor, *, attention: bool = True) -> Details:
        """Logits, patch features and what every block connected.

        Args:
            x: images (B, in_chans, H, W).
            attention: record the blocks, for which pruned tokens are masked instead of removed (the
                same numbers); a record holds several (B, heads, N, N) tensors.
        """
        x, _, resize = self._embed(x)
        records: list[AttentionRecord] = []
        live = None
        if attention:
            left = patches = x.shape[1] - 1
            for i, block in enumerate(self.blocks):
                keep = self._keep(i, left, patches)
                bound = None if live is None else left
                x, record = block.detailed(x, resize, live, bound, keep)
                live, left = record.live, left if keep is None else keep
                records.append(record)
        else:
            x, _, live = self._run(x, resize, count=len(self.blocks))
        x = self.norm(x)
        features = x[:, 1:] if self.aux_head is None else self.aux_head(x[:, 1:])
        return Details(self.forward_head(x), features, live, tuple(records))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of blocks as timm's contract of a ViT has it.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n blocks (int), these blocks (sequence), or all (None).
            return_prefix_tokens: pair each output with its class token (B, 1, C).
            norm: apply the final norm to every output.
            stop_early: do not run blocks past the last one asked for.
            output_fmt: `NCHW` maps or `NLC` tokens.
            intermediates_only: leave out the final features.

        Returns:
            List of patch outputs, or (final features, list).

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        count = last + 1 if stop_early else len(self.blocks)
        x, grid, resize = self._embed(x)
        x, found, _ = self._run(x, resize, count=count, wanted=wanted)
        if norm:
            found = [self.norm(tokens) for tokens in found]
        outputs: list[Any] = [tokens[:, 1:] for tokens in found]
        if output_fmt == "NCHW":
            outputs = [tokens.transpose(1, 2).unflatten(2, grid) for tokens in outputs]
        if return_prefix_tokens:
            outputs = [(out, tokens[:, :1]) for out, tokens in zip(outputs, found, strict=True)]
        return outputs if intermediates_only else (self.norm(x), outputs)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks after the last one asked for; returns the indices kept."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the tables of token positions for good; other sizes keep running without."""
        grid = tuple(-(-side // PATCH_SIZE) for side in to_2tuple(img_size))
        resize = token_resize(self.grid_size, grid, self.pos_embed)
        resized = resize_token_table(self.pos_embed.detach()[0], resize)
        self.pos_embed = nn.Parameter(resized[None], requires_grad=self.pos_embed.requires_grad)
        for block in self.blocks:
            if block.attn.mask_predictor is not None:
                block.attn.mask_predictor.set_tables(resize)
        self.grid_size = grid
        update_model_input_size(self, to_2tuple(img_size))

    def take_basis_rows(self, state_dict: StateDict, prefix: str = "") -> None:
        """Give every predictor as many basis rows as its tables in a state dict have.

        Their number belongs to the size that the tables were made for and stays when these are
        resized, while a new model has the number of its own size. The parameters stay the same
        objects: an optimiser may hold them, and shared tables are one.
        """
        for i, block in enumerate(self.blocks):
            predictor = block.attn.mask_predictor
            table = state_dict.get(f"{prefix}blocks.{i}.attn.mask_predictor.proj_n")
            if predictor is None or table is None or table.shape[1:] == predictor.proj_n.shape[1:]:
                continue
            for own in (predictor.proj_n, predictor.proj_back_n):
                own.data = own.data.new_empty(own.shape[0], *table.shape[1:])

    def _load_from_state_dict(
        self, state_dict: StateDict, prefix: str, *rest: Any, **named: Any
    ) -> None:
        self.take_basis_rows(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups of a ViT."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond biases and one-dimensional ones."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier of the class token."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (0 for none), and another pooling if given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        factory = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        self._build_heads(**factory)
        self.set_phase(self.phase)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _scatter(x: Tensor, kept: Tensor, patches: int) -> Tensor:
    """Put the tokens that pruning left back in their places; the others are zeros."""
    rows = nn.functional.pad(kept + 1, (1, 0))[..., None].expand_as(x)
    return x.new_zeros(x.shape[0], patches + 1, x.shape[2]).scatter(1, rows, x)


def _per_block(
    sparsity: Sparsity | dict[str, Any] | None,
    keep_rate: float | Sequence[float] | None,
    depth: int,
) -> list[Sparsity]:
    """One `Sparsity` per block."""
    settings = sparsity if isinstance(sparsity, Sparsity) else Sparsity(**(sparsity or {}))
    if keep_rate is None:
        return [settings] * depth
    rates = [keep_rate] * depth if isinstance(keep_rate, (int, float)) else list(keep_rate)
    if len(rates) != depth:
        raise ValueError(f"keep_rate has {len(rates)} values for {depth} blocks")
    return [replace(settings, keep_rate=rate) for rate in rates]


def _token_keep_rates(
    rate: float | Sequence[float], pruning_blocks: Sequence[int], depth: int
) -> dict[int, float]:
    """Pruning block -> share of the patch tokens that it leaves."""
    unknown = [i for i in pruning_blocks if not 0 <= i < depth]
    if unknown:
        raise ValueError(f"pruning_blocks {unknown} are not blocks 0 to {depth - 1}")
    if isinstance(rate, (int, float)):
        rates = [rate ** (4 * i // depth) for i in range(depth)]
    else:
        rates = list(rate)
    if len(rates) != depth or not all(0 < r <= 1 for r in rates):
        raise ValueError(f"token_keep_rate must be one or {depth} numbers in (0, 1], got {rate}")
    return {i: rates[i] for i in sorted(pruning_blocks)}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The numbers that tell one Sparsifiner from another."""

    dim: int
    heads: int
    params: int
    gmacs: float | None = None
    depth: int = 12
    lvvit: bool = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Sparsifiner`."""
        arguments: dict[str, Any] = {
            "embed_dim": self.dim,
            "depth": self.depth,
            "num_heads": self.heads,
        }
        if self.lvvit:
            arguments |= {
                "mlp_ratio": 3.0,
                "qkv_bias": False,
                "norm_eps": 1e-5,
                "conv_stem": True,
                "skip_scale": 2.0,
                "aux_head": True,
            }
        return arguments


VARIANTS = {
    "vz_sparsifiner_deit_tiny": Variant(dim=192, heads=3, params=5_918_632, gmacs=1.3417),
    "vz_sparsifiner_deit_small": Variant(dim=384, heads=6, params=22_251_880, gmacs=4.775),
    "vz_sparsifiner_deit_base": Variant(dim=768, heads=12, params=86_768_872),
    "vz_sparsifiner_lvvit_small": Variant(
        dim=384, heads=6, depth=16, params=26_420_112, gmacs=6.7863, lvvit=True
    ),
}

default_cfgs = generate_default_cfgs(
    timm_configs(
        {
            name: DataConfig(
                first_conv="patch_embed.conv1" if variant.lvvit else "patch_embed.proj",
                classifier=("head", "aux_head") if variant.lvvit else "head",
                reduction=PATCH_SIZE,
                licence="mit",
            )
            for name, variant in VARIANTS.items()
        },
        ENTRIES,
    )
)


_TOKEN_TABLES = (".mask_predictor.proj_n", ".mask_predictor.proj_back_n")


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' files as they are; a dense DeiT or LV-ViT as a start for the body.

    The tables of token positions are resized to the model's grid (from a square one), and the
    predictors get as many basis rows as the file has. A file without predictors leaves the model's
    own, which are then untrained.
    """
    state_dict = _fit_token_tables(unwrap(state_dict), model.grid_size)  # type: ignore[arg-type]
    model.take_basis_rows(state_dict)  # type: ignore[operator]
    own = model.state_dict()
    expected = any(".mask_predictor." in name for name in own)
    if not expected:
        state_dict = {k: v for k, v in state_dict.items() if ".mask_predictor." not in k}
    elif not any(".mask_predictor." in name for name in state_dict):
        logger.warning(
            "the file holds a dense model: the connectivity predictors start untrained, and until"
            " their phase (attn_recon) has run the model attends to arbitrary tokens"
        )
        state_dict |= {name: own[name] for name in own if ".mask_predictor." in name}
    if "aux_head.weight" not in own:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("aux_head.")}
    return state_dict


def _fit_token_tables(state_dict: StateDict, grid: Grid) -> StateDict:
    """The tables of a square grid's tokens, resized to another grid; others stay as they are."""
    fitted = dict(state_dict)
    positions = state_dict.get("pos_embed")
    if positions is None or positions.shape[1] == math.prod(grid) + 1:
        return fitted
    side = math.isqrt(positions.shape[1] - 1)
    if side * side + 1 != positions.shape[1]:
        return fitted
    resize = token_resize((side, side), grid, positions)
    fitted["pos_embed"] = resize_token_table(positions[0], resize)[None]
    for name, table in state_dict.items():
        if name.endswith(_TOKEN_TABLES):
            fitted[name] = resize_token_table(table, resize)
    return fitted


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    kwargs.setdefault("out_indices", (-1,))
    return build_backbone(
        Sparsifiner,
        name,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter"},
        **{**VARIANTS[name].arguments(), **kwargs},
    )


_OTHER_WRAPPERS = ("features_list", "features_dict", "features_hook", "features_fx")
_ONLY_GETTER = (
    "Blocks hand on token sequences: only forward_intermediates makes maps of them (timm's getter, "
    "also the default of timm's ViT)."
)

for _name, _variant in VARIANTS.items():
    register(
        ModelInfo(
            name=_name,
            family="sparsifiner",
            channels=(_variant.dim,),
            strides=(PATCH_SIZE,),
            params=_variant.params,
            gmacs=_variant.gmacs,
            paper="2303.13755",
            code="https://github.com/lim142857/Sparsifiner",
            code_licence="MIT",
            choices="top-k",
            limits=MappingProxyType(dict.fromkeys(_OTHER_WRAPPERS, _ONLY_GETTER)),
        ),
        _build,
        module=__name__,
    )
