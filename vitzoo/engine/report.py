"""What a user sees of a training run: a progress bar, or one line an epoch without a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from vitzoo.errors import missing_extra


def console() -> Any:
    """rich's console on the standard output.

    Raises:
        InputError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError:
        raise missing_extra("train", "rich") from None
    return Console(highlight=False, soft_wrap=True)


class Report:
    """Progress of one process's run; silent where `enabled` is False (all but the first process).

    Args:
        total: epochs.
        metric: the key that leads each line.
        shown: keys of the metrics that it has; all if empty.
        enabled: whether to print at all.
    """

    def __init__(
        self, total: int, metric: str, *, shown: Sequence[str] = (), enabled: bool = True
    ) -> None:
        self.total, self.metric, self.enabled = total, metric, enabled
        self.shown = tuple(shown)
        self.console = console() if enabled else None
        self._bar: Any = None
        self._task: Any = None
        self._shown = 0.0

    def __enter__(self) -> Report:
        if self.enabled and self.console.is_terminal:  # type: ignore[union-attr]
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """One line."""
        if self.enabled:
            self.console.print(text, markup=False)  # type: ignore[union-attr]

    def start(self, what: str, steps: int, *, done: int = 0) -> None:
        """A new bar."""
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=steps, completed=done, note="")

    def step(self, note: str = "") -> None:
        """One step of the bar."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)

    @property
    def wants_note(self) -> bool:
        """Whether a note would be seen now: reading the loss waits for the device."""
        now = time.monotonic()
        if self._bar is None or now - self._shown < 0.5:
            return False
        self._shown = now
        return True

    def chosen(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics that a line has, the leading one first."""
        keys = dict.fromkeys([self.metric, *(self.shown or metrics)])
        return {key: metrics[key] for key in keys if key in metrics}

    def epoch(self, facts: Mapping[str, Any]) -> None:
        """The line of a finished epoch."""
        number = facts["epoch"] + 1
        width = len(str(self.total))
        parts = [f"epoch {number:>{width}}/{self.total}", f"train loss {facts['train_loss']:.4f}"]
        for key, value in self.chosen(facts.get("metrics", {})).items():
            parts.append(f"{key} {value:.{4 if key == 'loss' else 2}f}")
        parts += [f"lr {facts['lr']:.2e}", f"{facts['samples_per_second']:.0f} samples/s"]
        self.line("  ".join(parts))
