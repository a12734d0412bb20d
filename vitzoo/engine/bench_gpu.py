"""`vitzoo bench gpu`: is every operator right on this GPU, how fast, and with how much memory.

Needs torch, triton and this package; whole models also timm. First every operator, backend, dtype
and direction is compared with the reference in float64 on odd sizes; a backend that differs is not
timed. `tools/bench_gpu.py` runs it where timm and typer are not installed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import torch

from vitzoo.engine import bench_cases as cases
from vitzoo.engine.bench_cases import ODD, Case
from vitzoo.engine.bench_checks import compare
from vitzoo.engine.bench_gpu_table import model_sentence, sentence
from vitzoo.errors import InputError
from vitzoo.ops import OPERATORS, _proven, use_backend

DTYPES = ("float32", "float16", "bfloat16")
# Backends that run on a GPU; the portable one is what kernels have to beat.
BACKENDS = ("triton", "portable")
# Packages that compute the same, timed where they are installed and no bias is asked of them.
RIVALS = {
    "neighborhood_attention": "natten",
    "window_attention": "xformers",
    "grouped_attention": "xformers",
}
# Layers of the families at 224 pixels (batch 32) and at 512 (batch 8).
TIMED: dict[str, tuple[Case, ...]] = {
    "window": (cases.window(56, 56, batch=32), cases.window(128, 128, batch=8)),
    "halo": (cases.halo(64, 64, heads=4, batch=32),),
    "neighborhood": (
        cases.neighborhood(56, 56, batch=32),
        cases.neighborhood(56, 56, batch=32, biased=False),
        cases.neighborhood(128, 128, batch=8),
    ),
    "routed": (
        cases.routed(14, grid=7, chosen=16, heads=8, batch=32),
        cases.routed(128, grid=8, chosen=1, heads=2, batch=8),
        cases.routed(64, grid=8, chosen=4, heads=4, batch=8),
        cases.routed(32, grid=8, chosen=16, heads=8, batch=8),
    ),
    "grouped": (cases.grouped(*[20_000] * 4),),
}
MODELS = ("vz_davit_tiny", "vz_biformer_small", "vz_nat_mini", "vz_halonet26t")
MODEL_SETTINGS = ((224, 32), (512, 8))
# Dense attention of more tokens than this is left out: it would take the whole budget.
_DENSE_TOKENS = 4096


def require_gpu() -> None:
    """Raise if there is nothing to measure on.

    Raises:
        InputError: torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError(
            f"bench gpu needs a CUDA GPU, and torch {torch.__version__} sees none on this machine"
        )


def check_all(
    device: str = "cuda", dtypes: Sequence[str] = DTYPES, workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Every operator, backend, dtype and direction against float64 on odd sizes.

    Args:
        device: of the tensors.
        dtypes: of `DTYPES`.
        workers: processes that share the checks, because nearly all of their time is spent by
            compilers on the CPU; none but this one if 0.

    Yields:
        Rows with `operator` (as in `OPERATORS`), `backend`, `dtype`, `direction` (`forward` or
        `backward`), the worst `error`, and `problem`: None, or a sentence.
    """
    tasks = [
        (odd, backend, dtype, direction, device)
        for odd in ODD.values()
        for backend in BACKENDS
        if backend in OPERATORS[odd[0].operator].backends
        for dtype in dtypes
        for direction in _proven.DIRECTIONS
    ]
    if not workers:
        yield from (_check(*task) for task in tasks)
        return
    # A forked process cannot use the GPU of its parent.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_check, *task) for task in tasks]):
            yield done.result()


def _check(
    odd: Sequence[Case], backend: str, dtype: str, direction: str, device: str
) -> dict[str, Any]:
    worst, problem = 0.0, None
    for case in odd:
        try:
            found = compare(
                case,
                backend,
                getattr(torch, dtype),
                backward=direction == "backward",
                device=device,
            )
        except Exception as error:  # Compilers have errors of their own; a row says which.
            problem = " ".join(str(error).split())[:300]
            break
        worst = max(worst, *found["errors"].values())
        problem = problem or found["disagrees"]
    return {
        "operator": odd[0].operator,
        "backend": backend,
        "dtype": dtype,
        "direction": direction,
        "error": worst,
        "problem": problem,
    }


def proven_records(
    rows: Sequence[dict[str, Any]], capability: str, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """What `--enable` writes: the kernels that agreed, in the form of `vitzoo/ops/_proven.py`."""
    return [
        {
            "operator": row["operator"],
            "dtype": row["dtype"],
            "direction": row["direction"],
            "capability": capability,
            "error": row["error"],
            "device": facts["device"],
            "torch": facts["torch"],
        }
        for row in rows
        if row["backend"] == "triton" and row["problem"] is None
    ]


def flex_neighborhood(case: Case, leaves: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Neighborhood attention by torch's compiled flex_attention, with the same bias."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, H, W, heads, d = leaves["q"].shape
    size = case.settings["kernel_size"]

    def first(p: Any, side: int) -> Any:
        return (p - size // 2).clamp(0, side - size)

    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        y, x = first(i // W, H), first(i % W, W)
        in_rows = (j // W >= y) & (j // W < y + size)
        return in_rows & (j % W >= x) & (j % W < x + size)

    mask = create_block_mask(near, None, None, H * W, H * W, device=leaves["q"].device)

    def score(value: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        row = (j // W - i // W + size - 1).clamp(0, 2 * size - 2)
        column = (j % W - i % W + size - 1).clamp(0, 2 * size - 2)
        return value + leaves["bias"][h, row, column]

    attend = torch.compile(flex_attention)

    def run() -> torch.Tensor:
        q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in "qkv")
        out: Any = attend(q, k, v, score_mod=score, block_mask=mask)
        return out.transpose(1, 2).reshape(-1, H, W, heads, d)

    return run


def _forms(case: Case, leaves: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    backends = [name for name in BACKENDS if name in OPERATORS[case.operator].backends]
    if case.operator in RIVALS and "bias" not in leaves:
        backends.append(RIVALS[case.operator])
    written = [form for form in case.forms if form != "reference"]
    forms: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(case.run, leaves, name) for name in (*backends, *written)
    }
    q = leaves["q"]
    if q.dim() == 5 and q.shape[1] * q.shape[2] <= _DENSE_TOKENS:
        dense = cases.attention(q.shape[1] * q.shape[2])
        flat = {n: leaves[n].flatten(1, 2) for n in "qkv"}
        forms["dense_sdpa"] = lambda: dense.run(flat, "portable")
    return forms


def time_all(
    wrong: set[tuple[str, str, str]], copy_bytes: float, until: float
) -> Iterator[dict[str, Any]]:
    """Median milliseconds and peak memory of every form, forward and with gradients.

    In bfloat16; the first case of every operator also in float32, by the backends alone.

    Args:
        wrong: (operator, backend, dtype) that disagreed; not timed.
        copy_bytes: bytes per second that a copy moves here, for the byte floor.
        until: no case begins after this time of `time.monotonic`.
    """
    for dtype in ("bfloat16", "float32"):
        for name, timed in TIMED.items():
            for case in timed if dtype == "bfloat16" else timed[:1]:
                for backward in (False, True):
                    if time.monotonic() > until:
                        return
                    yield _time_case(name, case, dtype, wrong, copy_bytes, backward=backward)


def _time_case(
    name: str,
    case: Case,
    dtype: str,
    wrong: set[tuple[str, str, str]],
    copy_bytes: float,
    *,
    backward: bool,
) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    case = case.on("cuda")
    leaves = case.leaves(kind, "cuda")
    row: dict[str, Any] = {
        "operator": name,
        "case": case.label,
        "dtype": dtype,
        "direction": "both" if backward else "forward",
        "forms": {},
    }
    if not backward:
        row["floor_ms"] = 1e3 * case.least_bytes(kind) / copy_bytes
    for form, run in _forms(case, leaves).items():
        if (case.operator, form, dtype) in wrong:
            row["forms"][form] = {"refused": "it disagrees with the reference"}
        elif dtype == "bfloat16" or form in BACKENDS:
            row["forms"][form] = _time(run, list(leaves.values()), backward=backward)
    return row


def time_flex(until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first neighborhood by compiled flex_attention, by direction: compiling takes a while."""
    case = TIMED["neighborhood"][0].on("cuda")
    leaves = case.leaves(torch.bfloat16, "cuda")
    for direction in ("forward", "both"):
        if time.monotonic() > until:
            return
        attend = flex_neighborhood(case, leaves)
        yield direction, _time(attend, list(leaves.values()), backward=direction == "both")


def _time(
    run: Callable[[], torch.Tensor], leaves: list[torch.Tensor], *, backward: bool
) -> dict[str, Any]:
    from triton.testing import do_bench

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = run()
            if backward:
                torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)

    try:
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        ms = do_bench(step, warmup=10, rep=50, return_mode="median")
        return {"ms": ms, "graph_ms": _graph_ms(step), "peak_bytes": peak}
    except Exception as error:  # A rival that cannot run here is a row of the table, not the end.
        return {"failed": " ".join(str(error).split())[:300]}


def _graph_ms(step: Callable[[], None], steps: int = 5, replays: int = 9) -> float | None:
    """Milliseconds of the device alone: `steps` in a CUDA graph; None where none can be captured.

    What torch and Triton do on the CPU before a launch, some 50 to 100 us, is not in it.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        # What a library sets up at its first call on a stream cannot be captured.
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(steps):
                step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(1 + replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / steps)
    return statistics.median(times[1:])


def time_models(until: float) -> Iterator[dict[str, Any]]:
    """Images per second in inference and peak memory of a training step, in bfloat16.

    With the kernels (`triton`) and without (`portable`).
    """
    import timm

    import vitzoo  # noqa: F401  (registers the zoo's names)

    for size, batch in MODEL_SETTINGS:
        for name in MODELS:
            if time.monotonic() > until:
                return
            model: Any = timm.create_model(name).to("cuda", torch.bfloat16)
            # From the CPU: after a capture that failed, the device's generator refuses.
            images = torch.randn(batch, 3, size, size).to("cuda", torch.bfloat16)
            row: dict[str, Any] = {"model": name, "size": size, "batch": batch}
            for backend in BACKENDS:
                with use_backend(backend):
                    row[backend] = _time_model(model, images)
            yield row


def _time_model(model: Any, images: torch.Tensor) -> dict[str, Any]:
    weights = [p for p in model.parameters() if p.requires_grad]
    forward = _time(lambda: model.eval()(images), [], backward=False)
    train = _time(lambda: model.train()(images), weights, backward=True)
    best = min((forward[k] for k in ("ms", "graph_ms") if forward.get(k)), default=None)
    return {
        "images_per_second": None if best is None else 1e3 * len(images) / best,
        "forward": forward,
        "train": train,
    }


def copy_speed() -> float:
    """Bytes read and written per second by a copy of 1 GB."""
    from triton.testing import do_bench

    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * do_bench(lambda: target.copy_(source), return_mode="median"))


def run_gpu(
    *,
    seconds: float = 450.0,
    enable: bool = False,
    say: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Check, time, and with `enable` record what agreed for this machine.

    Args:
        seconds: nothing new is timed after so long.
        enable: write the kernels that agreed into the user's own record.
        say: gets a line per finding.
        save: gets the report after every stage, so that a killed run leaves what it found.

    Raises:
        InputError: no GPU.
    """
    require_gpu()
    until = time.monotonic() + seconds
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    facts = {
        "device": torch.cuda.get_device_name(),
        "capability": capability,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "kernels": _proven.kernels_digest(),
    }
    report: dict[str, Any] = {"machine": facts, "checks": [], "rows": [], "models": []}
    for row in check_all(workers=min(16, os.cpu_count() or 1)):
        report["checks"].append(row)
        verdict = row["problem"] or f"agrees, {row['error']:.1e}"
        say(f"{row['operator']} {row['backend']} {row['dtype']} {row['direction']}: {verdict}")
    # Processes finish in any order.
    report["checks"].sort(key=lambda row: [str(value) for value in row.values()])
    if enable:
        records = proven_records(report["checks"], capability, facts)
        say(f"{len(records)} records -> {_proven.write_records(records)}")
    save(report)
    wrong = {
        (row["operator"], row["backend"], row["dtype"])
        for row in report["checks"]
        if row["problem"] is not None
    }
    report["copy_bytes_per_second"] = copy_speed()
    for found in time_all(wrong, report["copy_bytes_per_second"], until):
        report["rows"].append(found)
        say(sentence(found))
    save(report)
    if importlib.util.find_spec("timm") is None:
        say("timm is not installed: no whole models")
    else:
        for found in time_models(until):
            report["models"].append(found)
            say(model_sentence(found))
            save(report)
    for direction, found in time_flex(until):
        # Its first row; there is one, since whatever leaves time for flex left time for it.
        of_it = ("neighborhood", direction)
        row = next(r for r in report["rows"] if (r["operator"], r["direction"]) == of_it)
        row["forms"]["flex"] = found
        say(sentence(row))
    save(report)
    return report
