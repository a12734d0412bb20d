"""Which weights of the table a file is, and what a folder made from it may say of its origin.

A file's name proves nothing: anybody may call a net `nat_mini.pth`. Licence, origin and published
figures are passed on only where the user names the tag, or the content or the cache proves it.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from vitzoo.zoo import download
from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.files import digits_in_name, sha256_of
from vitzoo.zoo.published import all_entries

logger = logging.getLogger("vitzoo.zoo")

_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".safetensors")
_OF_WEIGHTS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "description", "notes")


@dataclass(frozen=True, kw_only=True)
class Match:
    """An entry of the weights table that a file is (`certain`) or is only named like."""

    entry: WeightEntry
    certain: bool

    def claimed(
        self, *, classes: int | None, channels: int | None, arguments: Mapping[str, Any]
    ) -> WeightEntry | None:
        """The entry if the converted weights are its own; None, with a warning, if not.

        Args:
            classes: outputs of the classifier in the file, None if it has none.
            channels: image channels of the file's stem, None if unknown.
            arguments: what the user wants the model to be built with.
        """
        doubt = self._doubt(classes or 0, channels, arguments)
        if doubt is None:
            return self.entry
        logger.warning(
            "the folder states no origin, licence or accuracy of %s: %s", self.entry.name, doubt
        )
        return None

    def _doubt(
        self, classes: int, channels: int | None, arguments: Mapping[str, Any]
    ) -> str | None:
        entry = self.entry
        if not self.certain:
            return f"only the file's name says so. If it is that file, give --model {entry.name}"
        if entry.state == "never published":
            return "they were never published"
        # Of a detector or segmenter only the backbone is kept, which has no classifier.
        expected = entry.num_classes if entry.task == "classification" else 0
        if classes != expected:
            return f"the file's classifier has {classes} outputs, theirs {expected}"
        if channels not in (None, entry.input_size[0]):
            return f"the file is for images of {channels} channels, not {entry.input_size[0]}"
        own = {key: _plain(value) for key, value in entry.arguments}
        other = [key for key, value in arguments.items() if own.get(key, ...) != _plain(value)]
        return f"the model is built with another {', '.join(other)}" if other else None


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def claims(entry: WeightEntry | None) -> dict[str, Any]:
    """What timm's configuration says of the weights themselves; all None for the user's own."""
    found: dict[str, Any] = dict.fromkeys(_OF_WEIGHTS)
    if entry:
        found |= {
            "tag": entry.tag,
            "license": entry.licence,
            "origin_url": entry.origin,
            "paper_ids": f"arXiv:{entry.paper}" if entry.paper else None,
        }
    return found


def match_of(source: Path, model: str | None) -> Match | None:
    """The table's entry that a file is, or may be.

    Args:
        source: the weights file.
        model: `NAME`, `NAME.TAG` or None, as the user gave it.

    Raises:
        WeightsError: no such model in the zoo, or no such tag.
        CorruptFileError: a file of the cache with wrong content; it has been removed.
    """
    name, _, tag = (model or "").partition(".")
    if model:
        _check_name(name)
    entries = [entry for entry in all_entries() if name in ("", entry.model)]
    if tag:
        found = next((entry for entry in entries if entry.tag == tag), None)
        if found is None:
            known = ", ".join(entry.tag for entry in entries)
            raise WeightsError(f"{name} has no weights {tag!r}; known: {known or 'none'}")
        return Match(entry=found, certain=True)
    if proven := _of_content(source, entries) or _of_cache(source, entries):
        return Match(entry=proven, certain=True)
    # The cache writes an address' folders before the name.
    plain = source.name.rpartition("--")[2]
    for entry in entries if plain.endswith(_SUFFIXES) else ():
        if plain in {address.rpartition("/")[2] for address in entry.sources}:
            return Match(entry=entry, certain=False)
    return None


def _check_name(name: str) -> None:
    # timm's own models can do without: their files are what timm publishes.
    known = timm.list_models("vz_*")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`vitzoo list` has their names"
        raise WeightsError(f"the zoo has no model {name!r}; {hint}")


def _of_content(source: Path, entries: Iterable[WeightEntry]) -> WeightEntry | None:
    """The entry whose published sha256, or its digits in an address, is the file's."""
    digits: dict[str, WeightEntry] = {}
    for entry in entries:
        known = [digits_in_name(address.rpartition("/")[2]) for address in entry.sources]
        digits |= {hexes: entry for hexes in (entry.sha256, *known) if hexes}
    found = sha256_of(source) if digits else ""
    return next((entry for hexes, entry in digits.items() if found.startswith(hexes)), None)


def _of_cache(source: Path, entries: Iterable[WeightEntry]) -> WeightEntry | None:
    """The entry that the file was downloaded for, verified once more."""
    for entry in entries:
        for i, address in enumerate(entry.sources):
            if not _cached_as(source, address):
                continue
            sha256 = entry.sha256 if i == 0 else None
            alone = dataclasses.replace(entry, sources=(address,), sha256=sha256)
            found = download.cached(alone)
            if found and found.resolve() == source.resolve():
                return entry
    return None


def _cached_as(path: Path, address: str) -> bool:
    """Whether a path is named as the caches name an address' file: spares hashing all others."""
    if address.startswith("hf-hub:"):
        repository = address.removeprefix("hf-hub:").partition("@")[0].split("/")[:2]
        return "--".join(["models", *repository]) in path.absolute().parts
    return path.name == urllib.parse.urlparse(address).path.strip("/").replace("/", "--")
