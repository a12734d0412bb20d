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


def test_import_brings_no_kernels_and_no_optional_package() -> None:
    code = "import sys, vitzoo; assert not [m for m in sys.modules if 'vitzoo.ops._triton' in m]"
    code += "; assert not {'natten', 'xformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU serves them")
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("window_attention", {"window_size": 4}),
        ("halo_attention", {"block_size": 4, "halo_size": 1}),
        ("neighborhood_attention", {"kernel_size": (3, 3)}),
        ("routed_attention", {"regions": torch.zeros(1, 1, 1).long(), "region_grid": (1, 1)}),
    ],
)
def test_forced_without_a_gpu_says_why(operator: str, options: dict) -> None:
    found = OPERATORS[operator]
    with pytest.raises(ValueError, match=r"cannot serve this call: .*(CUDA|not installed)"):
        found(Q, Q, Q, backend="triton", **options)
    assert found.select(Q, Q, Q, **options).name != "triton"


def test_an_image_of_2_to_31_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitzoo.ops import _kernels

    monkeypatch.setattr(_kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(_kernels, "_interpreted", lambda: True)
    assert _kernels.why_not_triton(Q, Q, Q) is None
    assert _kernels.why_not_triton(Q[0, 0], Q[0, 0], Q[0, 0]) is None
    assert _kernels._reach(torch.empty(9, 70_000, 40_000, 3, 16, device="meta")) > 2**31
    monkeypatch.setattr(_kernels, "_LARGEST_REACH", 3 * 64 + 3 * 16)
    assert "2^31" in str(_kernels.why_not_triton(Q, Q, Q))


def assert_interpreter_passes(which: str) -> None:
    """The folder's tests of one marker, in a process of their own: see its conftest."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--show-capture=no",
        "-m",
        which,
    ]
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_interpreter() -> None:
    assert_interpreter_passes("not slow")


@pytest.mark.slow
def test_interpreter_further_cases() -> None:
    assert_interpreter_passes("slow")
