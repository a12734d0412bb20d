"""Tiny trained runs, made once a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`run_of("detection")`: a run's folder; its photo lies beside it as `photo.png`."""
    for package in ("omegaconf", "accelerate", "pycocotools", "skimage"):
        pytest.importorskip(package)
    pytest.importorskip("segmentation_models_pytorch")
    from tests.engine.tiny_runs import scenes, tiny_run

    folder = tmp_path_factory.mktemp("runs")
    made: dict[str, Path] = {}

    def find(task: str) -> Path:
        if not made:
            root = scenes(folder / "scenes")
            (folder / "photo.png").write_bytes((root / "images/val/000000.png").read_bytes())
        if task not in made:
            made[task] = tiny_run(task, folder, folder / "scenes")
        return made[task]

    return find
