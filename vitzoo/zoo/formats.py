"""The wrappers that trainers write around weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from vitzoo.zoo.beside import read_over
from vitzoo.zoo.files import check_weights, wrapper_of

# Of compiled, distributed and Lightning's models; of what holds the backbone among other parts.
WHOLE = ("_orig_mod.", "module.", "model.")
# The last two are this library's own, inside a segmenter's and a detector's `backbone.`.
PARTS = ("backbone.", "encoder.", "body.model.", "maps.body.model.")
PREFIXES = (*WHOLE, *PARTS)


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a weights file, wrappers and all, read as plain tensors.

    Raises:
        WeightsError: see `check_weights`.
    """
    check_weights(path)
    return read_checked(path)


def read_checked(path: Path) -> dict[str, Any]:
    """`read_weights` of a file that `check_weights` has let through."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    import torch

    with read_over(path):
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def unwrap(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The weights inside the wrappers that trainers write around them.

    Handles `state_dict_ema`, `state_dict`, `model` and `model_ema` entries, also nested, and the
    prefixes of compiled, distributed and Lightning's models (`_orig_mod.`, `module.`, `model.`) and
    of detectors and segmenters (`backbone.`, `encoder.`, our own runs'), also one in another. Of an
    mmpretrain classifier the head is kept, too; counters and the like beside the weights are left
    out.
    """
    while wrapper := wrapper_of(state_dict):
        state_dict = state_dict[wrapper]
    state_dict = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    while prefix := prefix_of(state_dict):
        # Detectors and segmenters also hold neck and head: only the backbone is ours.
        inner = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix) or prefix in WHOLE
        }
        if prefix == "backbone.":
            inner |= {
                name.replace("head.fc.", "head."): value
                for name, value in state_dict.items()
                if name.startswith("head.fc.")
            }
        state_dict = inner
    return state_dict


def prefix_of(names: Iterable[str]) -> str | None:
    """What a trainer has put before the names, None if nothing."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in names)), None)


def classes_in(content: dict[str, Any], classifier: str | tuple[str, ...] | None) -> int | None:
    """Outputs of the classifier in a file's content, None if it holds none.

    Args:
        content: as read, in the zoo's, timm's or the authors' names.
        classifier: the model's own name for it; the authors of all families call it `head`.
    """
    weights = unwrap(content)
    first = classifier[0] if isinstance(classifier, list | tuple) else classifier
    for name in (first, "head"):
        head = weights.get(f"{name}.weight")
        if head is not None and head.dim() == 2:
            return len(head)
    return None
