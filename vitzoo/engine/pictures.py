"""A picture per family of which keys one query sees, as SVG, from the models themselves."""

from __future__ import annotations

from collections.abc import Iterable

import timm
import torch
from torch import Tensor

from vitzoo.attention.seen import keys_of_query, record_layers

# Family -> the models that are looked at; weights are random, so only reach is drawn.
MODELS = {
    "davit": ("vz_davit_tiny",),
    "litv2": ("vz_litv2_small",),
    "biformer": ("vz_biformer_tiny",),
    "halonet": ("vz_halonet26t",),
    "uhalonet": ("vz_uhalonet_micro",),
    "nat": ("vz_nat_mini", "vz_dinat_mini"),
    "sparsifiner": ("vz_sparsifiner_deit_tiny",),
    "lookupvit": ("vz_lookupvit_small",),
    "flatformer": ("vz_flatformer",),
}
_PANELS = 4
_SIDE = 168
_GAP = 16


def picture(family: str) -> str:
    """The family's picture as SVG text.

    One panel for each attention that reaches differently, in the order of the network: the query is
    outlined, a key is the darker the more heads see it.
    """
    panels: list[tuple[str, Tensor, tuple[int, int, int, int]]] = []
    for name in MODELS[family]:
        panels.extend(_grouped(name) if family == "flatformer" else _on_image(name))
    return _svg(panels)


def _on_image(name: str) -> Iterable[tuple[str, Tensor, tuple[int, int, int, int]]]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    sides = model.default_cfg["input_size"][1:]
    x = torch.randn(1, 3, *sides)
    with record_layers(model, tuple(sides)) as layers, torch.no_grad():
        model(x)
    known: set[tuple[object, ...]] = set()
    for layer in layers:
        rows, columns = layer.query_grid
        query = (rows * 3 // 8, columns * 3 // 8)
        seen = keys_of_query(layer, query)
        share = (seen.weights.abs() > 1e-9).float().mean(0)
        kind = (layer.operator.name, layer.query_grid, layer.key_grid, int(share.sum()))
        if kind in known or len(known) == _PANELS:
            continue
        known.add(kind)
        operator = layer.operator.name.replace("_", " ")
        title = f"{name}: {operator}, {rows}x{columns}"
        yield title, share, (*query, rows, columns)


def _grouped(name: str) -> Iterable[tuple[str, Tensor, tuple[int, int, int, int]]]:
    """FlatFormer's pillars have no map: the members of one pillar's group, in two flattenings."""
    from vitzoo.backbones.flatformer import flatten_windows

    grid, window, group = (52, 52), 13, 144
    torch.manual_seed(0)
    cells = torch.randperm(grid[0] * grid[1])[:900].sort().values
    coords = torch.stack([torch.zeros_like(cells), cells // grid[1], cells % grid[1]], dim=1)
    query = 200
    orders = flatten_windows(coords, grid, window)
    for title, order in zip(
        ("by x", "by x, shifted", "by y", "by y, shifted"), orders, strict=True
    ):
        at = int((order == query).nonzero())
        first = min(at // group * group, len(order) - group)
        share = torch.zeros(grid)
        share[coords[:, 1], coords[:, 2]] = 0.12
        members = coords[order[first : first + group]]
        share[members[:, 1], members[:, 2]] = 1.0
        y, x = coords[query, 1:].tolist()
        yield f"{name}: group of {group}, sorted {title}", share, (y, x, *grid)


def _svg(panels: list[tuple[str, Tensor, tuple[int, int, int, int]]]) -> str:
    columns = min(len(panels), _PANELS)
    rows = -(-len(panels) // columns)
    width, height = columns * (_SIDE + _GAP) + _GAP, rows * (_SIDE + 44) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="9">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for i, (title, share, query) in enumerate(panels):
        left = _GAP + i % columns * (_SIDE + _GAP)
        top = _GAP + i // columns * (_SIDE + 44)
        parts.append(f'<g transform="translate({left} {top})">')
        parts.append(f'<rect width="{_SIDE}" height="{_SIDE}" fill="#eeeeee"/>')
        parts.extend(_cells(share))
        y, x, query_rows, query_columns = query
        cell_w, cell_h = _SIDE / query_columns, _SIDE / query_rows
        parts.append(
            f'<rect x="{x * cell_w:.2f}" y="{y * cell_h:.2f}" width="{cell_w:.2f}" '
            f'height="{cell_h:.2f}" fill="none" stroke="#0b3d91" stroke-width="1.5"/>'
        )
        name, _, rest = title.partition(": ")
        parts.append(f'<text x="0" y="{_SIDE + 12}">{name}</text>')
        parts.append(f'<text x="0" y="{_SIDE + 24}">{rest}</text></g>')
    return "\n".join([*parts, "</svg>", ""])


def _cells(share: Tensor) -> Iterable[str]:
    """Seen keys as one path a shade; neighbours of one shade in a row are one rectangle."""
    height, width = _SIDE / share.shape[0], _SIDE / share.shape[1]
    paths: dict[float, list[str]] = {}
    for row, values in enumerate(share.tolist()):
        start = 0
        for column in range(1, len(values) + 1):
            if column < len(values) and values[column] == values[start]:
                continue
            if values[start] > 0:
                wide = (column - start) * width
                corner = f"M{start * width:.6g} {row * height:.6g}"
                paths.setdefault(values[start], []).append(
                    f"{corner}h{wide:.6g}v{height:.6g}h{-wide:.6g}z"
                )
            start = column
    for value, pieces in sorted(paths.items()):
        opacity = f"{0.15 + 0.75 * value:.2f}"
        yield f'<path d="{"".join(pieces)}" fill="#d62728" fill-opacity="{opacity}"/>'
