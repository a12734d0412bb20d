"""`vitzoo.predict` on runs of every image task, from every form an image comes in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitzoo
from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample

RunOf = Callable[[str], Path]
TASKS = ("classification", "detection", "segmentation")
THREE_LINES = (
    'import vitzoo; r = vitzoo.predict("{run}", "photo.png"); r[0].draw().save("drawn.png")'
)


def _forms(path: Path) -> dict[str, Any]:
    image = Image.open(path).convert("RGB")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    return {
        "path": path,
        "str": str(path),
        "PIL": image,
        "array": array,
        "tensor": tensor,
        "floats": tensor.float() / 255,
    }


@pytest.mark.parametrize("task", TASKS)
def test_three_lines_from_any_form_of_an_image(task: str, run_of: RunOf) -> None:
    run = run_of(task)
    photo = run.parent / "photo.png"
    forms = _forms(photo)
    given = {name: vitzoo.predict(run, image) for name, image in forms.items()}
    first = given["path"][0].to_dict()
    assert json.loads(json.dumps(first)) == first
    assert first["source"] == str(photo)
    for name, (result,) in given.items():
        found = result.to_dict() | {"source": first["source"]}
        assert found == first, name
    # After one step no object is sure enough for the default.
    options = {"min_score": 0.0} if task == "detection" else {}
    picture = given["path"][0].draw(**options)
    assert picture.mode == "RGB"
    # What is drawn is more than the photo.
    plain = Image.open(photo).convert("RGB").resize(picture.size)
    assert (np.asarray(picture) != np.asarray(plain)).any()


@pytest.mark.parametrize("task", TASKS)
def test_many_images_at_once_are_as_one_by_one(task: str, run_of: RunOf) -> None:
    run = run_of(task)
    image = torch.from_numpy(np.asarray(Image.open(run.parent / "photo.png")).copy()).movedim(-1, 0)
    batch = torch.stack([image, image.flip(-1), image.flip(-2)])
    together = vitzoo.predict(run, batch)
    assert len(together) == 3
    for result, alone in zip(together, batch, strict=True):
        (expected,) = vitzoo.predict(run, alone)
        _close(result.to_dict(), expected.to_dict())


def _close(found: Any, expected: Any) -> None:
    """Equal but for the last digits, which a batch's summation order changes."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key != "runs":
                _close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            _close(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    else:
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_three_lines_as_a_newcomer_types_them(task: str, run_of: RunOf) -> None:
    run = run_of(task)
    root = Path(vitzoo.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", THREE_LINES.format(run=run.name)]
    # Runs are found under `runs/` of the folder that one works in.
    work = run.parent / f"work-{task}"
    (work / "runs").mkdir(parents=True)
    (work / "runs" / run.name).symlink_to(run)
    (work / "photo.png").symlink_to(run.parent / "photo.png")
    subprocess.run(command, cwd=work, env=env, check=True, timeout=120)
    # Drawn beside or on the photo: never smaller.
    with Image.open(work / "drawn.png") as drawn, Image.open(work / "photo.png") as photo:
        assert drawn.width >= photo.width
        assert drawn.height >= photo.height


def test_what_is_no_image_is_named(run_of: RunOf) -> None:
    run = run_of("classification")
    with pytest.raises(UnreadableSample, match=r"gone.png: no such file"):
        vitzoo.predict(run, "gone.png")
    with pytest.raises(InputError, match="from 0 to 1"):
        vitzoo.predict(run, torch.full((3, 8, 8), 2.0))
    with pytest.raises(InputError, match="no run 'runs/none' here"):
        vitzoo.predict("runs/none", "gone.png")
