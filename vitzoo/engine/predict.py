"""Prediction on images with a run, a weights file, or a model by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.readers import get_img_extensions
from torch import nn

from vitzoo._paths import write_atomically
from vitzoo.engine.evaluate import Source, open_source, writable
from vitzoo.engine.recipe import merge
from vitzoo.engine.report import console
from vitzoo.errors import InputError
from vitzoo.tasks import Prediction, Task, UnreadableSample, task_class
from vitzoo.tasks._models import config_of, labels_in
from vitzoo.tasks.pictures import check_drawable
from vitzoo.tasks.results import contact_sheet

logger = logging.getLogger("vitzoo.data")

PRINTED = 100
DRAWN = 64


def load(
    model_or_run: Any, values: Sequence[str] = (), *, device: torch.device | None = None
) -> Task:
    """A task whose `predict` is ready.

    Args:
        model_or_run: a run (folder or name), a weights file, a model's `NAME.TAG`, or a timm model
            in memory.
        values: recipe values, such as `data.size=288`.
        device: where the model goes; the machine's accelerator, if it has one, unless told. One in
            memory stays where it is.

    Raises:
        InputError: nothing of that name, or weights that do not fit.
    """
    if isinstance(model_or_run, nn.Module):
        return _task_of_module(model_or_run, values)
    return ready(open_source(str(model_or_run), values), device)


def ready(source: Source, device: torch.device | None = None) -> Task:
    """The task of a source with its labels and model, on `device` as in `load`."""
    if device is None:
        own = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device("cpu") if own is None or source.recipe.run.device == "cpu" else own
    task = source.task()
    if source.weights is None:
        task.labels = _labels_of(source)
    source.load_model(task, device)
    return task


def _labels_of(source: Source) -> tuple[str, ...]:
    """Class names: those that the file or the configuration holds, else by their count."""
    options, count = source.recipe.options.model, source.known_classes()
    stored: Sequence[str] | None = None
    if options.checkpoint is not None:
        stored = labels_in(Path(options.checkpoint).expanduser())
    elif (config := config_of(options.name)) is not None:
        stored = config.label_names
    return tuple(stored) if stored and len(stored) == count else imagenet_labels(count)


def _task_of_module(model: nn.Module, values: Sequence[str]) -> Task:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if not name:
        raise InputError("a model in memory must come from timm.create_model")
    recipe = merge({"task": "classification", "model": {"name": name}}, values)
    task = task_class("classification")(recipe.options)
    task.model = model.eval()
    task.device = next(model.parameters()).device
    task.labels = imagenet_labels(int(model.num_classes))  # type: ignore[arg-type]
    return task


def imagenet_labels(count: int) -> tuple[str, ...]:
    """Names of the ImageNet subset of that size (1,000, 11,821, 21,841, ...), else numbers."""
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return tuple(str(i) for i in range(count))
    names = ImageNetInfo(subset)
    return tuple(names.index_to_description(i) for i in range(count))


def predict(model_or_run: Any, images: Any, values: Sequence[str] = ()) -> list[Prediction]:
    """Results for images; see `vitzoo.predict`."""
    if isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) < 4:
        images = [images]
    images = [str(image) if isinstance(image, Path) else image for image in images]
    return list(load(model_or_run, values).predict(images))


def image_files(given: Sequence[str], endings: Sequence[str] = ()) -> list[str]:
    """Image files from files and folders (with their subfolders), sorted.

    Args:
        given: as the user wrote them.
        endings: that files in a folder must have; those of images if none are given.

    Raises:
        InputError: something does not exist, or a folder holds no image.
    """
    found: list[str] = []
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            wanted = tuple(endings or get_img_extensions())
            inside = sorted(str(p) for p in path.rglob("*") if p.name.lower().endswith(wanted))
            if not inside:
                kind = f"files ({', '.join(endings)})" if endings else "images"
                raise InputError(f"no {kind} in {text}")
            found += inside
        elif path.is_file():
            found.append(str(path))
        else:
            raise InputError(f"{text} does not exist")
    if not found:
        raise InputError("no images given")
    return found


def predict_files(
    given: str,
    files: Sequence[str],
    values: Sequence[str] = (),
    *,
    top: int = 5,
    json_path: Path | None = None,
    draw: Path | None = None,
) -> None:
    """Predict on files or folders, print a table, write JSON.

    Args:
        given: a run, a weights file, or a model's `NAME.TAG`.
        files: image files and folders.
        values: recipe values; `data.on_error=skip` passes over unreadable images.
        top: classes to print of each image.
        json_path: where the JSON goes; `predictions.json` in the run's folder, or here, if None.
        draw: also draw the results into this picture.

    Raises:
        InputError: see `load` and `image_files`, or an unreadable image.
    """
    _check_targets(json_path, draw)
    source = open_source(given, values)
    if source.weights is None:
        source.classes()
    task = ready(source)
    facts: list[dict[str, Any]] = []
    shown: list[Prediction] = []
    skipped: list[str] = []
    pictures: list[Image.Image] = []
    for result in _readable(task, source, image_files(files, task.endings), skipped):
        # A result holds its whole image: a folder's do not fit into memory.
        facts.append(result.to_dict())
        if draw is not None and len(pictures) < DRAWN:
            pictures.append(result.draw())
        if len(shown) < PRINTED:
            shown.append(_without_image(result))
    if not facts:
        raise InputError("none of the images could be read")
    target = json_path or (source.folder or Path()) / "predictions.json"
    text = json.dumps({"model": given, "predictions": facts, "skipped": skipped}, indent=2)
    write_atomically(target, f"{text}\n".encode())
    _print(shown, len(facts), top)
    out = console()
    images = "1 image" if len(facts) == 1 else f"{len(facts)} images"
    out.print(f"{images} -> {target}", markup=False)
    if draw is not None:
        draw.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures).save(draw)
        out.print(f"first {len(pictures)} drawn -> {draw}", markup=False)


def _check_targets(json_path: Path | None, draw: Path | None) -> None:
    writable(json_path)
    if draw is not None:
        check_drawable(draw)


def _without_image(result: Any) -> Any:
    held = getattr(result, "image", None)
    return replace(result, image=None) if isinstance(held, Image.Image) else result


def _readable(
    task: Task, source: Source, paths: Sequence[str], skipped: list[str]
) -> Iterator[Prediction]:
    """Results batch by batch, so that one unreadable image costs no other."""
    data = source.recipe.options.data
    size = data.eval_batch_size or data.batch_size
    for start in range(0, len(paths), size):
        batch = list(paths[start : start + size])
        while batch:
            try:
                yield from task.predict(batch)
                break
            except UnreadableSample as error:
                if data.on_error == "stop":
                    raise InputError(f"{error} (data.on_error=skip passes over it)") from None
                logger.warning("%s; left out", error)
                skipped.append(error.path)
                batch.remove(error.path)


def _print(results: Sequence[Any], count: int, top: int) -> None:
    from rich.table import Table

    ranked = hasattr(results[0], "top")
    if not ranked and not hasattr(results[0], "summary"):
        return
    table = Table(box=None, header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column((f"best {top}" if top > 1 else "best") if ranked else "found")
    for result in results:
        if ranked:
            # Number and sign stay on one line.
            shares = (f"{one.label} {100 * one.score:.1f}\N{NO-BREAK SPACE}%" for one in result.top)
            text = "  ".join(islice(shares, top))
        else:
            text = result.summary()
        table.add_row(result.source or "", text)
    console().print(table)
    if count > len(results):
        console().print(f"... and {count - len(results)} more in the JSON file")
