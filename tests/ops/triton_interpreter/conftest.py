"""These run in a process of their own, started by tests/ops/test_triton.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
