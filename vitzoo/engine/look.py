"""What a model looks at: one query's keys drawn on the image; `profiling` has all layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vitzoo._paths import write_atomically
from vitzoo.attention.seen import Layer, Seen, keys_of_query, record_layers
from vitzoo.backbones import info
from vitzoo.engine.evaluate import open_source
from vitzoo.engine.predict import ready
from vitzoo.errors import InputError

_FIRE = (214, 39, 40)
# Pixels: what a picture's shorter side is brought to, and the strip with the scale.
_LEAST_SIDE = 224
_SCALE = 34
# Keys that are printed.
_LISTED = 8


def draw_keys(image: Image.Image, seen: Seen, *, head: int | None = None) -> Image.Image:
    """The keys of a query on the image: unseen ones dark, seen ones red by their weight.

    Args:
        image: any size; it is what the keys' grid covers.
        seen: from `vitzoo.attention.seen.keys_of_query`.
        head: this head's weights; the mean over the heads if None.
    """
    weights = weights_of(seen, head)
    strength = (weights / weights.max().clamp(min=1e-12)).sqrt()
    grey = image.convert("L").convert("RGB")
    base = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8)
    base = base.view(image.height, image.width, 3).float()
    strength, reached = (
        _enlarge(plane, (image.height, image.width))[..., None]
        for plane in (strength, (weights > 0).float())
    )
    base = base * (0.3 + 0.5 * reached)
    mixed = base + (torch.tensor(_FIRE) - base) * (0.75 * strength)
    out = Image.frombytes("RGB", image.size, mixed.byte().numpy().tobytes())
    (row, column), (rows, columns) = seen.query, seen.query_grid
    box = [
        column * image.width / columns,
        row * image.height / rows,
        (column + 1) * image.width / columns - 1,
        (row + 1) * image.height / rows - 1,
    ]
    ImageDraw.Draw(out).rectangle(box, outline=(255, 221, 0), width=max(1, image.width // 150))
    return out


def weights_of(seen: Seen, head: int | None) -> Tensor:
    """(rows, columns): the weights of one head, or the mean of all."""
    return seen.weights.mean(0) if head is None else seen.weights[head]


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture in whole multiples, so that keys and the scale's figures can be read."""
    times = -(-_LEAST_SIDE // min(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def with_scale(picture: Image.Image, largest: float) -> Image.Image:
    """A drawing with the scale of its red below: none, a quarter of the largest weight, all of it.

    Args:
        picture: from `draw_keys`.
        largest: the weight that is drawn in full red.
    """
    out = Image.new("RGB", (picture.width, picture.height + _SCALE), "white")
    out.paste(picture, (0, 0))
    left, right, top = 8, picture.width - 8, picture.height + 6
    pen = ImageDraw.Draw(out)
    grey = torch.full((3,), 0.8 * 127)
    for x in range(left, right):
        # Red grows with the root of the weight, as in `draw_keys`.
        share = 0.75 * (x - left) / (right - left)
        colour = (grey + (torch.tensor(_FIRE) - grey) * share).int().tolist()
        pen.line([x, top, x, top + 10], fill=tuple(colour))
    for part, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        text = f"{100 * largest * part**2:.3g} %"
        pen.text((left + part * (right - left), top + 13), text, fill="black", anchor=anchor)
    return out


def _enlarge(plane: Tensor, size: tuple[int, int]) -> Tensor:
    rows = torch.arange(size[0]) * plane.shape[0] // size[0]
    columns = torch.arange(size[1]) * plane.shape[1] // size[1]
    return plane[rows][:, columns]


def find_layer(layers: Sequence[Layer], wanted: str | None) -> Layer:
    """A layer by number (negative from the end) or by a part of its name; the first if None.

    Raises:
        InputError: none, or the model has no attention over tokens; the message lists them.
    """
    if not layers:
        raise InputError("this model has no attention over tokens that lie on a grid")
    if wanted is None:
        return layers[0]
    if wanted.lstrip("-").isdigit() and -len(layers) <= int(wanted) < len(layers):
        return layers[int(wanted)]
    for layer in layers:
        if wanted in layer.name:
            return layer
    known = ", ".join(f"{i} {layer.name}" for i, layer in enumerate(layers))
    raise InputError(f"no layer {wanted!r}; known: {known}")


@dataclass(frozen=True, eq=False)
class Look:
    """A query's keys, and where they were written.

    Attributes:
        seen: the keys.
        head: one head; None for the mean of all.
        sides: height and width of the image in pixels.
        picture, facts: the files: the drawing, and every key with its weights as JSON.
    """

    seen: Seen
    head: int | None
    sides: tuple[int, int]
    picture: Path
    facts: Path

    @property
    def elsewhere(self) -> float:
        """Share of the weight that is on no key of the map."""
        away = self.seen.elsewhere
        # One minus a sum of rounded weights may be a little below nothing.
        return max(0.0, (away.mean() if self.head is None else away[self.head]).item())

    def keys(self) -> list[dict[str, Any]]:
        """The keys, heaviest first: grid position, middle in pixels, weight, weight by head."""
        weights = weights_of(self.seen, self.head)
        found = []
        for row, column in (self.seen.weights.amax(0) > 0).nonzero().tolist():
            middle = [
                (at + 0.5) * side / count
                for at, side, count in zip((row, column), self.sides, weights.shape, strict=True)
            ]
            line = {
                "key": [row, column],
                "pixels": middle,
                "weight": weights[row, column].item(),
                "heads": self.seen.weights[:, row, column].tolist(),
            }
            found.append(line)
        return sorted(found, key=lambda line: -line["weight"])

    def to_dict(self) -> dict[str, Any]:
        """The layer, the query and all keys in JSON's types."""
        return {
            "layer": self.seen.layer,
            "query": self.seen.query,
            "query_grid": self.seen.query_grid,
            "key_grid": self.seen.weights.shape[1:],
            "head": self.head,
            "elsewhere": self.elsewhere,
            "keys": self.keys(),
        }

    def report(self) -> str:
        """What a user reads: the layer, its heaviest keys, what is off the map, the files."""
        seen, keys = self.seen, self.keys()
        which = "mean of the heads" if self.head is None else f"head {self.head}"
        rows, columns = seen.weights.shape[1:]
        lines = [
            f"{seen.layer}, query {seen.query} of {seen.query_grid}, {which}: "
            f"{len(keys)} of {rows} x {columns} keys, {100 * self.elsewhere:.1f} % off the map"
        ]
        for line in keys[:_LISTED]:
            (row, column), (y, x) = line["key"], line["pixels"]
            lines.append(f"  key {row},{column} at {y:.0f},{x:.0f}: {100 * line['weight']:.3g} %")
        if len(keys) > _LISTED:
            rest = sum(line["weight"] for line in keys[_LISTED:])
            lines.append(f"  {len(keys) - _LISTED} others: {100 * rest:.3g} %")
        lines.append(f"-> {self.picture}, {self.facts}")
        return "\n".join(lines)


def look(
    path: str,
    given: str,
    values: Sequence[str] = (),
    *,
    query: tuple[int, int] | None = None,
    layer: str | None = None,
    head: int | None = None,
    output: Path = Path("look.png"),
) -> Look:
    """Draw what a query sees, with a scale, and write every key's weight beside it.

    Args:
        path: the image.
        given: a run, a weights file or a model's name.
        values: recipe values.
        query: y and x in pixels of the image as the model gets it; its middle if None.
        layer: see `find_layer`.
        head: one head; the mean of all if None.
        output: the picture; the JSON file has its name and `.json`.

    Raises:
        InputError: unknown layer or head, a query beside the image, a file that is no picture's,
            or see `open_source`.
    """
    from vitzoo.tasks.pictures import check_drawable, open_image

    check_drawable(output)
    task = opened(given, values)
    picture, x = as_seen(task, open_image(path, where=path, mode="RGB"))
    seen = keys_in_image(body_of(task), x, query=query, layer=layer)
    if head is not None and not 0 <= head < len(seen.weights):
        raise InputError(f"{seen.layer} has heads 0 to {len(seen.weights) - 1}, not {head}")
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_keys(enlarged(picture), seen, head=head)
    with_scale(drawn, weights_of(seen, head).max().item()).save(output)
    found = Look(seen, head, (x.shape[-2], x.shape[-1]), output, output.with_suffix(".json"))
    facts = {"model": given, "image": path} | found.to_dict()
    write_atomically(found.facts, (json.dumps(facts, indent=1) + "\n").encode())
    return found


def keys_in_image(
    model: nn.Module, x: Tensor, *, query: tuple[int, int] | None = None, layer: str | None = None
) -> Seen:
    """The keys of one query in an image.

    Args:
        model: in eval mode on the CPU.
        x: (1, C, H, W), prepared.
        query: y and x in pixels of `x`; its middle if None.
        layer: see `find_layer`.

    Raises:
        InputError: unknown layer, or a query beside the image.
    """
    height, width = x.shape[-2:]
    with record_layers(model, (height, width)) as layers, torch.no_grad():
        model(x)
    chosen = find_layer(layers, layer)
    row, column = query or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise InputError(f"query {row},{column} is not on the image, {height} x {width}")
    rows, columns = chosen.query_grid
    return keys_of_query(chosen, (row * rows // height, column * columns // width))


def as_seen(task: Any, image: Image.Image) -> tuple[Image.Image, Tensor]:
    """An image as a task's backbone gets it: a picture, and the tensor (1, C, H, W)."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    if hasattr(task, "transform"):
        x = task.transform()(image)[None]
        config = task.data_config()
        mean, std = config["mean"], config["std"]
    elif hasattr(task, "preparation"):
        prepare = task.preparation()
        x, mean, std = prepare(image)[None], prepare.mean, prepare.std
    else:
        prepare = task.model.transform
        x = prepare([pil_to_tensor(image).float() / 255])[0].tensors
        mean, std = prepare.image_mean, prepare.image_std
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return to_pil_image((x[0] * std + mean).clamp(0, 1)), x


def body_of(task: Any) -> nn.Module:
    """What of a task's model takes the tensor of `as_seen`: of a detector its backbone."""
    body: nn.Module = task.model.backbone if hasattr(task.model, "transform") else task.model
    return body


def opened(given: str, values: Sequence[str]) -> Any:
    """A task on images with its model on the CPU.

    Raises:
        InputError: a model of points, or see `open_source`.
    """
    source = open_source(given, values)
    name = source.recipe.options.model.name
    if source.recipe.task == "detection3d" or _reads_points(name):
        raise InputError(f"{name} reads LiDAR points: look takes a model of images")
    return ready(source, torch.device("cpu"))


def _reads_points(name: str) -> bool:
    try:
        return info(name).modality == "points"
    except ValueError:
        return False  # one of timm's own
