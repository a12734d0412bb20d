"""Downloads from the hub: the real client over real sockets, and what is checked after it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.zoo.downloads import (
    CONTENT,
    HUB_FILE,
    PICKLE,
    URL_FILE,
    WRONG,
    entry,
    fill_disk,
    hub_cache_files,
    url,
)
from tests.zoo.hub_server import Hub
from vitzoo.zoo import files
from vitzoo.zoo.download import fetch, fetch_source
from vitzoo.zoo.errors import CorruptFileError, WeightsError

pytestmark = pytest.mark.usefixtures("quick")


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_hub_file_then_offline_hit(
    real_client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_client.files[HUB_FILE] = CONTENT
    path = fetch_source("hf-hub:org/net", cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    go_offline(monkeypatch)
    assert fetch_source("hf-hub:org/net", cache_dir=tmp_path) == path


def test_hub_offline_miss_says_what_to_do(
    real_client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    with pytest.raises(WeightsError, match="Run once online"):
        fetch_source("hf-hub:org/net", cache_dir=tmp_path)


def test_hub_falls_back_from_safetensors(real_client: Hub, tmp_path: Path) -> None:
    real_client.files["org/net/pytorch_model.bin"] = PICKLE
    assert fetch_source("hf-hub:org/net", cache_dir=tmp_path).name == "pytorch_model.bin"


def test_hub_cut_connection(real_client: Hub, tmp_path: Path) -> None:
    real_client.files[HUB_FILE] = CONTENT
    real_client.cut_once[HUB_FILE] = 600_000
    assert fetch_source("hf-hub:org/net", cache_dir=tmp_path).read_bytes() == CONTENT


def test_hub_error_then_success(real_client: Hub, tmp_path: Path) -> None:
    real_client.files[HUB_FILE] = CONTENT
    real_client.fail_once[HUB_FILE] = 500
    assert fetch_source("hf-hub:org/net", cache_dir=tmp_path).read_bytes() == CONTENT


def test_hub_wrong_bytes_are_refused(real_client: Hub, tmp_path: Path) -> None:
    real_client.files[HUB_FILE] = WRONG
    real_client.published[HUB_FILE] = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(CorruptFileError, match="has been removed"):
        fetch_source("hf-hub:org/net", cache_dir=tmp_path)
    assert not hub_cache_files(tmp_path)


def test_hub_flipped_byte_in_the_cache(
    real_client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_client.files[HUB_FILE] = CONTENT
    path = fetch_source("hf-hub:org/net", cache_dir=tmp_path)
    files._verified.clear()
    path.resolve().write_bytes(WRONG)
    with monkeypatch.context() as patch:
        go_offline(patch)
        with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
            fetch_source("hf-hub:org/net", cache_dir=tmp_path)
        assert not hub_cache_files(tmp_path)
    assert fetch_source("hf-hub:org/net", cache_dir=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("published", [True, False])
def test_hub_file_that_holds_no_weights(
    real_client: Hub, tmp_path: Path, published: bool, caplog: pytest.LogCaptureFixture
) -> None:
    real_client.files[HUB_FILE] = b'{"error": "rate limited"}'
    if not published:
        real_client.published[HUB_FILE] = "e" * 40  # As of a file outside LFS.
    real_client.files[URL_FILE] = CONTENT
    both = entry("hf-hub:org/net", url(real_client))
    assert fetch(both, cache_dir=tmp_path).read_bytes() == CONTENT
    assert "hf-hub:org/net delivered no weights: model.safetensors is not a whole" in caplog.text
    assert not hub_cache_files(tmp_path)
    real_client.files[HUB_FILE] = CONTENT
    real_client.published.clear()
    assert fetch_source("hf-hub:org/net", cache_dir=tmp_path).read_bytes() == CONTENT


def test_hub_that_cuts_every_time_gives_way_to_the_next_source(
    real_client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Always(dict):
        def pop(self, key: str, default: object = None) -> object:
            return self.get(key, default)

    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    real_client.files |= {HUB_FILE: CONTENT, URL_FILE: CONTENT}
    real_client.cut_once = Always({HUB_FILE: 300_000})
    both = entry("hf-hub:org/net", url(real_client))
    assert fetch(both, cache_dir=tmp_path).name == "files--net.safetensors"


def test_hub_full_disk(real_client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_client.files[HUB_FILE] = CONTENT
    with monkeypatch.context() as patch:
        fill_disk(patch, ".incomplete")
        with pytest.raises(WeightsError, match="disk is full"):
            fetch_source("hf-hub:org/net", cache_dir=tmp_path)
    assert not hub_cache_files(tmp_path)
    with monkeypatch.context() as patch:
        go_offline(patch)
        with pytest.raises(WeightsError, match="not in the cache"):
            fetch_source("hf-hub:org/net", cache_dir=tmp_path)
    assert fetch_source("hf-hub:org/net", cache_dir=tmp_path).read_bytes() == CONTENT
