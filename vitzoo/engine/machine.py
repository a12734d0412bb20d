"""What a command settles with the machine before it computes: device, linear layers, memory.

What is decided by timing is decided once a machine, so that every run of a recipe computes alike.
Two processes that time the same products on a busy machine can come to different choices, and the
last bits of their results with them. A run takes its choices from its checkpoint, else from what an
earlier run found on this machine, and only then by timing.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from vitzoo._paths import cache_folder, write_atomically
from vitzoo._processor import processor_facts
from vitzoo.engine.recipe import Recipe
from vitzoo.errors import missing_extra
from vitzoo.ops.linear import linear_choices, set_linear_choices

logger = logging.getLogger("vitzoo.engine")

# mallopt's numbers: bytes from which a block is mapped by itself, bytes at the end of the heap that
# are given back, bytes that the heap grows by beyond what is asked for.
_KEEP_FREED = {-3: 2**31 - 1, -1: 2**31 - 1, -2: 2**28}


def make_accelerator(recipe: Recipe) -> Any:
    """accelerate's handle for this process, as the recipe and `accelerate launch` say."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        raise missing_extra("train", "accelerate") from None
    if not torch.distributed.is_initialized():
        # A second run in one process may have another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return Accelerator(
        mixed_precision=recipe.run.precision,
        gradient_accumulation_steps=recipe.run.accumulate,
        cpu=recipe.run.device == "cpu",
    )


def fix_linear(stored: dict[str, str] | None) -> dict[str, str]:
    """Fix the choice of linear layers for this process; returns it for the checkpoint.

    Args:
        stored: of the run's checkpoint; None to take this machine's.
    """
    if stored is not None:
        set_linear_choices(stored)
        return stored
    path = cache_folder("linear.json")
    versions = f"vitzoo {version('vitzoo')}, torch {torch.__version__}"
    key = f"{versions}, {_processor()}, {torch.get_num_threads()} threads"
    known: dict[str, Any] = {}
    try:
        known = json.loads(path.read_text())
        set_linear_choices(known[key])
        return dict(known[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        set_linear_choices(None)
    found = linear_choices()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = known if isinstance(known, dict) else {}
        write_atomically(path, json.dumps(known | {key: found}, indent=2).encode())
    except OSError as error:
        logger.warning("cannot remember how linear layers are computed here: %s", error)
    return found


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, for work on a CPU; returns whether it was told to.

    Left alone, it hands large blocks back and takes fresh ones, whose pages the system clears, for
    every large tensor: a tenth to a fifth of the time of `vitzoo predict`, against 10 to 18 % more
    memory. Not with an accelerator, nor where the environment has settings of its own, nor with
    another C library.
    """
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Before 2.35 it refuses the first, and the others alone would map every block afresh.
    return all(mallopt(number, value) for number, value in _KEEP_FREED.items())


def _processor() -> str:
    if name := processor_facts().get("model name"):
        return name
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"
