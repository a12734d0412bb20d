"""From an authors' file to a folder that timm loads from disk or from the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from vitzoo._skeleton import without_memory
from vitzoo.errors import InputError
from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.files import sha256_of, wrapper_of
from vitzoo.zoo.formats import classes_in, prefix_of, read_weights, unwrap
from vitzoo.zoo.model_card import write_card
from vitzoo.zoo.provenance import Match, claims, match_of
from vitzoo.zoo.published import find_entry


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a weights file holds.

    Attributes:
        path, size, sha256: the file, its bytes and their hash.
        wrapper: entry that holds the weights, None if they lie open.
        prefix: put before every name by a trainer, None if there is none.
        tensors, params: how many, and the numbers in them.
        dtypes: of the tensors.
        shapes: name -> shape, without wrappers.
    """

    path: Path
    size: int
    sha256: str
    wrapper: str | None
    prefix: str | None
    tensors: int
    params: int
    dtypes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


def look_into(path: Path) -> FileFacts:
    """Read a weights file as plain tensors and say what is in it.

    Raises:
        WeightsError: no weights file, or one that would run code.
    """
    content = read_weights(path)
    wrapper = wrapper_of(content)
    outer = content[wrapper] if wrapper else content
    tensors = unwrap(content)
    return FileFacts(
        path=path,
        size=path.stat().st_size,
        sha256=sha256_of(path),
        wrapper=wrapper,
        prefix=prefix_of(outer),
        tensors=len(tensors),
        params=sum(v.numel() for n, v in tensors.items() if not _is_buffer(n)),
        dtypes=tuple(sorted({str(v.dtype).removeprefix("torch.") for v in tensors.values()})),
        shapes={name: tuple(value.shape) for name, value in tensors.items()},
    )


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def models_of_size(params: int, records: Iterable[Any]) -> list[str]:
    """Names of the models with exactly this many parameters."""
    return [record.name for record in records if record.params == params]


def convert(
    source: Path,
    target: Path,
    model: str | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Write a folder of safetensors, config.json and a card from a weights file.

    Configuration and card state licence, origin and published accuracy only where the file is
    certain to hold those very weights (see `vitzoo.zoo.provenance`).

    Args:
        source: a file in the authors', timm's or the zoo's format, wrapped or not.
        target: a new or empty folder.
        model: the model's name, `NAME` or `NAME.TAG`; None if the file has a name of the table.
        arguments: what the model is built with beyond its variant's own arguments.

    Returns:
        The model, as it was read back from the folder.

    Raises:
        WeightsError: an unknown or unsafe file, a folder that is not empty, or weights that do not
            fit the model.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target} is not an empty folder: name another one to write to")
    content = read_weights(source)
    match = match_of(source, model)
    name = model.partition(".")[0] if model else match.entry.model if match else None
    if name is None:
        raise WeightsError(
            f"{source.name} has no name of the weights table: say which model it is for "
            "(--model NAME; `vitzoo weights info FILE` lists the models of its size)"
        )
    try:
        built, given, entry = _build(source, name, content, match, arguments or {})
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        # A family's own code may stumble over weights of another, or over arguments it lacks.
        text = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} does not fit {name} as it was asked for: {text}") from error
    _save(built, target, given)
    write_card(target, built, entry, source)
    return _read_back(built, target)


def _build(
    source: Path,
    name: str,
    content: Mapping[str, Any],
    match: Match | None,
    asked: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, Any], WeightEntry | None]:
    """(model with the file's weights, what it is built with, the entry that they surely are)."""
    given = dict(match.entry.arguments if match else ()) | dict(asked)
    config = _config_of(name, match)
    classes = classes_in(dict(content), config.classifier)
    channels = _stem_channels(name, config, content, given)
    entry = None
    if match:
        entry = match.claimed(classes=classes, channels=channels, arguments=asked)
    overlay = claims(entry) | {"file": str(source), "num_classes": classes or 0}
    return _load(config, overlay, given, channels), given, entry


def _config_of(name: str, match: Match | None) -> PretrainedCfg:
    """timm's configuration of the matched weights; of the model where timm lists no such tag."""
    tagged = match is not None and find_entry(match.entry.name) is match.entry
    config = timm.get_pretrained_cfg(match.entry.name if match and tagged else name)
    assert config is not None
    return config


def _stem_channels(
    name: str, config: PretrainedCfg, content: Mapping[str, Any], arguments: Mapping[str, Any]
) -> int | None:
    """Image channels of the stem in a file, under whatever names its authors use."""
    if config.first_conv is None:
        return None
    family = sys.modules[timm.model_entrypoint(name).__module__]
    with without_memory():
        skeleton = timm.create_model(name, **arguments)
    weights = family.checkpoint_filter_fn(dict(content), skeleton)
    stem = weights.get(f"{config.first_conv}.weight")
    return None if stem is None else stem.shape[1]


def _load(
    config: PretrainedCfg,
    overlay: dict[str, Any],
    arguments: Mapping[str, Any],
    channels: int | None,
) -> nn.Module:
    """The model with the file's weights, its class count and its channels, or those asked for."""
    extra: dict[str, Any] = {}
    if channels is not None:
        overlay["input_size"] = (channels, *config.input_size[1:])
        extra["in_chans"] = channels
    held = overlay["num_classes"]
    if arguments.get("dense"):
        overlay["num_classes"] = held = 0
    if config.classifier is not None:
        extra["num_classes"] = held
    if arguments.get("num_classes", held) not in (0, held):
        raise WeightsError(
            f"the file's classifier has {held} outputs, not {arguments['num_classes']}: "
            "num_classes=0 leaves it out, and `vitzoo train` makes a new one"
        )
    full = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    return timm.create_model(
        full, pretrained=True, pretrained_cfg_overlay=overlay, **{**extra, **arguments}
    ).eval()


def _save(model: nn.Module, target: Path, arguments: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf

    target.mkdir(parents=True, exist_ok=True)
    # Tied weights share memory, which safetensors refuses: every name gets its own copy.
    tensors = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    save_config_for_hf(model, str(target / "config.json"), model_args=dict(arguments))


def _read_back(model: nn.Module, target: Path) -> nn.Module:
    again = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    before, after = model.state_dict(), again.state_dict()
    wrong = [k for k in before if k not in after or not torch.equal(before[k], after[k])]
    if wrong or len(before) != len(after):
        raise WeightsError(f"{target} does not read back as it was written: {wrong[:3]}")
    return again
