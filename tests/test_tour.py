"""The notebook's cells run, in their order, in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs/tour.ipynb"


def _cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_are_python() -> None:
    cells = _cells()
    assert len(cells) > 5
    for cell in cells:
        compile(cell, NOTEBOOK.name, "exec")


@pytest.mark.slow
def test_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, object] = {}
    for cell in _cells():
        exec(compile(cell, NOTEBOOK.name, "exec"), values)
    assert values["made"].agrees  # type: ignore[attr-defined]
    assert (tmp_path / "runs/tour/tour-float32.onnx").is_file()
