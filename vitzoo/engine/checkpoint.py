"""Checkpoints: one safetensors file each, written atomically and checked when read.

A file holds everything that resuming needs: tensors under `model.`, `ema.` and `optimizer.`, and a
JSON text of the rest. Nothing is pickled. Its digest covers names, shapes and bytes, so a torn or
damaged file is recognised and the one before is taken. accelerate's `save_state` writes several
files in place with pickles among them, which a kill can leave half new and half old.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitzoo._paths import write_atomically
from vitzoo.errors import InputError

logger = logging.getLogger("vitzoo.engine")


@dataclass
class Checkpoint:
    """Tensors by name, and facts in JSON's types."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    """SHA-256 over names, types, shapes, bytes and facts."""
    total = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write one checkpoint or weights file."""
    # Tied weights share memory, which safetensors refuses; a copy each is what a reader expects.
    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in checkpoint.tensors.items()
    }
    facts = json.dumps(checkpoint.facts)
    metadata = {"format": "pt", "vitzoo": facts, "sha256": digest(tensors, facts)}
    write_atomically(path, save(tensors, metadata=metadata))


def read(path: Path) -> Checkpoint:
    """Read and check one file.

    Raises:
        InputError: torn, damaged, or not written by vitzoo.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if "vitzoo" not in metadata:
        raise InputError(f"{path} holds weights, but was not written by vitzoo train")
    if metadata.get("sha256") != digest(tensors, metadata["vitzoo"]):
        raise InputError(f"{path} is damaged: its content does not match its SHA-256")
    return Checkpoint(tensors, json.loads(metadata["vitzoo"]))


def is_ours(path: Path) -> bool:
    """Whether a safetensors file was written here; also true of one that cannot be read at all."""
    try:
        with safe_open(path, framework="pt") as file:
            return "vitzoo" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


def path_of(folder: Path, update: int) -> Path:
    """The file of the checkpoint after an update."""
    return folder / f"update-{update:09d}.safetensors"


def newest(folder: Path) -> Checkpoint | None:
    """The last checkpoint that is whole; damaged ones are reported and passed over."""
    for path in sorted(folder.glob("update-*.safetensors"), reverse=True):
        try:
            return read(path)
        except InputError as error:
            logger.warning("%s; going back to the checkpoint before", error)
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and leftovers of killed saves."""
    for path in sorted(folder.glob("update-*.safetensors"))[:-keep]:
        path.unlink()
    for path in folder.glob(".*.part"):
        path.unlink()


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's `state_dict` as tensors by name and facts in JSON's types.

    Raises:
        InputError: the optimiser keeps something that neither holds.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for key, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{key}.{name}"] = value
            else:
                scalars.setdefault(str(key), {})[name] = value
    facts = {"scalars": scalars, "groups": state["param_groups"]}
    try:
        # What JSON changes on the way must not change what the optimiser reads back.
        json.dumps(facts)
    except TypeError as error:
        raise InputError(f"this optimiser's state cannot be saved: {error}") from None
    return tensors, facts


def unflatten_optimizer(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[Any, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.rpartition(".")
        state.setdefault(_key(key), {})[name] = tensor
    for key, entries in facts["scalars"].items():
        state.setdefault(_key(key), {}).update(entries)
    return {"state": state, "param_groups": [_tuples(group) for group in facts["groups"]]}


def _key(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the optimisers' pairs (betas) are tuples, parameter lists are lists."""
    return {
        name: tuple(value) if isinstance(value, list) and name != "params" else value
        for name, value in group.items()
    }
