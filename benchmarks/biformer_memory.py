"""Memory of one training step of BiFormer-S at a detector's size, with and without the gather.

Usage: python benchmarks/biformer_memory.py [--out benchmarks/biformer_memory.json]

`picked` is the zoo's routed attention, `expanded` the authors' form: torch.gather on the keys and
values expanded once per query region, then products and a softmax, all kept for backward. Each side
runs in a process of its own; the figure is its peak of resident memory. The detection setting: 16
regions per side, the dense version, one image of 800 x 1344, float32.

`expanded` is stopped where it has taken `--stop-at` times the memory of `picked`, so that the bar
can be shown on a machine that does not have what the whole step needs: its peak is then a lower
bound, and the ratio an upper one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import Tensor

from vitzoo.engine.bench import machine, resident_peak
from vitzoo.engine.bench_cases import expanded_keys
from vitzoo.ops import OPERATORS, Backend, use_backend
from vitzoo.ops.routed import join_regions, split_regions

BAR = 0.5


def expanded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    *,
    region_grid: tuple[int, int],
    weights: Tensor | None = None,
    scale: float,
) -> Tensor:
    """The authors' arithmetic: every query region gets its own copy of the keys it chose."""
    keys, values = expanded_keys(k, v, regions, region_grid)
    queries = split_regions(q, region_grid).flatten(0, 1).transpose(1, 2)
    scores = (queries * scale) @ keys.permute(0, 2, 3, 1)
    out = scores.softmax(dim=-1) @ values.transpose(1, 2)
    return join_regions(out.transpose(1, 2), region_grid, *q.shape[1:3])


def step(side: str, size: tuple[int, int]) -> dict:
    """One training step in this process."""
    operator = OPERATORS["routed_attention"]
    operator.backends["expanded"] = Backend("expanded", expanded_attention)
    torch.manual_seed(0)
    model = timm.create_model("vz_biformer_small", dense=True, n_win=16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(1, 3, *size)
    before = resident_peak()
    start = time.perf_counter()
    backend = "portable" if side == "picked" else "expanded"
    with use_backend(backend, operator="routed_attention"):
        loss = sum(x.relu().square().mean() for x in model(images))
        loss.backward()
        optimizer.step()
    return {
        "side": side,
        "seconds": time.perf_counter() - start,
        "before_bytes": before,
        "peak_bytes": resident_peak(),
        "step_bytes": resident_peak() - before,
        "loss": loss.item(),
    }


def run(side: str, size: list[int], most: float) -> dict:
    """One side in a process of its own, stopped beyond `most` bytes of resident memory."""
    command = [sys.executable, __file__, "--side", side, "--size", *map(str, size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            time.sleep(0.2)
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            peak = 1024 * int(found[1]) if found else 0
            if peak > most:
                process.kill()
                return {"side": side, "peak_bytes": peak, "stopped": True}
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{side} failed with {process.returncode}")
    return json.loads(output.splitlines()[-1]) | {"stopped": False}


def main() -> None:
    """Run both sides and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", choices=["picked", "expanded"], help="one side, in this process")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1344], metavar=("H", "W"))
    parser.add_argument("--stop-at", type=float, default=2.5, metavar="FACTOR")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(step(arguments.side, tuple(arguments.size))))
        return
    picked = run("picked", arguments.size, float("inf"))
    print(picked, flush=True)
    expanded = run("expanded", arguments.size, arguments.stop_at * picked["peak_bytes"])
    print(expanded, flush=True)
    ratio = picked["peak_bytes"] / expanded["peak_bytes"]
    report = {
        "machine": machine(),
        "model": "vz_biformer_small",
        "size": arguments.size,
        "sides": [picked, expanded],
        "peak_ratio": ratio,
        "upper_bound": expanded["stopped"],
        "bar": BAR,
        "reached": ratio <= BAR,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"peak: {ratio:.3f} of the expanded gather's (bar {BAR})")


if __name__ == "__main__":
    main()
