"""A run's folder: what is where, the lock, and writing that survives being killed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitzoo._paths import write_atomically
from vitzoo.errors import InputError


class RunFolder:
    """`runs/<name>`.

    `recipe.yaml` merged recipe; `metrics.jsonl` a line an epoch; `curves.png`;
    `weights.safetensors` the kept weights with labels and architecture; `checkpoints/` what
    resuming needs; `lock` held while a process trains here.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.metrics = root / "metrics.jsonl"
        self.curves = root / "curves.png"
        self.weights = root / "weights.safetensors"
        self.checkpoints = root / "checkpoints"
        self.lock_file = root / "lock"

    def read_metrics(self) -> list[dict[str, Any]]:
        """The log's lines; one torn by a kill is left out."""
        if not self.metrics.exists():
            return []
        lines = []
        for text in self.metrics.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return lines

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace the log."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.metrics, text.encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        The lock dies with the process, so a killed run never blocks its successor, and loader
        processes do not inherit it.

        Raises:
            InputError: a live process holds it.
        """
        try:
            import fcntl
        except ImportError:
            raise InputError("training needs Linux, macOS or WSL: no file locks here") from None
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
                raise InputError(
                    f"{self.root} is in use by {holder or 'another process'}: wait for it, or give "
                    "this run another name with run.name=NAME"
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
            os.ftruncate(handle, 0)
        finally:
            os.close(handle)


def find_run(given: str) -> Path | None:
    """The folder or weights file that a user means by a path or a run's name, if there is one."""
    for path in (Path(given).expanduser(), Path("runs") / given):
        if path.is_file() and path.suffix == ".safetensors":
            return path
        if path.is_dir():
            return path
    return None
