"""What the generated (synthetic) scenes prove of a head over a small zoo backbone."""

from collections.abc import Sequence
from typing import Any

from benchmarks.proof._runs import forget, trained

MOST_BEHIND = 5.0
# Ten minutes on two cores.
MOST_CPU_SECONDS = 1200.0


def keeps_up(ours: str, theirs: str, figures: Sequence[str]) -> dict[str, Any]:
    """Two recipes that differ in the backbone alone, each from nothing.

    Args:
        ours: the zoo's.
        theirs: timm's resnet18.
        figures: metrics in which ours may be behind by `MOST_BEHIND` points.
    """
    found = {recipe: trained(recipe, recipe) for recipe in (ours, theirs)}
    forget(found)
    ahead = {
        key: round(found[ours]["metrics"][key] - found[theirs]["metrics"][key], 2)
        for key in figures
    }
    return {
        "data": "400 generated scenes to learn from, 100 held out: synthetic",
        "ahead_of_resnet18": ahead,
        "required": {
            "at_least": dict.fromkeys(figures, -MOST_BEHIND),
            "at_most_cpu_seconds_each": MOST_CPU_SECONDS,
        },
        "passed": all(points >= -MOST_BEHIND for points in ahead.values())
        and all(run["cpu_seconds"] <= MOST_CPU_SECONDS for run in found.values()),
        **_time(found.values()),
        "runs": list(found.values()),
    }


def overfits(recipe: str, overrides: Sequence[str], required: dict[str, float]) -> dict[str, Any]:
    """A recipe learns 16 scenes by heart: a head with a bug cannot.

    Args:
        recipe: whose model is trained and then judged on the same scenes.
        overrides: the data, no augmentation, more epochs.
        required: least metrics in percent.
    """
    run = trained(recipe, f"overfit-{recipe}", overrides)
    forget([f"overfit-{recipe}"])
    reached = {key: run["metrics"][key] for key in required}
    return {
        "data": "16 generated scenes, judged on the same: synthetic",
        "reached": reached,
        "required": required,
        "passed": all(reached[key] >= least for key, least in required.items()),
        **_time([run]),
        "runs": [run],
    }


def _time(runs: Any) -> dict[str, float]:
    return {key: round(sum(run[key] for run in runs), 1) for key in ("seconds", "cpu_seconds")}
