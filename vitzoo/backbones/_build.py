"""From a registered name to a model, through timm's builder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from timm.models import build_model_with_cfg
from torch import Tensor, nn

StateDict = dict[str, Tensor]


def build_backbone(
    model_cls: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    filter_fn: Callable[[StateDict, nn.Module], StateDict],
    *,
    out_indices: tuple[int, ...] = (0, 1, 2, 3),
    strict: bool = True,
    feature_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg` with the zoo's conventions.

    Args:
        model_cls: the family's class.
        name: registered name.
        pretrained: load weights, from whichever source timm resolves.
        filter_fn: from any published layout to the model's parameter names.
        out_indices: stages that `features_only` returns unless told otherwise.
        strict: whether the file must hold every parameter. The dense version's output norms are
            never in a classification file, so `dense=True` is not strict.
        feature_cfg: further settings of timm's feature wrappers.
        **kwargs: for the class, and timm's own.
    """
    feature_cfg = {"out_indices": out_indices, "flatten_sequential": True, **(feature_cfg or {})}
    if kwargs.get("dense"):
        # Only the getter goes through forward_intermediates, where the output norms are.
        feature_cfg["feature_cls"] = "getter"
        strict = False
    return build_model_with_cfg(
        model_cls,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        pretrained_strict=strict,
        feature_cfg=feature_cfg,
        **kwargs,
    )


def unwrap(state_dict: dict[str, Any]) -> StateDict:
    """The weights inside the wrappers that trainers write around them.

    Handles `state_dict_ema`, `state_dict`, `model_ema` and `model` entries, and the prefixes
    `module.` and `backbone.` of distributed and detection checkpoints.
    """
    for key in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    for prefix in ("module.", "backbone."):
        if any(name.startswith(prefix) for name in state_dict):
            # Detectors and segmenters also hold neck and head: only the backbone is ours.
            state_dict = {
                name.removeprefix(prefix): value
                for name, value in state_dict.items()
                if name.startswith(prefix) or prefix == "module."
            }
    return state_dict


def rename(state_dict: StateDict, rules: Iterable[tuple[str, str]]) -> StateDict:
    """Apply (pattern, replacement) rules to every name, in order."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        renamed[name] = value
    return renamed
