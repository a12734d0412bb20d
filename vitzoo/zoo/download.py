"""From a source to a verified local file.

Hub files go through huggingface_hub, which caches, resumes, locks and honours `HF_HOME`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE` and proxies, but checks no content; plain addresses go through
`transfer`. Either way a file is verified, and known to hold weights, before anybody reads it.
"""

from __future__ import annotations

import errno
import re
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vitzoo._paths import cache_folder
from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.errors import CorruptFileError, TransientError, WeightsError
from vitzoo.zoo.files import admit, digits_in_name, logger, verify
from vitzoo.zoo.transfer import notes_of, transfer

TRIES = 4
BACK_OFF_S = 0.5
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")

T = TypeVar("T")


def fetch(entry: WeightEntry, *, cache_dir: str | Path | None = None) -> Path:
    """A verified local file of an entry, from the first of its sources that delivers one.

    Args:
        entry: of the weights table.
        cache_dir: instead of the hub's cache and the user's.

    Raises:
        WeightsError: no source delivered; the message says what each one answered.
    """
    if not entry.sources:
        raise WeightsError(f"{entry.name} has no download ({entry.state}). {_without(entry)}")
    failures = []
    for i, source in enumerate(entry.sources):
        try:
            return fetch_source(source, sha256=_expected(entry, i), cache_dir=cache_dir)
        except WeightsError as error:
            failures.append(f"{source}: {error}")
            if i + 1 < len(entry.sources):
                logger.warning("%s; trying %s", failures[-1], entry.sources[i + 1])
    raise WeightsError(f"no source of {entry.name} delivered a file. " + " | ".join(failures))


def _without(entry: WeightEntry) -> str:
    """What to do about weights that nobody can download: it depends on what they are for."""
    if entry.task == "classification":
        return (
            f'Give a local file: timm.create_model("{entry.model}", pretrained=True, '
            'pretrained_cfg_overlay={"file": PATH}).'
        )
    model = f"model.name={entry.model} " if entry.task != "detection3d" else ""
    what = "it" if entry.task == "detection3d" else "its backbone"
    linked = entry.origin and entry.state != "never published"
    origin = f" ({entry.origin} may link it)" if linked else ""
    return (
        f"With a file of your own{origin}, `vitzoo train RECIPE {model}model.checkpoint=FILE` "
        f"loads {what}; `vitzoo list --recipes` has those of the task {entry.task}."
    )


def _expected(entry: WeightEntry, i: int) -> str | None:
    """What the content of an entry's source must hash to, as far as the table or its name says."""
    source = entry.sources[i]
    if i == 0 and entry.sha256:
        return entry.sha256
    address = urllib.parse.urlparse(source)
    return digits_in_name(address.path) if address.scheme in ("http", "https") else None


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
        try:
            return _patiently(lambda: get(source, sha256, cache_dir))
        except CorruptFileError as error:
            # A bad file in the cache is replaced; a source that delivers another one is given up.
            logger.warning("%s", error)
            return _patiently(lambda: get(source, sha256, cache_dir))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WeightsError(
                f"the disk is full: {source} was not saved. Free space, or set XDG_CACHE_HOME "
                "(HF_HOME for hub files) to another disk, and run the same command again."
            ) from error
        raise


def cached(entry: WeightEntry, *, cache_dir: str | Path | None = None) -> Path | None:
    """The verified file of an entry if one of its sources is in the cache; asks no server.

    Raises:
        CorruptFileError: it was there with wrong content, and has been removed.
        UnsafeFileError: a pickle that would run code was there, and has been removed.
    """
    from huggingface_hub import try_to_load_from_cache

    for i, source in enumerate(entry.sources):
        expected = _expected(entry, i)
        if source.startswith("hf-hub:"):
            repo, wanted, revision = _hub_parts(source)
            for filename in wanted:
                found = try_to_load_from_cache(repo, filename, cache_dir, revision)
                if isinstance(found, str):
                    path = Path(found)
                    verify(path, expected or _published_hash(path), where_from=source)
                    return path
        elif (target := _target_of(source, cache_dir)).is_file():
            verify(target, expected, where_from=source)
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
        except TransientError as error:
            if i + 1 == TRIES:
                raise WeightsError(str(error)) from error
            logger.info("%s; trying again", error)
            time.sleep(BACK_OFF_S * 2**i)
    raise AssertionError("unreachable")


def _from_hub(source: str, sha256: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub.errors import EntryNotFoundError

    repo, wanted, revision = _hub_parts(source)
    missing: Exception | None = None
    for filename in wanted:
        try:
            path = _hub_file(repo, filename, revision, cache_dir)
        except EntryNotFoundError as error:
            missing = error
            continue
        verify(path, sha256 or _published_hash(path), where_from=source)
        return path
    if _offline():
        raise WeightsError(
            f"{repo} is not in the cache and HF_HUB_OFFLINE is set. Run once online, or give a "
            "local file."
        ) from missing
    raise WeightsError(f"{repo} has no {' and no '.join(wanted)}") from missing


def _hub_file(repo: str, filename: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """A file as the hub's client delivers it; only a missing one remains the client's error."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))
    except errors.LocalEntryNotFoundError as error:
        if _offline():
            raise
        # Its client has tried five times by now.
        raise WeightsError("the hub does not answer and the file is not in the cache") from error
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise WeightsError(f"{repo} is not on the hub or needs a login ({error})") from error
    except errors.EntryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise WeightsError(f"the hub answered {error}") from error
        raise TransientError(str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TransientError(str(error)) from error
    except Exception as error:
        # What its transport raises (requests, httpx, httpx2) after tries of its own.
        raise WeightsError(f"the hub's client gave up: {error}") from error


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
            admit(transfer(source, target), target, sha256, where_from=source)
            notes_of(target).unlink(missing_ok=True)
        verify(target, sha256, where_from=source)
    return target


def _target_of(source: str, cache_dir: str | Path | None) -> Path:
    address = urllib.parse.urlparse(source)
    folder = Path(cache_dir or cache_folder("weights")) / (address.hostname or "")
    return folder / address.path.strip("/").replace("/", "--")
