"""Plots: learning curves, and the profile of a model's attention."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitzoo._paths import write_atomically
from vitzoo.errors import missing_extra


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path, *, metric: str, title: str) -> None:
    """Loss, metric and learning rate over the epochs.

    Args:
        lines: of `metrics.jsonl`.
        path: PNG to write.
        metric: the task's metric.
        title: of the picture.
    """
    evaluated = [line for line in lines if metric in line.get("metrics", {})]
    epochs = [line["epoch"] + 1 for line in lines]
    marker = "." if len(lines) < 40 else None
    figure = _figure(11, 3.4)
    loss, score, rate = figure.subplots(1, 3)
    loss.plot(epochs, [line["train_loss"] for line in lines], marker=marker, label="training")
    with_loss = [line for line in evaluated if "loss" in line["metrics"]]
    if with_loss:
        values = [line["metrics"]["loss"] for line in with_loss]
        loss.plot(
            [line["epoch"] + 1 for line in with_loss], values, marker=marker, label="held out"
        )
    loss.set_title("loss")
    loss.legend()
    values = [line["metrics"][metric] for line in evaluated]
    score.plot([line["epoch"] + 1 for line in evaluated], values, marker=marker, color="tab:green")
    score.set_title(f"{metric}, held out" + (f" (last {values[-1]:.2f})" if values else ""))
    rate.plot(epochs, [line["lr"] for line in lines], marker=marker, color="tab:red")
    rate.set_title("learning rate")
    for axes in (loss, score, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if len(lines) < 12:
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    _save(figure, path)


def draw_profile(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Distance, entropy and importance of every head, layer by layer.

    Args:
        lines: of `vitzoo.engine.profiling.profile`; a layer's name is its module, a slash and the
            operator, which has a colour.
        path: PNG to write.
    """
    kinds = list(dict.fromkeys(line["layer"].rpartition("/")[2] for line in lines))
    figure = _figure(max(8.0, 2 + 0.3 * len(lines)), 9)
    titles = {
        "distance_pixels": "mean distance, pixels",
        "entropy_bits": "entropy, bits",
        "importance": "share of importance",
    }
    rows = figure.subplots(3, 1, sharex=True)
    for axes, (key, title) in zip(rows, titles.items(), strict=True):
        for number, kind in enumerate(kinds):
            points = [
                (i, value)
                for i, line in enumerate(lines)
                if line["layer"].endswith(f"/{kind}")
                for value in line.get(key, [])
            ]
            at, values = zip(*points, strict=True) if points else ((), ())
            label = kind.replace("_", " ")
            axes.scatter(at, values, s=12, alpha=0.6, color=f"C{number}", label=label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    rows[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    names = [line["layer"].rpartition("/")[0] for line in lines]
    rows[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("train", "matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
