"""Paired, interleaved timing on the CPU: what `vitzoo bench ops` and `bench models` rest on.

Machines are shared and noisy, so absolute times mean little: both sides are timed in one process,
one after the other, and what counts is the median of the pairwise ratios. The allocator changes
some models by a factor of two, so it is a setting of the measurement, the same for both sides,
which is why a measurement runs in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vitzoo._processor import processor_facts

# glibc hands every block above a threshold back to the system at once; with these it keeps them.
QUIET_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}

# MKL's, oneDNN's and torch's: where one is set, figures are not those of the processor at its best.
_INSTRUCTION_SETTINGS = (
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
)


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warm_up: int = 2,
    seconds: float = float("inf"),
) -> dict[str, list[float]]:
    """Time all sides in turn, round after round.

    Args:
        sides: what to time, by name.
        rounds: how often.
        warm_up: rounds before that, which do not count.
        seconds: no new round begins after so long, but three are always made.

    Returns:
        Seconds of every call, by name; entries of one place are of one round.
    """
    for _ in range(warm_up):
        for run in sides.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    began = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - began > seconds:
            break
        # Whoever comes later finds the caches as the others left them: take turns.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            sides[name]()
            found[name].append(time.perf_counter() - start)
    return found


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How often `fast` fits into `slow`: the median over the rounds, and the quartiles."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(slow, fast, strict=True)], n=4, method="inclusive"
    )
    return {"ratio": median, "ratio_quartiles": [low, high]}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log sizes, by least squares."""
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(time_) for time_ in seconds]
    ).slope


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is timed, against what, and how.

    Attributes:
        model, baseline: names for `timm.create_model`.
        size: side of the square images.
        batch: images per pass.
        dtype: of weights and images.
        mode: forward pass, or forward, backward and optimiser step.
        memory_format: of the images, both sides.
        threads: of torch.
        pairs: how often each side is timed.
        malloc: glibc's allocator as it is, or told to keep what it has.
        linear: `VITZOO_BACKEND_LINEAR`; `reference` gives stock linear layers.
        compile_baseline: run the baseline under torch.compile.
        gmacs, baseline_gmacs: nominal cost per image; their ratio turns a ratio of images per
            second into one of multiply-adds per second.
    """

    model: str
    baseline: str
    size: int = 224
    batch: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    mode: Literal["forward", "train"] = "forward"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    threads: int = 2
    pairs: int = 15
    malloc: Literal["default", "quiet"] = "default"
    linear: str = "reference"
    compile_baseline: bool = False
    gmacs: float | None = None
    baseline_gmacs: float | None = None


def measure(measurement: Measurement) -> dict[str, Any]:
    """Run a measurement in a fresh process with its environment; returns `measure_here`'s result.

    Raises:
        RuntimeError: the process failed; the message holds what it printed last.
    """
    return _in_a_process(measurement, "time")


def measure_memory(measurement: Measurement) -> dict[str, int]:
    """Bytes that one pass needs beyond weights and images, each side in a fresh process.

    Args:
        measurement: what runs, eager; `pairs` and `malloc` play no part.

    Returns:
        `model_bytes` and `baseline_bytes`: rise of the largest resident size.

    Raises:
        RuntimeError: a process failed.
    """
    plain = replace(measurement, malloc="default")
    return {f"{side}_bytes": _in_a_process(plain, side) for side in ("model", "baseline")}


def _in_a_process(measurement: Measurement, what: str) -> Any:
    settings = {"VITZOO_BACKEND_LINEAR": measurement.linear}
    environment = {k: v for k, v in os.environ.items() if k not in QUIET_MALLOC}
    if measurement.malloc == "quiet":
        settings |= QUIET_MALLOC
    done = subprocess.run(
        [sys.executable, "-m", "vitzoo.engine.bench", what, json.dumps(asdict(measurement))],
        env=environment | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{measurement.model} was not measured: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(measurement: Measurement) -> dict[str, Any]:
    """Time both sides in this process.

    Returns:
        The settings, median milliseconds of each side, the median ratio baseline / model of the
        pairs with its quartiles, and, where costs are given, the ratio of multiply-add rates.
    """
    import torch

    torch.set_num_threads(measurement.threads)
    ours = _step(measurement, measurement.model)
    base = _step(measurement, measurement.baseline, compiled=measurement.compile_baseline)
    times = interleaved({"model": ours, "baseline": base}, rounds=measurement.pairs)
    result = asdict(measurement) | {
        "model_ms": 1e3 * statistics.median(times["model"]),
        "baseline_ms": 1e3 * statistics.median(times["baseline"]),
        **ratio(times["baseline"], times["model"]),
    }
    chosen = None
    if measurement.linear == "auto":
        from vitzoo.ops import linear_choices

        chosen = linear_choices()
    result["linear_choices"] = chosen
    if measurement.gmacs and measurement.baseline_gmacs:
        result["mac_rate_ratio"] = result["ratio"] * measurement.gmacs / measurement.baseline_gmacs
    return result


def memory_here(measurement: Measurement, side: str) -> int:
    """Bytes by which one pass of a side raises this process's largest resident size."""
    import torch

    torch.set_num_threads(measurement.threads)
    run = _step(measurement, getattr(measurement, side))
    before = resident_peak()
    run()
    return resident_peak() - before


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux's ru_maxrss begins with that of the process which started this one.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _step(measurement: Measurement, name: str, *, compiled: bool = False) -> Callable[[], None]:
    import timm
    import torch

    import vitzoo  # noqa: F401  (registers the zoo's names)

    torch.manual_seed(0)
    dtype = getattr(torch, measurement.dtype)
    # timm's plain ViTs serve one size, which has to be said.
    size = {"img_size": measurement.size} if name.startswith(("deit_", "vit_")) else {}
    model = timm.create_model(name, **size).to(dtype)
    x = torch.randn(measurement.batch, 3, measurement.size, measurement.size, dtype=dtype)
    if measurement.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if measurement.mode == "forward":
        model = model.eval()
        run = torch.compile(model) if compiled else model

        def forward() -> None:
            with torch.inference_mode():
                run(x)

        return forward
    model = model.train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    target = torch.arange(measurement.batch) % 10

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(run(x), target).backward()
        optimizer.step()

    return train


def machine() -> dict[str, Any]:
    """The machine and versions that a figure belongs to."""
    import timm
    import torch

    import vitzoo

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vitzoo": vitzoo.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    name = platform.processor()
    if facts := processor_facts():
        name = "{model name} (family {cpu family}, model {model})".format_map(
            defaultdict(str, facts)
        )
    held = [f"{key}={os.environ[key]}" for key in _INSTRUCTION_SETTINGS if key in os.environ]
    return ", ".join([name, *held])


if __name__ == "__main__":
    wanted, given = sys.argv[1], Measurement(**json.loads(sys.argv[2]))
    found = measure_here(given) if wanted == "time" else memory_here(given, wanted)
    print(json.dumps(found))  # noqa: T201
