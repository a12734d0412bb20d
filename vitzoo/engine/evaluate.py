"""Evaluation of a run, a weights file or published weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitzoo._paths import write_atomically
from vitzoo.engine import checkpoint
from vitzoo.engine.loaders import Batches
from vitzoo.engine.machine import make_accelerator
from vitzoo.engine.recipe import Recipe, merge
from vitzoo.engine.report import Report
from vitzoo.engine.runfolder import RunFolder, find_run
from vitzoo.errors import InputError
from vitzoo.tasks import Task, task_class
from vitzoo.tasks._models import ELSEWHERE, classes_in, config_of, has_other_labels, known_name


@dataclass(frozen=True)
class Source:
    """A trained model as a user names it.

    Attributes:
        title: what to call it.
        recipe: of its training, with the user's values; of published weights the defaults.
        weights: the file's content; None where timm loads published weights.
        folder: of the run, if it is one.
    """

    title: str
    recipe: Recipe
    weights: checkpoint.Checkpoint | None
    folder: Path | None

    def task(self) -> Task:
        """The task, with the labels of the weights where they come from a run."""
        task = task_class(self.recipe.task)(self.recipe.options)
        if self.weights is not None:
            task.labels = tuple(self.weights.facts["labels"])
        return task

    def known_classes(self) -> int:
        """Outputs of the trained classifier that a name stands for, 0 if it has none."""
        options = self.recipe.options.model
        if options.checkpoint is not None:
            return classes_in(Path(options.checkpoint).expanduser(), options.name) or 0
        config = config_of(options.name)
        return int(config.num_classes) if config else 1000

    def classes(self) -> int:
        """Outputs of the trained classifier that a name stands for.

        Raises:
            InputError: it has none.
        """
        count = self.known_classes()
        if not count:
            options = self.recipe.options.model
            what = options.checkpoint or options.name
            raise InputError(f"{what} has no classifier: fine-tune it first (vitzoo train ...)")
        return count

    def load_model(self, task: Task, device: torch.device) -> None:
        """Put the trained model into the task, ready to evaluate."""
        options = self.recipe.options.model
        if self.weights is None and (options.pretrained or options.checkpoint is not None):
            known = self.known_classes()
            if known != len(task.labels):
                # timm would replace the classifier with a random one.
                raise InputError(f"{self.title} knows {known} classes, not {len(task.labels)}")
            file = options.checkpoint
            if has_other_labels(file, task.labels):
                raise InputError(f"{file} was trained for other classes than the data's")
        model = task.build_model(pretrained=self.weights is None)
        if self.weights is not None:
            try:
                model.load_state_dict(self.weights.tensors)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"the weights of {self.title} do not fit: {reason}") from None
        task.model = model.to(device).eval()
        task.device = device


def open_source(given: str, values: Sequence[str] = ()) -> Source:
    """Find a run (folder or name), a weights file, or a model by name.

    Args:
        given: as the user wrote it.
        values: `key=value` arguments on top of the recipe that is stored with the weights.

    Raises:
        InputError: none of these; or a run without weights; or another task than its own.
    """
    path = find_run(given)
    folder = None if path is None else path if path.is_dir() else path.parent
    if path is not None and folder is not None and (folder / "config.json").is_file():
        # What `vitzoo weights convert` writes, or one of the hub's snapshots.
        given, path = f"local-dir:{folder}", None
    elif Path(given).expanduser().is_file() and path is None:
        raise InputError(_ask_for_name(given))
    if path is None:
        try:
            known_name(given, elsewhere=True)
        except InputError as error:
            if given.startswith(ELSEWHERE):
                raise
            raise InputError(f"no run {given!r} here, and {error}") from None
        written = {"task": "classification", "model": {"name": given, "pretrained": True}}
        return Source(given, merge(written, values), None, None)
    file = RunFolder(path).weights if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} has no weights.safetensors: no epoch of it is finished yet")
    if not checkpoint.is_ours(file):
        raise InputError(_ask_for_name(str(file)))
    weights = checkpoint.read(file)
    recipe = merge(weights.facts["recipe"], values, where=str(file))
    if recipe.task != weights.facts["task"]:
        raise InputError(f"{given} is for {weights.facts['task']}, not for {recipe.task}")
    return Source(given, recipe, weights, path if path.is_dir() else None)


@torch.no_grad()
def evaluate(
    given: str, values: Sequence[str] = (), *, json_path: Path | None = None
) -> dict[str, float]:
    """Evaluate and print a table of measured and published figures.

    Args:
        given: a run, a weights file, or a model's `NAME.TAG`.
        values: `key=value` arguments, `data.root=FOLDER` among them.
        json_path: also write the figures here.

    Returns:
        The measured figures.

    Raises:
        InputError: see `open_source`; or data whose classes are not the model's.
    """
    writable(json_path)
    source = open_source(given, values)
    task = source.task()
    data = task.build_data(train=False)
    if source.weights is None and (known := source.classes()) != len(data.labels):
        raise InputError(
            f"the data has {len(data.labels)} classes, but {given} was trained for {known}: "
            "fine-tune it first (vitzoo train ... --pretrained)"
        )
    task.labels = data.labels
    accelerator = make_accelerator(source.recipe)
    source.load_model(task, accelerator.device)
    options = source.recipe.options.data
    batches = Batches(
        data.val,
        data.val_collate or data.collate,
        batch_size=options.eval_batch_size or options.batch_size,
        workers=options.workers,
        train=False,
        on_error=options.on_error,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    with Report(1, task.metric, enabled=accelerator.is_main_process) as report:
        report.start(f"evaluating {given}", len(batches))
        with accelerator.autocast():
            metrics = task.evaluate(_shown(batches, accelerator.device, report))
    if not metrics:
        raise InputError("nothing to evaluate on: no readable sample")
    if accelerator.is_main_process:
        published = dict(task.published()) if source.weights is None else {}
        samples = len(data.val) - len(batches.bad)  # type: ignore[arg-type]
        _print_table(given, samples, metrics, published, len(batches.bad))
        if json_path is not None:
            facts = {"model": given, "samples": samples, "measured": metrics}
            facts |= {"published": published, "unreadable": len(batches.bad)}
            write_atomically(json_path, (json.dumps(facts, indent=2) + "\n").encode())
    return metrics


def _ask_for_name(file: str) -> str:
    return (
        f"{file} was not written by vitzoo train, so it does not say which model it is for: give "
        f"the model's name, and the file as model.checkpoint={file}"
    )


def writable(path: Path | None) -> Path | None:
    """The path of a file to write, checked before any work is done.

    Raises:
        InputError: it is a folder, or its folder does not exist.
    """
    if path is not None and path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    return path


def _shown(batches: Batches, device: torch.device, report: Report) -> Iterator[Any]:
    from accelerate.utils import send_to_device

    for batch in batches:
        yield send_to_device(batch, device)
        report.step()


def _print_table(
    title: str, samples: int, metrics: dict[str, float], published: dict[str, float], bad: int
) -> None:
    from rich.table import Table

    from vitzoo.engine.report import console

    left_out = f", {bad} more could not be read" if bad else ""
    table = Table(title=f"{title} on {samples} samples{left_out}", title_justify="left", box=None)
    table.add_column("metric")
    table.add_column("measured", justify="right")
    if published:
        table.add_column("published", justify="right")
    for key, value in metrics.items():
        row = [key, f"{value:.4f}" if key == "loss" else f"{value:.2f}"]
        if published:
            row.append(f"{published[key]:.2f}" if key in published else "")
        table.add_row(*row)
    console().print(table)
