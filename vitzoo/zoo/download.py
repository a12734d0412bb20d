"""From a source to a verified local file.

Hub files go through huggingface_hub, which caches, resumes, locks and honours `HF_HOME`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE` and proxies, but checks no content; plain addresses go through the
resuming download here. Either way the file is verified before anybody reads it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from vitzoo._paths import cache_folder, write_atomically
from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.errors import CorruptFileError, WeightsError
from vitzoo.zoo.files import digits_in_name, logger, verify

TRIES = 4
BACK_OFF_S = 0.5
TIMEOUT_S = 30
CHUNK = 1 << 20
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")

T = TypeVar("T")


class _TransientError(Exception):
    """A failure that may pass: worth another try at the same source."""


def fetch(entry: WeightEntry, *, cache_dir: str | Path | None = None) -> Path:
    """A verified local file of an entry, from the first of its sources that delivers one.

    Args:
        entry: of the weights table.
        cache_dir: instead of the hub's cache and the user's.

    Raises:
        WeightsError: no source delivered; the message says what each one answered.
    """
    if not entry.sources:
        raise WeightsError(
            f"{entry.name} has no download ({entry.state}). Give a local file: "
            f'timm.create_model("{entry.model}", pretrained=True, '
            'pretrained_cfg_overlay={"file": PATH}).'
        )
    failures = []
    for i, source in enumerate(entry.sources):
        expected = entry.sha256 if i == 0 else None
        try:
            return fetch_source(source, sha256=expected, cache_dir=cache_dir)
        except WeightsError as error:
            failures.append(f"{source}: {error}")
            if i + 1 < len(entry.sources):
                logger.warning("%s; trying %s", failures[-1], entry.sources[i + 1])
    raise WeightsError(f"no source of {entry.name} delivered a file. " + " | ".join(failures))


def fetch_source(
    source: str, *, sha256: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A verified local file of one source.

    Args:
        source: `hf-hub:ORG/NAME[/FILE][@REVISION]` or an http(s) address.
        sha256: the content that it must have, if known.
        cache_dir: instead of the hub's cache or the user's.

    Raises:
        WeightsError: it could not be had, or only with wrong content.
    """
    get = _from_hub if source.startswith("hf-hub:") else _from_url
    try:
        return _patiently(lambda: get(source, sha256, cache_dir))
    except CorruptFileError as error:
        # A bad file in the cache is replaced; a source that delivers another one is given up.
        logger.warning("%s", error)
        return _patiently(lambda: get(source, sha256, cache_dir))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WeightsError(
                f"the disk is full: {source} was not saved. Free space, or set XDG_CACHE_HOME "
                "(HF_HOME for hub files) to another disk, and run the same command again."
            ) from error
        raise


def cached(entry: WeightEntry, *, cache_dir: str | Path | None = None) -> Path | None:
    """The verified file of an entry if one of its sources is in the cache; asks no server.

    Raises:
        CorruptFileError: it was there with wrong content, and has been removed.
    """
    from huggingface_hub import try_to_load_from_cache

    for i, source in enumerate(entry.sources):
        expected = entry.sha256 if i == 0 else None
        if source.startswith("hf-hub:"):
            repo, wanted, revision = _hub_parts(source)
            for filename in wanted:
                found = try_to_load_from_cache(repo, filename, cache_dir, revision)
                if isinstance(found, str):
                    path = Path(found)
                    verify(path, expected or _published_hash(path), where_from=source)
                    return path
        elif (target := _target_of(source, cache_dir)).is_file():
            verify(target, expected or digits_in_name(target.name), where_from=source)
            return target
    return None


def _hub_parts(source: str) -> tuple[str, tuple[str, ...], str | None]:
    """(repository, file names to try, revision) of `hf-hub:ORG/NAME[/FILE][@REVISION]`."""
    name, _, revision = source.removeprefix("hf-hub:").partition("@")
    wanted = "/".join(name.split("/")[2:])
    return "/".join(name.split("/")[:2]), (wanted,) if wanted else WEIGHT_FILES, revision or None


def _patiently(attempt: Callable[[], T]) -> T:
    """Repeat what may pass, with a growing pause."""
    for i in range(TRIES):
        try:
            return attempt()
        except _TransientError as error:
            if i + 1 == TRIES:
                raise WeightsError(str(error)) from error
            logger.info("%s; trying again", error)
            time.sleep(BACK_OFF_S * 2**i)
    raise AssertionError("unreachable")


def _from_hub(source: str, sha256: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repo, wanted, revision = _hub_parts(source)
    missing: Exception | None = None
    for filename in wanted:
        try:
            found = hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir)
        except LocalEntryNotFoundError as error:
            if _offline():
                missing = error
                continue
            # Its client has tried five times by now.
            raise WeightsError(
                "the hub does not answer and the file is not in the cache"
            ) from error
        except (RepositoryNotFoundError, GatedRepoError) as error:
            raise WeightsError(f"{repo} is not on the hub or needs a login ({error})") from error
        except EntryNotFoundError as error:
            missing = error
            continue
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code < 500:
                raise WeightsError(f"the hub answered {error}") from error
            raise _TransientError(str(error)) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise _TransientError(str(error)) from error
        path = Path(found)
        verify(path, sha256 or _published_hash(path), where_from=source)
        return path
    if _offline():
        raise WeightsError(
            f"{repo} is not in the cache and HF_HUB_OFFLINE is set. Run once online, or give a "
            "local file."
        ) from missing
    raise WeightsError(f"{repo} has no {' and no '.join(wanted)}") from missing


def _published_hash(path: Path) -> str | None:
    """The hub names a large file's blob by its published sha256."""
    blob = path.resolve().name
    return blob if _SHA256.match(blob) else None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _from_url(source: str, sha256: str | None, cache_dir: str | Path | None) -> Path:
    from filelock import FileLock

    address = urllib.parse.urlparse(source)
    if address.scheme not in ("http", "https"):
        raise WeightsError(f"{source} is neither an http(s) address nor hf-hub:ORG/NAME")
    target = _target_of(source, cache_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            if _offline():
                raise WeightsError(
                    f"{source} is not in the cache and HF_HUB_OFFLINE is set. Run once online, or "
                    "give a file."
                )
            _download(source, target)
        verify(target, sha256 or digits_in_name(target.name), where_from=source)
    return target


def _target_of(source: str, cache_dir: str | Path | None) -> Path:
    address = urllib.parse.urlparse(source)
    folder = Path(cache_dir or cache_folder("weights")) / (address.hostname or "")
    return folder / address.path.strip("/").replace("/", "--")


def _download(source: str, target: Path) -> None:
    """Download with resume into `TARGET.part`, then rename."""
    part = target.with_name(target.name + ".part")
    about = target.with_name(target.name + ".part.json")
    request = urllib.request.Request(source, headers={"User-Agent": "vitzoo"})
    validator = json.loads(about.read_text())["validator"] if about.exists() else None
    have = part.stat().st_size if part.exists() and validator else 0
    if have and validator:
        # If-Range: a file that changed meanwhile is sent whole.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator)
    with _answer(request) as answer:
        _refuse_web_page(source, answer)
        if answer.status != 206:
            have = 0
            validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            write_atomically(about, json.dumps({"validator": validator}).encode())
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if have else "wb") as file:
            _copy(answer, file, have, total, target.name)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise _TransientError(f"the connection was cut at {part.stat().st_size} of {total} bytes")
    os.replace(part, target)
    about.unlink(missing_ok=True)


@contextlib.contextmanager
def _answer(request: urllib.request.Request) -> Iterator[Any]:
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise _TransientError(f"the server answered {error.code}") from error
        raise WeightsError(f"the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise _TransientError(str(error)) from error


def _refuse_web_page(source: str, answer: Any) -> None:
    if answer.headers.get_content_type() == "text/html":
        raise WeightsError(
            f"{source} answered with a web page, so it needs a browser or an account: download it "
            "there, then run `vitzoo weights convert FILE`"
        )


def _copy(answer: Any, file: IO[bytes], have: int, total: int | None, name: str) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, leave=False) as bar:
        while True:
            try:
                chunk = answer.read(CHUNK)
            except (OSError, EOFError) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                raise _TransientError(f"the connection was cut: {error}") from error
            if not chunk:
                return
            file.write(chunk)
            bar.update(len(chunk))
