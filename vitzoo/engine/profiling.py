"""Every attention layer in figures: how far its heads look, how spread, how much they matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitzoo._paths import write_atomically
from vitzoo.attention.seen import Layer, keys_of_queries, record_layers
from vitzoo.engine.curves import draw_profile
from vitzoo.engine.look import as_seen, body_of, find_layer, opened
from vitzoo.errors import InputError

_QUERIES_PER_SIDE = 4


def profile(
    path: str, given: str, values: Sequence[str] = (), *, output: Path = Path("profile.json")
) -> list[dict[str, Any]]:
    """Attention distance, entropy and importance of every head: a JSON file and a plot beside it.

    Distance is the mean over 16 queries of sum(weight * distance) in pixels of the image; entropy
    that of the weights, in bits; importance is |sum(out * gradient of the best logit)| over a
    head's outputs (Michel et al., arXiv 1905.10650, section 2.3), as a share of its layer.

    Args:
        path: the image.
        given: a run, a weights file or a model's name.
        values: recipe values.
        output: the JSON file or the plot; the other has its name and `.png` or `.json`.

    Returns:
        A line for each layer: `layer`, `distance_pixels`, `entropy_bits`, and `importance` where
        the model has logits, each with a figure for each head.

    Raises:
        InputError: another ending, no attention over tokens, or see `open_source`.
    """
    from vitzoo.tasks.pictures import open_image

    if output.suffix not in (".json", ".png"):
        raise InputError(f"{output}: a profile's name ends in .json or .png")
    task = opened(given, values)
    model, x = body_of(task), as_seen(task, open_image(path, where=path, mode="RGB"))[1]
    sides = (x.shape[-2], x.shape[-1])
    with record_layers(model, sides) as layers, torch.enable_grad():
        logits = model(x.requires_grad_())
    find_layer(layers, None)
    outs = [layer.out for layer in layers]
    gradients: Sequence[Tensor | None] = [None] * len(outs)
    if isinstance(logits, Tensor):  # a detector's backbone gives maps, of which none is the best
        gradients = torch.autograd.grad(logits.amax(1).sum(), outs, allow_unused=True)
    pairs = zip(layers, gradients, strict=True)
    lines = [_line(layer, gradient, sides) for layer, gradient in pairs]
    facts = {"model": given, "image": path, "queries": _QUERIES_PER_SIDE**2, "layers": lines}
    write_atomically(output.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
    draw_profile(lines, output.with_suffix(".png"))
    return lines


def _line(layer: Layer, gradient: Tensor | None, sides: tuple[int, int]) -> dict[str, Any]:
    distance, entropy = _spread(layer, sides)
    line: dict[str, Any] = {
        "layer": layer.name,
        "distance_pixels": distance.tolist(),
        "entropy_bits": entropy.tolist(),
    }
    if gradient is not None:
        effect = (layer.out * gradient).sum(-1).flatten(0, -2).sum(0).abs()
        line["importance"] = (effect / effect.sum().clamp(min=1e-12)).tolist()
    return line


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
