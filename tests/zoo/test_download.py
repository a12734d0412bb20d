"""Downloads over real sockets: nothing wrong is ever loaded, nothing good is lost."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.zoo.downloads import CONTENT, URL_FILE, WRONG, entry, no_trace, url
from tests.zoo.hub_server import Hub
from vitzoo.zoo import download, files
from vitzoo.zoo.download import fetch, fetch_source
from vitzoo.zoo.errors import CorruptFileError, WeightsError

pytestmark = pytest.mark.usefixtures("quick")


# Plain addresses


def test_url_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    first = fetch_source(url(hub), cache_dir=tmp_path)
    assert first.read_bytes() == CONTENT
    assert fetch_source(url(hub), cache_dir=tmp_path) == first
    assert len(hub.ranges[URL_FILE]) == 1


def test_cut_connection_resumes_by_range(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    hub.cut_once[URL_FILE] = 500_000
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [None, "bytes=500000-"]


def test_file_that_changed_meanwhile_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = WRONG
    hub.cut_once[URL_FILE] = 500_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "TRIES", 1)
        with pytest.raises(WeightsError, match="cut at 500000"):
            fetch_source(url(hub), cache_dir=tmp_path)
    hub.files[URL_FILE] = CONTENT
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT


def test_server_error_then_success(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    hub.fail_once[URL_FILE] = 500
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT


def test_wrong_bytes_of_the_right_length_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = WRONG
    with pytest.raises(CorruptFileError, match="has been removed"):
        fetch_source(url(hub), sha256=hashlib.sha256(CONTENT).hexdigest(), cache_dir=tmp_path)
    assert no_trace(tmp_path)


def test_flipped_byte_in_the_cache_is_noticed_and_mended(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    path = fetch_source(url(hub), cache_dir=tmp_path)
    assert files.recorded_hash_path(path).exists()
    files._verified.clear()
    path.write_bytes(WRONG)
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(hub.ranges[URL_FILE]) == 2


def test_web_page_is_not_taken_for_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = b"<html>please log in</html>"
    hub.kinds[URL_FILE] = "text/html; charset=utf-8"
    with pytest.raises(WeightsError, match="needs a browser"):
        fetch_source(url(hub), cache_dir=tmp_path)
    assert no_trace(tmp_path)


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files[URL_FILE] = CONTENT
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        fetch_source(url(hub), cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    path = fetch_source(url(hub), cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_source(url(hub), cache_dir=tmp_path) == path


# Entries


def test_next_source_is_taken_and_named(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.files[URL_FILE] = CONTENT
    dead = f"{hub.address}/files/gone.safetensors"
    path = fetch(entry(dead, url(hub)), cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert f"{dead}: the server answered 404 Not Found; trying {url(hub)}" in caplog.text


def test_all_sources_dead_lists_each(hub: Hub, tmp_path: Path) -> None:
    sources = [f"{hub.address}/files/{name}" for name in ("a", "b")]
    with pytest.raises(WeightsError) as failure:
        fetch(entry(*sources), cache_dir=tmp_path)
    assert all(source in str(failure.value) for source in sources)


def test_entry_without_source_says_what_to_do() -> None:
    with pytest.raises(WeightsError, match="Give a local file"):
        fetch(entry(state="never published"))
