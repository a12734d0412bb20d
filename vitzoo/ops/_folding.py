"""When operators and the linear layers around them may be computed as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitzoo.ops._dispatch import replaceable
from vitzoo.ops._onednn import records_gradient, why_not_onednn


def may_fold(operators: Sequence[str], *tensors: Tensor) -> bool:
    """Whether a layer's products may be put together in another order, for these tensors.

    In plain float32 inference on the CPU, where no backend is forced for one of the operators and
    nobody listens to them: counters, tracers and other dtypes keep the layers apart, as for oneDNN.
    """
    if why_not_onednn(*tensors) is not None or records_gradient(*tensors):
        return False
    return replaceable(*operators)
