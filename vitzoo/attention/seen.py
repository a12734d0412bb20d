"""Which keys a query attends to and how much, for every attention of the zoo alike.

The output of an attention is linear in its values, so the gradient of the output at one query by
the values is the weight of every key: whatever an operator masks, routes, pads or drops shows, and
no family's weights are described a second time. What is told apart is on which grids the queries
and keys of an operator lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.attention.halo import HaloAttention
from vitzoo.ops._dispatch import Operator, listen

Grid = tuple[int, int]

# Operators over tokens -> where their values stand among the arguments.
VALUES = {
    "attention": 2,
    "window_attention": 2,
    "halo_attention": 2,
    "neighborhood_attention": 2,
    "routed_attention": 2,
    "grouped_attention": 2,
    "lookup_gather": 1,
    "lookup_infuse": 1,
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of an operator in a forward pass.

    Attributes:
        name: the module that called, and the operator.
        operator: the operator.
        args, kwargs: of the call.
        out: its result, (B, ..., heads, head_dim).
        query_grid, key_grid: rows and columns of tokens on either side, without padding; points are
            one row, in the order in which the layer has them.
        prefix: tokens ahead of the grid (the class token).
    """

    name: str
    operator: Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    query_grid: Grid
    key_grid: Grid
    prefix: int


@dataclass(frozen=True, eq=False)
class Seen:
    """What one query sees.

    Attributes:
        layer: name of the layer.
        query: its row and column among the queries.
        query_grid: rows and columns of queries.
        weights: (heads, rows, columns) of the keys.
        elsewhere: (heads,), weight on what is not on the map: class token, padding, border.
    """

    layer: str
    query: Grid
    query_grid: Grid
    weights: Tensor
    elsewhere: Tensor

    def __post_init__(self) -> None:
        if not all(0 <= at < side for at, side in zip(self.query, self.query_grid, strict=True)):
            raise ValueError(f"query {self.query} is not on the {self.query_grid} grid")


@contextmanager
def record_layers(model: nn.Module, sides: Grid) -> Iterator[list[Layer]]:
    """Collect the attention over tokens of a forward pass inside the block, in order.

    Args:
        model: any model of the zoo.
        sides: height and width of the image in pixels, from which the grid of a sequence follows.
    """
    layers: list[Layer] = []
    running: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append((names[module], module, args))

    def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        running.pop()

    def heard(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor):  # type: ignore[no-untyped-def]
        if operator.name not in VALUES:
            return
        name, module, inputs = running[-1]
        found = _grids(operator.name, args, module, inputs, sides)
        if found is not None:
            title = f"{name}/{operator.name}"
            layers.append(Layer(title, operator, args, kwargs, out, *found))

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        with listen(heard):
            yield layers
    finally:
        for handle in handles:
            handle.remove()


def _grids(
    operator: str, args: tuple[Any, ...], module: nn.Module, inputs: tuple[Any, ...], sides: Grid
) -> tuple[Grid, Grid, int] | None:
    """Grids of queries and of keys and the prefix; None where tokens lie on no grid."""
    if operator == "grouped_attention":
        points = (1, args[0].shape[0])
        return points, points, 0
    first = inputs[0]
    on_map = first.dim() == 4 and not isinstance(module, HaloAttention)
    own = (first.shape[1], first.shape[2]) if on_map else None
    if operator.startswith("lookup"):
        compressed = _compressed(args[0].shape[2], own) if own else None
        if own is None or compressed is None:
            return None
        return (compressed, own, 0) if operator == "lookup_gather" else (own, compressed, 0)
    q, k = args[0], args[1]
    if q.dim() == 5:
        stride = max(1, round(k.shape[1] / q.shape[1]))
        keys = own or (k.shape[1], k.shape[2])
        if operator == "routed_attention" and k.shape != q.shape:
            keys = (k.shape[1], k.shape[2])  # pooled: no padding to leave out
        queries = own or (-(-keys[0] // stride), -(-keys[1] // stride))
        return queries, keys, 0
    found = (own, 0) if own else _grid(q.shape[1], sides)
    if found is None or found[0] is None:
        return None
    queries, prefix = found
    if k.shape[1] == q.shape[1]:
        return queries, queries, prefix
    pooled = _grid(k.shape[1], queries)
    return None if pooled is None else (queries, pooled[0], pooled[1])


def _grid(tokens: int, sides: Grid) -> tuple[Grid, int] | None:
    """Rows and columns of so many tokens over an image, and how many tokens come first."""
    for prefix in (0, 1):
        for step in range(1, max(sides) + 1):
            rows, columns = (-(-side // step) for side in sides)
            if rows * columns == tokens - prefix:
                return (rows, columns), prefix
    found = _compressed(tokens, (tokens, tokens))
    return None if found is None else (found, 0)


def _compressed(tokens: int, grid: Grid) -> Grid | None:
    """The grid of LookupViT's compressed tokens: a square, cut where the map is smaller."""
    for side in range(1, max(grid) + 1):
        rows, columns = (min(side, length) for length in grid)
        if rows * columns == tokens:
            return rows, columns
    return None


def keys_of_query(layer: Layer, query: Grid) -> Seen:
    """The weights of all keys for one query of the first image.

    Args:
        layer: from `record_layers`.
        query: row and column among the layer's queries.

    Raises:
        ValueError: the query is not on the layer's grid.
    """
    (seen,) = keys_of_queries(layer, [query])
    return seen


def keys_of_queries(layer: Layer, queries: list[Grid]) -> list[Seen]:
    """The same for several queries, from one pass of the operator."""
    at = VALUES[layer.operator.name]
    values = torch.ones_like(layer.args[at][..., :1]).detach().requires_grad_()
    args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in layer.args]
    args[at] = values
    kwargs = dict(layer.kwargs)
    if kwargs.get("fill") is not None:
        k_fill, v_fill = kwargs["fill"]
        kwargs["fill"] = (k_fill.detach(), torch.zeros_like(v_fill[..., :1]))
    with torch.enable_grad():
        out = layer.operator(*args, **kwargs)
    found = []
    for row, column in queries:
        inside = row < layer.query_grid[0] and column < layer.query_grid[1]
        if not inside or min(row, column) < 0:
            raise ValueError(f"query {(row, column)} is not on the {layer.query_grid} grid")
        place: tuple[int, ...] = (0, row, column)
        if out.dim() == 4:
            place = (0, layer.prefix + row * layer.query_grid[1] + column)
        elif out.dim() == 3:
            place = (column,)
        with torch.enable_grad():
            one = out[place].sum()
        (gradient,) = torch.autograd.grad(one, values, retain_graph=True)
        gradient = gradient[..., 0] if out.dim() == 3 else gradient[0, ..., 0]
        weights, elsewhere = _on_grid(gradient, layer)
        found.append(Seen(layer.name, (row, column), layer.query_grid, weights, elsewhere))
    return found


def on_map(seen: Seen, cells: Tensor, grid: Grid) -> Seen:
    """What a point sees, from the order of its layer to the map that the points lie on.

    Args:
        seen: of a layer over points.
        cells: (P, 2), row and column of each point in the layer's order.
        grid: rows and columns of the map.
    """
    rows, columns = cells.long().unbind(1)
    weights = seen.weights.new_zeros(len(seen.weights), *grid)
    weights[:, rows, columns] = seen.weights[:, 0]
    row, column = cells[seen.query[1]].tolist()
    return replace(seen, query=(row, column), query_grid=grid, weights=weights)


def _on_grid(weights: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """(..., heads) -> (heads, rows, columns), and what of each head's weight lies elsewhere."""
    rows, columns = layer.key_grid
    if weights.dim() == 2:
        weights = weights[layer.prefix :].unflatten(0, (rows, columns))
    weights = weights[:rows, :columns].permute(2, 0, 1)
    return weights, 1 - weights.sum((1, 2))
