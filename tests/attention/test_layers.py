"""The shared layers: what they compute however they cut the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitzoo.attention import layers
from vitzoo.attention.layers import Mlp


@pytest.mark.parametrize("most", [1, 2 * 12 * 32 * 4, 2**30])
def test_an_mlp_in_parts_equals_the_whole(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    mlp, x = Mlp(8, 32).eval(), torch.randn(5, 3, 4, 8)
    expected = F.linear(
        F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias
    )
    monkeypatch.setattr(layers, "CACHED_BYTES", most)
    torch.testing.assert_close(mlp(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fc1", "act", "fc2"])
def test_a_hook_of_an_mlp_sees_all_images_at_once(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mlp, seen = Mlp(8, 32).eval(), []
    mlp.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    monkeypatch.setattr(layers, "CACHED_BYTES", 1)
    with torch.inference_mode():
        out = mlp(torch.randn(5, 3, 8))
    assert [len(s) for s in seen] == [5]
    assert out.shape == (5, 3, 8)


def test_another_layer_in_an_mlp_is_called() -> None:
    mlp, x = Mlp(8, 32).eval(), torch.randn(5, 3, 8)
    mlp.act = nn.ReLU()
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), mlp.fc2(mlp.fc1(x).relu()))
