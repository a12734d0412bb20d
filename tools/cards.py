"""Write MODEL_CARDS.md and docs/pictures/; with --check, fail if one is stale."""

import json
import sys
from pathlib import Path

import vitzoo
from vitzoo.engine.pictures import MODELS, picture
from vitzoo.zoo.cards import render
from vitzoo.zoo.published import all_entries

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "MODEL_CARDS.md"
PICTURES = ROOT / "docs" / "pictures"
SPEED = ROOT / "benchmarks" / "models.json"
POINTS = ROOT / "benchmarks" / "flatformer.json"
GPU = ROOT / "benchmarks" / "gpu.json"


def cards() -> str:
    """The cards of all registered models."""
    measured = [json.loads(f.read_text()) if f.exists() else None for f in (SPEED, POINTS, GPU)]
    return render([vitzoo.info(name) for name in vitzoo.list_models()], all_entries(), *measured)


def files() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {TARGET: cards()} | {PICTURES / f"{name}.svg": picture(name) for name in MODELS}


if __name__ == "__main__":
    for path, text in files().items():
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale: make cards")
