"""Labelled images from folders, from timm's data set names and from installed packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from vitzoo.errors import InputError, missing_extra, some_of
from vitzoo.tasks.contract import DataOptions, UnreadableSample
from vitzoo.tasks.fashion_mnist import fashion_mnist_root
from vitzoo.tasks.pictures import open_image
from vitzoo.tasks.splits import TRAIN_FOLDERS, find_split, part_of

logger = logging.getLogger("vitzoo.data")

Transform = Callable[[Image.Image], Any]


@dataclass(kw_only=True)
class ImageDataOptions(DataOptions):
    """The recipe's `data` section for labelled images.

    Attributes:
        name: None or empty for a folder of class folders under `root`; `sklearn/digits`; or one of
            timm's names: `torch/fashion_mnist`, `torch/cifar10`, `hfds/ORG/NAME`, `wds/NAME`.
        train_split, val_split: names of the two halves; folders also answer to the usual synonyms.
        val_fraction: of a folder of class folders without a split, the part of each class that is
            kept for validation, the same files every time.
        train_first, val_first: keep only the first n samples.
        classes: keep only the samples of these classes, by number, which count from 0 then.
        num_classes: where the data set itself does not say (`wds/`).
        download: let torchvision fetch the data set into `root`.
        size: side of the images; the model's own if None.
        mean, std, interpolation, crop_pct: of the evaluation; the model's own if None.
    """

    name: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    val_fraction: float | None = None
    train_first: int | None = None
    val_first: int | None = None
    classes: list[int] | None = None
    num_classes: int | None = None
    download: bool = False
    size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


class Source(Protocol):
    """Images and labels by index, not yet transformed."""

    labels: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def image(self, index: int) -> tuple[Any, int]:
        """(file object, path or PIL image; class index)."""

    def where(self, index: int) -> str:
        """What to call the sample in a message."""


class ImageSamples(Dataset[Any]):
    """A source with a transform: `[index] -> (transformed image, class index)`."""

    def __init__(
        self, source: Source, transform: Transform, *, mode: str = "RGB", first: int | None = None
    ) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.length = len(source) if first is None else min(first, len(source))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        where = self.source.where(index)
        try:
            file, target = self.source.image(index)
        except OSError as error:
            raise UnreadableSample(where, error.strerror or str(error)) from None
        image = open_image(file, where=where, mode=self.mode)
        return self.transform(image), int(target)


class ImageStream(IterableDataset[Any]):
    """timm's streamed data sets (`wds/`, `hfids/`) with the zoo's transform."""

    def __init__(self, dataset: Any, transform: Transform) -> None:
        dataset.transform = transform
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as this epoch does."""
        self.dataset.set_epoch(epoch)

    def set_workers(self, workers: int) -> None:
        """Tell the reader how many processes share it."""
        self.dataset.set_loader_cfg(num_workers=workers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


@dataclass
class ReaderSource:
    """One of timm's map-style readers."""

    reader: Any
    labels: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.reader)

    def image(self, index: int) -> tuple[Any, int]:
        file, target = self.reader[index]
        return file, target

    def where(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True))


@dataclass
class ArraySource:
    """uint8 images (N, H, W) or (N, H, W, 3) in memory."""

    images: Any
    targets: Any
    labels: tuple[str, ...] | None
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(np.asarray(self.images[index])), int(self.targets[index])

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"


@dataclass
class SomeClasses:
    """The samples of some classes of a source, renumbered in the order of `labels`."""

    source: Source
    indices: list[int]
    number: dict[int, int]
    labels: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> tuple[Any, int]:
        file, target = self.source.image(self.indices[index])
        return file, self.number[int(target)]

    def where(self, index: int) -> str:
        return self.source.where(self.indices[index])


@dataclass
class TorchvisionSource:
    """A torchvision data set of (PIL image, class index)."""

    dataset: Any
    labels: tuple[str, ...] | None
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        return image, target

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"


def open_source(
    options: ImageDataOptions, *, train: bool, labels: tuple[str, ...] | None = None
) -> Source | ImageStream:
    """The images of one split, of all classes or those of `options.classes`; see `_open`."""
    if options.classes is None:
        return _open(options, train=train, labels=labels)
    source = _open(options, train=train)
    if isinstance(source, ImageStream):
        raise InputError("data.classes needs a data set with an index, not a stream")
    return some_classes(source, options.classes)


def some_classes(source: Source, classes: list[int]) -> SomeClasses:
    """Keep only some classes of a source.

    Raises:
        InputError: a class that the source does not have, or no sample left.
    """
    count = len(source.labels) if source.labels else None
    strangers = [i for i in classes if i < 0 or (count is not None and i >= count)]
    if strangers or len(set(classes)) != len(classes):
        raise InputError(
            f"data.classes={classes}: give different numbers from 0 to {(count or 0) - 1}"
        )
    targets = _targets(source)
    indices = [i for i, target in enumerate(targets) if target in classes]
    if not indices:
        raise InputError(f"data.classes={classes}: no sample has one of these classes")
    number = {old: new for new, old in enumerate(classes)}
    labels = tuple(source.labels[i] for i in classes) if source.labels else None
    return SomeClasses(source, indices, number, labels)


def _targets(source: Source) -> list[int]:
    """The class of every sample, without reading images where the source knows them."""
    if isinstance(source, ArraySource):
        return [int(target) for target in source.targets]
    if isinstance(source, TorchvisionSource) and hasattr(source.dataset, "targets"):
        return [int(target) for target in source.dataset.targets]
    if isinstance(source, ReaderSource) and hasattr(source.reader, "samples"):
        return [int(target) for _, target in source.reader.samples]
    return [int(source.image(i)[1]) for i in range(len(source))]


def _open(
    options: ImageDataOptions, *, train: bool, labels: tuple[str, ...] | None = None
) -> Source | ImageStream:
    """The images of one split.

    Args:
        options: the recipe's section.
        train: which split.
        labels: class names whose order the targets must follow; the data's own order if None.

    Raises:
        InputError: nothing there, an unknown name, or classes that are not among `labels`.
    """
    split = options.train_split if train else options.val_split
    name = options.name or ""
    prefix, _, rest = name.partition("/")
    if not name:
        return _folder(options, split, train=train, labels=labels)
    if name == "sklearn/digits":
        return digits(train=train)
    if prefix == "torch":
        return _torchvision(options, rest, split)
    if prefix in ("hfds", "hfids", "wds", "tfds"):
        return _timm_named(options, name, split, train=train)
    raise InputError(
        f"unknown data set {name!r} (data.name): leave it empty for a folder, or use "
        "sklearn/digits, torch/NAME, hfds/ORG/NAME, hfids/ORG/NAME or wds/NAME"
    )


def digits(*, train: bool) -> ArraySource:
    """scikit-learn's 1,797 digits: 8x8, a fifth held out, stratified, always the same split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise missing_extra("train", "scikit-learn") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    halves = train_test_split(
        images, bunch.target, test_size=0.2, random_state=0, stratify=bunch.target
    )
    part = 0 if train else 1
    labels = tuple(str(name) for name in bunch.target_names)
    return ArraySource(halves[part], halves[2 + part], labels, "sklearn/digits")


def _folder(
    options: ImageDataOptions, split: str, *, train: bool, labels: tuple[str, ...] | None
) -> ReaderSource:
    from timm.data.readers import create_reader

    if options.root is None:
        raise InputError("data.root is not set: give data.root=FOLDER, a folder of class folders")
    root = Path(options.root).expanduser()
    if not root.exists():
        raise InputError(f"data.root={options.root} does not exist")
    folder = find_split(root, split) if root.is_dir() else root
    fraction = options.val_fraction
    if folder == root and root.is_dir() and train and fraction is None:
        raise InputError(
            f"{root} has no train and val folders: make both, each with one folder a class, or "
            "hold out a part of each class for validation, data.val_fraction=0.1"
        )
    if folder != root and fraction is not None:
        raise InputError(
            f"{root} is split already: leave out data.val_fraction, or hold out a part of one "
            f"folder, data.root={folder}"
        )
    try:
        reader = create_reader("", root=str(folder))
    except (RuntimeError, OSError):
        raise InputError(
            f"no images in class folders under {folder} (expected {folder}/CLASS/IMAGE.jpg)"
        ) from None
    if any(Path(path).parent == folder for path, _ in reader.samples):
        raise InputError(
            f"{folder} has images outside of class folders (expected {folder}/CLASS/IMAGE.jpg)"
        )
    if fraction is not None:
        reader.samples = part_of(reader.samples, root, fraction, held_out=not train)
    found = {index: name for name, index in reader.class_to_idx.items()}
    source = ReaderSource(reader, tuple(found[i] for i in sorted(found)))
    if labels is not None and source.labels != labels:
        _follow_labels(source, labels, folder)
    return source


def _follow_labels(source: ReaderSource, labels: tuple[str, ...], folder: Path) -> None:
    """Renumber a folder's classes in the order of `labels`."""
    own = source.labels or ()
    strangers = [name for name in own if name not in labels]
    if strangers:
        raise InputError(
            f"{folder} has {len(own)} classes, {strangers[0]!r} among them, but the model knows "
            f"{len(labels)} ({some_of(labels)}): they must be "
            "the same classes"
        )
    missing = [name for name in labels if name not in own]
    if missing and own:
        logger.warning("%s has no image of %s", folder, some_of(missing))
    index = {name: i for i, name in enumerate(labels)}
    reader = source.reader
    reader.samples = [(path, index[own[target]]) for path, target in reader.samples]
    source.labels = labels


def _torchvision(options: ImageDataOptions, name: str, split: str) -> TorchvisionSource:
    from timm.data import create_dataset

    root = options.root
    if name == "fashion_mnist":
        root = fashion_mnist_root(options.root, download=options.download)
    elif root is None:
        raise InputError(f"data.root is not set: the folder of torchvision's {name}")
    split = "train" if split in TRAIN_FOLDERS else split
    try:
        dataset = create_dataset(f"torch/{name}", root=root, split=split, download=options.download)
    except (RuntimeError, OSError, AssertionError, TypeError) as error:
        raise InputError(f"torchvision's {name} in {root}: {error}") from None
    labels = getattr(dataset, "classes", None)
    return TorchvisionSource(dataset, tuple(labels) if labels else None, f"torch/{name}")


def _timm_named(
    options: ImageDataOptions, name: str, split: str, *, train: bool
) -> Source | ImageStream:
    """`hfds/`, `hfids/`, `wds/` and `tfds/` through timm."""
    from timm.data import create_dataset

    prefix = name.partition("/")[0]
    package = {"wds": "webdataset", "tfds": "tensorflow-datasets"}.get(prefix, "datasets")
    try:
        dataset = create_dataset(
            name,
            root=options.root,
            split=split,
            is_training=train,
            batch_size=options.batch_size,
        )
    except ImportError:
        raise InputError(
            f"data.name={name} needs the package {package!r}: pip install {package}"
        ) from None
    except (RuntimeError, OSError, AssertionError, ValueError) as error:
        raise InputError(f"data.name={name}: {error}") from None
    if isinstance(dataset, IterableDataset):
        return ImageStream(dataset, lambda image: image)
    by_name = getattr(dataset.reader, "class_to_idx", None) or {}
    found = {index: name for name, index in by_name.items()}
    labels = tuple(str(found[i]) for i in sorted(found)) or None
    return ReaderSource(dataset.reader, labels)
