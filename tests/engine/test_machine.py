"""Choices made by timing are the same for every run on a machine, and for a run that resumes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitzoo.engine.machine import fix_linear
from vitzoo.ops.linear import linear_choices, set_linear_choices

CLASSES = ("inference/narrow", "inference/wide", "training/narrow", "training/wide")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = linear_choices()
    yield
    set_linear_choices(before)


def test_the_first_run_decides_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([dict.fromkeys(CLASSES, "onednn"), dict.fromkeys(CLASSES, "reference")])
    # The package's attribute of that name is the function.
    module = importlib.import_module("vitzoo.ops.linear")
    monkeypatch.setattr(module, "_measure", lambda: next(measured))
    assert set(fix_linear(None).values()) == {"onednn"}
    set_linear_choices(None)
    assert set(fix_linear(None).values()) == {"onednn"}
    assert linear_choices() == dict.fromkeys(CLASSES, "onednn")


def test_a_checkpoint_outranks_the_machine() -> None:
    fix_linear(None)
    stored = dict.fromkeys(CLASSES, "reference")
    assert fix_linear(stored) == stored
    assert linear_choices() == stored


def test_a_damaged_memory_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "vitzoo").mkdir()
    (tmp_path / "vitzoo/linear.json").write_text('{"torch')
    first = fix_linear(None)
    assert fix_linear(None) == first
