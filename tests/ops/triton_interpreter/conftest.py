"""These run in a process of their own, started by tests/ops/test_triton.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Triton reads the variable where a kernel is decorated, so no other process can hold these tests.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def scalars_as_ends_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 makes an integer of an array of one number, which numpy 2.4 no longer does."""
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return
    before = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        before(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
