"""Where files of the user's machine go, and writing them in one step."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """A folder under the platform's user cache, `vitzoo/<parts>`; not created here."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base.joinpath("vitzoo", *parts)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds either the old content or all of the new."""
    # Two processes may write the same file: each has a partial one of its own.
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    if os.name == "nt":
        return  # Windows opens no folders; its renames are journalled.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
