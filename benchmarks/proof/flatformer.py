"""FlatFormer: what its blocks bring to a small detector, and how its time grows."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.train import train

RECIPE = "flatformer-synthetic"
METRIC = "AP2m/car"
LEAST_AP = 60.0
LEAST_GAIN = 10.0
MOST_MINUTES = 12.0
SPEED = Path(__file__).parents[1] / "flatformer.py"


def run(overrides: list[str]) -> dict[str, Any]:
    """Train the recipe from nothing and evaluate it on the held-out frames."""
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        recipe = load_recipe(RECIPE, [*overrides, f"run.folder={folder}"])
        if not recipe.options.model.args["depth"]:
            # They name the blocks' parameters.
            recipe.optim.lr_multipliers.clear()
        summary = train(recipe)
        return {
            "minutes": (time.perf_counter() - wall) / 60,
            # Of this process alone; on a busy machine the clock on the wall tells of the others.
            "cpu_minutes": (time.process_time() - cpu) / 60,
            "metrics": {key: round(value, 3) for key, value in summary.metrics.items()},
        }


def blocks(overrides: list[str] | None = None) -> dict[str, Any]:
    """The synthetic recipe, and the same detector without FlatFormer's blocks."""
    overrides = overrides or []
    ours = run(overrides)
    without = run([*overrides, "model.args.depth=0"])
    reached = ours["metrics"][METRIC]
    gain = reached - without["metrics"][METRIC]
    return {
        "recipe": RECIPE,
        "overrides": overrides,
        METRIC: reached,
        "gain": gain,
        "minutes": ours["minutes"],
        "required": {METRIC: LEAST_AP, "gain": LEAST_GAIN, "at_most_minutes": MOST_MINUTES},
        "passed": reached >= LEAST_AP and gain >= LEAST_GAIN and ours["minutes"] <= MOST_MINUTES,
        "load_average": os.getloadavg()[0],
        "with_blocks": ours,
        "without_blocks": without,
    }


def speed() -> dict[str, Any]:
    """`benchmarks/flatformer.py`; its own JSON has the details."""
    done = subprocess.run([sys.executable, str(SPEED)], check=False)
    return {"details": "benchmarks/flatformer.json", "passed": done.returncode == 0}


BARS = {"flatformer-blocks": blocks, "flatformer-speed": speed}
