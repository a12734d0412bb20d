"""What the zoo knows of each model, and its registration with timm."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from timm.models import register_model
from torch import nn

_INFO: dict[str, ModelInfo] = {}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts of one registered model, for tests, cards and heads to read.

    Attributes:
        name: the name that `timm.create_model` takes.
        family: name of the family's file in `vitzoo/backbones/`.
        modality: `image`, or `points` for LiDAR.
        channels, strides: of the feature maps, first to last.
        input_size: (channels, height, width) of the default configuration.
        params: trainable parameters of the reference at its own class count.
        gmacs: billions of multiply-adds of one image of `input_size`, where the reference states or
            allows counting them.
        paper: arXiv number.
        code: repository of the code that the model follows.
        code_licence: that repository's licence.
        odd_sides: whether a side that a downsampling does not divide is rounded `up` or `down`,
            where the first map's side is still rounded up; `all down` rounds that down, too.
        fixed_input_size: the model takes `input_size` only.
        choices: a discrete choice inside (top-k), which rounding can flip; None if there is none.
        limits: what cannot hold for this model -> why, e.g. `any_size`, or `dynamic_size`
            for one exported graph that takes any height and width.
    """

    name: str
    family: str
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    params: int | None
    gmacs: float | None
    paper: str
    code: str
    code_licence: str
    modality: Literal["image", "points"] = "image"
    input_size: tuple[int, int, int] = (3, 224, 224)
    odd_sides: Literal["up", "down", "all down"] = "up"
    fixed_input_size: bool = False
    choices: str | None = None
    limits: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def map_sides(self, side: int) -> tuple[int, ...]:
        """Sides of the feature maps of an image side in pixels, first to last."""
        if self.odd_sides == "up":
            return tuple(-(-side // stride) for stride in self.strides)
        first = self.strides[0]
        if self.odd_sides == "all down":
            side -= side % first
        return tuple(-(-side // first) // (stride // first) for stride in self.strides)


def info(name: str) -> ModelInfo:
    """The record of a zoo model; a weight tag after a dot is ignored.

    Raises:
        ValueError: no such model in the zoo; the message offers the nearest names.
    """
    found = _INFO.get(name.partition(".")[0])
    if found is None:
        near = difflib.get_close_matches(name, _INFO, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"vitzoo has no model {name!r}{hint}")
    return found


def list_models(family: str | None = None) -> list[str]:
    """Names of the zoo's models, of one family or all, in the order of registration."""
    return [name for name, record in _INFO.items() if family in (None, record.family)]


def register(record: ModelInfo, build: Callable[..., nn.Module], *, module: str) -> None:
    """Register one model with timm and keep its record.

    Args:
        record: the model's facts.
        build: called as `build(name, pretrained, **kwargs)`.
        module: `__name__` of the family's module, where timm looks for `default_cfgs`.
    """

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(record.name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = record.name
    entrypoint.__module__ = module
    entrypoint.__doc__ = f"{record.name} (arXiv {record.paper}), following {record.code}."
    setattr(sys.modules[module], record.name, register_model(entrypoint))
    _INFO[record.name] = record
