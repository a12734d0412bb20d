"""MODEL_CARDS.md holds what the registry and the weights table hold."""

from __future__ import annotations

import runpy
from pathlib import Path

import vitzoo
from vitzoo.zoo.published import all_entries

ROOT = Path(__file__).parents[1]


def test_cards_are_not_stale() -> None:
    cards = runpy.run_path(str(ROOT / "tools" / "cards.py"))["cards"]()
    assert (ROOT / "MODEL_CARDS.md").read_text() == cards, "run `make cards`"


def test_every_model_and_every_weight_has_a_line() -> None:
    text = (ROOT / "MODEL_CARDS.md").read_text()
    assert [n for n in vitzoo.list_models() if f"| `{n}` |" not in text] == []
    assert [e.name for e in all_entries() if f"| `{e.name}` |" not in text] == []
