"""When a step on the CPU may be computed in another way: by oneDNN, in parts, put together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a step on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_derivatives() -> bool:
    """Whether every step must be an operator of torch, with all of its derivatives and batching.

    In eager mode under function transforms and forward-mode derivatives. A step of our own has a
    first derivative in reverse mode only, and torch would not say so: a forward-mode tangent that
    it does not know counts as zero.
    """
    return not torch.compiler.is_compiling() and _transformed()


def _transformed() -> bool:
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def contiguous_bias(bias: Tensor | None) -> Tensor | None:
    """A bias as oneDNN's operators need it: they read memory from its first number on."""
    return None if bias is None else bias.contiguous()


def why_not_apart(*tensors: Tensor | None) -> str | None:
    """Why a step on the CPU must not be taken apart or put together otherwise, or None."""
    # Asked before most steps, whose products have emptied the caches: few calls, no generators.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "A traced graph keeps torch's own operators."
    for t in tensors:
        if t is None:
            continue
        if not t.is_cpu:
            return "This is for the CPU only."
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            return "It takes plain tensors, no subclasses."
    if _get_current_dispatch_mode() is not None:
        return "A dispatch mode (fake tensors, counters) should see torch's own operators."
    if _transformed():
        return "Function transforms and forward-mode derivatives need torch's own operators."
    return None


def why_not_onednn(*tensors: Tensor | None) -> str | None:
    """Why oneDNN's own operators must not stand for torch's here, or None."""
    reason = why_not_apart(*tensors)
    if reason is not None:
        return reason
    for t in tensors:
        if t is not None and t.dtype is not torch.float32:
            return "It is for float32; torch sends other dtypes to oneDNN by itself."
    if torch.is_autocast_enabled("cpu"):
        return "Autocast chooses the dtype of torch's own operators."
    if not (_HAS_ONEDNN and torch.backends.mkldnn.enabled):
        return "This torch has no oneDNN, or it is switched off."
    return None
