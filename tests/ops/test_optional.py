"""natten and xformers: what they say where they cannot serve, and how xformers is called."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vitzoo.ops import OPERATORS, _optional, attention, grouped_attention, window_attention

Q = torch.zeros(1, 6, 6, 1, 16)
OFFSETS = torch.tensor([0, 5, 12])
LINE = torch.zeros(12, 1, 16)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages are said to be there."""
    monkeypatch.setattr(_optional, "_found", lambda package: True)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is."""
    monkeypatch.setattr(_optional, "_found", lambda package: False)


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(
    ("operator", "backend", "given", "options"),
    [
        ("neighborhood_attention", "natten", Q, {"kernel_size": (3, 3)}),
        ("window_attention", "xformers", Q, {"window_size": 3}),
        ("grouped_attention", "xformers", LINE, {"group_size": 4, "frame_offsets": OFFSETS}),
    ],
)
def test_missing_packages_are_named(
    operator: str, backend: str, given: Tensor, options: dict
) -> None:
    with pytest.raises(ValueError, match=rf"{backend} is not installed: pip install vitzoo\["):
        OPERATORS[operator](given, given, given, backend=backend, **options)


@pytest.mark.usefixtures("installed")
def test_xformers_runs_on_gpus_only() -> None:
    with pytest.raises(ValueError, match="xformers runs on CUDA devices, the tensors are on cpu"):
        window_attention(Q, Q, Q, window_size=3, backend="xformers")


@pytest.mark.usefixtures("installed")
def test_auto_takes_neither() -> None:
    for operator, options, taken in (
        ("neighborhood_attention", {"kernel_size": (3, 3)}, "portable"),
        ("window_attention", {"window_size": 3}, "products"),
    ):
        assert OPERATORS[operator].select(Q, Q, Q, **options).name == taken


def test_limits_of_xformers() -> None:
    from vitzoo.ops import grouped, window

    assert "bias" in str(window._why_not_plain(Q, Q, Q, window_size=3, bias=torch.zeros(9, 9)))
    assert "partial windows" in str(window._why_not_plain(Q, Q, Q, window_size=4))
    assert window._why_not_plain(Q, Q, Q, window_size=4, fill=(Q[0, 0, 0],) * 2) is None
    for size, sentence in ((4, "None"), (6, "frames smaller than a group")):
        found = grouped._why_not_xformers(LINE, LINE, LINE, group_size=size, frame_offsets=OFFSETS)
        assert sentence in str(found)


def test_layout_of_a_call_to_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with its signature takes the call: no machine here can run xformers itself."""
    module = ModuleType("xformers.ops")
    module.memory_efficient_attention = lambda q, k, v, scale: attention(  # type: ignore[attr-defined]
        q, k, v, scale=scale, backend="reference"
    )
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 5, 7, 2, 8, generator=generator) for _ in range(3)]
    fill = (torch.randn(2, 8, generator=generator), torch.randn(2, 8, generator=generator))
    options = {"window_size": 4, "fill": fill, "scale": 0.3}
    found = OPERATORS["window_attention"].backends["xformers"].run(*maps, **options)
    torch.testing.assert_close(found, window_attention(*maps, backend="reference", **options))
    lines = [t.flatten(0, 2) for t in maps]
    options = {"group_size": 9, "frame_offsets": torch.tensor([0, 30, 70])}
    found = OPERATORS["grouped_attention"].backends["xformers"].run(*lines, **options)
    torch.testing.assert_close(found, grouped_attention(*lines, backend="reference", **options))
