"""Triton kernels without a GPU: what they answer here, and their interpreter tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitzoo.ops import OPERATORS

FOLDER = Path(__file__).parent / "triton_interpreter"
Q = torch.zeros(1, 4, 4, 1, 16)


def test_import_brings_no_triton_kernels() -> None:
    code = "import sys, vitzoo; assert not [m for m in sys.modules if 'vitzoo.ops._triton' in m]"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU serves them")
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("window_attention", {"window_size": 4}),
        ("halo_attention", {"block_size": 4, "halo_size": 1}),
        ("neighborhood_attention", {"kernel_size": (3, 3)}),
    ],
)
def test_forced_without_a_gpu_says_why(operator: str, options: dict) -> None:
    found = OPERATORS[operator]
    with pytest.raises(ValueError, match=r"cannot serve this call: .*(CUDA|not installed)"):
        found(Q, Q, Q, backend="triton", **options)
    assert found.select(Q, Q, Q, **options).name != "triton"


@pytest.mark.parametrize("file", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_interpreter(file: str) -> None:
    """In a process of their own: see the folder's conftest."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--show-capture=no"]
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", str(FOLDER / f"{file}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
