"""Answers that are no weights, and what a cut, a kill or a full disk leaves of a plain download."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.zoo.downloads import CONTENT, OTHER, PICKLE, URL_FILE, entry, fill_disk, no_trace, url
from tests.zoo.hub_server import Hub
from vitzoo.zoo import download, files, transfer
from vitzoo.zoo.download import fetch, fetch_source
from vitzoo.zoo.errors import WeightsError

pytestmark = pytest.mark.usefixtures("quick")

MIRROR = "files/mirror/net.safetensors"
ERROR = b'{"error": "rate limited, come back later"}'


def part_of(hub: Hub, folder: Path) -> Path:
    target = download._target_of(url(hub), folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(target.name + ".part")


def leave(hub: Hub, folder: Path, part: bytes, notes: str | None) -> None:
    """What a killed process left."""
    part_of(hub, folder).write_bytes(part)
    if notes is not None:
        part_of(hub, folder).with_suffix(".part.json").write_text(notes)


def notes_on(content: bytes, total: int | None = None) -> str:
    tag = f'"{hashlib.sha256(content).hexdigest()}"'
    return json.dumps({"validator": tag, "total": total})


# Answers that are no weights


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
def test_error_page_with_status_200_is_not_kept(hub: Hub, tmp_path: Path, name: str) -> None:
    path = f"files/{name}"
    hub.files[path], hub.kinds[path] = ERROR, "application/json"
    with pytest.raises(WeightsError, match=rf"delivered no weights: files--{name} is not a"):
        fetch_source(url(hub, path), cache_dir=tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".json", ".lock"}
    hub.files[path] = CONTENT if name.endswith("safetensors") else PICKLE
    assert fetch_source(url(hub, path), cache_dir=tmp_path).read_bytes() == hub.files[path]


def test_error_page_leads_to_the_next_source(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.files |= {URL_FILE: ERROR, MIRROR: CONTENT}
    both = entry(url(hub), url(hub, MIRROR))
    assert fetch(both, cache_dir=tmp_path).read_bytes() == CONTENT
    assert f"{url(hub)} delivered no weights" in caplog.text
    assert f"trying {url(hub, MIRROR)}" in caplog.text


def test_error_page_that_an_older_version_kept_is_replaced(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    target = part_of(hub, tmp_path).with_suffix("")
    target.write_bytes(ERROR)
    files.recorded_hash_path(target).write_text(hashlib.sha256(ERROR).hexdigest())
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT


def test_cut_that_looks_like_the_end_is_noticed(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    hub.unsized.add(URL_FILE)
    hub.cut_once[URL_FILE] = 500_000
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [None, None]


def test_content_checked_without_a_hash_is_checked_against_one_later(
    hub: Hub, tmp_path: Path
) -> None:
    hub.files[URL_FILE] = OTHER
    fetch_source(url(hub), cache_dir=tmp_path)
    hub.files[URL_FILE] = CONTENT
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert fetch_source(url(hub), sha256=sha256, cache_dir=tmp_path).read_bytes() == CONTENT


# Digits in a file's name


def test_date_in_a_name_is_no_hash(hub: Hub, tmp_path: Path) -> None:
    for name in ("net-20240101.safetensors", "net-deadbeef.safetensors"):
        hub.files[f"files/{name}"] = CONTENT
        path = fetch_source(url(hub, f"files/{name}"), cache_dir=tmp_path)
        assert path.read_bytes() == CONTENT
        assert "no hash" in files.verify_file(path.rename(tmp_path / name))


def test_digits_in_a_name_of_the_table_are_a_hash(hub: Hub, tmp_path: Path) -> None:
    digits = hashlib.sha256(CONTENT).hexdigest()[:8]
    good, bad, dated = (f"files/net-{d}.safetensors" for d in (digits, "deadbeef", "20240101"))
    hub.files |= {good: CONTENT, bad: CONTENT, dated: CONTENT}
    assert fetch(entry(url(hub, good)), cache_dir=tmp_path).is_file()
    assert fetch(entry(url(hub, dated)), cache_dir=tmp_path).is_file()
    with pytest.raises(WeightsError, match="published deadbeef"):
        fetch(entry(url(hub, bad)), cache_dir=tmp_path)


# Going on


def test_all_bytes_there_but_not_renamed(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    leave(hub, tmp_path, CONTENT, notes_on(CONTENT, len(CONTENT)))
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert not hub.ranges[URL_FILE]


def test_all_bytes_there_of_an_unknown_length(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    leave(hub, tmp_path, CONTENT, notes_on(CONTENT))
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [f"bytes={len(CONTENT)}-", None]


@pytest.mark.parametrize("notes", [None, "", "{", "[]", "{}", "7", '{"validator": null}'])
def test_broken_notes_start_over(hub: Hub, tmp_path: Path, notes: str | None) -> None:
    hub.files[URL_FILE] = CONTENT
    leave(hub, tmp_path, OTHER[:500_000], notes)
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [None]


def test_cut_of_unknown_length_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    hub.chunked.add(URL_FILE)
    hub.cut_once[URL_FILE] = 1 << 19
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [None, f"bytes={1 << 19}-"]


def test_answer_that_is_no_http_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.files[URL_FILE] = CONTENT
    hub.garbage_once.add(URL_FILE)
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["garbage", "cut"])
def test_broken_http_leads_to_the_next_source(
    hub: Hub, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    hub.files |= {URL_FILE: CONTENT, MIRROR: CONTENT}
    if how == "garbage":
        hub.garbage_once.add(URL_FILE)
    else:
        hub.chunked.add(URL_FILE)
        hub.cut_once[URL_FILE] = 500_000
    found = fetch(entry(url(hub), url(hub, MIRROR)), cache_dir=tmp_path)
    assert found.read_bytes() == CONTENT
    assert "mirror" in found.name


def test_kill_between_two_versions_does_not_splice_them(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(hub, tmp_path, OTHER[:500_000], notes_on(OTHER, len(OTHER)))
    hub.files[URL_FILE] = CONTENT
    real = transfer.write_atomically

    def killed(path: Path, content: bytes) -> None:
        real(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_source(url(hub), cache_dir=tmp_path)
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT


def test_server_without_if_range_does_not_splice(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(hub, tmp_path, OTHER[:500_000], notes_on(OTHER, len(OTHER)))
    hub.files[URL_FILE] = CONTENT
    hub.ignores_if_range.add(URL_FILE)
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == ["bytes=500000-", None]


# A full disk


def test_full_disk_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files[URL_FILE] = CONTENT
    with monkeypatch.context() as patch:
        fill_disk(patch, ".part")
        with pytest.raises(WeightsError, match="disk is full"):
            fetch_source(url(hub), cache_dir=tmp_path)
    assert no_trace(tmp_path)
    assert fetch_source(url(hub), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.ranges[URL_FILE] == [None, "bytes=300000-"]


def test_full_disk_while_a_corrupt_file_is_replaced(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files[URL_FILE] = CONTENT
    path = fetch_source(url(hub), cache_dir=tmp_path)
    path.write_bytes(OTHER)
    with monkeypatch.context() as patch:
        fill_disk(patch, ".part")
        with pytest.raises(WeightsError, match="disk is full"):
            fetch_source(url(hub), cache_dir=tmp_path)
    assert no_trace(tmp_path)
