"""Which kernels `auto` may take: what is recorded, on which device, for which source."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from vitzoo.ops import _proven

RECORD = {
    "operator": "window_attention",
    "dtype": "bfloat16",
    "direction": "forward",
    "capability": "9.0",
}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder and no committed records."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_proven, "cache_folder", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(_proven, "COMMITTED", tmp_path / "committed.json")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    _proven.forget()
    yield tmp_path
    _proven.forget()


def test_the_committed_records_are_of_these_kernels() -> None:
    """Whoever changes a kernel empties the file, or proves it anew (`vitzoo bench gpu`)."""
    committed = Path(_proven.__file__).with_name("proven.json")
    for record in _proven.read_records(committed):
        assert record["direction"] in _proven.DIRECTIONS
        assert record["kernels"] == _proven.kernels_digest()


def test_a_record_counts_for_its_own_key_only() -> None:
    assert not _proven.proven(**RECORD)
    _proven.write_records([RECORD])
    assert _proven.proven(**RECORD)
    for key, other in [("dtype", "float16"), ("direction", "backward"), ("capability", "8.0")]:
        assert not _proven.proven(**{**RECORD, key: other})


def test_changed_kernels_void_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    _proven.write_records([RECORD])
    monkeypatch.setattr(_proven, "kernels_digest", lambda: "another")
    assert not _proven.proven(**RECORD)


def test_a_new_record_replaces_the_old(files: Path) -> None:
    _proven.write_records([{**RECORD, "error": 1.0}])
    _proven.write_records([{**RECORD, "error": 2.0}, {**RECORD, "direction": "backward"}])
    records = _proven.read_records(files / "proven.json")
    assert [(r["direction"], r.get("error")) for r in records] == [
        ("forward", 2.0),
        ("backward", None),
    ]


def test_training_needs_both_directions() -> None:
    _proven.write_records([RECORD])
    asked = ("window_attention", torch.bfloat16)
    assert _proven.why_not_proven(*asked, False, 0) is None
    assert "backward kernels have not been compared" in _proven.why_not_proven(*asked, True, 0)
    _proven.write_records([{**RECORD, "direction": "backward"}])
    assert _proven.why_not_proven(*asked, True, 0) is None


def test_a_spoilt_file_is_said_once_and_passed_over(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (files / "proven.json").write_text(json.dumps({"records": [{"operator": "x"}]}))
    with caplog.at_level(logging.WARNING, logger="vitzoo.ops"):
        assert not _proven.proven(**RECORD)
        assert not _proven.proven(**RECORD)
    assert len(caplog.records) == 1
    assert "without capability" in caplog.text


def test_an_incomplete_record_is_refused() -> None:
    with pytest.raises(ValueError, match="a record needs"):
        _proven.write_records([{**RECORD, "direction": "sideways"}])


def test_the_question_does_not_break_a_graph() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def ask(x: torch.Tensor) -> torch.Tensor:
        reason = _proven.why_not_proven("window_attention", x.dtype, False, 0)
        return x + 1 if reason is None else x - 1

    assert ask(torch.zeros(1)).item() == -1
