"""Which kernels agreed with the reference on a GPU; `auto` takes no others.

A record says that one operator agreed on one kind of device: `operator`, `dtype` (`float32`,
`float16`, `bfloat16`), `direction` (`forward`, `backward`: all gradients), `capability` (`9.0`) and
`kernels`, a digest of the kernels' source. Whatever else it holds (device, versions, errors,
bounds) is for the reader. Records come from two files of one format, `{"records": [...]}`:
`proven.json` beside this module, which is committed, and one in the user's cache folder, which
`vitzoo bench gpu --enable` writes. A change to the kernels makes every record void.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vitzoo._paths import cache_folder, write_atomically

logger = logging.getLogger("vitzoo.ops")

Record = Mapping[str, Any]

COMMITTED = Path(__file__).with_name("proven.json")
DIRECTIONS = ("forward", "backward")
_KEY = ("operator", "dtype", "direction", "capability", "kernels")


def user_file() -> Path:
    """The record of the user's own machine."""
    return cache_folder("proven.json")


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """Twelve hex digits that change with any line of the kernels' source."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in [*sorted((folder / "_triton").glob("*.py")), folder / "_triton_backends.py"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if it does not exist.

    Raises:
        ValueError: the file is not of the format, or a record lacks a field.
    """
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())["records"]
        missing = {key for record in records for key in _KEY if key not in record}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not {{"records": [...]}}: {error}') from error
    if missing:
        raise ValueError(f"{path} has a record without {', '.join(sorted(missing))}")
    return records


def write_records(records: Sequence[Record], path: Path | None = None) -> Path:
    """Replace the records of the same operator, dtype, direction and capability in a file.

    Args:
        records: each with `operator`, `dtype`, `direction` and `capability`; `kernels` is added.
        path: the user's file if None.

    Returns:
        The file written.

    Raises:
        ValueError: a record lacks a field or names no direction.
    """
    path = path or user_file()
    added = [{**record, "kernels": kernels_digest()} for record in records]
    for record in added:
        missing = [key for key in _KEY if key not in record]
        if missing or record["direction"] not in DIRECTIONS:
            raise ValueError(
                f"a record needs {', '.join(_KEY[:-1])} with a direction of "
                f"{' or '.join(DIRECTIONS)}, got {dict(record)}"
            )
    replaced = {tuple(record[key] for key in _KEY[:-1]) for record in added}
    kept = [r for r in read_records(path) if tuple(r[key] for key in _KEY[:-1]) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"records": [*kept, *added]}, indent=1, sort_keys=True)
    write_atomically(path, f"{text}\n".encode())
    forget()
    return path


def forget() -> None:
    """Read the files again at the next question."""
    _proven.cache_clear()


@lru_cache(maxsize=1)
def _proven() -> frozenset[tuple[str, ...]]:
    found = read_records(COMMITTED)
    try:
        found += read_records(user_file())
    except (ValueError, OSError) as error:
        logger.warning("no kernel of your own record is taken: %s", error)
    return frozenset(tuple(str(record[key]) for key in _KEY) for record in found)


def proven(operator: str, dtype: str, direction: str, capability: str) -> bool:
    """Whether the present kernels of an operator agreed with the reference on such a device.

    Args:
        operator: `window_attention`, ...
        dtype: `float32`, `float16` or `bfloat16`.
        direction: `forward` or `backward`.
        capability: `major.minor` of the device.
    """
    return (operator, dtype, direction, capability, kernels_digest()) in _proven()


@torch.compiler.assume_constant_result
def why_not_proven(
    operator: str, dtype: torch.dtype, needs_grad: bool, device_index: int
) -> str | None:
    """None where `auto` may take the operator's kernels on that CUDA device, else a sentence."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device_index))
    name = str(dtype).removeprefix("torch.")
    for direction in DIRECTIONS if needs_grad else DIRECTIONS[:1]:
        if not proven(operator, name, direction, capability):
            return (
                f"its {direction} kernels have not been compared with the reference in {name} on a "
                f"device of compute capability {capability}; `vitzoo bench gpu --enable` does that."
            )
    return None
