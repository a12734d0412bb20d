"""Triton kernels without a GPU: what they answer here, and their interpreter tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vitzoo import ops
from vitzoo.ops import OPERATORS, _kernels

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


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the interpreter could be asked; nothing is run."""
    monkeypatch.setattr(_kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(_kernels, "_interpreted", lambda: True)


@pytest.mark.usefixtures("served")
def test_an_image_of_2_to_31_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _kernels.why_not_triton(Q, Q, Q) is None
    assert _kernels.why_not_triton(Q[0, 0], Q[0, 0], Q[0, 0], one_map=True) is None
    assert _kernels._reach(torch.empty(9, 70_000, 40_000, 3, 16, device="meta")) > 2**31
    heads_first = torch.empty(1, 8, 9000, 9000, 16, device="meta").permute(0, 2, 3, 1, 4)
    assert _kernels._reach(heads_first) > 2**31
    copied = torch.empty(1, 384, 3000, 3000, device="meta").permute(0, 2, 3, 1)[..., None, :]
    assert _kernels._reach(copied) > 2**31
    monkeypatch.setattr(_kernels, "_LARGEST_REACH", 3 * 64 + 3 * 16)
    assert "2^31" in str(_kernels.why_not_triton(Q, Q, Q))


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        (Q.expand(2, -1, -1, -1, -1), Q, Q),
        (Q, Q.expand(-1, -1, -1, 2, -1), Q.expand(-1, -1, -1, 2, -1)),
        (Q, Q[:, :2], Q),
        (Q[..., :8], Q, Q),
        (Q[0], Q, Q),
    ],
)
def test_nothing_is_broadcast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    assert "broadcast nothing" in str(_kernels.why_not_triton(q, k, v))


@pytest.mark.usefixtures("served")
def test_only_some_operators_need_one_map() -> None:
    assert _kernels.why_not_triton(Q[:, :2], Q, Q) is None
    assert "broadcast nothing" in str(_kernels.why_not_triton(Q[:, :2], Q, Q, one_map=True))


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        ("window_attention", {"window_size": 4, "shift": 9}, "shift in"),
        ("halo_attention", {"block_size": 4, "halo_size": 1, "border": "zeros"}, "border must be"),
        ("halo_attention", {"block_size": 4, "halo_size": 1, "stride": 3}, "divisor"),
        (
            "halo_attention",
            {"block_size": 4, "halo_size": 1, "axial_bias": (torch.zeros(3, 16),) * 2},
            "two tables",
        ),
    ],
)
def test_bad_arguments_raise_before_a_kernel_runs(
    operator: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ops, operator)(Q, Q, Q, backend="triton", **options)


@pytest.mark.usefixtures("served")
def test_transforms_modes_and_traces_get_torchs_own_operators() -> None:
    reasons = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        reasons.append(_kernels.why_not_triton(x, x, x))
        return x.sum()

    torch.func.grad(ask)(Q)
    torch.func.jvp(ask, (Q,), (Q,))
    torch.jit.trace(ask, Q, check_trace=False)
    assert ["transforms" in str(r) for r in reasons] == [True, True, False]
    assert "exported graph" in str(reasons[2])
    with torch.autocast("cpu", torch.bfloat16):
        assert "float64" in str(_kernels.why_not_triton(Q.double(), Q.double(), Q.double()))


@pytest.mark.parametrize(
    ("operator", "options", "dtype", "grad", "taken"),
    [
        ("window_attention", {"window_size": 4}, torch.bfloat16, True, True),
        ("window_attention", {"window_size": 4}, torch.float32, False, False),
        ("halo_attention", {"block_size": 4, "halo_size": 1}, torch.float32, False, False),
        ("neighborhood_attention", {"kernel_size": (3, 3)}, torch.float32, True, True),
        ("routed_attention", {"region_grid": (1, 1)}, torch.float16, False, True),
        ("routed_attention", {"region_grid": (1, 1)}, torch.float16, True, False),
        ("routed_attention", {"region_grid": (1, 1)}, torch.float32, False, False),
    ],
)
def test_auto_takes_proven_kernels_where_they_are_faster(
    operator: str,
    options: dict,
    dtype: torch.dtype,
    grad: bool,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with FakeTensorMode():
        q = torch.empty(1, 4, 4, 1, 16, dtype=dtype, device="cuda", requires_grad=grad)
        given = (q, q, q)
        if operator == "routed_attention":
            given = (*given, torch.zeros(1, 1, 1, dtype=torch.int64, device="cuda"))
        chosen = OPERATORS[operator].select(*given, **options)
    assert (chosen.name == "triton") == taken


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
