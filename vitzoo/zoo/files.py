"""Files on disk: whether their content is the published one, and reading them safely."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from vitzoo._paths import write_atomically
from vitzoo.zoo.beside import Unread, read_over
from vitzoo.zoo.errors import CorruptFileError, UnsafeFileError, WeightsError

logger = logging.getLogger("vitzoo.zoo")

# In order of preference. An average that timm's trainer keeps is what it evaluates. Trainers in
# DeiT's manner (BiFormer's, U-HaloNet's) write `model` and `model_ema`, but choose their best file
# by `model` and evaluate that.
WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema")

# Files whose content this process has checked -> size and modification time, sha256.
_verified: dict[Path, tuple[tuple[int, int], str]] = {}


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str | None, *, where_from: str) -> None:
    """Check a file of the cache once per process, and again when size or time have changed.

    Args:
        path: the file; a symbolic link of the hub's cache is followed.
        expected: sha256 that the table or the hub publishes, or its first digits; with None the
            first file's own hash is recorded beside it, and later contents must match that.
        where_from: the source, for messages.

    Raises:
        CorruptFileError: the content is another, or no weights; the file has been removed.
        UnsafeFileError: the same of a pickle that would run code.
    """
    real = path.resolve()
    mark, found = _verified.get(real, (None, ""))
    if mark != _mark(real) or not found.startswith(expected or ""):
        found = _inspect(path, expected or _recorded(real), path.name, where_from)
        _remember(real, found, expected, where_from)


def admit(part: Path, target: Path, expected: str | None, *, where_from: str) -> None:
    """Give a new download its name in the cache if it passes the checks of `verify`.

    Args:
        part: the download under another name; removed if it does not pass.
        target: its name in the cache.
        expected: as for `verify`.
        where_from: the source, for messages.

    Raises:
        CorruptFileError: the content is another, or no weights.
        UnsafeFileError: a pickle that would run code.
    """
    found = _inspect(part, expected or _recorded(target), target.name, where_from)
    part.replace(target)
    _remember(target.resolve(), found, expected, where_from)


def _inspect(path: Path, expected: str | None, name: str, where_from: str) -> str:
    """The sha256 of a file with good content; one with bad content is removed."""
    found = sha256_of(path)
    again = "The file has been removed; run the same command again to download it anew."
    if expected and not found.startswith(expected):
        _remove(path)
        raise CorruptFileError(
            f"{name} from {where_from} is corrupt: sha256 {found}, published {expected}. {again}"
        )
    try:
        check_weights(path, name)
    except WeightsError as error:
        _remove(path)
        # A hash that was recorded of such a file would keep its good successor out.
        recorded_hash_path(path.resolve()).unlink(missing_ok=True)
        if isinstance(error, UnsafeFileError):
            raise UnsafeFileError(f"{error} The file has been removed.") from error
        raise CorruptFileError(f"{where_from} delivered no weights: {error}. {again}") from error
    return found


def _remove(path: Path) -> None:
    for file in {path, path.resolve()}:
        file.unlink(missing_ok=True)


def _remember(real: Path, found: str, expected: str | None, where_from: str) -> None:
    """Note that a content was checked; on disk, where nothing else says what it should be."""
    record = recorded_hash_path(real)
    if expected is None and not record.exists():
        write_atomically(record, f"{found}\n".encode())
        logger.info("%s publishes no checksum; recorded sha256 %s", where_from, found)
    _verified[real] = (_mark(real), found)


def _mark(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _recorded(path: Path) -> str | None:
    record = recorded_hash_path(path)
    return record.read_text().strip() if record.exists() else None


def verify_file(path: Path, expected: str | None = None) -> str:
    """Check a user's own file, which is never removed; returns what it was checked against.

    Args:
        path: the file.
        expected: sha256 or its first digits; the recorded hash if None.

    Raises:
        CorruptFileError: the content is another.
    """
    basis = "the given hash"
    if expected is None:
        expected, basis = _recorded(path), f"as recorded in {recorded_hash_path(path).name}"
    if expected is None:
        return "no hash is known for it"
    found = sha256_of(path)
    if not found.startswith(expected.lower()):
        raise CorruptFileError(f"{path} has sha256 {found}, expected {expected}: download it anew")
    return basis


def digits_in_name(name: str) -> str | None:
    """The first digits of the sha256 in a published file's name: `net-1a2b3c4d.pth`.

    That is a habit of torch's hub, so it holds for sources of the table alone: a user's
    `run-20240101.pth` says nothing of its content. Eight digits without a letter are a date.
    """
    match = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", name)
    return match[1] if match else None


def recorded_hash_path(path: Path) -> Path:
    """Where the hash of a file is kept whose source publishes none."""
    return path.with_name(path.name + ".sha256")


def check_weights(path: Path, name: str | None = None) -> None:
    """Make sure that a file holds weights and nothing that would run when it is opened.

    Args:
        path: a whole safetensors file, or a pickle of tensors and of what trainers keep beside them
            (`vitzoo.zoo.beside`).
        name: what it will be called, where it is still called otherwise.

    Raises:
        UnsafeFileError: the pickle wants to import or call something.
        WeightsError: the file does not exist, or is no weights file, or is cut short.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}")
    shown = name or path
    if Path(shown).suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                return
        except SafetensorError as error:
            raise WeightsError(f"{shown} is not a whole safetensors file: {error}") from error
    try:
        with read_over(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, shown, error) from error
    except Exception as error:
        # What damaged bytes say to an unpickler ends in any error.
        text = (str(error).splitlines() or [""])[0].strip()
        reason = f": {text}" if " " in text else ""
        raise WeightsError(f"{shown} is not a whole weights file of PyTorch{reason}") from error
    _check_names(shown, content)


def _refusal(path: Path, shown: str | Path, error: pickle.UnpicklingError) -> WeightsError:
    """The error for what torch's safe unpickler refuses, whose text advises to switch it off."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    with path.open("rb") as file:
        head = file.read(2)
    if not found and head != b"PK" and head[:1] != b"\x80":
        return WeightsError(f"{shown} is not a weights file of PyTorch: it is no archive or pickle")
    what = f"it wants to import {found[1]}" if found else "it holds more than tensors"
    return UnsafeFileError(
        f"{shown} was refused: {what}, and opening it could run code. It was not executed. Ask "
        "its author for a safetensors file; of your own model save nothing but the weights: "
        "torch.save(model.state_dict(), FILE)."
    )


def wrapper_of(content: dict[str, Any]) -> str | None:
    """The entry that holds the weights, None if they lie open."""
    return next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)


def _check_names(path: str | Path, content: Any) -> None:
    """Make sure that there are tensors by name, in wrappers or not."""
    while isinstance(content, dict) and (wrapper := wrapper_of(content)):
        content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {_kind(content)}, not named weights")
    strangers = [key for key in content if not isinstance(key, str)]
    if strangers:
        raise WeightsError(f"{path} holds no named weights: one of its keys is {strangers[0]!r}")
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        entries = ", ".join(f"{k} ({_kind(v)})" for k, v in list(content.items())[:3])
        raise WeightsError(f"{path} holds no named weights: its entries are {entries or 'none'}")


def _kind(value: Any) -> str:
    return "foreign object" if isinstance(value, Unread) else type(value).__name__
