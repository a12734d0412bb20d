"""Timed choices are the same for every run on a machine, and freed memory is used again."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitzoo.engine import machine
from vitzoo.engine.machine import fix_linear, keep_freed_memory
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


PAGES = """
import resource
import torch
from vitzoo.engine.machine import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def fewest():
    seen = []
    for _ in range(6):
        before = faults()
        torch.ones(2**24)
        seen.append(faults() - before)
    return min(seen)

print(fewest(), keep_freed_memory(), fewest())
"""


def fresh_pages() -> tuple[int, str, int]:
    """The fewest page faults of a tensor of 64 MB, what `keep_freed_memory` said, and the fewest
    after it, in a process of its own."""
    others = ("GLIBC_TUNABLES", "LD_PRELOAD")
    plain = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k not in others}
    done = subprocess.run(
        [sys.executable, "-c", PAGES],
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    )
    many, said, few = done.stdout.split()
    return int(many), said, int(few)


LIBRARY, VERSION = platform.libc_ver()


@pytest.mark.skipif(
    LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35),
    reason="other C libraries are left alone, and glibc before 2.35 refuses",
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerators have their own memory")
def test_freed_memory_is_used_again() -> None:
    many, said, few = fresh_pages()
    assert said == "True"
    # Huge pages make few of many.
    assert few < 10 < many


class Refusing:
    """A C library that refuses the first setting, as glibc before 2.35."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def mallopt(self, number: int, value: int) -> int:
        self.asked.append(number)
        return 0


def test_a_refusal_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda name: "MALLOC" in name, os.environ), "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name, raising=False)
    library = Refusing()
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.34"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not keep_freed_memory()
    assert library.asked == [-3]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")],
)
def test_settings_of_the_user_are_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
