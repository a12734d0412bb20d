"""The linear map, so that a faster product than the BLAS library's can take its place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator

LINEAR = Operator("linear", [Backend("reference", F.linear)])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """x @ weight^T + bias.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        backend: `auto` or `reference`.

    Returns:
        (..., out_features).
    """
    return LINEAR(x, weight, bias, backend=backend)
