"""Files on disk: whether their content is the published one, and reading them safely."""

from __future__ import annotations

import argparse
import hashlib
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from vitzoo._paths import write_atomically
from vitzoo.zoo.errors import CorruptFileError, UnsafeFileError, WeightsError

logger = logging.getLogger("vitzoo.zoo")

WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model")

# Files whose content this process has checked -> (size, modification time).
_verified: dict[Path, tuple[int, int]] = {}


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str | None, *, where_from: str) -> None:
    """Check a file's content once per process, and again when size or time have changed.

    Args:
        path: the file; a symbolic link of the hub's cache is followed.
        expected: sha256 that the table or the hub publishes, or its first digits; with None the
            first file's own hash is recorded beside it, and later contents must match that.
        where_from: the source, for messages.

    Raises:
        CorruptFileError: the content is another; the file has been removed.
    """
    real = path.resolve()
    stat = real.stat()
    mark = (stat.st_size, stat.st_mtime_ns)
    if _verified.get(real) == mark:
        return
    record = recorded_hash_path(real)
    if expected is None and record.exists():
        expected = record.read_text().strip()
    found = sha256_of(real)
    if expected is None:
        write_atomically(record, f"{found}\n".encode())
        logger.info("%s publishes no checksum; recorded sha256 %s", where_from, found)
    elif not found.startswith(expected):
        for file in {path, real}:
            file.unlink(missing_ok=True)
        raise CorruptFileError(
            f"{path.name} from {where_from} is corrupt: sha256 {found}, published {expected}. The "
            "file has been removed; run the same command again to download it anew."
        )
    _verified[real] = mark


def verify_file(path: Path, expected: str | None = None) -> str:
    """Check a user's own file, which is never removed; returns what it was checked against.

    Args:
        path: the file.
        expected: sha256 or its first digits; the recorded hash or the digits in the file's name
            if None.

    Raises:
        CorruptFileError: the content is another.
    """
    record = recorded_hash_path(path)
    basis = "the given hash"
    if expected is None and record.exists():
        expected, basis = record.read_text().strip(), f"as recorded in {record.name}"
    if expected is None and (expected := digits_in_name(path.name)):
        basis = "as the file's name says"
    if expected is None:
        return "no hash is known for it"
    found = sha256_of(path)
    if not found.startswith(expected.lower()):
        raise CorruptFileError(f"{path} has sha256 {found}, expected {expected}: download it anew")
    return basis


def digits_in_name(name: str) -> str | None:
    """The first digits of the sha256, which torch's hub files carry: `net-1a2b3c4d.pth`."""
    match = re.search(r"-([0-9a-f]{8,64})\.", name)
    return match[1] if match else None


def recorded_hash_path(path: Path) -> Path:
    """Where the hash of a file is kept whose source publishes none."""
    return path.with_name(path.name + ".sha256")


def check_weights(path: Path) -> None:
    """Make sure that a file holds weights and nothing that would run when it is opened.

    Args:
        path: a whole safetensors file, or a pickle that holds nothing but tensors and data.

    Raises:
        UnsafeFileError: the pickle wants to import or call something.
        WeightsError: the file does not exist, or is no weights file, or is cut short.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                return
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        with plain_arguments():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to switch the safety off.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants to import {found[1]}" if found else "it holds more than tensors"
        raise UnsafeFileError(
            f"{path} was refused: {what}, and opening it could run code. It was not executed. Ask "
            "its author for a safetensors file."
        ) from error
    except Exception as error:
        # What damaged bytes say to an unpickler ends in any error.
        text = (str(error).splitlines() or [""])[0].strip()
        reason = f": {text}" if " " in text else ""
        raise WeightsError(f"{path} is not a whole weights file of PyTorch{reason}") from error
    _check_names(path, content)


def plain_arguments() -> Any:
    """Context in which torch reads the `argparse.Namespace` that timm's trainer stores, as data."""
    return torch.serialization.safe_globals([argparse.Namespace])


def wrapper_of(content: dict[str, Any]) -> str | None:
    """The entry that holds the weights, None if they lie open."""
    return next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)


def _check_names(path: Path, content: Any) -> None:
    """Make sure that there are tensors by name, in wrappers or not."""
    while isinstance(content, dict) and (wrapper := wrapper_of(content)):
        content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not named weights")
    strangers = [key for key in content if not isinstance(key, str)]
    if strangers:
        raise WeightsError(f"{path} holds no named weights: one of its keys is {strangers[0]!r}")
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        entries = ", ".join(f"{k} ({type(v).__name__})" for k, v in list(content.items())[:3])
        raise WeightsError(f"{path} holds no named weights: its entries are {entries or 'none'}")
