"""One plain download, which goes on where it was cut.

Bytes gather in `TARGET.part`; `TARGET.part.json` notes which version of the file they are of.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vitzoo._paths import write_atomically
from vitzoo.zoo.errors import TransientError, WeightsError

TIMEOUT_S = 30
CHUNK = 1 << 20


class _RangeError(Exception):
    """What the server has does not go on where the bytes on disk end."""


@dataclass(frozen=True)
class _Kept:
    """What an earlier try left: bytes, the server's name of the version, the whole length."""

    size: int = 0
    validator: str | None = None
    total: int | None = None


def notes_of(target: Path) -> Path:
    """Where it is noted which version of a file its `.part` belongs to."""
    return target.with_name(target.name + ".part.json")


def transfer(source: str, target: Path) -> Path:
    """Download a file with resume; the caller checks it and gives it its name.

    Args:
        source: an http(s) address.
        target: the file's later name; its folder exists.

    Returns:
        `TARGET.part`, all of it as far as the server told its length.

    Raises:
        TransientError: the server failed or the connection was cut; the next call goes on.
        WeightsError: the server refuses, or answers with a web page.
    """
    part = target.with_name(target.name + ".part")
    kept = _kept(part, notes_of(target))
    if kept.size and kept.size == kept.total:
        return part  # The earlier process was killed between the last byte and the rename.
    request = urllib.request.Request(source, headers={"User-Agent": "vitzoo"})
    if kept.size and kept.validator:
        # If-Range: a file that changed meanwhile is sent whole.
        request.add_header("Range", f"bytes={kept.size}-")
        request.add_header("If-Range", kept.validator)
    try:
        with _answer(request) as answer:
            _refuse_web_page(source, answer)
            _receive(answer, part, notes_of(target), kept)
    except _RangeError as error:
        part.unlink(missing_ok=True)
        raise TransientError(str(error)) from error
    return part


def _kept(part: Path, notes: Path) -> _Kept:
    try:
        noted = json.loads(notes.read_text())
        kept = _Kept(part.stat().st_size, noted["validator"], noted["total"])
    except (OSError, ValueError, LookupError, TypeError):
        return _Kept()  # Nothing there, or notes that cannot be relied upon.
    return kept if kept.total is None or kept.size <= kept.total else _Kept()


@contextlib.contextmanager
def _answer(request: urllib.request.Request) -> Iterator[Any]:
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise _RangeError("the server has no bytes after those on disk") from error
        if error.code in (408, 429) or error.code >= 500:
            raise TransientError(f"the server answered {error.code}") from error
        raise WeightsError(f"the server answered {error.code} {error.reason}") from error
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error


def _refuse_web_page(source: str, answer: Any) -> None:
    if answer.headers.get_content_type() == "text/html":
        raise WeightsError(
            f"{source} answered with a web page, so it needs a browser or an account: download it "
            "there, then run `vitzoo weights convert FILE`"
        )


def _receive(answer: Any, part: Path, notes: Path, kept: _Kept) -> None:
    """Put an answer's bytes after those on disk or, if it is the whole file, in their place."""
    resumed = answer.status == 206
    if resumed and not _continues(answer, kept):
        raise _RangeError("the server sent another part than was asked for")
    have = kept.size if resumed else 0
    total = None if answer.length is None else have + answer.length
    with part.open("ab" if resumed else "wb") as file:
        if not resumed:
            # Only now that the old version's bytes are gone: else a kill would let them count as
            # the new one's.
            validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            noted = {"validator": validator, "total": total}
            write_atomically(notes, json.dumps(noted).encode())
        _copy(answer, file, have, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise TransientError(f"the connection was cut at {part.stat().st_size} of {total} bytes")


def _continues(answer: Any, kept: _Kept) -> bool:
    tag = answer.headers.get("ETag")
    if tag and kept.validator and kept.validator.startswith('"') and tag != kept.validator:
        return False  # A server that knows Range but not If-Range.
    begins = f"bytes {kept.size}-"
    return str(answer.headers.get("Content-Range")).startswith(begins)


def _copy(answer: Any, file: IO[bytes], have: int, total: int | None) -> None:
    from tqdm.auto import tqdm

    name = Path(file.name).stem
    with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, leave=False) as bar:
        while True:
            try:
                # `read` would wait for a whole chunk, and lose what came of it before a cut.
                chunk = answer.read1(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise TransientError(
                    f"the connection was cut at {have} bytes: {type(error).__name__}"
                ) from error
            if not chunk:
                return
            file.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
