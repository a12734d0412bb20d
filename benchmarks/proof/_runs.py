"""Training runs of proofs: they go on where they were killed, and add up the processor's time."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.train import train

RUNS = Path("runs") / "proof"


def trained(recipe: str, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a recipe from nothing, or go on with what a killed proof left.

    Args:
        recipe: its name.
        name: of the run; the proof that it is for ends with `forget`.
        overrides: `key=value` arguments.

    Returns:
        The model's name, its `metrics`, and `seconds` and `cpu_seconds` over all pieces, with what
        was done twice after a kill; several threads add up.
    """
    folder = RUNS / name
    given = [*overrides, f"run.folder={RUNS}", f"run.name={name}", "run.save_every=25"]
    with _counted(folder.with_suffix(".json")) as total:
        merged = load_recipe(recipe, given)
        summary = train(merged)
    return {
        "recipe": recipe,
        # Where the data lies is the machine's affair.
        "overrides": [text for text in overrides if not text.startswith("data.root=")],
        "model": merged.options.model.name,
        "metrics": {key: round(value, 2) for key, value in summary.metrics.items()},
        **total,
    }


def forget(names: Iterable[str]) -> None:
    """Remove finished runs, so that the next proof starts from nothing."""
    for name in names:
        shutil.rmtree(RUNS / name)
        (RUNS / name).with_suffix(".json").unlink()


@contextmanager
def _counted(file: Path) -> Iterator[dict[str, float]]:
    """Sums of wall and processor seconds, kept in a file if the work is ended with SIGTERM."""
    total = json.loads(file.read_text()) if file.is_file() else {"seconds": 0.0, "cpu_seconds": 0.0}
    wall, cpu = time.monotonic(), time.process_time()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield total
    finally:
        total["seconds"] = round(total["seconds"] + time.monotonic() - wall, 1)
        total["cpu_seconds"] = round(total["cpu_seconds"] + time.process_time() - cpu, 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(total))
        signal.signal(signal.SIGTERM, before)
