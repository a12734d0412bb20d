"""What the benchmarks report: ratios, slopes, tables, and nothing where results disagree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitzoo.engine import bench_cases as cases
from vitzoo.engine import bench_gpu, bench_models, bench_ops
from vitzoo.engine.bench import (
    Measurement,
    exponent,
    interleaved,
    machine,
    measure_memory,
    ratio,
)
from vitzoo.engine.bench_cases import GATHERED, ODD, Case
from vitzoo.engine.bench_checks import compare
from vitzoo.errors import InputError
from vitzoo.ops import OPERATORS, Backend, use_backend


def test_sides_take_turns() -> None:
    order: list[str] = []
    sides = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleaved(sides, rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(times) for times in found.values()] == [3, 3, 3]


def test_ratio_is_the_median_of_the_rounds() -> None:
    assert ratio([2, 9, 8], [1, 3, 2])["ratio"] == 3
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_agree(name: str) -> None:
    for case in ODD[name]:
        for dtype in (torch.float32, torch.bfloat16):
            assert compare(case, "auto", dtype, backward=True)["disagrees"] is None


@pytest.mark.parametrize(
    "case",
    [
        cases.window(14, 21, batch=2),
        cases.window(7, 9),
        cases.halo(16, 24, batch=2),
        cases.neighborhood(9, 13, batch=2),
        cases.routed(14, grid=7, chosen=4, heads=2, batch=2),
        cases.grouped(5, 0, 31, group=9),
    ],
    ids=lambda case: f"{case.operator}-{case.tokens}",
)
def test_written_out_forms_agree(case: Case) -> None:
    assert case.operator in GATHERED
    for form in case.forms:
        assert compare(case, form, torch.float32, backward=True)["disagrees"] is None


def test_no_ratio_without_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS["window_attention"]
    right = operator.backends["portable"].run

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return right(*args, **kwargs) * 1.01

    monkeypatch.setitem(operator.backends, "portable", Backend("portable", wrong))
    row = bench_ops.time_case(
        "window", cases.window(7, 7), "float32", "forward", rounds=3, seconds=0.1
    )
    assert "is off by" in row["refused"]
    assert not any("ratio" in form for form in row["forms"].values())
    assert "REFUSED" in bench_ops.sentence(row)
    with use_backend("reference", operator="window_attention"):
        assert (
            bench_ops.disagreement(
                "window", cases.window(7, 7), "auto", torch.float32, backward=False
            )
            is None
        )


def test_an_operator_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from vitzoo.commands import app

    small = cases.grouped(60, group=9)
    monkeypatch.setitem(bench_ops.TIMED, "grouped", (small,))
    monkeypatch.setitem(bench_ops.SWEPT, "grouped", lambda side: cases.grouped(side, group=9))
    monkeypatch.setitem(bench_ops.TIMED, "channel", (cases.channel(20),))
    out = tmp_path / "ops.json"
    quick = ["--rounds=3", "--threads=1", "--dtype=float32", f"--out={out}"]
    assert app(["bench", "ops", "channel", "--direction=forward", *quick]) == 0
    assert app(["bench", "ops", "grouped", *quick]) == 0
    report = json.loads(out.read_text())
    # The first command's row stays.
    assert [row["operator"] for row in report["rows"]] == ["grouped", "grouped", "channel"]
    assert set(report["rows"][0]["forms"]) == {"eager", "gather_sdpa", "reference"}
    assert report["slopes"]["grouped"]["tokens"] == [28, 56, 112, 224]
    assert "| grouped | 60 tokens" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(InputError, match="unknown 'halos'; known: window, halo"):
        app(["bench", "ops", "halos"])


def test_models_are_judged_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = dict.fromkeys(("inference/wide", "training/wide"), "reference")

    def measured(m: object) -> dict:
        found = {k: getattr(m, k) for k in bench_models._KEY if k != "measure"}
        found |= {"size": m.size, "ratio": 1.3, "mac_rate_ratio": 2.6, "linear_choices": choices}
        seconds = {"model_ms": m.size**2 / 1000, "baseline_ms": m.size**4 / 1e6}
        return found | seconds | {"ratio_quartiles": [1.2, 1.4]}

    memory = {"model_bytes": 30_000_000, "baseline_bytes": 40_000_000}
    monkeypatch.setattr(bench_models, "measure", measured)
    monkeypatch.setattr(bench_models, "measure_memory", lambda m: memory)
    out = tmp_path / "models.json"
    report = bench_models.run_models(["vz_davit_tiny"], mallocs=["quiet"])
    judged = {(r["linear"], r["mode"], r["bar"], r["reached"]) for r in report["results"]}
    # Without oneDNN its bars are reported only.
    assert ("auto", "train", None, None) in judged
    assert ("reference", "forward", 0.97, True) in judged
    choices["training/wide"] = "onednn"
    report = bench_models.run_models(["vz_davit_tiny"], mallocs=["quiet"])
    assert ("auto", "train", 1.5, False) in {
        (r["linear"], r["mode"], r["bar"], r["reached"]) for r in report["results"]
    }
    bench_models.write(report, out)
    sweep = bench_models.run_sweep(["vz_nat_mini"], sizes=[32, 224, 448])
    assert sweep["sweeps"]["vz_nat_mini"]["exponents"] == pytest.approx({"model": 1, "baseline": 2})
    bench_models.write(sweep, out)
    table = out.with_suffix(".md").read_text()
    assert "1.5 MISSED" in table
    assert "| mac_rate | 2.60 | 2.40 to 2.80 | 0.95 reached | 0.75 |" in table
    assert "| vz_nat_mini | 1 (1.30) |" in table
    assert out.with_suffix(".png").exists()
    with pytest.raises(InputError, match="multiples of 16"):
        bench_models.run_sweep(sizes=[100])
    with pytest.raises(InputError, match="unknown 'vz_none'"):
        bench_models.run_models(["vz_none"])


def test_a_processor_that_is_held_back_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_ENABLE_INSTRUCTIONS", raising=False)
    free = machine()["processor"]
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    assert machine()["processor"] == f"{free}, MKL_ENABLE_INSTRUCTIONS=AVX2"


def test_a_pass_needs_memory() -> None:
    tiny = Measurement(model="vz_lookupvit_small", baseline="vit_tiny_patch16_224", batch=4)
    found = measure_memory(tiny)
    # The hidden map of one MLP alone, 4 x 196 x 768 x 4 bytes.
    assert found["baseline_bytes"] > 2.4e6
    assert 2.4e6 < found["model_bytes"] < 1e9


def test_without_a_gpu_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from vitzoo.cli import run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["bench", "gpu"]) == 2
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        bench_gpu.run_gpu()


def test_only_kernels_that_agree_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS["channel_attention"]
    right = operator.backends["portable"].run

    def double(q: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return right(q, *args, **kwargs) * (1.1 if q.dtype == torch.bfloat16 else 1)

    monkeypatch.setitem(operator.backends, "triton", Backend("triton", double))
    monkeypatch.setattr(bench_gpu, "ODD", {"channel": (cases.channel(63),)})
    rows = list(bench_gpu.check_all("cpu", ["float32", "bfloat16"]))
    kernels = {(r["dtype"], r["direction"]): r["problem"] for r in rows if r["backend"] == "triton"}
    assert kernels["float32", "forward"] is None
    assert "is off by" in kernels["bfloat16", "forward"]
    records = bench_gpu.proven_records(rows, "9.0", {"device": "none", "torch": "2"})
    assert {(r["dtype"], r["direction"]) for r in records} == {
        ("float32", "forward"),
        ("float32", "backward"),
    }


def test_processes_share_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "ODD", {"attention": (cases.attention(7),)})
    rows = list(bench_gpu.check_all("cpu", ["float32"], workers=1))
    assert {(r["backend"], r["direction"], r["problem"]) for r in rows} == {
        ("portable", "forward", None),
        ("portable", "backward", None),
    }


def test_a_killed_gpu_run_leaves_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"operator": "a", "backend": "triton", "dtype": "d", "direction": "f", "problem": None}
    saved = []

    def killed() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(bench_gpu, "version", lambda name: "3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    monkeypatch.setattr(bench_gpu, "check_all", lambda workers: [row | {"error": 0.5}])
    monkeypatch.setattr(bench_gpu, "copy_speed", killed)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.run_gpu(save=saved.append)
    assert saved[0]["checks"][0]["error"] == 0.5


def test_the_gpu_benchmark_loads_without_timm() -> None:
    code = (
        "import sys, runpy; sys.modules.update(timm=None, typer=None)\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'timm' else find(n, *a)\n"
        "import torch; torch.cuda.is_available = lambda: False\n"
        "sys.argv = ['bench_gpu']; runpy.run_path('tools/bench_gpu.py', run_name='__main__')\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "needs a CUDA GPU" in done.stderr
