"""The tasks by name; `contract` says what a task is and how to add one."""

from __future__ import annotations

import difflib
import importlib

from vitzoo.errors import InputError
from vitzoo.tasks.contract import (
    DataOptions,
    Prediction,
    Running,
    Task,
    TaskData,
    UnreadableSample,
    all_reduce_sum,
)

__all__ = [
    "TASKS",
    "DataOptions",
    "Prediction",
    "Running",
    "Task",
    "TaskData",
    "UnreadableSample",
    "all_reduce_sum",
    "task_class",
]

# Name in recipes -> where its class is; imported when asked for, since a task may need an extra.
TASKS = {
    "classification": "vitzoo.tasks.classification:ClassificationTask",
    "detection": "vitzoo.tasks.detection.task:DetectionTask",
    "detection3d": "vitzoo.tasks.detection3d.task:Detection3DTask",
    "segmentation": "vitzoo.tasks.segmentation.task:SegmentationTask",
    "sparsifiner": "vitzoo.tasks.sparsifiner:SparsifinerTask",
}


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        InputError: no such task; the message names those there are.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}"
        raise InputError(f"unknown task {name!r}; {hint}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
