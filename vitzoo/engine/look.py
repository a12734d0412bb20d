"""What a model looks at: one query's keys drawn on the image, and all layers in figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vitzoo._paths import write_atomically
from vitzoo.attention.seen import Layer, Seen, keys_of_queries, keys_of_query, record_layers
from vitzoo.errors import InputError

_FIRE = (214, 39, 40)
_QUERIES_PER_SIDE = 4


def draw_keys(image: Image.Image, seen: Seen, *, head: int | None = None) -> Image.Image:
    """The keys of a query on the image: unseen ones dark, seen ones red by their weight.

    Args:
        image: any size; it is what the keys' grid covers.
        seen: from `vitzoo.attention.seen.keys_of_query`.
        head: this head's weights; the mean over the heads if None.
    """
    weights = seen.weights.mean(0) if head is None else seen.weights[head]
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


def look(
    path: str,
    given: str,
    values: Sequence[str] = (),
    *,
    query: tuple[int, int] | None = None,
    layer: str | None = None,
    head: int | None = None,
    output: Path = Path("look.png"),
) -> Seen:
    """Draw what a query sees.

    Args:
        path: the image.
        given: a run, a weights file or a model's name.
        values: recipe values.
        query: y and x in pixels of the image as the model gets it; its middle if None.
        layer: see `find_layer`.
        head: one head; the mean of all if None.
        output: the picture.

    Raises:
        InputError: unknown layer or head, a query beside the image, or see `open_source`.
    """
    from vitzoo.tasks.pictures import open_image

    task = _opened(given, values)
    picture, x = as_seen(task, open_image(path, where=path, mode="RGB"))
    seen = keys_in_image(task.model, x, query=query, layer=layer)
    if head is not None and not 0 <= head < len(seen.weights):
        raise InputError(f"{seen.layer} has heads 0 to {len(seen.weights) - 1}, not {head}")
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_keys(picture, seen, head=head).save(output)
    return seen


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
    """An image as a classifier gets it: a picture, and the tensor (1, C, H, W)."""
    from torchvision.transforms.functional import to_pil_image

    x = task.transform()(image)[None]
    config = task.data_config()
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return to_pil_image((x[0] * std + mean).clamp(0, 1)), x


def _opened(given: str, values: Sequence[str]) -> Any:
    """A classification task with its model on the CPU."""
    from vitzoo.engine.predict import load

    task: Any = load(given, values, device=torch.device("cpu"))
    if not hasattr(task, "transform"):
        raise InputError(f"{given} does not take one image")
    return task


def profile(
    path: str, given: str, values: Sequence[str] = (), *, output: Path = Path("look.json")
) -> list[dict[str, Any]]:
    """Attention distance, entropy and importance of every head: a JSON file and a plot beside it.

    Distance is the mean over 16 queries of sum(weight * distance) in pixels of the image; entropy
    that of the weights, in bits; importance is |sum(out * gradient of the best logit)| over a
    head's outputs (Michel et al., arXiv 1905.10650, section 2.3), as a share of its layer.
    """
    from vitzoo.tasks.pictures import open_image

    task = _opened(given, values)
    model, x = task.model, as_seen(task, open_image(path, where=path, mode="RGB"))[1]
    sides = (x.shape[-2], x.shape[-1])
    with record_layers(model, sides) as layers, torch.enable_grad():
        logits = model(x.requires_grad_())
    find_layer(layers, None)
    outs = [layer.out for layer in layers]
    gradients = torch.autograd.grad(logits.amax(1).sum(), outs, allow_unused=True)
    lines = []
    for layer, gradient in zip(layers, gradients, strict=True):
        distance, entropy = _spread(layer, sides)
        line: dict[str, Any] = {
            "layer": layer.name,
            "distance_pixels": distance.tolist(),
            "entropy_bits": entropy.tolist(),
        }
        if gradient is not None:
            effect = (layer.out * gradient).sum(-1).flatten(0, -2).sum(0).abs()
            line["importance"] = (effect / effect.sum().clamp(min=1e-12)).tolist()
        lines.append(line)
    facts = {"model": given, "image": path, "queries": _QUERIES_PER_SIDE**2, "layers": lines}
    write_atomically(output, (json.dumps(facts, indent=2) + "\n").encode())
    _plot(lines, output.with_suffix(".png"))
    return lines


@torch.no_grad()
def _spread(layer: Layer, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean distance in pixels and mean entropy in bits over a grid of queries, per head."""
    rows, columns = layer.query_grid
    picks = [
        (int((i + 0.5) * rows / _QUERIES_PER_SIDE), int((j + 0.5) * columns / _QUERIES_PER_SIDE))
        for i in range(_QUERIES_PER_SIDE)
        for j in range(_QUERIES_PER_SIDE)
    ]
    distances, entropies = [], []
    for seen in keys_of_queries(layer, sorted(set(picks))):
        places = [
            (torch.arange(count) + 0.5) * side / count
            for count, side in zip(layer.key_grid, sides, strict=True)
        ]
        own = [
            (at + 0.5) * side / count
            for at, count, side in zip(seen.query, layer.query_grid, sides, strict=True)
        ]
        far = torch.hypot(places[0][:, None] - own[0], places[1][None] - own[1])
        inside = seen.weights.sum((1, 2)).clamp(min=1e-12)
        share = seen.weights / inside[:, None, None]
        distances.append((share * far).sum((1, 2)))
        entropies.append(-torch.xlogy(share, share).sum((1, 2)) / torch.log(torch.tensor(2.0)))
    return torch.stack(distances).mean(0), torch.stack(entropies).mean(0)


def _plot(lines: Sequence[dict[str, Any]], target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "distance_pixels": "mean distance, pixels",
        "entropy_bits": "entropy, bits",
        "importance": "share of importance",
    }
    for axes, (key, title) in zip(figure.subplots(3, 1, sharex=True), titles.items(), strict=True):
        for i, line in enumerate(lines):
            heads = line.get(key, [])
            axes.scatter([i] * len(heads), heads, s=12, alpha=0.6, color="tab:red")
        axes.set_ylabel(title)
    axes.set_xlabel("layer")
    figure.savefig(target, dpi=110)
