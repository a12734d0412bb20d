"""The linear map, so that a faster product than the BLAS library's can take its place.

On CPUs where the BLAS does not use the widest vectors, oneDNN computes a float32 linear layer up to
twice as fast. MKL does not on AMD's processors; elsewhere processor, threads and width decide, so
both are timed once a process, in a few milliseconds, when the first product of some size asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo._processor import mkl_on_amd
from vitzoo.ops._derived import Derived
from vitzoo.ops._dispatch import Backend, Operator, forced_backend
from vitzoo.ops._onednn import contiguous_bias, records_gradient, why_not_onednn

# A product of fewer multiply-adds is over before oneDNN has set itself up.
_WORTH_IT = 1 << 22
# Up to this many input features the BLAS is bound by memory and oneDNN's fused bias counts.
_NARROW = 96
# A bound near 1 would let a busy machine decide differently from process to process, and where the
# gain is small the BLAS keeps everybody's numbers.
_CLEAR_WIN = 1.5
_CLASSES = ("inference/narrow", "inference/wide", "training/narrow", "training/wide")

_choices: dict[str, str] | None = None
_packed: Derived[Tensor] = Derived()


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map as a 1x1 convolution over a channels-last view: oneDNN with autograd."""
    rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    bias = contiguous_bias(bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def _pack(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own order, if it can be kept."""
    if weight.is_inference():
        return weight
    return _packed.get(
        (weight,), lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    )


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's product: on packed weights in inference, as a convolution where autograd records."""
    if records_gradient(x, weight, bias):
        _packed.drop(weight)
        return _as_convolution(x, weight, bias)
    return _pointwise(x, _pack(weight), bias, "none")


def linear_gelu_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with the exact GELU applied while the product is still in the cache."""
    return _pointwise(x, _pack(weight), bias, "gelu")


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x @ weight^T + bias), exact, through `linear`."""
    out = LINEAR(x, weight, bias)
    if out.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.gelu(out)
    # In place: on the CPU a second map of this size would push the first out of the cache.
    return torch.ops.aten.gelu_(out)


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    # Compilers first: they would remember the questions for a map's size.
    reason = why_not_onednn(x, weight, bias)
    if reason is not None:
        return reason
    if x.numel() == 0 or weight.numel() == 0:
        return "There is nothing to multiply."
    if weight.dim() != 2 or x.shape[-1] != weight.shape[-1]:
        return "The shapes do not fit, which torch says in plainer words."
    if bias is not None and bias.shape != weight.shape[:1]:
        return "A bias that is broadcast is torch's to add."
    return None


def _gelu_why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    reason = _why_not(x, weight, bias)
    if reason is None and records_gradient(x, weight, bias):
        return "The fused GELU has no backward."
    return reason


def _auto_skip(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    if x.numel() * weight.shape[0] < _WORTH_IT:
        return "The product is too small to gain."
    phase = "training" if records_gradient(x, weight, bias) else "inference"
    width = "narrow" if x.shape[-1] <= _NARROW else "wide"
    if (_choices or linear_choices())[f"{phase}/{width}"] != "onednn":
        return "The BLAS is as fast on this machine."
    return None


def _gelu_auto_skip(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    forced = forced_backend("linear")
    if forced != "auto":
        return None if forced == "onednn" else "Another backend is forced for `linear`."
    return _auto_skip(x, weight, bias)


def linear_choices() -> dict[str, str]:
    """What `auto` takes in this process: class of product -> `onednn` or `reference`.

    The classes are `inference/narrow`, `inference/wide`, `training/narrow` and `training/wide`;
    narrow is up to 96 input features. The first call decides, by timing where the processor does
    not tell. A run that is to be repeated bit for bit stores this and gives it to
    `set_linear_choices`.
    """
    global _choices
    if _choices is None:
        _choices = _measure()
    return dict(_choices)


def set_linear_choices(choices: Mapping[str, str] | None) -> None:
    """Fix what `auto` takes, or with None let the next product decide by timing again.

    Raises:
        ValueError: a class is missing or unknown, or its value is no backend.
    """
    global _choices
    if choices is not None:
        wrong = set(choices) ^ set(_CLASSES) or set(choices.values()) - set(LINEAR.backends)
        if wrong:
            raise ValueError(
                f"linear choices: {', '.join(sorted(wrong))} missing or unknown; the classes are "
                f"{', '.join(_CLASSES)}, the values {', '.join(LINEAR.backends)}"
            )
        choices = dict(choices)
    _choices = choices


@lru_cache(maxsize=1)
def _blas_is_narrow() -> bool:
    """Whether torch's BLAS is MKL on an AMD processor with AVX-512: it uses half of that width."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and mkl_on_amd()


@torch.no_grad()
def _measure() -> dict[str, str]:
    if not torch.backends.mkldnn.is_available():
        return dict.fromkeys(_CLASSES, "reference")
    found = {}
    for width, (rows, dim, out) in {"narrow": (4096, 96, 288), "wide": (768, 256, 512)}.items():
        # Constants: the random state is the user's.
        # The user's default dtype and device may be others.
        x, weight, bias = (
            torch.ones(*shape, dtype=torch.float32, device="cpu")
            for shape in ((rows, dim), (out, dim), (out,))
        )
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        candidates: dict[str, Callable[[], Tensor]] = {
            "reference": lambda: F.linear(x, weight, bias),  # noqa: B023
            "inference": lambda: _pointwise(x, packed, bias, "none"),  # noqa: B023
            "training": lambda: _as_convolution(x, weight, bias),  # noqa: B023
        }
        if _blas_is_narrow():
            del candidates["inference"]
        best = dict.fromkeys(candidates, float("inf"))
        for _ in range(9):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
        for phase in ("inference", "training"):
            # What is known is not timed: from process to process that says 1.1 or 1.4.
            known = phase not in candidates
            wins = known or best["reference"] > _CLEAR_WIN * best[phase]
            found[f"{phase}/{width}"] = "onednn" if wins else "reference"
    return found


LINEAR = Operator(
    "linear",
    [
        Backend("onednn", linear_onednn, why_not=_why_not, auto_skip=_auto_skip),
        Backend("reference", F.linear),
    ],
)
LINEAR_GELU = Operator(
    "linear_gelu",
    [
        Backend("onednn", linear_gelu_onednn, why_not=_gelu_why_not, auto_skip=_gelu_auto_skip),
        Backend("reference", linear_gelu_reference),
    ],
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """x @ weight^T + bias.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        backend: `auto`, `onednn` (float32 on the CPU) or `reference`.

    Returns:
        (..., out_features).
    """
    return LINEAR(x, weight, bias, backend=backend)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """GELU(x @ weight^T + bias), exact; in inference one product where oneDNN is faster.

    A backend forced for `linear` holds here too: `reference` keeps `auto` from fusing.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        backend: `auto`, `onednn` (float32 on the CPU, no gradient) or `reference`.

    Returns:
        (..., out_features).
    """
    return LINEAR_GELU(x, weight, bias, backend=backend)
