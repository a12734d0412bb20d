"""The page to try a model on: built without a server, its functions called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitzoo.engine.demo import Demo, build_page

RunOf = Callable[[str], Path]


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_an_upload_is_answered_and_a_click_shows_keys(task: str, run_of: RunOf) -> None:
    demo = Demo(str(run_of(task)))
    photo = Image.open(run_of(task).parent / "photo.png").convert("RGB")
    drawn, facts = demo.find(photo)
    assert drawn is not None
    assert facts is not None
    assert demo.find(None) == (None, None)
    assert (demo.layers is not None) == (task == "classification")
    if demo.layers:
        picture = demo.seen(photo)
        assert picture is not None
        assert picture.size == (32, 32)
        keys = demo.look(photo, demo.layers[0], 16, 16)
        assert (np.asarray(keys) != np.asarray(picture)).any()


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_page_holds_together_without_a_server(task: str, run_of: RunOf) -> None:
    pytest.importorskip("gradio")
    demo = Demo(str(run_of(task)))
    page = build_page(demo, "a run")
    config = page.get_config_file()
    kinds = [part["type"] for part in config["components"]]
    assert kinds.count("image") == (4 if demo.layers else 2)
    assert ("dropdown" in kinds) == bool(demo.layers)
    photo = Image.open(run_of(task).parent / "photo.png").convert("RGB")
    functions = {function.fn.__name__: function.fn for function in page.fns.values()}
    drawn, facts = functions["find"](photo)
    assert drawn.size[0] > 0
    assert facts["source"] is None
    if demo.layers:

        class Click:
            index = (5, 9)

        keys = functions["clicked"](photo, demo.layers[0], Click())
        assert keys.size == (32, 32)
