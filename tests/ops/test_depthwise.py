"""The fused depthwise convolution and GELU against the two steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.ops import depthwise_gelu
from vitzoo.ops.depthwise import DEPTHWISE_GELU


def tensors(H: int, W: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, H, W, 24), (24, 1, 3, 3), (24,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (13, 30)])
def test_backends_agree(size: tuple[int, int], with_bias: bool) -> None:
    x, weight, bias = tensors(*size)
    given = x, weight, bias if with_bias else None
    conv = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=with_bias)
    conv.load_state_dict({"weight": weight} | ({"bias": bias} if with_bias else {}))
    expected = F.gelu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    for backend in ("reference", "onednn"):
        if DEPTHWISE_GELU.why_not(backend, *given) is None:
            out = depthwise_gelu(*given, backend=backend)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)


def test_the_fused_form_is_for_inference_in_float32() -> None:
    x, weight, bias = tensors(7, 9)
    half = [t.bfloat16() for t in (x, weight, bias)]
    assert "float32" in (DEPTHWISE_GELU.why_not("onednn", *half) or "")
    weight.requires_grad_()
    assert "backward" in (DEPTHWISE_GELU.why_not("onednn", x, weight, bias) or "")
    depthwise_gelu(x, weight, bias).sum().backward()
    assert weight.grad is not None
