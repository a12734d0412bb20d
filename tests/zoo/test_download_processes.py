"""Downloads in processes of their own, set up by the environment: at once, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.zoo.downloads import CONTENT, HUB_FILE, URL_FILE, hub_cache_files, no_trace, url
from tests.zoo.hub_server import Hub

CLIENT = """
import json, logging, sys
from vitzoo.zoo.download import fetch_source
from vitzoo.zoo.errors import WeightsError
logging.basicConfig(level=logging.WARNING)
print("ready", flush=True)
try:
    print(json.dumps({"path": str(fetch_source(sys.argv[1]))}))
except WeightsError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""


def client(hub: Hub, home: Path, source: str = "hf-hub:org/net") -> subprocess.Popen:
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, source],
        env=environment,
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


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kept_bytes(home: Path) -> int:
    return sum(part.stat().st_size for part in home.rglob("*.safetensors.part"))


def test_two_processes_at_once_download_an_address_once(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    hub.held[URL_FILE] = threading.Event()
    both = [client(hub, tmp_path, url(hub)) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        process.stdout.readline()
    wait_until(lambda: kept_bytes(tmp_path))
    time.sleep(0.5)  # In which the other one meets the lock.
    hub.held[URL_FILE].set()
    paths = {answer(process)["path"] for process in both}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [None]


def test_address_killed_in_mid_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    hub.held[URL_FILE] = threading.Event()
    process = client(hub, tmp_path, url(hub))
    wait_until(lambda: kept_bytes(tmp_path) == 1 << 16)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.held[URL_FILE].set()
    assert no_trace(tmp_path)
    assert Path(answer(client(hub, tmp_path, url(hub)))["path"]).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [None, f"bytes={1 << 16}-"]
