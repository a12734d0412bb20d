"""Inputs in poisoned surroundings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def surrounded(x: Tensor) -> Tensor:
    """The same numbers as a strided view with NaN on all sides, in every axis but the last two."""
    pads = (1, 3, 1, 1, *(1,) * (2 * (x.dim() - 2)))
    inside = tuple(slice(1, 1 + n) for n in x.shape)
    return F.pad(x, pads, value=float("nan"))[inside]


def assert_half_precision_agrees(results: dict[str, list[Tensor]], exact: list[Tensor]) -> None:
    """Errors against float32 are at most twice those of the reference in half precision."""
    for found, plain, wanted in zip(results["triton"], results["reference"], exact, strict=True):
        error, usual = ((x.float() - wanted).abs().max().item() for x in (found, plain))
        assert error <= 2 * usual + torch.finfo(torch.float32).eps, (error, usual)
