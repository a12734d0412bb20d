"""A run that is killed and started again ends where an undisturbed one does, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.engine.narrow import narrow
from vitzoo.engine import checkpoint
from vitzoo.engine.runfolder import RunFolder
from vitzoo.engine.train import train
from vitzoo.errors import InputError

ROOT = Path(__file__).parents[2]


class Forker:
    """Training processes that can be killed; see `forker.py`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.forker"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, *values: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(values) + "\n")
        self.process.stdin.flush()
        return int(self._ask())

    def ended(self) -> int:
        return int(self._ask().removeprefix("exit "))


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    made = Forker()
    yield made
    made.process.communicate()


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """All tensors of the last checkpoint and of the kept weights, and the log without times."""
    run = RunFolder(folder / "run")
    saved = checkpoint.newest(run.checkpoints)
    assert saved is not None
    tensors = saved.tensors | {
        f"kept.{name}": tensor for name, tensor in checkpoint.read(run.weights).tensors.items()
    }
    timed = ("seconds", "samples_per_second")
    lines = [{k: v for k, v in line.items() if k not in timed} for line in run.read_metrics()]
    return tensors, lines


def assert_same(left: Path, right: Path) -> None:
    mine, my_lines = outcome(left)
    others, other_lines = outcome(right)
    assert mine.keys() == others.keys()
    different = [name for name in mine if not torch.equal(mine[name], others[name])]
    assert not different
    assert my_lines == other_lines


def wait_for_part(folder: Path, pid: int) -> None:
    """Return while a checkpoint is being written."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if any(folder.glob(".update-*.part")):
            return
    pytest.fail(f"process {pid} saved nothing in a minute")


def test_five_kills_change_nothing(forker: Forker, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    started = time.monotonic()
    forker.start(str(calm))
    assert forker.ended() == 0
    seconds = time.monotonic() - started
    moments = random.Random(7)
    checkpoints = RunFolder(killed / "run").checkpoints
    caught = 0
    for kill in range(5):
        pid = forker.start(str(killed))
        if kill in (1, 3):
            wait_for_part(checkpoints, pid)
        else:
            # From before the first step to well after it, yet never to the end of the run.
            time.sleep(moments.uniform(0.1, 0.3) * seconds)
        os.kill(pid, signal.SIGKILL)
        caught += forker.ended() == -signal.SIGKILL
    assert caught == 5
    forker.start(str(killed))
    assert forker.ended() == 0
    assert_same(calm, killed)
    assert not list(checkpoints.glob(".*.part"))


def test_a_torn_newest_checkpoint_gives_way_to_the_one_before(
    forker: Forker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    forker.start(str(calm))
    assert forker.ended() == 0
    forker.start(str(torn))
    assert forker.ended() == 0
    checkpoints = RunFolder(torn / "run").checkpoints
    newest = max(checkpoints.glob("*.safetensors"))
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    forker.start(str(torn))
    assert forker.ended() == 0
    assert_same(calm, torn)
    # A single wrong byte is seen too.
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    found = checkpoint.newest(checkpoints)
    assert found is not None
    assert "does not match its SHA-256" in caplog.text
    with pytest.raises(InputError, match="damaged"):
        checkpoint.read(newest)


def test_a_live_lock_refuses_and_a_dead_one_does_not(forker: Forker, tmp_path: Path) -> None:
    pid = forker.start(str(tmp_path))
    run = RunFolder(tmp_path / "run")
    wait_for_part(run.checkpoints, pid)
    before = run.recipe.read_bytes()
    with pytest.raises(InputError, match=f"in use by process {pid}"):
        train(narrow(tmp_path))
    assert run.recipe.read_bytes() == before
    os.kill(pid, signal.SIGKILL)
    forker.ended()
    with run.locked():
        pass


def test_another_recipe_does_not_go_on(tmp_path: Path) -> None:
    values = ("schedule.epochs=1", "schedule.warmup_epochs=0", "data.train_first=32")
    train(narrow(tmp_path, *values))
    with pytest.raises(InputError, match=r"optim\.lr=0\.001 \(now 0\.5\)"):
        train(narrow(tmp_path, *values, "optim.lr=0.5"))
    lines = RunFolder(tmp_path / "run").read_metrics()
    # A finished run is not trained on, and what cannot change the result may change.
    summary = train(narrow(tmp_path, *values, "data.workers=1"))
    assert summary.metrics == lines[-1]["metrics"]
    assert RunFolder(tmp_path / "run").read_metrics() == lines


def test_nothing_of_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    train(narrow(tmp_path, "schedule.epochs=1", "schedule.warmup_epochs=0", "data.train_first=32"))
    run = RunFolder(tmp_path / "run")
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert run.weights in files
    for path in files:
        if path.suffix == ".safetensors":
            # It begins with a length, whose bytes can be those of a pickle: read it instead.
            assert safetensors.torch.load_file(path), path
        else:
            assert not path.read_bytes().startswith((b"PK", b"\x80")), path
    assert json.loads(run.metrics.read_text().splitlines()[0])["epoch"] == 0
