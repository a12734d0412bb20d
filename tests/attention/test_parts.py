"""Layers that see a few images at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitzoo.attention import parts
from vitzoo.attention.choices import record_choices
from vitzoo.attention.parts import PartedSequential


class Watched(nn.Module):
    """Doubles its input and remembers the batch sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        return 2 * x


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> PartedSequential:
    """Two layers; a part holds two images of `images`."""
    monkeypatch.setattr(parts, "_PART_BYTES", 2 * 4 * 6)
    return PartedSequential(Watched(), nn.Linear(6, 3)).eval()


def images() -> Tensor:
    return torch.arange(30.0).view(5, 6)


def test_inference_passes_in_parts(layers: PartedSequential) -> None:
    with torch.no_grad():
        out = layers(images())
    assert layers[0].seen == [2, 2, 1]
    torch.testing.assert_close(out, layers[1](2 * images()))


def test_a_small_batch_stays_whole(layers: PartedSequential) -> None:
    with torch.no_grad():
        layers(images()[:2])
    assert layers[0].seen == [2]


@pytest.mark.parametrize("why", ["gradients", "training", "hook", "choices", "empty"])
def test_whole_where_somebody_expects_one_call(layers: PartedSequential, why: str) -> None:
    x = images()[:0] if why == "empty" else images()
    layers.train(why == "training")
    if why == "hook":
        layers[1].register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(why == "gradients"):
        if why == "choices":
            with record_choices():
                layers(x)
        else:
            layers(x)
    assert layers[0].seen == [x.shape[0]]
