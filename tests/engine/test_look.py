"""`vitzoo look`: a picture of one query's keys, and a profile of all heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitzoo import commands
from vitzoo.engine import curves
from vitzoo.engine.look import look
from vitzoo.engine.profiling import profile
from vitzoo.errors import InputError

VALUES = ["model.pretrained=false", "model.args={depths: [1, 1, 1, 1]}", "data.size=128"]


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 140, 3), "uint8")).save(path)
    return str(path)


def test_a_window_is_lit_and_the_rest_is_dark(photo: str, tmp_path: Path) -> None:
    target = tmp_path / "look.png"
    seen = look(photo, "vz_davit_tiny", VALUES, query=(0, 127), output=target).seen
    assert seen.query == (0, 31)
    assert (seen.weights.amax(0) > 0).nonzero().amin(0).tolist() == [0, 28]
    red = np.asarray(Image.open(target), int)
    assert red.shape == (256 + 34, 256, 3)  # twice the model's 128 pixels, and the scale
    scale, red = red[256:], red[:256:2, ::2]
    red = red[..., 0] - red[..., 1]
    assert (red[:24, 112:120] > 0).all()
    assert (red[32:, :] <= 0).all()
    bar = scale[8, 8:248]
    growth = np.diff(bar[:, 0] - bar[:, 1])
    assert growth.min() >= -1
    assert bar[0, 0] - bar[0, 1] <= 0
    assert bar[-1, 0] - bar[-1, 1] > 80
    assert (scale[18:] < 128).any(), "no figures below the scale"


def test_weights_are_told_in_words_and_as_json(photo: str, tmp_path: Path) -> None:
    found = look(photo, "vz_davit_tiny", VALUES, layer="0", head=1, output=tmp_path / "a.png")
    facts = json.loads((tmp_path / "a.json").read_text())
    weights = found.seen.weights
    keys = facts["keys"]
    assert len(keys) == int((weights.amax(0) > 0).sum())
    assert [line["weight"] for line in keys] == sorted(
        weights[1][weights.amax(0) > 0].tolist(), reverse=True
    )
    for line in keys:
        row, column = line["key"]
        assert line["heads"] == weights[:, row, column].tolist()
        assert line["pixels"] == [4 * row + 2, 4 * column + 2]
    assert sum(line["weight"] for line in keys) + facts["elsewhere"] == pytest.approx(1, abs=1e-5)
    text = found.report()
    row, column = keys[0]["key"]
    assert f"key {row},{column} at {4 * row + 2},{4 * column + 2}: " in text
    assert f"{100 * keys[0]['weight']:.3g} %" in text
    assert "head 1: " in text
    assert "-0.0" not in text
    away = look(photo, "vz_davit_tiny", VALUES, output=tmp_path / "b.png")
    away.seen.elsewhere.fill_(-1e-6)
    assert " 0.0 % off the map" in away.report()


@pytest.mark.parametrize("output", ["a.json", "a.png"])
def test_profile_counts_bits_and_shares(photo: str, tmp_path: Path, output: str) -> None:
    lines = profile(photo, "vz_davit_tiny", VALUES, output=tmp_path / output)
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert json.loads((tmp_path / "a.json").read_text())["layers"] == lines
    for line in lines:
        assert sum(line["importance"]) == pytest.approx(1, abs=1e-4)
        assert 0 <= max(line["entropy_bits"]) <= np.log2(49) + 1e-4


def test_profile_names_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(curves, "_save", lambda figure, path: kept.append(figure))
    names = ["stages.0.0.attn/window_attention", "stages.1.0.attn/attention"]
    lines = [
        {"layer": name, "distance_pixels": [1.0, 2.0], "entropy_bits": [3.0, 4.0]} for name in names
    ]
    curves.draw_profile(lines, tmp_path / "a.png")
    top, _, bottom = kept[0].axes
    ticks = [tick.get_text() for tick in bottom.get_xticklabels()]
    assert ticks == ["stages.0.0.attn", "stages.1.0.attn"]
    kinds = [text.get_text() for text in top.get_legend().get_texts()]
    assert kinds == ["window attention", "attention"]


def test_files_of_look_and_profile_lie_side_by_side(
    photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["look", photo, *VALUES, "--model", "vz_davit_tiny"]
    assert commands.app(arguments) == 0
    assert commands.app([*arguments, "--profile"]) == 0
    found = {path.name for path in tmp_path.iterdir()} - {"photo.png"}
    assert found == {"look.png", "look.json", "profile.json", "profile.png"}
    assert "keys" in json.loads((tmp_path / "look.json").read_text())


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_other_tasks_show_their_backbone(
    task: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = run_of(task)
    given = (str(run.parent / "photo.png"), str(run))
    found = look(*given, output=tmp_path / "look.png")
    assert found.keys()
    assert found.elsewhere < 1
    lines = profile(*given, output=tmp_path / "profile.json")
    assert [("importance" in line) for line in lines] == [task == "segmentation"] * len(lines)


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
        look(photo, "vz_davit_tiny", VALUES, **{"output": tmp_path / "a.png", **options})


@pytest.mark.parametrize("run", [look, profile])
def test_points_and_strange_endings_are_named(run: Any, photo: str) -> None:
    with pytest.raises(InputError, match="vz_flatformer reads LiDAR points"):
        run(photo, "vz_flatformer", ["model.pretrained=false"])
    with pytest.raises(InputError, match=r"o\.xyz"):
        run(photo, "vz_davit_tiny", VALUES, output=Path("o.xyz"))
