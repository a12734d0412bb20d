"""From a backbone's name to its maps at wanted strides, for any head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitzoo._skeleton import without_memory
from vitzoo.errors import InputError


class SimplePyramid(nn.Module):
    """Several maps from one, as plain-ViT detectors make them (ViTDet, arXiv 2203.16527).

    Transposed convolutions upwards, a pooling downwards.

    Args:
        channels: of the one map.
        factors: size of each wanted map by that of the input: 4, 2, 1 or 0.5.
    """

    def __init__(self, channels: int, factors: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        made: dict[float, tuple[nn.Module, int]] = {
            4: (
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, 2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                quarter,
            ),
            2: (nn.ConvTranspose2d(channels, half, 2, 2), half),
            1: (nn.Identity(), channels),
            0.5: (nn.MaxPool2d(2, ceil_mode=True), channels),
        }
        self.branches = nn.ModuleList(made[factor][0] for factor in factors)
        self.channels = tuple(made[factor][1] for factor in factors)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> maps (B, channels[i], factors[i] * H, factors[i] * W)."""
        return [branch(x) for branch in self.branches]


class Maps(nn.Module):
    """The maps of a zoo or timm backbone at given strides, finest first.

    Zoo backbones of several scales are built in their dense version, with output norms on
    the wanted maps where the authors have them; those of one scale pass `SimplePyramid`.

    Args:
        name: for `timm.create_model`.
        strides: wanted ones.
        pretrained: load published weights.
        norm_all: output norms on all the wanted maps of a backbone that has such norms, unless
            `norm_indices` says which. LITv2's detectors go without the first, its segmenters have
            it.
        **kwargs: for `timm.create_model`.

    Raises:
        ValueError: the backbone has not these strides.
    """

    channels: tuple[int, ...]

    def __init__(
        self,
        name: str,
        *,
        strides: Sequence[int],
        pretrained: bool = False,
        norm_all: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        common: dict[str, Any] = {"features_only": True, "feature_cls": "getter", **kwargs}
        indices, dense = _plan(name, common, self.strides, norm_all=norm_all)
        self.body = timm.create_model(
            name, pretrained=pretrained, out_indices=indices, **{**common, **dense}
        )
        self.channels = tuple(self.body.feature_info.channels())
        self.pyramid = None
        if len(indices) == 1 and len(self.strides) > 1:
            own = self.body.feature_info.reduction()[0]
            factors = [own / stride for stride in self.strides]
            self.pyramid = SimplePyramid(self.channels[0], factors)
            self.channels = self.pyramid.channels

    @property
    def model(self) -> nn.Module:
        """timm's model inside, with `group_matcher`, `no_weight_decay` and `pretrained_cfg`."""
        return self.body.model

    def layer_groups(self, prefix: str, *, coarse: bool) -> dict[str, Any]:
        """timm's group matcher of the model for its names under `prefix`.

        Raises:
            InputError: one of timm's models that have none.
        """
        try:
            matcher = self.model.group_matcher(coarse=coarse)  # type: ignore[operator]
        except (AssertionError, AttributeError):
            kind = type(self.model).__name__
            raise InputError(f"{kind} has no groups of layers, as layer decay needs them") from None
        return groups_under(prefix, matcher)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> maps (B, channels[i], H / strides[i], W / strides[i])."""
        maps = self.body(x)
        return maps if self.pyramid is None else self.pyramid(maps[0])


def groups_under(prefix: str, matcher: dict[str, Any]) -> dict[str, Any]:
    """timm's group matcher of a model that is a part of another one.

    Args:
        prefix: of the part's parameters, such as `backbone.`.
        matcher: of the part alone: name -> pattern, or list of (pattern, suffix).
    """

    def moved(pattern: str) -> str:
        # timm holds patterns against a name's start, and so each of their alternatives.
        alternatives = re.sub(r"(^|\|)\^", r"\1", pattern)
        return f"^{re.escape(prefix)}(?:{alternatives})"

    return {
        name: moved(given)
        if isinstance(given, str)
        else [(moved(pattern), suffix) for pattern, suffix in given]
        for name, given in matcher.items()
    }


def _plan(
    name: str, common: dict[str, Any], strides: tuple[int, ...], *, norm_all: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Indices of the feature maps to take, and the arguments of the dense version."""
    found = _reductions(name, common)
    if len(set(found)) == 1:
        known = [found[0] // 4, found[0] // 2, found[0], 2 * found[0]]
        if not set(strides) <= set(known):
            raise ValueError(f"a pyramid over {name} has strides {known}, not {strides}")
        return (len(found) - 1,), {}
    missing = [stride for stride in strides if stride not in found]
    if missing:
        raise ValueError(f"{name} has maps at strides {found}, none at {missing[0]}")
    indices = tuple(found.index(stride) for stride in strides)
    if not name.startswith("vz_"):
        return indices, {}
    with without_memory():
        dense = timm.create_model(name, **common, dense=True, out_indices=indices)
    normed = getattr(dense.model, "norm_indices", None)
    if normed is None:
        return indices, {"dense": True}
    if norm_all and normed and "norm_indices" not in common:
        normed = indices
    # A norm whose map is not taken would be a parameter without a gradient.
    wanted = tuple(i for i in normed if i in indices)
    return indices, {"dense": True, "norm_indices": wanted}


def _reductions(name: str, common: dict[str, Any]) -> list[int]:
    """Strides of all feature maps of a model, from a build on the meta device."""
    without = {key: value for key, value in common.items() if key != "norm_indices"}
    with without_memory():
        model = timm.create_model(name, **without)
    return [level["reduction"] for level in model.feature_info.info]
