"""What FlatFormer's blocks bring: the synthetic recipe, and the same detector without them.

Usage: python benchmarks/flatformer_synthetic.py [--out FILE.json] [key=value ...]

Trains `configs/detection3d/flatformer-synthetic.yaml` twice from the same seed, once with
`model.args.depth=0`, and evaluates both on the held-out frames.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from vitzoo.engine.bench import machine
from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.train import train

RECIPE = "flatformer-synthetic"
METRIC = "AP2m/car"
LEAST_AP = 60.0
LEAST_GAIN = 10.0
MOST_MINUTES = 12.0


def run(folder: str, name: str, overrides: list[str]) -> dict:
    """Train and evaluate once, from nothing."""
    recipe = load_recipe(RECIPE, [*overrides, f"run.folder={folder}", f"run.name={name}"])
    wall, cpu = time.perf_counter(), time.process_time()
    summary = train(recipe)
    return {
        "minutes": (time.perf_counter() - wall) / 60,
        # What the run alone used: on a busy machine the wall clock says more about the others.
        "cpu_minutes": (time.process_time() - cpu) / 60,
        "metrics": {key: round(value, 3) for key, value in summary.metrics.items()},
    }


def main() -> int:
    """Train both, write JSON, and fail if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="recipe keys for both runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "flatformer_synthetic.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        ours = run(folder, "flatformer", arguments.overrides)
        without = run(folder, "without", [*arguments.overrides, "model.args.depth=0"])
    gain = ours["metrics"][METRIC] - without["metrics"][METRIC]
    found = {
        "machine": machine() | {"threads": arguments.threads, "load": os.getloadavg()[0]},
        "overrides": arguments.overrides,
        "flatformer": ours,
        "without_blocks": without,
        "bars": {
            f"{METRIC} with the blocks": {"least": LEAST_AP, "found": ours["metrics"][METRIC]},
            "gain in points": {"least": LEAST_GAIN, "found": gain},
            "minutes": {"most": MOST_MINUTES, "found": ours["minutes"]},
        },
        "reached": ours["metrics"][METRIC] >= LEAST_AP
        and gain >= LEAST_GAIN
        and ours["minutes"] <= MOST_MINUTES,
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["bars"], indent=1))
    return 0 if found["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
