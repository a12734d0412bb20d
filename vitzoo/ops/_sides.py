"""Sides of maps: numbers in eager mode, symbols under export and, varied, torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value


def symbolic(*sides: int) -> bool:
    """Whether a side is unknown under export: the graph must then not branch on it.

    False under torch.compile, which may branch on its symbols: see `unknown`.
    """
    return any(isinstance(side, torch.SymInt) for side in sides)


def unknown(*sides: int) -> bool:
    """Whether a side is unknown under export or torch.compile.

    A compiled graph may branch on it, but is then made anew for sizes that take the other branch.
    """
    if torch.compiler.is_dynamo_compiling():
        # To isinstance dynamo shows its symbols as integers.
        return not all(has_static_value(side) for side in sides)
    return symbolic(*sides)


def traced_by_export() -> bool:
    """Whether torch.export looks on.

    Not `is_exporting()`, which in torch 2.11 is also true under torch.compile.
    """
    return torch.compiler._is_exporting_flag


def exporting() -> bool:
    """Whether a graph is made, which must run where this package is not installed."""
    return traced_by_export() or torch.jit.is_tracing()


def larger(a: int, b: int) -> Any:
    """max(a, b), also of symbols."""
    return torch.sym_max(a, b) if symbolic(a, b) else max(a, b)


def smaller(a: int, b: int) -> Any:
    """min(a, b), also of symbols."""
    return torch.sym_min(a, b) if symbolic(a, b) else min(a, b)


def pieces(side: int, size: int) -> int:
    """How many pieces of `size` cover a side; the last may hang over."""
    # Not -(-side // size): symbolic sides of nested negatives take minutes to simplify, and ONNX
    # divides towards zero.
    return (side + size - 1) // size


def overhang(side: int, size: int) -> int:
    """What is missing from a side to the next multiple of `size`."""
    return pieces(side, size) * size - side


def copied_if_unknown(x: Tensor) -> Tensor:
    """x (B, ...), or a contiguous copy where a size other than the batch's is unknown.

    Whether a view is contiguous would otherwise decide which graph is made.
    """
    return x.clone(memory_format=torch.contiguous_format) if unknown(*x.shape[1:]) else x


def crop(x: Tensor, top: int, H: int, left: int, W: int) -> Tensor:
    """Rows top to top + H and columns left to left + W of x (B, H', W', ...)."""
    return copied_if_unknown(x[:, top : top + H, left : left + W])
