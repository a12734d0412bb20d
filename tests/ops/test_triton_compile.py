"""Tile configurations compile for GPUs that this machine does not have, and spill nothing.

What cannot be seen so: results of compiled code, races, speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.triton_compile import CALLS

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that a block can have on every one of them, and on consumers' GPUs.
SHARED = 99 * 1024
MATRIX = {80: {"HMMA"}, 90: {"HMMA", "HGMMA"}, 100: {"HMMA", "UTCHMMA"}}


def compiled(architectures: str, dtypes: str, folder: Path, *calls: str) -> list[dict]:
    """Rows of `tests.ops.triton_compile`, in a process of its own and without Triton's cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.ops.triton_compile", architectures, dtypes, *calls]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    """No spills, little shared memory, and the architecture's matrix instruction for halves."""
    assert rows
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED, row
        if row["dtype"] != "float32":
            assert MATRIX[row["architecture"]] & set(row["matrix"]), row


def test_a_selection(tmp_path: Path) -> None:
    check(compiled("90", "bfloat16", tmp_path, "window-bias", "neighborhood-nat", "routed-2"))
    check(compiled("80,100", "float16", tmp_path, "routed-2"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("call", CALLS)
def test_all(call: str, dtype: str, tmp_path: Path) -> None:
    rows = compiled(",".join(map(str, ARCHITECTURES)), dtype, tmp_path, call)
    check(rows)
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
