"""The table of `vitzoo bench gpu`, from a small report."""

from __future__ import annotations

import json
from pathlib import Path

from vitzoo.engine.bench_gpu_table import model_sentence, sentence, table, write


def form(ms: float, graph_ms: float | None) -> dict:
    return {"ms": ms, "graph_ms": graph_ms, "peak_bytes": 2**21}


REPORT = {
    "machine": {"device": "X", "capability": "9.0", "torch": "2", "python": "3", "date": "d"},
    "checks": [
        {"operator": "a", "backend": "triton", "dtype": "float16", "problem": "off by one"},
        {"operator": "a", "backend": "portable", "dtype": "float16", "problem": None},
    ],
    "rows": [
        {
            "operator": "window",
            "case": "c",
            "dtype": "bfloat16",
            "direction": "forward",
            "floor_ms": 0.01,
            "forms": {
                "triton": form(0.1, 0.02),
                "portable": {"failed": "no memory"},
                "gather_sdpa": form(0.09, 0.08),
                "eager": form(0.3, None),
            },
        }
    ],
    "models": [
        {
            "model": "m",
            "size": 224,
            "batch": 2,
            "triton": {
                "images_per_second": 10.0,
                "forward": form(500.0, 200.0),
                "train": form(5.0, 4.0),
            },
            "portable": {"images_per_second": None, "forward": {}, "train": {"failed": "x"}},
        }
    ],
}


def test_cells_say_what_was_measured() -> None:
    text = table(REPORT)
    assert "1 of 2 checks" in text
    assert "a triton float16: off by one" in text
    row = next(line for line in text.splitlines() if line.startswith("| window"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:9] == ["10", "20 (100)", "", "80", "300 called"]
    assert cells[-4:] == ["4.0", "2.0", "2", "2"]
    assert "| m | 224 | 2 | 10 (4) |  | 4.0 (5.0) |  | 2 |  |" in text


def test_sentences_stand_what_failed() -> None:
    said = sentence(REPORT["rows"][0])
    assert "triton 20 (100), portable , gather_sdpa 80, eager 300 called" in said
    assert model_sentence(REPORT["models"][0]) == "m 224, images/s: triton 10 (4), portable "


def test_the_committed_table_is_of_the_committed_figures(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    write(json.loads((folder / "gpu.json").read_text()), tmp_path / "gpu.json")
    assert (tmp_path / "gpu.md").read_text() == (folder / "gpu.md").read_text()
