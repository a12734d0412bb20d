"""From a registered name to a model, through timm's builder."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from vitzoo.zoo.beside import read_over
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.formats import read_checked, unwrap
from vitzoo.zoo.resolve import local_overlay

__all__ = ["StateDict", "build_backbone", "name_mismatch", "rename", "unwrap"]

StateDict = dict[str, Tensor]

logger = logging.getLogger("vitzoo.zoo")


def build_backbone(
    model_cls: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    filter_fn: Callable[[StateDict, nn.Module], StateDict],
    *,
    out_indices: tuple[int, ...] = (0, 1, 2, 3),
    optional: tuple[str, ...] = (),
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
        optional: starts of parameter names that a file may lack. The dense version's output norms
            are always among them, since no classification file holds them.
        feature_cfg: further settings of timm's feature wrappers.
        **kwargs: for the class, and timm's own.
    """
    feature_cfg = {"out_indices": out_indices, "flatten_sequential": True, **(feature_cfg or {})}
    if kwargs.get("dense"):
        # Only the getter goes through forward_intermediates, where the output norms are.
        feature_cfg["feature_cls"] = "getter"
    file, stated = None, False
    if pretrained:
        config = kwargs.pop("pretrained_cfg", None)
        given = kwargs.pop("pretrained_cfg_overlay", None)
        # A tag stands for the table's entry; a whole configuration is the caller's word.
        stated = not isinstance(config, str | None) or "num_classes" in (given or {})
        cfg = resolve_pretrained_cfg(name, config, given)
        overlay = local_overlay(cfg, kwargs.get("cache_dir"))
        file = Path(overlay["file"]) if overlay else None
        kwargs["pretrained_cfg"] = dataclasses.asdict(dataclasses.replace(cfg, **(overlay or {})))
    features = bool(kwargs.get("features_only"))
    with read_over(file) if pretrained else nullcontext():
        return build_model_with_cfg(
            model_cls,
            name,
            pretrained,
            pretrained_filter_fn=_checked(
                filter_fn,
                name,
                optional,
                file=file,
                features=features,
                stated=stated,
                norms_chosen="norm_indices" in kwargs,
            ),
            # The comparison of names is the filter's; torch's would demand the optional ones.
            pretrained_strict=not (kwargs.get("dense") or optional),
            feature_cfg=feature_cfg,
            **kwargs,
        )


def _checked(
    filter_fn: Callable[[StateDict, nn.Module], StateDict],
    name: str,
    optional: tuple[str, ...],
    *,
    file: Path | None,
    features: bool,
    stated: bool,
    norms_chosen: bool,
) -> Callable[[StateDict, nn.Module], StateDict]:
    """The filter, then a comparison of names that says what does not fit.

    Args:
        filter_fn, name, optional: as for `build_backbone`.
        file: the weights file, None if timm reads it by itself.
        features: whether the model is wrapped by `features_only`.
        stated: whether the caller has said how many classes the file has.
        norms_chosen: whether the caller has said which stages have an output norm.
    """

    def filter_and_check(state_dict: StateDict, model: nn.Module) -> StateDict:
        if file is not None and file.suffix != ".safetensors":
            # timm's reader has taken one of the file's entries, `model_ema` before `model`: the
            # choice is the zoo's (`vitzoo.zoo.files.WRAPPERS`).
            state_dict = read_checked(file)
        found = filter_fn(state_dict, model)
        report = name_mismatch(found, model, optional=optional)
        if not report and not features:
            report = _classifier_mismatch(found, model)
        if report:
            raise WeightsError(f"the file does not fit {name}: {report}")
        if not stated and not features:
            _keep_fitting_classifier(found, model)
        _compare_output_norms(found, model, name, chosen=norms_chosen)
        return found

    return filter_and_check


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    found = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _output_norms(model: nn.Module) -> tuple[str, ...]:
    """Starts of the names of a dense model's output norms, those it goes without included."""
    return _possible_output_norms(model) if getattr(model, "dense", False) else ()


def _possible_output_norms(model: nn.Module) -> tuple[str, ...]:
    pattern = getattr(model, "output_norm_name", None)
    if pattern is None:
        return ()
    count = len(model.feature_info)  # type: ignore[arg-type]
    return tuple(f"{pattern.format(i)}." for i in range(count))


def _classifier_mismatch(state_dict: StateDict, model: nn.Module) -> str:
    """What is wrong with a classifier that timm will keep: one of the model's class count."""
    classes = getattr(model, "num_classes", 0)
    if not classes or classes != getattr(model, "pretrained_cfg", {}).get("num_classes"):
        return ""
    for key, value in model.state_dict().items():
        if not key.startswith(tuple(f"{head}." for head in _classifiers(model))):
            continue
        if key not in state_dict:
            return f"it has no classifier ({key}): give num_classes=0 to build the model without"
        if state_dict[key].shape != value.shape:
            shapes = f"{tuple(state_dict[key].shape)} in the file, {tuple(value.shape)}"
            return f"{key} is {shapes} in the model: give num_classes={len(state_dict[key])}"
    return ""


def _keep_fitting_classifier(state_dict: StateDict, model: nn.Module) -> None:
    """Let timm keep a whole classifier that fits, whatever the table says of the file.

    timm compares the model's class count with the configuration's, which knows the published files.
    """
    heads = tuple(f"{head}." for head in _classifiers(model))
    own = {
        key: value for key, value in model.state_dict().items() if heads and key.startswith(heads)
    }
    if own and all(k in state_dict and state_dict[k].shape == v.shape for k, v in own.items()):
        config: Any = model.pretrained_cfg
        config["num_classes"] = model.num_classes


def _compare_output_norms(
    state_dict: StateDict, model: nn.Module, name: str, *, chosen: bool
) -> None:
    """Say when a detector's or segmenter's file has its output norms on other stages."""
    own = set(getattr(model, "norm_indices", ()))
    starts = enumerate(_output_norms(model))
    held = {i for i, start in starts if any(key.startswith(start) for key in state_dict)}
    # Whoever names fewer stages wants the others raw.
    if held and (own - held or (held - own and not chosen)):
        logger.warning(
            "%s: the file has output norms on stages %s, the model on %s; norm_indices=%s gives "
            "what the file was trained as",
            name,
            sorted(held),
            sorted(own),
            tuple(sorted(held)),
        )


def name_mismatch(
    state_dict: StateDict, model: nn.Module, *, optional: tuple[str, ...] = ()
) -> str:
    """What is missing, unexpected or of another shape, by name; empty if the weights fit.

    The classifier is left out: timm replaces it where the class counts differ. So are the first
    convolution's channels, which timm adapts to those of the images, and BatchNorm's batch counter,
    which torch itself fills in. A dense model may lack output norms, and has no use for a
    classification file's head and final norm.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    heads = _classifiers(model)
    norms = _output_norms(model)
    dropped = ("head.", "norm.", *norms) if getattr(model, "dense", False) else ()
    own = {
        key: value
        for key, value in model.state_dict().items()
        if not key.endswith(".num_batches_tracked") or key in state_dict
    }
    classifier = tuple(f"{head}." for head in heads)
    without = (*classifier, *optional, *norms)
    missing = [key for key in own if key not in state_dict and not key.startswith(without)]
    extra = [k for k in state_dict if k not in own and not k.startswith((*classifier, *dropped))]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_nearest(missing, extra)})")
    if extra:
        parts.append(f"{len(extra)} unexpected ({_nearest(extra, missing)})")
    for key, value in state_dict.items():
        if key not in own or key.startswith(classifier):
            continue
        kept = 1 if key == f"{cfg.get('first_conv')}.weight" and value.dim() == 4 else None
        if _shape(value, but=kept) != _shape(own[key], but=kept):
            shapes = f"{tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
            parts.append(f"{key} is {shapes}")
            break
    possible = () if norms else _possible_output_norms(model)
    if parts and possible and any(key.startswith(possible) for key in extra):
        parts.append("it is a detector's or segmenter's file: give dense=True")
    return "; ".join(parts)


def _shape(value: Tensor, *, but: int | None) -> list[int]:
    return [size for axis, size in enumerate(value.shape) if axis != but]


def _nearest(names: list[str], candidates: list[str], most: int = 3) -> str:
    shown = []
    for name in names[:most]:
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.7)
        shown.append(f"{name}, nearest {near[0]}" if near else name)
    return "; ".join(shown) + (", ..." if len(names) > most else "")


def rename(state_dict: StateDict, rules: Iterable[tuple[str, str]]) -> StateDict:
    """Apply (pattern, replacement) rules to every name, in order."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        renamed[name] = value
    return renamed
