"""Batches whose content depends on seed, epoch and position only.

Each training sample is drawn under its own seed, so augmentation is the same with any number of
loader processes, and a run that resumes in the middle of an epoch needs no loader state: it starts
the order of that epoch at its position.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample

logger = logging.getLogger("vitzoo.data")


def seed_everything(*parts: int) -> None:
    """Seed `random`, numpy and torch (all devices) from integers.

    The parts are hashed, so that neighbouring steps do not get related streams.
    """
    state = np.random.SeedSequence(parts).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002 - timm's mixup draws from the global generator
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


@dataclass(frozen=True)
class Draw:
    """A request for one sample: its index and the seed to draw it under."""

    index: int
    seed: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Bad:
    """A sample that could not be read, on its way from a loader process."""

    path: str
    reason: str


@dataclass(frozen=True)
class Collated:
    """A batch and the samples that are missing from it."""

    batch: Any
    bad: tuple[Bad, ...]


class _Seeded(Dataset[Any]):
    """Answers `Draw`s; with `substitute` an unreadable sample gives way to the next readable."""

    def __init__(self, dataset: Any, *, substitute: bool) -> None:
        self.dataset = dataset
        self.substitute = substitute
        self.reported: set[str] = set()

    def __getitem__(self, draw: Draw) -> Any:
        first: Bad | None = None
        for offset in range(len(self.dataset) if self.substitute else 1):
            if draw.seed is not None:
                seed_everything(*draw.seed)
            try:
                return self.dataset[(draw.index + offset) % len(self.dataset)]
            except UnreadableSample as error:
                first = first or Bad(error.path, error.reason)
                if self.substitute and error.path not in self.reported:
                    self.reported.add(error.path)
                    logger.warning("%s; training takes the next one instead", error)
        return first


@dataclass
class _Collate:
    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Collated:
        good = [sample for sample in samples if not isinstance(sample, Bad)]
        bad = tuple(sample for sample in samples if isinstance(sample, Bad))
        return Collated(self.collate(good) if good else None, bad)


class _Order:
    """Batch sampler of one process; set for an epoch before it is iterated."""

    def __init__(
        self, length: int, batch_size: int, *, train: bool, seed: int, rank: int, world: int
    ) -> None:
        self.length, self.batch_size, self.train = length, batch_size, train
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        if self.train:
            return self.length // (self.batch_size * self.world)
        return len(self._eval_starts())

    def _eval_starts(self) -> list[int]:
        """Where evaluation's batches over all processes start.

        Sharded models meet in every forward, so each process gets as many batches as the others: a
        tail too small to go round joins the batch before.
        """
        starts = list(range(0, self.length, self.batch_size * self.world))
        if len(starts) > 1 and self.length - starts[-1] < self.world:
            starts.pop()
        return starts

    def __iter__(self) -> Iterator[list[Draw]]:
        if not self.train:
            starts = self._eval_starts()
            for start, end in zip(starts, [*starts[1:], self.length], strict=True):
                mine = range(start + self.rank, end, self.world)
                if mine:
                    yield [Draw(index) for index in mine]
            return
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(self.skip, len(self)):
            start = (batch * self.world + self.rank) * self.batch_size
            yield [
                Draw(order[position], (self.seed, self.epoch, position))
                for position in range(start, start + self.batch_size)
            ]


class _SeededStream(IterableDataset[Any]):
    """A streamed data set, each sample drawn under a seed of its place in its loader process."""

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset, self.seed, self.rank = dataset, seed, rank
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        place = (self.rank, worker.id if worker else 0)
        samples = iter(self.dataset)
        for position in range(2**62):
            seed_everything(self.seed, self.epoch, *place, position)
            try:
                sample = next(samples)
            except StopIteration:
                return
            yield sample


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Batches:
    """The batches of one split for one process.

    Args:
        dataset: map-style, or a stream with `set_epoch` and `set_workers`.
        collate: list of samples -> batch.
        batch_size: samples a batch and process.
        workers: loader processes; of a map-style data set at most one a core.
        train: shuffled, whole batches only; else every sample once, in order.
        on_error: `stop` or `skip`.
        seed: of order and augmentation.
        rank, world: this process and how many there are.

    Raises:
        InputError: fewer training samples than a batch.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        *,
        batch_size: int,
        workers: int,
        train: bool,
        on_error: str,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.train, self.on_error = train, on_error
        self.bad: list[Bad] = []
        self.stream = dataset if isinstance(dataset, IterableDataset) else None
        # More get in each other's way, and torch warns. The order of a stream depends on how many
        # share it.
        if self.stream is None and workers > (cores := _cores()):
            logger.info("%d loader processes for %d cores instead of %d", cores, cores, workers)
            workers = cores
        shared: dict[str, Any] = {
            "num_workers": workers,
            "collate_fn": _Collate(collate),
            "persistent_workers": workers > 0 and train and self.stream is None,
        }
        if self.stream is not None:
            self.stream.set_workers(workers)  # type: ignore[attr-defined]
            self._seeded = _SeededStream(self.stream, seed, rank)
            self.loader = DataLoader(self._seeded, batch_size=batch_size, drop_last=train, **shared)
            self.length = len(dataset) // (batch_size * world)
            return
        self.order = _Order(
            len(dataset), batch_size, train=train, seed=seed, rank=rank, world=world
        )
        if train and not len(self.order):
            raise InputError(
                f"{len(dataset)} training samples are fewer than one batch "
                f"({batch_size} x {world} processes): lower data.batch_size"
            )
        samples = _Seeded(dataset, substitute=train and on_error == "skip")
        self.loader = DataLoader(samples, batch_sampler=self.order, **shared)
        self.length = len(self.order)

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch from number `skip` on.

        Raises:
            InputError: an unreadable sample where `on_error` is `stop`, or no readable one at all.
        """
        if self.stream is None:
            self.order.epoch, self.order.skip = epoch, skip
            return self._checked(iter(self.loader))
        self.stream.set_epoch(epoch)  # type: ignore[attr-defined]
        self._seeded.epoch = epoch
        batches = iter(self.loader)
        for _ in range(skip):
            # A stream has no positions: what was seen before the kill is read past.
            next(batches)
        return self._checked(batches)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def _checked(self, batches: Iterator[Collated]) -> Iterator[Any]:
        self.bad = []
        for collated in batches:
            for bad in collated.bad:
                if self.on_error == "stop":
                    raise InputError(
                        f"cannot read {bad.path}: {bad.reason} (data.on_error=skip passes over it)"
                    )
                if self.train:
                    raise InputError(f"no readable training image: {bad.path}: {bad.reason}")
                logger.warning("cannot read %s: %s; left out", bad.path, bad.reason)
                self.bad.append(bad)
            if collated.batch is not None:
                yield collated.batch
