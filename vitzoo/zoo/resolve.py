"""From what a user asked of timm to a verified local file.

timm checks no content: same-length wrong bytes from a server and a flipped byte in the cache both
load without a word. So a zoo model resolves its source here and hands timm a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from vitzoo.zoo.download import WEIGHT_FILES, fetch, fetch_source
from vitzoo.zoo.errors import WeightsError
from vitzoo.zoo.files import check_weights
from vitzoo.zoo.published import find_entry


def local_overlay(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, Any] | None:
    """What to lay over a resolved timm configuration so that it reads a verified local file.

    Args:
        cfg: timm's configuration after the user's overlay.
        cache_dir: instead of the default caches.

    Returns:
        `file` and `source`, or None where the user handed over a state dict.

    Raises:
        WeightsError: the source delivers nothing, or nothing that is safe to load.
    """
    if cfg.state_dict is not None:
        return None
    if cfg.file:
        path = Path(cfg.file).expanduser()
        if path.is_dir():
            path = weights_in(path)
        # timm would refuse a bad file too, but its error advises to switch the safety off.
        check_weights(path)
    else:
        path = _downloaded(cfg, cache_dir)
    # A file goes ahead of hub and address unless `source` says otherwise.
    return {"file": str(path), "source": None}


def weights_in(folder: Path) -> Path:
    """The weights file of a folder as timm and `vitzoo weights convert` write it.

    Raises:
        WeightsError: it has none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}")


def _downloaded(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    source = f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    entry = find_entry(f"{cfg.architecture}.{cfg.tag}") if cfg.tag else None
    if entry and (not source or source in entry.sources):
        return fetch(entry, cache_dir=cache_dir)
    if not source:
        raise WeightsError(
            f"no weights are published for {cfg.architecture}. Give a local file: "
            'pretrained_cfg_overlay={"file": PATH}, or leave out pretrained=True.'
        )
    if cfg.hf_hub_id and cfg.hf_hub_filename:
        source = f"{source}/{cfg.hf_hub_filename}"
    return fetch_source(source, cache_dir=cache_dir)
