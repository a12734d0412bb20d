"""FlatFormer's backbone on the CPU: time against pillars, shares, and padded equal windows.

Usage: python benchmarks/flatformer.py [--density NAME] [--rounds N] [--out FILE.json]

One density alone takes half the time; the file's rows of the other one are kept.

Every round times all sides one after the other in one process; figures are medians over the rounds,
ratios are medians of the ratios within a round. The other side of the comparison attends inside
equal windows, each padded to the fullest one, over the same pillars with the same weights: only
attention pays for the padding there, the projections and the MLP do not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm
import torch
from torch import Tensor

import vitzoo
from vitzoo.attention import grouped as group_module
from vitzoo.backbones import flatformer
from vitzoo.engine.bench import QUIET_MALLOC, machine
from vitzoo.engine.bench import exponent as slope
from vitzoo.ops import attention

GRID = (468, 468)
WINDOW = 13
COUNTS = (5_000, 10_000, 20_000, 35_000, 50_000)
DENSITIES = ("uniform", "range_squared")
PILLAR_METRES = 0.32
# Nothing is denser than at this range: the vehicle's own surroundings are cut out.
NEAREST_METRES = 3.0
LARGEST_EXPONENT = 1.1
LEAST_RATIO = 1.5


def draw_pillars(count: int, density: str, seed: int = 0) -> Tensor:
    """(count, 3) coordinates (frame, y, x) of distinct cells of one frame."""
    rng = np.random.default_rng(seed)
    y, x = np.divmod(np.arange(GRID[0] * GRID[1]), GRID[1])
    away = np.hypot(y - GRID[0] / 2, x - GRID[1] / 2) * PILLAR_METRES
    weight = np.ones(len(y)) if density == "uniform" else np.maximum(away, NEAREST_METRES) ** -2
    cells = rng.choice(len(y), count, replace=False, p=weight / weight.sum())
    coords = np.stack([np.zeros(count, np.int64), y[cells], x[cells]], axis=1)
    return torch.from_numpy(coords)


class PaddedWindows:
    """Attention inside equal windows, padded to the fullest, for rows sorted window by window."""

    def __init__(self, coords: Tensor) -> None:
        self.tables = []
        for i, order in enumerate(flatformer.flatten_windows(coords, GRID, WINDOW)):
            shift = WINDOW // 2 * (i % 2)
            y, x = ((coords[order, axis] + shift) // WINDOW for axis in (1, 2))
            _, window, counts = torch.unique_consecutive(
                y * GRID[1] + x, return_inverse=True, return_counts=True
            )
            first = counts.cumsum(0) - counts
            slot = window * int(counts.max()) + torch.arange(len(order)) - first[window]
            self.tables.append((slot, len(counts), int(counts.max())))
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        """(P, heads, head_dim) -> the same; called layer by layer, in the flattenings' order."""
        slot, windows, fullest = self.tables[self.calls % len(self.tables)]
        self.calls += 1
        padded = [
            t.new_zeros(windows * fullest, *t.shape[1:]).index_copy(0, slot, t) for t in (q, k, v)
        ]
        holds = torch.zeros(windows * fullest, dtype=torch.bool).index_fill(0, slot, True)
        mask = holds.view(windows, 1, 1, fullest)
        out = attention(*(t.unflatten(0, (windows, fullest)) for t in padded), mask=mask)
        return out.flatten(0, 1).index_select(0, slot)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def mapping(coords: Tensor) -> None:
    """All index work of one forward pass."""
    orders = flatformer.flatten_windows(coords, GRID, WINDOW)
    ranks = orders.argsort(dim=-1)
    for i, order in enumerate(orders):
        ranks[i - 1][order]


def measure(model: torch.nn.Module, count: int, density: str, rounds: int) -> dict:
    """Times of one pillar count."""
    coords = draw_pillars(count, density)
    features = torch.randn(count, 128, generator=torch.Generator().manual_seed(0))
    backbone = partial(model, features, coords, 1)

    def padded() -> Tensor:
        with patch.object(group_module, "grouped_attention", PaddedWindows(coords)):
            return model(features, coords, 1)

    attend = Attending(model)
    sides = {"backbone": backbone, "padded": padded, "mapping": partial(mapping, coords)}
    found: dict[str, list[float]] = {name: [] for name in [*sides, "attention"]}
    for round_ in range(rounds + 1):
        times = {name: timed(run) for name, run in sides.items() if name != "backbone"}
        with attend:
            times["backbone"] = timed(backbone)
        times["attention"] = attend.seconds
        if round_:  # the first warms up
            for name, seconds in times.items():
                found[name].append(seconds)
    ratios = [a / b for a, b in zip(found["padded"], found["backbone"], strict=True)]
    tables = PaddedWindows(coords).tables
    return {
        "pillars": count,
        "density": density,
        "seconds": {name: statistics.median(times) for name, times in found.items()},
        "padded_over_flattened": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "padded_slots_per_pillar": statistics.mean(w * m / count for _, w, m in tables),
    }


class Attending:
    """Adds up the time that a model's attention modules take inside `with`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = [m for m in model.modules() if isinstance(m, group_module.GroupAttention)]
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.seconds, start = 0.0, [0.0]

        def before(*_: object) -> None:
            start[0] = time.perf_counter()

        def after(*_: object) -> None:
            self.seconds += time.perf_counter() - start[0]

        self.handles = [m.register_forward_pre_hook(before) for m in self.modules]
        self.handles += [m.register_forward_hook(after) for m in self.modules]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def dense_part(rounds: int) -> float:
    """Seconds of neck and head on one frame's map, which no pillar count changes."""
    detector = vitzoo.build_detector3d(num_classes=3).eval()
    bev = torch.zeros(1, *GRID, 128).permute(0, 3, 1, 2)
    run = partial(lambda: detector.head(detector.neck(bev), skip=("vel",)))
    return min(timed(run) for _ in range(max(2, rounds // 2)))


def exponent(rows: list[dict]) -> float:
    """Slope of log time over log pillars."""
    return slope([r["pillars"] for r in rows], [r["seconds"]["backbone"] for r in rows])


@torch.inference_mode()
def report(counts: list[int], rounds: int, densities: Sequence[str], kept: list[dict]) -> dict:
    """Everything measured and the rows `kept` from before, with the bars."""
    model = timm.create_model("vz_flatformer", grid_size=GRID).eval()
    rows = [row for row in kept if row["density"] not in densities]
    for density in densities:
        for count in counts:
            row = measure(model, count, density, rounds)
            rows.append(row)
            print(
                f"{density} {count}: {row['seconds']['backbone']:.2f} s, "
                f"padded windows x {row['padded_over_flattened']:.2f}",
                flush=True,
            )
    dense = dense_part(rounds)
    for row in rows:
        seconds = row["seconds"]
        whole = seconds["backbone"] + dense
        row["shares"] = {
            "mapping": seconds["mapping"] / whole,
            "attention": seconds["attention"] / whole,
            "rest_of_backbone": (seconds["backbone"] - seconds["mapping"] - seconds["attention"])
            / whole,
            "bev_convolutions": dense / whole,
        }
    by_density = {name: [r for r in rows if r["density"] == name] for name in DENSITIES}
    exponents = {name: exponent(found) for name, found in by_density.items() if found}
    ratios = [row["padded_over_flattened"] for row in by_density["range_squared"]] or [0.0]
    return {
        "machine": machine() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "dense_part_seconds": dense,
        "rows": rows,
        "exponents": exponents,
        "bars": {
            "exponent": {"most": LARGEST_EXPONENT, "found": max(exponents.values())},
            "padded_over_flattened": {"least": LEAST_RATIO, "found": min(ratios)},
        },
        "reached": len(exponents) == len(DENSITIES)
        and max(exponents.values()) <= LARGEST_EXPONENT
        and min(ratios) >= LEAST_RATIO,
    }


def main() -> int:
    """Measure, write JSON, and fail if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    parser.add_argument("--density", choices=DENSITIES, nargs="*", default=list(DENSITIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "flatformer.json")
    arguments = parser.parse_args()
    if not QUIET_MALLOC.items() <= os.environ.items():
        # Read at a process's start only; the same for both sides.
        command = [sys.executable, *sys.argv]
        return subprocess.run(command, env=os.environ | QUIET_MALLOC, check=False).returncode
    torch.set_num_threads(arguments.threads)
    kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    found = report(arguments.counts, arguments.rounds, arguments.density, kept)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"exponents": found["exponents"], "bars": found["bars"]}, indent=1))
    return 0 if found["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
