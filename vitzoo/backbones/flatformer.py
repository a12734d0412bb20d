"""FlatFormer: flattened window attention on LiDAR pillars (arXiv 2301.08739).

The pillars of a frame are sorted window by window and cut into groups of equal size, so that no
group has to be padded; the sort axis and a shift of the windows alternate from layer to layer.
Follows github.com/mit-han-lab/flatformer at 31dc5a9 (Apache-2.0),
`mmdet3d/models/middle_encoders/flatformer.py`. Frames never mix here, whatever their size or the
grid's: the reference fails on an empty frame, on one with fewer pillars than a group, and mixes
frames on some small grids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.models import checkpoint as checkpoint_layer
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vitzoo.attention.grouped import GroupAttention
from vitzoo.attention.layers import Mlp
from vitzoo.backbones._build import StateDict, build_backbone, rename, unwrap
from vitzoo.backbones._registry import ModelInfo, register
from vitzoo.zoo.entries.flatformer import ENTRIES

_NORM_EPS = 1e-5
# Flattenings of a block's four layers: (major axis, whether the windows are shifted).
_FLATTENINGS = (("x", False), ("x", True), ("y", False), ("y", True))


def _sides(window_size: int | Sequence[int]) -> tuple[int, int]:
    """A window's sides along x and y, of one number or two."""
    sides = (window_size,) * 2 if isinstance(window_size, int) else tuple(window_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"window_size must be one side or two (x, y) of at least 1, got {sides}")
    return sides[0], sides[1]


def _snake(place: Tensor, length: int, turn: Tensor) -> Tensor:
    """`place` in [0, length), counted backwards where `turn` is odd."""
    return torch.where(turn % 2 == 0, place, length - 1 - place)


def _sort_key(
    frame: Tensor, major: Tensor, minor: Tensor, window_size: tuple[int, int], windows: int
) -> Tensor:
    """Place of every pillar on a snake over the windows, and inside each window.

    Args:
        frame, major, minor: (P,) frame and coordinates; window rows follow each other along
            `minor`, the windows of a row along `major`.
        window_size: sides of a window in pillars along `major` and `minor`.
        windows: a number that no count of windows along a side exceeds.
    """
    long, wide = window_size
    row, cell_minor = minor // wide, minor % wide
    column, cell_major = major // long, major % long
    key = (frame * windows + row) * windows + _snake(column, windows, row)
    key = key * long + _snake(cell_major, long, row)
    return key * wide + _snake(cell_minor, wide, row + cell_major)


def flatten_windows(
    coords: Tensor, grid_size: tuple[int, int], window_size: int | Sequence[int]
) -> Tensor:
    """Orders of the pillars for the four layers of a block: x, x shifted, y, y shifted.

    Args:
        coords: (P, 3) as (frame, y, x), in any order.
        grid_size: (ny, nx).
        window_size: side of a window in pillars, or its sides (x, y).

    Returns:
        (4, P): rows of `coords` in flattened order, frame after frame.
    """
    frame, y, x = coords.long().unbind(-1)
    wx, wy = _sides(window_size)
    windows = (max(grid_size) + max(wx, wy) // 2) // min(wx, wy) + 1
    keys = []
    for axis, shifted in _FLATTENINGS:
        along_x, along_y = x + wx // 2 * shifted, y + wy // 2 * shifted
        if axis == "x":
            keys.append(_sort_key(frame, along_x, along_y, (wx, wy), windows))
        else:
            keys.append(_sort_key(frame, along_y, along_x, (wy, wx), windows))
    return torch.stack(keys).argsort(dim=-1)


def encode_position(
    coords: Tensor,
    grid_size: tuple[int, int],
    channels: int,
    *,
    temperature: float = 10000.0,
    normalize: bool = False,
) -> Tensor:
    """Sines and cosines of the pillars' absolute coordinates, x then y, interleaved.

    Args:
        coords: (P, 3) as (frame, y, x).
        grid_size: (ny, nx).
        channels: width; what four does not divide is left zero at the end.
        temperature: longest period over 2 pi, in pillars.
        normalize: coordinates as a fraction of the grid times 2 * 3.1415, the reference's constant.

    Returns:
        (P, channels) float32.
    """
    width = 2 * (channels // 4)
    device = coords.device
    exponents = 2 * (torch.arange(width, device=device) // 2) / width
    periods = (temperature**exponents)[::2]
    encoded = []
    for axis, size in ((2, grid_size[1]), (1, grid_size[0])):
        # A table over the side, looked up: a side is much shorter than the list of pillars.
        place = torch.arange(size, device=device, dtype=torch.float32)
        if normalize:
            place = place / size * 2 * 3.1415
        angles = place[:, None] / periods
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        encoded.append(table.index_select(0, coords[:, axis].long()))
    encoded.append(table.new_zeros(len(coords), channels - 2 * width))
    return torch.cat(encoded, dim=-1)


class Layer(nn.Module):
    """Group attention and MLP, each with its residual and a LayerNorm after it."""

    def __init__(
        self, dim: int, num_heads: int, group_size: int, mlp_ratio: float, **factory: Any
    ) -> None:
        super().__init__()
        self.attn = GroupAttention(dim, num_heads, group_size, **factory)
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)

    def forward(self, x: Tensor, position: Tensor, frame_offsets: Tensor) -> Tensor:
        """Pillars in flattened order and their position encoding (P, C) -> (P, C)."""
        x = self.norm1(x + self.attn(x, position, frame_offsets))
        return self.norm2(x + self.mlp(x))


class FlatFormer(nn.Module):
    """FlatFormer on pillars; the features come from a pillar encoder, the map goes to a 2-D neck.

    Args:
        in_chans: channels of the pillar features, also the width of the network.
        num_classes: 0; there is no classifier.
        grid_size: (ny, nx) of the map.
        depth: blocks of four layers.
        num_heads: heads; divides `in_chans`.
        window_size: side of the windows that the flattening follows, in pillars, or their sides in
            the order (x, y), as the reference's `window_shape` has them.
        group_size: pillars of a group.
        mlp_ratio: hidden width of the MLPs over the channels; their activation is always GELU.
        pos_temperature, pos_normalize: see `encode_position`.

    Raises:
        ValueError: a classifier is asked for, the heads do not divide the channels, or a size is
            below 1.
    """

    def __init__(
        self,
        in_chans: int = 128,
        num_classes: int = 0,
        *,
        grid_size: tuple[int, int] = (468, 468),
        depth: int = 2,
        num_heads: int = 8,
        window_size: int | Sequence[int] = 13,
        group_size: int = 144,
        mlp_ratio: float = 2.0,
        pos_temperature: float = 10000.0,
        pos_normalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes:
            raise ValueError(f"FlatFormer has no classifier, got num_classes={num_classes}")
        if min(*grid_size, group_size) < 1:
            raise ValueError(f"grid {grid_size} and group {group_size} must be positive")
        self.in_chans = self.num_features = self.head_hidden_size = in_chans
        self.num_classes = 0
        self.grid_size = (int(grid_size[0]), int(grid_size[1]))
        self.window_size = _sides(window_size)
        self.pos_temperature = pos_temperature
        self.pos_normalize = pos_normalize
        self.grad_checkpointing = False
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layer: Any = partial(Layer, in_chans, num_heads, group_size, mlp_ratio, **factory)
        # Containers: the blocks share the flattenings, so the loop over them is in the model.
        self.blocks = nn.Sequential(
            *(nn.Sequential(*(layer() for _ in _FLATTENINGS)) for _ in range(depth))
        )
        self.feature_info = [{"num_chs": in_chans, "reduction": 1, "module": "blocks"}]
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for every matrix, queries, keys and values as one; attention biases zero."""
        for module in self.modules():
            if isinstance(module, GroupAttention):
                dim = module.proj.in_features
                bound = math.sqrt(6 / (dim + 3 * dim))
                for linear in (module.qk, module.v):
                    nn.init.uniform_(linear.weight, -bound, bound)
                nn.init.xavier_uniform_(module.proj.weight)
                for linear in (module.qk, module.v, module.proj):
                    nn.init.zeros_(linear.bias)
            elif isinstance(module, Mlp):
                nn.init.xavier_uniform_(module.fc1.weight)
                nn.init.xavier_uniform_(module.fc2.weight)

    def forward_features(self, features: Tensor, coords: Tensor, batch_size: int) -> Tensor:
        """Pillar features after the last block, in the rows of the input.

        Args:
            features: (P, in_chans).
            coords: (P, 3) integers as (frame, y, x), no cell twice, rows in any order.
            batch_size: frames, empty ones included.

        Returns:
            (P, in_chans).

        Raises:
            ValueError: shapes or coordinates do not fit the model.
        """
        self._check(features, coords, batch_size)
        if len(features) == 0:
            return features
        orders = flatten_windows(coords, self.grid_size, self.window_size)
        ranks = orders.argsort(dim=-1)
        position = encode_position(
            coords,
            self.grid_size,
            self.in_chans,
            temperature=self.pos_temperature,
            normalize=self.pos_normalize,
        ).to(features.dtype)
        positions = [position.index_select(0, order) for order in orders]
        # The rows stay in flattened order: between two layers they move once.
        moves = [ranks[i - 1][order] for i, order in enumerate(orders)]
        counts = torch.zeros(batch_size + 1, dtype=torch.int64, device=coords.device)
        frame = coords[:, 0].long()
        frame_offsets = counts.scatter_add(0, frame + 1, torch.ones_like(frame)).cumsum(0)
        x = features.index_select(0, orders[0])
        for i, block in enumerate(self.blocks):
            for j, layer in enumerate(cast(nn.Sequential, block)):
                if i or j:
                    x = x.index_select(0, moves[j])
                x = self._run(layer, x, positions[j], frame_offsets)
        return x.index_select(0, ranks[-1]) if len(self.blocks) else features

    def forward(self, features: Tensor, coords: Tensor, batch_size: int) -> Tensor:
        """Pillars (P, C) at coords (P, 3) as (frame, y, x) -> map (B, C, ny, nx), else zero."""
        x = self.forward_features(features, coords, batch_size)
        ny, nx = self.grid_size
        frame, row, column = coords.long().unbind(-1)
        cells = x.new_zeros(batch_size * ny * nx, x.shape[1])
        cells = cells.index_copy(0, (frame * ny + row) * nx + column, x)
        return cells.view(batch_size, ny, nx, -1).permute(0, 3, 1, 2)

    def _run(self, layer: nn.Module, x: Tensor, position: Tensor, frame_offsets: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint_layer(layer, x, position, frame_offsets)
        return layer(x, position, frame_offsets)

    def _check(self, features: Tensor, coords: Tensor, batch_size: int) -> None:
        if features.dim() != 2 or features.shape[1] != self.in_chans:
            raise ValueError(f"features must be (P, {self.in_chans}), got {tuple(features.shape)}")
        if coords.shape != (len(features), 3) or coords.is_floating_point():
            raise ValueError(
                f"coords must be integers of shape ({len(features)}, 3) as (frame, y, x), "
                f"got {coords.dtype} of shape {tuple(coords.shape)}"
            )
        if torch.compiler.is_compiling() or len(coords) == 0:
            return
        limits = coords.new_tensor([batch_size, *self.grid_size])
        if bool(((coords < 0) | (coords >= limits)).any()):
            raise ValueError(
                f"coords must lie in [0, {limits.tolist()}) as (frame, y, x), got values from "
                f"{coords.amin(0).tolist()} to {coords.amax(0).tolist()}"
            )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: blocks (coarse) or layers."""
        return {"stem": r"^$", "blocks": r"^blocks\.(\d+)" + ("" if coarse else r"\.(\d+)")}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: the LayerNorms'."""
        return {name for name, _ in self.named_parameters() if "norm" in name}

    def rename_checkpoint(self, state_dict: StateDict) -> StateDict:
        """The reference's parameter names -> ours; see `checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


_AUTHORS_NAMES = (
    (r"^middle_encoder\.", ""),
    (r"^block_list\.(\d+)\.block\.(\d+)\.", r"blocks.\1.\2."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    # Not in our own names, where `mlp.` is there already.
    (r"(?<!\.mlp)\.(fc[12])\.", r".mlp.\1."),
)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names, of the encoder alone or of a whole detector -> ours."""
    if isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]  # type: ignore[assignment]
    encoder = "middle_encoder."
    if any(name.startswith(encoder) for name in state_dict):
        state_dict = {name: v for name, v in state_dict.items() if name.startswith(encoder)}
    else:
        state_dict = unwrap(state_dict)
    renamed: StateDict = {}
    for name, value in rename(state_dict, _AUTHORS_NAMES).items():
        packed = re.fullmatch(r"(.*\.attn)\.attn\.in_proj_(weight|bias)", name)
        if packed is None:
            renamed[name] = value
            continue
        path, kind = packed.groups()
        dim = len(value) // 3
        renamed[f"{path}.qk.{kind}"], renamed[f"{path}.v.{kind}"] = value.split((2 * dim, dim))
    return renamed


default_cfgs = generate_default_cfgs(
    {
        "vz_flatformer": {
            "num_classes": 0,
            "input_size": (128, 468, 468),
            "pool_size": None,
            "first_conv": None,
            "classifier": None,
            "license": "apache-2.0",
        }
    }
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    # A folder or hub repository of the user's own comes as a configuration.
    own = kwargs.get("pretrained_cfg_overlay") or kwargs.get("pretrained_cfg")
    if pretrained and not own:
        raise ValueError(f"{name} has no published weights: {ENTRIES[0].notes}")
    return build_backbone(FlatFormer, name, pretrained, checkpoint_filter_fn, **kwargs)


register(
    ModelInfo(
        name="vz_flatformer",
        family="flatformer",
        channels=(128,),
        strides=(1,),
        input_size=(128, 468, 468),
        params=1_059_840,
        gmacs=None,
        paper="2301.08739",
        code="https://github.com/mit-han-lab/flatformer",
        code_licence="Apache-2.0",
        modality="points",
        limits={
            "images": "the input is (features, coords, batch_size) of LiDAR pillars",
            "features_only": "one map, at the pillar grid's own resolution",
        },
    ),
    _build,
    module=__name__,
)
