"""`vitzoo look`: a picture of one query's keys, and a profile of all heads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitzoo.engine.look import look, profile
from vitzoo.errors import InputError

VALUES = ["model.pretrained=false", "model.args={depths: [1, 1, 1, 1]}", "data.size=128"]


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 140, 3), "uint8")).save(path)
    return str(path)


def test_a_window_is_lit_and_the_rest_is_dark(photo: str, tmp_path: Path) -> None:
    target = tmp_path / "look.png"
    seen = look(photo, "vz_davit_tiny", VALUES, query=(0, 127), output=target)
    assert seen.query == (0, 31)
    assert (seen.weights.amax(0) > 0).nonzero().amin(0).tolist() == [0, 28]
    red = np.asarray(Image.open(target), int)
    red = red[..., 0] - red[..., 1]
    assert (red[:24, 112:120] > 0).all()
    assert (red[32:, :] <= 0).all()


def test_profile_counts_bits_and_shares(photo: str, tmp_path: Path) -> None:
    lines = profile(photo, "vz_davit_tiny", VALUES, output=tmp_path / "look.json")
    assert (tmp_path / "look.png").stat().st_size > 0
    assert json.loads((tmp_path / "look.json").read_text())["layers"] == lines
    for line in lines:
        assert sum(line["importance"]) == pytest.approx(1, abs=1e-4)
        assert 0 <= max(line["entropy_bits"]) <= np.log2(49) + 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": (128, 0)}, "not on the image, 128 x 128"),
        ({"layer": "stages.9"}, "known: 0 stages.0"),
        ({"head": 7}, "heads 0 to 2"),
    ],
)
def test_wrong_places_are_named(photo: str, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        look(photo, "vz_davit_tiny", VALUES, output=tmp_path / "a.png", **options)
