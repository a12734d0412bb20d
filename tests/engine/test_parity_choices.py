"""A difference that a top-k choice explains, and differences that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from vitzoo.attention.choices import record_choices, replay_choices
from vitzoo.engine import parity_choices
from vitzoo.engine.parity import Parity
from vitzoo.engine.parity_choices import compare_but_for_choices
from vitzoo.engine.traced import Network

# A fresh network hardly listens to its attention.
BOUND = 5e-6


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    widths = {"embed_dims": (32, 64, 64, 64), "num_heads": (1, 2, 2, 2)}
    model = timm.create_model("vz_biformer_tiny", depths=(1, 1, 1, 1), num_classes=5, **widths)
    return Network(model.eval(), (3, 112, 112), {}, ("logits",))


@torch.no_grad()
def otherwise(network: Network, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and choices that differ from the model's in the first image."""
    with record_choices() as made:
        network.model(x)
    for choice in made:
        choice[0] = choice[0].roll(1, dims=-2)
    with replay_choices(made):
        return network.model(x), made


def compared(
    network: Network, monkeypatch: pytest.MonkeyPatch, *, graph: Any, telling: Any
) -> Parity:
    """What is found if two runners stand for the graphs."""
    monkeypatch.setattr(parity_choices, "trace", lambda *args, **kwargs: None)
    monkeypatch.setattr(parity_choices, "write_graph", lambda *args, **kwargs: None)
    monkeypatch.setattr(parity_choices, "run_graph", lambda path, to: telling)
    return compare_but_for_choices(network, graph, "onnx", ("batch",), bound=BOUND)


def test_another_choice_is_told_from_another_function(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def graph(x: Tensor) -> Sequence[Tensor]:
        return [otherwise(network, x)[0]]

    def telling(x: Tensor) -> Sequence[Tensor]:
        logits, made = otherwise(network, x)
        return [logits, *(choice.long() for choice in made)]

    found = compared(network, monkeypatch, graph=graph, telling=telling)
    assert found.worst <= BOUND
    assert found.flipped == len(found.shapes)

    def scaled(x: Tensor) -> Sequence[Tensor]:
        return [1.1 * graph(x)[0]]

    found = compared(network, monkeypatch, graph=scaled, telling=telling)
    assert found.worst > BOUND
    assert found.flipped == 0

    def wrong(x: Tensor) -> Sequence[Tensor]:
        logits, *made = telling(x)
        return [1.1 * logits, *made]

    assert compared(network, monkeypatch, graph=scaled, telling=wrong).worst > BOUND


def test_choices_that_the_second_graph_does_not_make_explain_nothing(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def graph(x: Tensor) -> Sequence[Tensor]:
        return [otherwise(network, x)[0]]

    @torch.no_grad()
    def telling(x: Tensor) -> Sequence[Tensor]:
        return parity_choices._Telling(network.model)(x)

    found = compared(network, monkeypatch, graph=graph, telling=telling)
    assert found.worst > BOUND


def test_where_nothing_is_off_nothing_is_written(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.no_grad()
    def graph(x: Tensor) -> Sequence[Tensor]:
        return [network.model(x)]

    found = compared(network, monkeypatch, graph=graph, telling=None)
    assert found.worst == 0
    assert found.flipped is None


def test_a_model_without_choices_is_off_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Network(torch.nn.Conv2d(3, 1, 1).eval(), (3, 8, 8), {}, ("map",))

    @torch.no_grad()
    def graph(x: Tensor) -> Sequence[Tensor]:
        return [plain.model(x) + 1]

    found = compared(plain, monkeypatch, graph=graph, telling=None)
    assert found.worst == pytest.approx(1, abs=1e-5)
    assert found.flipped is None


def test_no_choice_explains_what_is_not_finite(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.no_grad()
    def graph(x: Tensor) -> Sequence[Tensor]:
        return [network.model(x) * torch.nan]

    found = compared(network, monkeypatch, graph=graph, telling=None)
    assert found.worst == torch.inf
