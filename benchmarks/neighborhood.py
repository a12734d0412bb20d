"""Neighborhood attention by tiles against the gather of every query's own keys, on the CPU.

Usage: python benchmarks/neighborhood.py [--pairs N] [--out benchmarks/neighborhood.json]

Kernel 7 with a bias table, head dimension 32, float32, batch 1: NAT's maps at 224 pixels. Both
sides run in one process in turn; the figure is the median of the pairwise ratios, forward and
forward with all gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from vitzoo.engine.bench import machine
from vitzoo.ops import neighborhood_attention

HERE = Path(__file__).parent
# Side of the map, heads, and the least ratios forward and with backward.
CASES = [(56, 2, 3.0, 5.0), (28, 4, None, None), (14, 8, None, None)]


def seconds(tensors: list[torch.Tensor], backend: str, *, backward: bool) -> float:
    """One call."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = neighborhood_attention(*tensors[:3], kernel_size=7, bias=tensors[3], backend=backend)
        if backward:
            torch.autograd.grad(out, tensors, out.detach())
    return time.perf_counter() - start


def ratio(side: int, heads: int, pairs: int, *, backward: bool) -> float:
    """Time of the gather over time of the tiles."""
    torch.manual_seed(0)
    tensors = [t.requires_grad_() for t in torch.randn(3, 1, side, side, heads, 32).unbind()]
    tensors.append(torch.randn(heads, 13, 13, requires_grad=True))
    ratios = []
    for i in range(pairs + 2):
        tiles = seconds(tensors, "portable", backward=backward)
        gather = seconds(tensors, "reference", backward=backward)
        if i >= 2:
            ratios.append(gather / tiles)
    return statistics.median(ratios)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "neighborhood.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for side, heads, least_forward, least_both in CASES:
        for backward, least in ((False, least_forward), (True, least_both)):
            found = ratio(side, heads, args.pairs, backward=backward)
            results.append(
                {"side": side, "heads": heads, "backward": backward, "ratio": found, "bar": least}
            )
            print(f"{side}x{side}, {heads} heads, backward {backward}: {found:.1f}x (bar {least})")
    record = {"machine": machine(), "threads": args.threads, "results": results}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
