"""From an authors' file to a folder that timm loads from disk or from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitzoo.errors import InputError
from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.files import sha256_of, wrapper_of
from vitzoo.zoo.formats import classes_in, prefix_of, read_weights, unwrap
from vitzoo.zoo.model_card import write_card
from vitzoo.zoo.published import all_entries, find_entry


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
    entry = _entry_of(source, model)
    name = model.partition(".")[0] if model else entry.model if entry else None
    if name is None:
        raise WeightsError(
            f"{source.name} has no name of the weights table: say which model it is for "
            "(--model NAME; `vitzoo weights info FILE` lists the models of its size)"
        )
    # timm's own models can do without this: their files are what timm publishes.
    if not name.startswith("vz_") or not timm.is_model(name):
        raise WeightsError(f"the zoo has no model {name!r}; `vitzoo list` has their names")
    given = dict(entry.arguments if entry else ()) | dict(arguments or {})
    try:
        built = _load(source, name, content, given, entry)
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        # A family's own code may stumble over weights of another, or over arguments it lacks.
        text = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} does not fit {name} as it was asked for: {text}") from error
    _save(built, target, given, entry)
    write_card(target, built, entry, source)
    return _read_back(built, target)


def _entry_of(source: Path, model: str | None) -> WeightEntry | None:
    """The table's entry of a name with a tag, or of a file that is named as its source is."""
    if model and "." in model:
        name, _, tag = model.partition(".")
        found = [e for e in all_entries() if (e.model, e.tag) == (name, tag)]
        if not found:
            known = ", ".join(e.tag for e in all_entries() if e.model == name)
            raise WeightsError(f"{name} has no weights {tag!r}; known: {known or 'none'}")
        return found[0]
    for entry in all_entries():
        if model in (None, entry.model):
            names = {address.rpartition("/")[2] for address in entry.sources}
            if source.name in names:
                return entry
    return None


def _load(
    source: Path,
    name: str,
    content: Mapping[str, Any],
    arguments: Mapping[str, Any],
    entry: WeightEntry | None,
) -> nn.Module:
    # timm lists the tags of classifiers only.
    full = entry.name if entry and find_entry(entry.name) is entry else name
    config = timm.get_pretrained_cfg(full)
    assert config is not None
    dense = bool(arguments.get("dense"))
    classes = None if dense else classes_in(dict(content), config.classifier)
    overlay = {"file": str(source), "num_classes": classes or 0}
    in_chans = _image_channels(unwrap(dict(content)))
    extra: dict[str, Any] = {}
    if in_chans not in (None, config.input_size[0]) and len(config.input_size) == 3:
        extra["in_chans"] = in_chans
        overlay["input_size"] = (in_chans, *config.input_size[1:])
    if config.classifier is not None:
        extra["num_classes"] = classes or 0
    return timm.create_model(
        full,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **extra,
        **arguments,
    ).eval()


def _image_channels(weights: Mapping[str, Tensor]) -> int | None:
    """Input channels of the first convolution in a file, whose names keep the network's order."""
    for value in weights.values():
        if isinstance(value, Tensor) and value.dim() == 4:
            return value.shape[1] if value.shape[1] in (1, 3, 4) else None
    return None


def _save(
    model: nn.Module, target: Path, arguments: Mapping[str, Any], entry: WeightEntry | None
) -> None:
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf

    target.mkdir(parents=True, exist_ok=True)
    # Tied weights share memory, which safetensors refuses: every name gets its own copy.
    tensors = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    about = {"tag": entry.tag} if entry else {}
    save_config_for_hf(
        model,
        str(target / "config.json"),
        model_config={"pretrained_cfg": about},
        model_args=dict(arguments),
    )


def _read_back(model: nn.Module, target: Path) -> nn.Module:
    again = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    before, after = model.state_dict(), again.state_dict()
    wrong = [k for k in before if k not in after or not torch.equal(before[k], after[k])]
    if wrong or len(before) != len(after):
        raise WeightsError(f"{target} does not read back as it was written: {wrong[:3]}")
    return again
