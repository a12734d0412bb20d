"""What the tests of downloads share."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import save

from tests.zoo.hub_server import Hub
from vitzoo.zoo.entries import WeightEntry


def _pickle() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, file)
    return file.getvalue()


CONTENT = save({"w": torch.arange(300_000, dtype=torch.float32)})
WRONG = CONTENT[:-4] + b"\xff\xff\xff\xff"
OTHER = save({"w": -torch.arange(300_000, dtype=torch.float32)})
PICKLE = _pickle()
HUB_FILE = "org/net/model.safetensors"
URL_FILE = "files/net.safetensors"


def url(hub: Hub, path: str = URL_FILE) -> str:
    return f"{hub.address}/{path}"


def entry(*sources: str, **facts: Any) -> WeightEntry:
    return WeightEntry(model="vz_net", tag="org_in1k", sources=sources, **facts)


def no_trace(folder: Path) -> bool:
    """Whether no file that could be taken for weights is left."""
    return not [p for p in folder.rglob("*.safetensors") if p.is_file()]


def hub_cache_files(home: Path) -> list[Path]:
    """Complete files in the hub's cache."""
    return [p for p in home.rglob("blobs/*") if p.is_file() and p.suffix != ".incomplete"]


class _Full:
    """A file whose disk is full after some bytes: the next write ends in the middle."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        self.file.write(content[: self.room])
        if len(content) > self.room:
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(content)
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def fill_disk(patch: pytest.MonkeyPatch, suffix: str, room: int = 300_000) -> None:
    """Let the disk be full once `room` bytes are in a file with this suffix."""
    real = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        file = real(path, mode, *arguments, **more)
        writes = path.suffix == suffix and mode in ("wb", "ab")
        return _Full(file, room) if writes else file

    patch.setattr(Path, "open", opened)
