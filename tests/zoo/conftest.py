"""A running hub, and the real client pointed at it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import huggingface_hub
import pytest

from tests.zoo.hub_server import Hub
from vitzoo.zoo import download, files


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and nothing verified by the test before."""
    monkeypatch.setattr(download, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(files, "_verified", {})


@pytest.fixture
def real_client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The real client over real sockets, only with the address that HF_ENDPOINT would set."""
    pointed = functools.partial(huggingface_hub.hf_hub_download, endpoint=hub.address)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", pointed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub
