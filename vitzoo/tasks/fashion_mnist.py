"""Where Fashion-MNIST lies on this machine."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from pathlib import Path

from vitzoo._paths import cache_folder
from vitzoo.errors import InputError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist_root(root: str | None, *, download: bool) -> str:
    """A folder that torchvision reads Fashion-MNIST from.

    In order: `root` as torchvision lays it out; the four .gz files under `root`, or those of the
    Debian package `dataset-fashion-mnist`, unpacked into the user's cache; a download.

    Raises:
        InputError: none of these is there.
    """
    cache = cache_folder("datasets")
    packed = Path(root).expanduser() if root else DEBIAN_FASHION_MNIST
    target = (packed if root else cache) / "FashionMNIST" / "raw"
    if len(list(target.glob("*-ubyte"))) == 4 or download:
        return str(target.parent.parent)
    archives = sorted(packed.glob("*-ubyte.gz"))
    if len(archives) != 4:
        raise InputError(
            "Fashion-MNIST is not here: install the Debian package dataset-fashion-mnist, or give "
            "data.root=FOLDER with its four .gz files, or let torchvision fetch it with "
            "data.download=true"
        )
    if root:
        # Not beside the real ones: a folder may hold anything under their names.
        cache = cache / hashlib.sha256(str(packed.resolve()).encode()).hexdigest()[:12]
    target = cache / "FashionMNIST" / "raw"
    target.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        partial = target / f"{archive.stem}.{os.getpid()}.part"
        with gzip.open(archive) as packed_file, partial.open("wb") as file:
            shutil.copyfileobj(packed_file, file)
        partial.replace(target / archive.stem)
    return str(cache)
