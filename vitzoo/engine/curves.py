"""Learning curves as a picture."""

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("train", "matplotlib") from None
    evaluated = [line for line in lines if metric in line.get("metrics", {})]
    epochs = [line["epoch"] + 1 for line in lines]
    marker = "." if len(lines) < 40 else None
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
