"""What a query is shown to see, against each operator's definition written out key by key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import vitzoo  # noqa: F401  (registers the names)
from vitzoo.attention.seen import Layer, keys_of_queries, keys_of_query, on_map, record_layers
from vitzoo.backbones.flatformer import flatten_windows

SIDES = (64, 96)
# (row, column) of a key or None for one that is not on the map -> its logit of each head.
Logits = Iterator[tuple[tuple[int, int] | None, Tensor]]


def _window(layer: Layer, y: int, x: int) -> Logits:
    (q, k, _), size = layer.args, layer.kwargs["window_size"]
    rows, columns = layer.key_grid
    query, scale = q[0, y, x], layer.kwargs.get("scale") or q.shape[-1] ** -0.5
    for ky in range(y // size * size, y // size * size + size):
        for kx in range(x // size * size, x // size * size + size):
            if ky < rows and kx < columns:
                yield (ky, kx), scale * (query * k[0, ky, kx]).sum(-1)
            else:
                yield None, scale * (query * layer.kwargs["fill"][0]).sum(-1)


def _halo(layer: Layer, y: int, x: int) -> Logits:
    (q, k, _), block, halo = layer.args, layer.kwargs["block_size"], layer.kwargs["halo_size"]
    step, query = layer.kwargs["stride"], q[0, y, x]
    per_block, window = block // step, block + 2 * halo
    height, width = layer.kwargs["axial_bias"]
    y0, x0 = y // per_block * block - halo, x // per_block * block - halo
    rows, columns = k.shape[1:3]
    for jy in range(window):
        for jx in range(window):
            ky, kx = y0 + jy, x0 + jx
            relative = height[window - 1 + jy - y % per_block]
            relative = relative + width[window - 1 + jx - x % per_block]
            logit = (query * relative).sum(-1)
            if 0 <= ky < rows and 0 <= kx < columns:
                on_map = ky < layer.key_grid[0] and kx < layer.key_grid[1]
                content = q.shape[-1] ** -0.5 * (query * k[0, ky, kx]).sum(-1)
                yield (ky, kx) if on_map else None, logit + content
            elif layer.kwargs["border"] == "zero":
                near = -halo <= ky < rows + halo and -halo <= kx < columns + halo
                if near:
                    yield None, logit


def _neighbors(position: int, length: int, kernel: int, dilation: int) -> list[int]:
    """The kernel members of the position's class nearest to it; ties go down."""
    members = range(position % dilation, length, dilation)
    first = min(max(position // dilation - kernel // 2, 0), len(members) - kernel)
    return list(members[first : first + kernel])


def _neighborhood(layer: Layer, y: int, x: int) -> Logits:
    q, k, _ = layer.args
    (kernel, _), (dilation, _) = layer.kwargs["kernel_size"], layer.kwargs["dilation"]
    for ky in _neighbors(y, k.shape[1], kernel, dilation):
        for kx in _neighbors(x, k.shape[2], kernel, dilation):
            logit = q.shape[-1] ** -0.5 * (q[0, y, x] * k[0, ky, kx]).sum(-1)
            row, column = (ky - y) // dilation + kernel - 1, (kx - x) // dilation + kernel - 1
            on_map = ky < layer.key_grid[0] and kx < layer.key_grid[1]
            yield (ky, kx) if on_map else None, logit + layer.kwargs["bias"][:, row, column]


def _routed(layer: Layer, y: int, x: int) -> Logits:
    q, k, _, regions = layer.args
    rows, columns = layer.kwargs["region_grid"]
    height, width = k.shape[1] // rows, k.shape[2] // columns
    for region in regions[0, y // height * columns + x // width].tolist():
        for ky in range(region // columns * height, (region // columns + 1) * height):
            for kx in range(region % columns * width, (region % columns + 1) * width):
                on_map = ky < layer.key_grid[0] and kx < layer.key_grid[1]
                logit = layer.kwargs["scale"] * (q[0, y, x] * k[0, ky, kx]).sum(-1)
                yield (ky, kx) if on_map else None, logit


def _sequence(layer: Layer, y: int, x: int) -> Logits:
    q, k, _ = layer.args
    at = layer.prefix + y * layer.query_grid[1] + x
    mask, scale = layer.kwargs.get("mask"), layer.kwargs.get("scale") or q.shape[-1] ** -0.5
    for j in range(k.shape[1]):
        logit = scale * (q[0, at] * k[0, j]).sum(-1)
        if mask is not None:
            logit = logit.masked_fill(~mask[0, :, at, j], float("-inf"))
        place = divmod(j - layer.prefix, layer.key_grid[1]) if j >= layer.prefix else None
        yield place, logit


def _lookup(layer: Layer, y: int, x: int) -> Logits:
    gather, similarity = layer.operator.name == "lookup_gather", layer.args[0][0]
    at = y * layer.query_grid[1] + x
    logits = similarity[:, at] if gather else similarity[:, :, at]
    for j in range(logits.shape[1]):
        yield divmod(j, layer.key_grid[1]), logits[:, j]


DEFINITIONS: dict[str, Callable[[Layer, int, int], Logits]] = {
    "window_attention": _window,
    "halo_attention": _halo,
    "neighborhood_attention": _neighborhood,
    "routed_attention": _routed,
    "attention": _sequence,
    "lookup_gather": _lookup,
    "lookup_infuse": _lookup,
}

FOUR = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "vz_davit_tiny": (FOUR, {"window_attention"}),
    "vz_litv2_small": (FOUR, {"window_attention", "attention"}),
    "vz_biformer_tiny": ({}, {"routed_attention", "attention"}),
    "vz_halonet26t": ({}, {"halo_attention"}),
    "vz_uhalonet_micro": ({"depths": (1, 1, 1, 1)}, {"halo_attention"}),
    "vz_nat_mini": (FOUR, {"neighborhood_attention"}),
    "vz_dinat_mini": ({**FOUR, "dilations": ((2,), (1,), (1,), (1,))}, {"neighborhood_attention"}),
    "vz_sparsifiner_deit_tiny": ({"depth": 2}, {"attention"}),
    "vz_lookupvit_small": ({"depth": 1}, {"lookup_gather", "attention", "lookup_infuse"}),
}


def _layers(name: str) -> list[Layer]:
    torch.manual_seed(0)
    model = timm.create_model(name, **CASES[name][0]).eval()
    for parameter in model.parameters():
        # Fresh tables and scales are near zero: without this all weights would be alike.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    with record_layers(model, SIDES) as layers, torch.no_grad():
        model(torch.randn(1, 3, *SIDES))
    return layers


@pytest.mark.parametrize("name", CASES)
def test_keys_shown_are_the_operators_definition(name: str) -> None:
    layers = _layers(name)
    assert {layer.operator.name for layer in layers} == CASES[name][1]
    for layer in layers:
        rows, columns = layer.query_grid
        queries = sorted({(0, 0), (rows // 2, columns // 2), (rows - 1, columns - 1)})
        for seen in keys_of_queries(layer, queries):
            places, logits = zip(*DEFINITIONS[layer.operator.name](layer, *seen.query), strict=True)
            weights = torch.stack(logits).softmax(0)
            expected = torch.zeros_like(seen.weights)
            for place, weight in zip(places, weights, strict=True):
                if place is not None:
                    expected[:, place[0], place[1]] += weight
            assert torch.equal(seen.weights > 0, expected > 0), (layer.name, seen.query)
            torch.testing.assert_close(seen.weights, expected, rtol=1e-4, atol=1e-6)
            assert math.isclose(
                (seen.elsewhere.sum() + seen.weights.sum()).item(), len(expected), rel_tol=1e-5
            )


def _order(cells: list[tuple[int, int]], window: int, *, by_rows: bool, shift: int) -> list[int]:
    """Points in FlatFormer's order: window after window, to and fro (paper, section 3.2)."""

    def to_and_fro(place: int, length: int, turn: int) -> int:
        return place if turn % 2 == 0 else length - 1 - place

    def key(i: int) -> tuple[int, ...]:
        across, down = (at + shift for at in (cells[i] if by_rows else cells[i][::-1]))
        row, inside = divmod(across, window)
        column, along = divmod(down, window)
        # An even length that all windows fit in; only its parity shows, and it never does.
        snake = to_and_fro(column, 1000, row)
        first = to_and_fro(along, window, row)
        return (row, snake, first, to_and_fro(inside, window, row + along))

    return sorted(range(len(cells)), key=key)


def test_points_shown_are_those_of_the_group() -> None:
    torch.manual_seed(0)
    grid, window, group = (14, 17), 4, 9
    model = timm.create_model(
        "vz_flatformer",
        in_chans=16,
        grid_size=grid,
        depth=1,
        num_heads=2,
        window_size=window,
        group_size=group,
    ).eval()
    flat = torch.randperm(grid[0] * grid[1])[:40]
    cells = torch.stack([flat // grid[1], flat % grid[1]], 1)
    coords = torch.nn.functional.pad(cells, (1, 0))
    with record_layers(model, grid) as layers, torch.no_grad():
        model(torch.randn(40, 16), coords, 1)
    assert [layer.operator.name for layer in layers] == ["grouped_attention"] * 4
    orders = flatten_windows(coords, grid, window)
    kinds = [(by_rows, shift) for by_rows in (True, False) for shift in (0, window // 2)]
    for layer, order, (by_rows, shift) in zip(layers, orders, kinds, strict=True):
        own = _order(cells.tolist(), window, by_rows=by_rows, shift=shift)
        q, k, _ = layer.args
        for at in (0, 20, 39):
            seen = on_map(keys_of_query(layer, (0, at)), cells[order], grid)
            assert seen.query == tuple(cells[own[at]].tolist())
            first = at // group * group
            last = min(first + group, 40)
            keys = range(last - group, last)
            weights = (q.shape[-1] ** -0.5 * (q[at] * k[keys]).sum(-1)).softmax(0)
            expected = torch.zeros(2, *grid)
            for j, weight in zip(keys, weights, strict=True):
                expected[:, *cells[own[j]]] = weight
            torch.testing.assert_close(seen.weights, expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(seen.weights > 0, expected > 0)


def test_a_query_beside_the_map_is_refused() -> None:
    layer = _layers("vz_davit_tiny")[0]
    with pytest.raises(ValueError, match=r"\(16, 0\) is not on the \(16, 24\) grid"):
        keys_of_query(layer, (16, 0))
