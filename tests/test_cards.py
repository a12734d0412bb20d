"""MODEL_CARDS.md holds what the registry and the weights table hold."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

import vitzoo
from vitzoo.engine.pictures import MODELS, picture
from vitzoo.zoo.published import all_entries

ROOT = Path(__file__).parents[1]


def test_cards_are_not_stale() -> None:
    cards = runpy.run_path(str(ROOT / "tools" / "cards.py"))["cards"]()
    assert (ROOT / "MODEL_CARDS.md").read_text() == cards, "run `make cards`"


QUICK = ("davit", "nat", "flatformer")


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in sorted(MODELS)],
)
def test_pictures_are_not_stale(family: str) -> None:
    drawn = (ROOT / "docs" / "pictures" / f"{family}.svg").read_text()
    assert drawn == picture(family), "run `make cards`"


def test_every_family_has_a_picture() -> None:
    assert {vitzoo.info(name).family for name in vitzoo.list_models()} == set(MODELS)


def test_the_measured_backbone_of_points_is_on_its_card() -> None:
    text = (ROOT / "MODEL_CARDS.md").read_text()
    card = text.partition("## FlatFormer")[2].partition("\n## ")[0]
    found = json.loads((ROOT / "benchmarks" / "flatformer.json").read_text())
    assert "Speed and memory: not measured yet" not in card
    assert all(f"{value:.2f} (" in card for value in found["exponents"].values())
    assert sum(f"| {row['padded_over_flattened']:.2f} |" in card for row in found["rows"]) == 10


def test_every_model_and_every_weight_has_a_line() -> None:
    text = (ROOT / "MODEL_CARDS.md").read_text()
    assert [n for n in vitzoo.list_models() if f"| `{n}` |" not in text] == []
    assert [e.name for e in all_entries() if f"| `{e.name}` |" not in text] == []
