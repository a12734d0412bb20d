"""Routed attention against the expanded gather, at the three routed stages of BiFormer-S.

Usage: python benchmarks/biformer_operator.py [--pairs N] [--out benchmarks/biformer_operator.json]

224 x 224, batch 8, float32, forward, no gradient. Both sides in turn in one process; the figure is
the median ratio of the pairs, in wall time and in processor time (a busy machine spoils the first
more than the second). `same_attention` compares with the expanded gather followed by the attention
that the zoo uses after picking, `authors_attention` with the authors' products and softmax.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from biformer_memory import expanded_attention, expanded_keys
from torch import Tensor

from vitzoo.engine.bench import machine
from vitzoo.ops import attention, routed_attention
from vitzoo.ops.routed import join_regions, split_regions

# Channels, side of the map, regions chosen of 49.
STAGES = {1: (64, 56, 1), 2: (128, 28, 4), 3: (256, 14, 16)}
BARS = {3: 5.0}
GRID = (7, 7)


def expanded_then_fused(
    q: Tensor, k: Tensor, v: Tensor, regions: Tensor, *, region_grid: tuple, scale: float
) -> Tensor:
    """The expanded gather and the zoo's own attention."""
    keys, values = expanded_keys(k, v, regions, region_grid)
    queries = split_regions(q, region_grid).flatten(0, 1)
    out = attention(queries, keys, values, scale=scale)
    return join_regions(out, region_grid, *q.shape[1:3])


def timed(run: Callable[[], Tensor]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(stage: int, pairs: int) -> dict:
    """Median ratios of a stage."""
    channels, side, chosen = STAGES[stage]
    torch.manual_seed(0)
    qkv = torch.randn(8, side, side, 3, channels // 32, 32)
    regions = torch.rand(8, 49, 49).topk(chosen, dim=-1).indices
    arguments = (*qkv.unbind(3), regions)
    settings = {"region_grid": GRID, "scale": channels**-0.5}
    sides = {
        "routed": routed_attention,
        "same_attention": expanded_then_fused,
        "authors_attention": expanded_attention,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    with torch.inference_mode():
        expected = routed_attention(*arguments, **settings, backend="reference")
        for run in sides.values():
            torch.testing.assert_close(run(*arguments, **settings), expected, rtol=1e-4, atol=1e-5)
        for _ in range(pairs):
            for name, run in sides.items():
                times[name].append(timed(lambda run=run: run(*arguments, **settings)))
    result: dict = {"stage": stage, "bar": BARS.get(stage)}
    for name in ("same_attention", "authors_attention"):
        for i, clock in enumerate(("wall", "cpu")):
            ratios = [b[i] / a[i] for a, b in zip(times["routed"], times[name], strict=True)]
            result[f"{name}_{clock}"] = statistics.median(ratios)
    result["routed_ms"] = 1e3 * statistics.median(wall for wall, _ in times["routed"])
    return result


def main() -> None:
    """Time the three stages and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for stage in STAGES:
        results.append(compare(stage, arguments.pairs))
        print(results[-1], flush=True)
    report = {"machine": machine(), "threads": arguments.threads, "results": results}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
