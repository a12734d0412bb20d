"""A recipe's `model` section made into a backbone through timm, and the freezing of its parts."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, group_parameters
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from vitzoo.backbones import list_models
from vitzoo.errors import InputError
from vitzoo.zoo import formats
from vitzoo.zoo.beside import read_over
from vitzoo.zoo.files import check_weights


@dataclass(kw_only=True)
class ModelOptions:
    """The recipe's `model` section for a backbone with timm's classifier.

    Attributes:
        name: a model of the zoo (or of timm), with or without a weight tag; or `local-dir:FOLDER`
            or `hf-hub:ORG/NAME` with what `vitzoo weights convert` writes.
        pretrained: start from the published weights; the classifier is new where the class count
            differs.
        checkpoint: start from this file instead, in the zoo's, timm's or the authors' format; the
            classifier is new where the count differs, or the class names that a run's file holds.
        num_classes: only to demand a count; the data set's own if None.
        in_chans: image channels, 1 or 3.
        drop_rate, drop_path_rate: dropout before the classifier, stochastic depth.
        args: the model's other arguments (`depths`, `embed_dims`, `num_heads`, ...).
        frozen_stages: keep the stem and the first n stages as they are.
        linear_probe: train nothing but the classifier.
        grad_checkpointing: recompute activations in backward.
        compile: run the model through torch.compile.
    """

    name: str = "???"  # OmegaConf's mark of a value that must be given
    pretrained: bool = False
    checkpoint: str | None = None
    num_classes: int | None = None
    in_chans: int = 3
    drop_rate: float | None = None
    drop_path_rate: float | None = None
    args: dict[str, Any] = field(default_factory=dict)
    frozen_stages: int = 0
    linear_probe: bool = False
    grad_checkpointing: bool = False
    compile: bool = False


logger = logging.getLogger("vitzoo.tasks")

# Where timm finds a folder of weights and configuration, as `vitzoo weights convert` writes it.
ELSEWHERE = ("local-dir:", "hf-hub:")


def config_of(name: str) -> PretrainedCfg | None:
    """timm's configuration of a name, of `local-dir:FOLDER` or of `hf-hub:ORG/NAME`, if any.

    Raises:
        InputError: the folder or the repository holds none.
    """
    return _read_elsewhere(name)[0] if name.startswith(ELSEWHERE) else timm.get_pretrained_cfg(name)


def _read_elsewhere(name: str) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    """Configuration, architecture and its arguments of a folder or a repository."""
    source, _, place = name.partition(":")
    read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
    try:
        found, architecture, arguments = read(place)
    except Exception as error:
        # A missing file, no network, no JSON, no such key: each loader and client has its own.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name} has no readable config.json: {reason}") from None
    known_name(architecture)
    fields = {field.name for field in dataclasses.fields(PretrainedCfg)}
    config = PretrainedCfg(**{key: value for key, value in found.items() if key in fields})
    return config, architecture, dict(arguments or {})


def known_name(name: str, *, elsewhere: bool = False) -> str:
    """The name, if `timm.create_model` knows it.

    Args:
        name: of a model, with or without a weight tag.
        elsewhere: whether `local-dir:FOLDER` and `hf-hub:ORG/NAME` will do, too.

    Raises:
        InputError: it does not; the message offers the nearest names.
    """
    if elsewhere and name.startswith(ELSEWHERE):
        config_of(name)
        return name
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        names = {*list_models(), *timm.list_models()}
        near = difflib.get_close_matches(bare, names, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see `vitzoo list`"
        raise InputError(f"unknown model {name!r}{hint}")
    tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in tags:
        known = f"; known: {', '.join(tags)}" if tags else "; it has none"
        raise InputError(f"{bare} has no weights {tag!r}{known}")
    return name


def create_model(options: ModelOptions, labels: Sequence[str], *, pretrained: bool) -> nn.Module:
    """Build the model of a recipe.

    Args:
        options: the recipe's section.
        labels: class names, one for each output of the classifier.
        pretrained: whether to load the weights that the section names.

    Raises:
        InputError: unknown name or argument, unreadable or refused weights.
    """
    known_name(options.name, elsewhere=True)
    arguments = dict(options.args)
    for key in ("drop_rate", "drop_path_rate"):
        if getattr(options, key) is not None:
            arguments[key] = getattr(options, key)
    load = pretrained and (options.pretrained or options.checkpoint is not None)
    if pretrained and not load:
        _warn_of_unused_weights(options.name)
    path = None
    if load and options.checkpoint is not None:
        path = Path(options.checkpoint).expanduser()
        if not path.is_file():
            raise InputError(f"model.checkpoint={options.checkpoint} is no file")
    try:
        if path is not None:
            overlay: dict[str, Any] = {"file": str(path)}
            # timm keeps a head if the file is said to have the model's class count.
            if has_other_labels(path, labels):
                overlay["num_classes"] = 0
            elif classes_in(path, options.name) == len(labels):
                overlay["num_classes"] = len(labels)
            arguments["pretrained_cfg_overlay"] = overlay
        with read_over(path):
            model = timm.create_model(
                options.name,
                pretrained=load,
                num_classes=len(labels),
                in_chans=options.in_chans,
                **arguments,
            )
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, OSError, KeyError) as error:
        raise _explain(error, options, load=load) from error
    if getattr(model, "dense", False):
        raise InputError(
            f"{options.name} is a backbone for detectors and segmenters: it has no classifier"
        )
    if options.grad_checkpointing:
        recompute_activations(model)
    if options.compile:
        model.compile()
    return model


def classes_in(path: Path, name: str) -> int | None:
    """Outputs of the classifier in a weights file, None if it has none under the model's name.

    Args:
        path: a file in the zoo's, timm's or the authors' format.
        name: the model that it is for.

    Raises:
        InputError: no such file, or not one of plain tensors.
    """
    config = config_of(name)
    return formats.classes_in(formats.read_weights(path), config.classifier if config else None)


def labels_in(path: Path) -> tuple[str, ...] | None:
    """The class names that a run wrote into its weights file; None in any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    stored = json.loads(metadata.get("vitzoo", "{}")).get("labels")
    return tuple(stored) if stored else None


def has_other_labels(file: str | Path | None, labels: Sequence[str]) -> bool:
    """Whether a run wrote the file for other classes than these, or for these in another order."""
    stored = labels_in(Path(file).expanduser()) if file else None
    return stored is not None and stored != tuple(labels)


def backbone_of(options: Any, *, pretrained: bool) -> tuple[str, bool, dict[str, Any]]:
    """A backbone under a head: timm's name, whether to load weights, and further arguments.

    Args:
        options: a `model` section with `name`, `pretrained`, `checkpoint` and `args`.
        pretrained: whether the model starts from them at all.

    Raises:
        InputError: `checkpoint` is no file of plain tensors, or a folder or repository is none.
    """
    name, arguments = options.name, dict(options.args)
    load = pretrained and (options.pretrained or options.checkpoint is not None)
    if name.startswith(ELSEWHERE):
        config, name, own = _read_elsewhere(name)
        own.pop("num_classes", None)  # of a classifier, which the head takes the place of
        arguments = own | arguments
        if load:
            arguments["pretrained_cfg"] = config
        elif pretrained:
            _warn_of_unused_weights(options.name)
    if load and options.checkpoint is not None:
        path = Path(options.checkpoint).expanduser()
        check_weights(path)
        arguments["pretrained_cfg_overlay"] = {"file": str(path), "source": ""}
    return name, load, arguments


def _warn_of_unused_weights(name: str) -> None:
    """Whoever names a folder or a repository most likely wants its weights, too."""
    if name.startswith(ELSEWHERE):
        logger.warning("%s gives the architecture only; with --pretrained its weights, too", name)


def refused_pickle(path: str) -> InputError:
    """The error for a weight file that is not plain tensors."""
    return InputError(
        f"{path} is not a file of plain tensors, so it was not loaded: it is damaged, or its "
        "pickle would run code. Ask its author for safetensors."
    )


def _explain(error: Exception, options: ModelOptions, *, load: bool) -> InputError:
    text = " ".join(str(error).split())
    if "nexpected keyword" in text or isinstance(error, TypeError):
        return InputError(f"model.args do not fit {options.name}: {text}")
    if load:
        what = options.checkpoint or f"the weights of {options.name}"
        if "weights_only" in text:
            return refused_pickle(what)
        return InputError(f"cannot load {what}: {text[:600]}")
    return InputError(f"cannot build {options.name}: {text}")


def recompute_activations(model: Any) -> None:
    """Turn gradient checkpointing on.

    Raises:
        InputError: one of timm's models that have none.
    """
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError):
        raise InputError(
            "model.grad_checkpointing=true: this model cannot recompute its activations"
        ) from None


def freeze(model: nn.Module, *, stages: int, linear_probe: bool) -> list[nn.Module]:
    """Stop gradients of the first stages, or of everything but the classifier.

    Args:
        model: a timm model (`group_matcher`, `get_classifier`).
        stages: stem and first n stages; 0 freezes nothing.
        linear_probe: all but the classifier.

    Returns:
        The modules without a trainable parameter: keep them in evaluation mode, so that their
        BatchNorm statistics and stochastic depth rest too.

    Raises:
        InputError: more stages than the model has, or a model without any that timm knows.
    """
    if linear_probe:
        model.requires_grad_(False)
        for classifier in _classifiers(model):
            classifier.requires_grad_(True)
    elif stages:
        try:
            matcher = model.group_matcher(coarse=True)  # type: ignore[operator]
        except (AssertionError, AttributeError):
            raise InputError(
                f"model.frozen_stages={stages}: {type(model).__name__} has no groups of layers"
            ) from None
        groups = group_parameters(model, matcher, reverse=True)
        # The last group is whatever no pattern names: final norm and head.
        last = max(groups.values())
        if stages >= last:
            raise InputError(
                f"model.frozen_stages={stages}, but the model has {last - 1} stages to freeze"
            )
        for name, parameter in model.named_parameters():
            if groups[name] <= stages:
                parameter.requires_grad_(False)
    else:
        return []
    return [
        module
        for module in model.modules()
        if any(True for _ in module.parameters())
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def _classifiers(model: nn.Module) -> Iterable[nn.Module]:
    found = model.get_classifier()  # type: ignore[operator]
    return found if isinstance(found, list | tuple) else (found,)
