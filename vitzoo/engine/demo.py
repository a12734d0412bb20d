"""A page to try a model on: upload a photo, see what it finds and which keys a query sees."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from vitzoo.attention.seen import record_layers
from vitzoo.engine.look import as_seen, draw_keys, keys_in_image
from vitzoo.engine.predict import load
from vitzoo.errors import InputError


class Demo:
    """What the page does, apart from the page.

    Args:
        given: a run, a weights file, or a model's name.
        values: recipe values.
    """

    def __init__(self, given: str, values: Sequence[str] = ()) -> None:
        self.task: Any = load(given, values)
        if self.task.endings:
            raise InputError(f"{given} does not take photos")
        # A click looks into the model on the CPU, an upload uses it where it is.
        on_cpu = self.task.device.type == "cpu"
        self._model = self.task.model if on_cpu else copy.deepcopy(self.task.model).cpu()
        # The layers that a click can ask for; None if the model is not a classifier.
        self.layers = self._layers() if hasattr(self.task, "transform") else None

    def find(self, image: Image.Image | None) -> tuple[Image.Image | None, dict[str, Any] | None]:
        """The image with what was found drawn on it, and the same as JSON."""
        if image is None:
            return None, None
        (result,) = self.task.predict([image])
        return result.draw(), result.to_dict()

    def seen(self, image: Image.Image | None) -> Image.Image | None:
        """The image as the model gets it, to click on."""
        return None if image is None else as_seen(self.task, image.convert("RGB"))[0]

    def look(self, image: Image.Image | None, layer: str, y: int, x: int) -> Image.Image | None:
        """The keys that the query at y, x of `seen`'s picture attends to in a layer."""
        if image is None:
            return None
        picture, pixels = as_seen(self.task, image.convert("RGB"))
        keys = keys_in_image(self._model, pixels, query=(y, x), layer=layer)
        return draw_keys(picture, keys)

    def _layers(self) -> list[str]:
        channels, height, width = self.task.data_config()["input_size"]
        with record_layers(self._model, (height, width)) as layers, torch.no_grad():
            self._model(torch.zeros(1, channels, height, width))
        return [layer.name for layer in layers]


def build_page(demo: Demo, title: str) -> Any:
    """The page as `gradio.Blocks`; `.launch()` serves it."""
    import gradio

    with gradio.Blocks(title=title) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            photo = gradio.Image(type="pil", label="photo")
            drawn = gradio.Image(label="found")
        facts = gradio.JSON(label="as JSON")
        photo.change(demo.find, photo, [drawn, facts])
        if demo.layers:
            layer = gradio.Dropdown(demo.layers, value=demo.layers[0], label="layer")
            with gradio.Row():
                seen = gradio.Image(label="as the model gets it: click on a query")
                keys = gradio.Image(label="the keys it sees")
            photo.change(demo.seen, photo, seen)

            # gradio reads the annotation, which must therefore be the class itself.
            def clicked(image: Image.Image | None, name: str, event):  # type: ignore[no-untyped-def]
                x, y = event.index
                return demo.look(image, name, y, x)

            clicked.__annotations__["event"] = gradio.SelectData
            seen.select(clicked, [photo, layer], keys)
    return page
