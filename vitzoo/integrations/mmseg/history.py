"""Checkpoints of mmengine without pickled objects, so that torch's safe loading resumes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS

_KEY = "vitzoo_history"


@HOOKS.register_module()
class PlainHistoryHook(Hook):
    """Writes the log's history as tensors and numbers, and makes it a history again on loading.

    mmengine 0.10.7 pickles its `HistoryBuffer`s into every checkpoint; loading one back takes
    either `getattr` on torch's list of safe functions or no safety at all.
    """

    priority = "VERY_LOW"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace what only a pickle can hold."""
        checkpoint.update({key: _plain(value) for key, value in checkpoint.items()})

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Bring the histories back."""
        hub = checkpoint.get("message_hub")
        if isinstance(hub, dict):
            hub["log_scalars"] = {
                key: _history(value) for key, value in hub.get("log_scalars", {}).items()
            }


def _plain(value: Any) -> Any:
    if isinstance(value, HistoryBuffer):
        log, counts = value.data
        return {
            _KEY: torch.as_tensor(np.asarray(log, np.float64)),
            "counts": torch.as_tensor(np.asarray(counts, np.int64)),
            "max_length": value.max_length,
        }
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        # Also of an OrderedDict with metadata, which a state dict is: kept as it is.
        for key, item in value.items():
            value[key] = _plain(item)
        return value
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _history(value: Any) -> Any:
    if not (isinstance(value, dict) and _KEY in value):
        return value
    log, counts = value[_KEY].tolist(), value["counts"].tolist()
    return HistoryBuffer(log, counts, value["max_length"])
