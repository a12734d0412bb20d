"""What trainers keep beside the weights in a pickle: read over, never built.

`weights_only=True` refuses a whole file for a numpy number in the optimizer's settings or for the
configuration of the run. Names of libraries that hold such data are given an inert stand-in each;
nothing of theirs is imported or called, and all other names are refused as before.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

# Numbers and arrays, run configurations, histories, paths: what trainers in the manner of DeiT,
# ConvNeXt, Swin, BiFormer (hydra), OpenMMLab and Lightning write.
_LIBRARIES = {
    *("addict", "argparse", "collections", "datetime", "enum", "lightning", "lightning_fabric"),
    *("mmcv", "mmengine", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "typing", "yacs"),
}
_TYPES = ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "str", "tuple")
# Types that configurations name, and how a method is named by mmengine's histories.
_NAMES = {"_operator.getitem", "builtins.getattr", *(f"builtins.{name}" for name in _TYPES)}
# Files older than PyTorch 1.6 do not say beforehand what they name.
_FREQUENT = {
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "yacs.config.CfgNode",
}
# Subclasses of dict and list, by their last name: torch fills plain ones only.
_MAPPINGS = {"AttributeDict", "CfgNode", "ConfigDict", "Dict", "defaultdict"}
_SEQUENCES = {"deque"}


# torch's list of safe names belongs to the process.
_reading = threading.RLock()


class Unread:
    """In place of an object."""

    def __new__(cls, *_: Any) -> Unread:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _UnreadMapping:
    """In place of a dict's subclass; makes plain ones."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _UnreadSequence:
    """In place of a list's subclass; makes plain ones."""

    def __new__(cls, *_: Any) -> Any:
        return []


@contextmanager
def read_over(path: str | Path | None = None) -> Iterator[None]:
    """Context in which torch's safe unpickler reads over what a trainer keeps beside the weights.

    Args:
        path: the file that will be read; without one, and for files older than PyTorch 1.6, only
            what is frequent is read over.
    """
    names = set(_FREQUENT)
    if path is not None:
        # Of a damaged file whoever reads it says what is wrong.
        with suppress(Exception):
            names.update(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    with _reading:
        # Leaving takes out what was put in, so what an outer context has put in is left alone.
        known = torch.serialization.get_safe_globals()
        wanted = [(_stand_in(name), name) for name in sorted(names) if _holds_data(name)]
        with torch.serialization.safe_globals([pair for pair in wanted if pair not in known]):
            yield


def _holds_data(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES or name in _NAMES


def _stand_in(name: str) -> type:
    last = name.rpartition(".")[2]
    if last in _MAPPINGS:
        return _UnreadMapping
    return _UnreadSequence if last in _SEQUENCES else Unread
