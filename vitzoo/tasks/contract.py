"""What a task is: the part of a training job that the engine does not know.

A task joins a backbone with a head and says what the data, the loss, the metrics and the results
are. The engine owns everything else: the loop, devices and processes, precision, the optimiser and
its schedule, EMA, checkpoints, resuming, logs. To add a task:

1. Write `vitzoo/tasks/<name>.py` with a dataclass of recipe sections and a subclass of `Task`.
2. Add one line to `TASKS` in `vitzoo/tasks/__init__.py`.
3. Put recipes under `configs/<name>/`; `task: <name>` is their first line.

The order of calls in a training process::

    task = TaskClass(options)            # options: the recipe's sections, typed
    data = task.build_data()             # sets nothing but may read files; engine sets task.labels
    task.labels = data.labels
    model = task.build_model()           # uses task.labels
    task.model = <model, wrapped for precision and processes>
    task.train_mode()                    # every epoch
    task.begin_update(update)            # before every optimiser update, the same in all processes
    task.training_step(batch)["loss"]    # every batch of it, already on task.device
    task.model = <EMA or model>.eval()
    task.evaluate(loader)                # -> {"top1": 91.2, ...}, at the end of an epoch

For evaluation and prediction of a finished run, `options` and `labels` come from the weights file,
`build_model` gives the architecture (the engine loads the weights into it), and `build_data` is
called only to evaluate.

Rules that make a killed run resume to the same result:

- A training dataset is map-style where it can be (`__len__`, `__getitem__(index)`), without state.
- Randomness comes from the global generators of `random`, `numpy` and `torch` only. The engine
  seeds them before each sample (from seed, epoch and position) and before each step (from seed,
  step and process), so results do not depend on the number of workers either, but for a stream,
  which they share.
- A sample that cannot be read raises `UnreadableSample`; the engine stops or skips as
  `data.on_error` says, and names the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

Batch = Any


class Prediction(Protocol):
    """One image's result; the fields are the task's."""

    def draw(self) -> Any:
        """The image with the result drawn on it, a `PIL.Image.Image`."""

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON's types."""


class UnreadableSample(Exception):  # noqa: N818 - the sample is what it names
    """A sample's file is missing, truncated or not what it should be."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.reason}"


@dataclass(kw_only=True)
class DataOptions:
    """Fields of every task's `data` section: the engine reads them.

    Attributes:
        root: folder of the data set.
        batch_size: training samples per process and step, before accumulation.
        eval_batch_size: the same for evaluation; `batch_size` if None.
        workers: loader processes; 0 loads in the training process. Of a map-style data set at most
            one a core is started.
        on_error: at an unreadable sample, `stop` with its name, or `skip` it with a log line
            (training takes the next one instead; evaluation leaves it out and counts it).
    """

    root: str | None = None
    batch_size: int = 64
    eval_batch_size: int | None = None
    workers: int = 2
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What `build_data` returns.

    Attributes:
        train: samples to learn from; None when only `val` was asked for.
        val: samples to evaluate on.
        labels: class names in the order of the model's outputs.
        collate: list of training samples -> batch.
        val_collate: the same for evaluation; `collate` if None.
    """

    train: Dataset[Any] | None
    val: Dataset[Any]
    labels: tuple[str, ...]
    collate: Callable[[list[Any]], Batch] = default_collate
    val_collate: Callable[[list[Any]], Batch] | None = None


class Task(ABC):
    """Base of the tasks; the module's docstring has the order of calls.

    Attributes:
        options_type: dataclass whose fields are the recipe's sections of this task, each a
            dataclass with defaults; `model` and `data` (a `DataOptions`) must be among them.
        metric: key of `evaluate`'s result that selects the best checkpoint, and leads in logs.
        maximise: whether more of `metric` is better.
        shown: keys of the metrics that an epoch's line has; all if empty. The log has all.
        endings: of the files that `predict` takes from a folder; those of images if empty.
        labels: class names in the order of the model's outputs.
        model: what steps and evaluation run; set by the engine.
        device: where batches are; set by the engine.
    """

    options_type: ClassVar[type]
    metric: ClassVar[str]
    maximise: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ()
    endings: ClassVar[tuple[str, ...]] = ()

    model: nn.Module
    labels: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def build_data(self, *, train: bool = True) -> TaskData:
        """Open the data; with `train=False` only what evaluation needs.

        Raises:
            InputError: nothing there, or not what the recipe says.
        """

    @abstractmethod
    def build_model(self, *, pretrained: bool = True) -> nn.Module:
        """The model for `self.labels`, on the CPU, with frozen parameters marked.

        Args:
            pretrained: load the weights that the recipe starts from; False when a checkpoint
                follows.

        Raises:
            InputError: unknown name, wrong arguments, or weights that do not fit.
        """

    def train_mode(self) -> None:
        """Put the model into training mode; override to keep frozen parts in evaluation mode."""
        self.model.train()

    def begin_update(self, update: int) -> None:
        """Tell the model which optimiser update comes next, for what it draws once an update.

        Every module of the model that has a `begin_update` is called, so that a backbone hears it
        inside a wrapper or a detector, too.

        Args:
            update: its number, from 0; a resumed run repeats it, and all processes have the same.
        """
        for module in self.model.modules():
            begin: Any = getattr(module, "begin_update", None)
            if begin is not None:
                begin(update)

    @abstractmethod
    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """One batch -> `loss` to differentiate, and any scalars to log beside it."""

    @abstractmethod
    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Metrics of `self.model` over a loader; called without gradients.

        With several processes each sees its share of the samples: reduce with `all_reduce_sum`.
        """

    @abstractmethod
    def predict(self, images: Sequence[Any]) -> Sequence[Prediction]:
        """Results for images, as `vitzoo.tasks.pictures.image_of` takes them.

        Raises:
            UnreadableSample: a path that is no readable image.
        """

    def published(self) -> Mapping[str, float]:
        """Metrics of the starting weights as their origin states them, to print beside ours."""
        return {}


@dataclass
class Running:
    """Sums of scalars over batches and processes, for means."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, float], count: int) -> None:
        """Add sums over `count` samples."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
        self.count += count

    def means(self, device: torch.device) -> dict[str, float]:
        """Means over the samples of all processes; empty if there were none."""
        keys = sorted(self.sums)
        total = torch.tensor([self.sums[key] for key in keys] + [self.count], dtype=torch.float64)
        *sums, count = all_reduce_sum(total, device).tolist()
        return {key: value / count for key, value in zip(keys, sums, strict=True)} if count else {}


def all_reduce_sum(values: Tensor, device: torch.device) -> Tensor:
    """Sum a tensor over the processes; returned on the CPU."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values.cpu()
    # MPS and some accelerators have no float64; sums of counts stay exact in float32 up to 2^24,
    # and distributed runs are on CUDA or the CPU, which have it.
    values = values.to(device)
    torch.distributed.all_reduce(values)
    return values.cpu()
