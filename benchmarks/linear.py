"""The float32 product of a linear layer, through the BLAS and through oneDNN, as JSON.

Usage: python benchmarks/linear.py [--rounds N] [--out benchmarks/linear.json]

All variants of a shape are timed in turn in one process; a figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.engine.bench import machine
from vitzoo.ops.linear import linear_choices, linear_gelu_onednn, linear_onednn

# Rows, input features, output features: of DeiT-S, DaViT-T (batch 8, 224) and LookupViT-B.
SHAPES = [
    (1568, 384, 1536),
    (25088, 96, 288),
    (25088, 96, 384),
    (6272, 192, 768),
    (392, 768, 3072),
    (1568, 768, 1536),
]


def variants(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> the same product, or product and GELU, another way."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    trained = weight.clone().requires_grad_()

    def convolution() -> Tensor:
        with torch.enable_grad():
            return linear_onednn(x, trained, bias)

    return {
        "F.linear": lambda: F.linear(x, weight, bias),
        "oneDNN, 1x1 convolution": convolution,
        "oneDNN, plain weight": lambda: pointwise(x, weight, bias, "none", [], "none"),
        "oneDNN, packed weight": lambda: linear_onednn(x, weight, bias),
        "F.linear, then GELU": lambda: F.gelu(F.linear(x, weight, bias)),
        "oneDNN, packed weight, fused GELU": lambda: linear_gelu_onednn(x, weight, bias),
    }


@torch.no_grad()
def time_shape(rows: int, dim: int, out: int, rounds: int) -> dict[str, float]:
    """GFLOP/s of every variant, the GELU's own operations not counted."""
    torch.manual_seed(0)
    found = variants(torch.randn(rows, dim), torch.randn(out, dim), torch.randn(out))
    times: dict[str, list[float]] = {name: [] for name in found}
    for step in range(rounds + 2):
        for name, run in found.items():
            start = time.perf_counter()
            run()
            if step >= 2:
                times[name].append(time.perf_counter() - start)
    return {
        name: round(2e-9 * rows * dim * out / statistics.median(t), 1) for name, t in times.items()
    }


def main() -> None:
    """Time all shapes and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for rows, dim, out in SHAPES:
        rate = time_shape(rows, dim, out, arguments.rounds)
        results.append({"rows": rows, "in": dim, "out": out, "gflops": rate})
        print(rows, dim, out, rate, flush=True)
    report = {
        "machine": machine(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "auto_takes": linear_choices(),
        "results": results,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
