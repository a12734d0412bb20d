"""Write MODEL_CARDS.md; with --check, fail if it is stale."""

import json
import sys
from pathlib import Path

import vitzoo
from vitzoo.zoo.cards import render
from vitzoo.zoo.published import all_entries

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "MODEL_CARDS.md"
SPEED = ROOT / "benchmarks" / "models.json"


def cards() -> str:
    """The cards of all registered models."""
    speed = json.loads(SPEED.read_text()) if SPEED.exists() else None
    return render([vitzoo.info(name) for name in vitzoo.list_models()], all_entries(), speed)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == cards() else "MODEL_CARDS.md is stale: make cards")
    TARGET.write_text(cards())
