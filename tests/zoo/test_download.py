"""Downloads over real sockets: nothing wrong is ever loaded, nothing good is lost."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from tests.zoo.hub_server import Hub
from vitzoo.zoo import download, files
from vitzoo.zoo.download import fetch, fetch_source
from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.errors import CorruptFileError, WeightsError

CONTENT = save({"w": torch.arange(300_000, dtype=torch.float32)})
WRONG = CONTENT[:-4] + b"\xff\xff\xff\xff"
HUB_FILE = "org/net/model.safetensors"
URL_FILE = "files/net.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(files, "_verified", {})


def url(hub: Hub) -> str:
    return f"{hub.address}/{URL_FILE}"


def no_trace(folder: Path) -> bool:
    """Whether no file that could be taken for weights is left."""
    return not [p for p in folder.rglob("*.safetensors") if p.is_file()]


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
    hub.web_pages.add(URL_FILE)
    with pytest.raises(WeightsError, match="needs a browser"):
        fetch_source(url(hub), cache_dir=tmp_path)
    assert no_trace(tmp_path)


def test_full_disk_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files[URL_FILE] = CONTENT

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "_copy", full)
        with pytest.raises(WeightsError, match="disk is full"):
            fetch_source(url(hub), cache_dir=tmp_path)
    assert no_trace(tmp_path)
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT


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


def entry(*sources: str, **facts: object) -> WeightEntry:
    return WeightEntry(model="vz_net", tag="org_in1k", sources=sources, **facts)


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


# The hub's client


@pytest.fixture
def real_client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The real client over real sockets, only with the address that HF_ENDPOINT would set."""
    pointed = functools.partial(huggingface_hub.hf_hub_download, endpoint=hub.address)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", pointed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def hub_cache_files(home: Path) -> list[Path]:
    """Complete files in the hub's cache."""
    return [p for p in home.rglob("blobs/*") if p.is_file() and p.suffix != ".incomplete"]


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
    real_client.files["org/net/pytorch_model.bin"] = CONTENT
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


# The hub's client in processes of its own, set up by the environment

CLIENT = """
import json, logging, sys
from vitzoo.zoo.download import fetch_source
from vitzoo.zoo.errors import WeightsError
logging.basicConfig(level=logging.WARNING)
try:
    print(json.dumps({"path": str(fetch_source("hf-hub:org/net"))}))
except WeightsError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""


def client(hub: Hub, home: Path, **variables: str) -> subprocess.Popen:
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> dict:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def test_two_processes_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.files[HUB_FILE] = CONTENT
    hub.slow[HUB_FILE] = 0.05
    both = [client(hub, tmp_path), client(hub, tmp_path)]
    paths = {answer(process)["path"] for process in both}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == CONTENT


def test_killed_in_mid_download_then_success(hub: Hub, tmp_path: Path) -> None:
    hub.files[HUB_FILE] = CONTENT
    hub.slow[HUB_FILE] = 0.3
    process = client(hub, tmp_path)
    deadline = time.monotonic() + 60
    while not hub.ranges[HUB_FILE] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not hub_cache_files(tmp_path)
    hub.slow.clear()
    assert Path(answer(client(hub, tmp_path))["path"]).read_bytes() == CONTENT
