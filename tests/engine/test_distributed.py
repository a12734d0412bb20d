"""Two processes on the CPU, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.narrow import NARROW
from vitzoo.engine import checkpoint
from vitzoo.engine.recipe import write_recipe
from vitzoo.engine.runfolder import RunFolder

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *values: str) -> RunFolder:
    recipe = folder / "narrow.yaml"
    recipe.write_text(write_recipe(NARROW | {"augment": {}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "tools/train.py", str(recipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"run.folder={folder}", "data.batch_size=8", "data.workers=0", *values],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return RunFolder(folder / "run")


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    calm.mkdir()
    run = launch(calm)
    lines = run.read_metrics()
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[-1]["update"] == 8
    whole = checkpoint.newest(run.checkpoints)
    newest = max(run.checkpoints.glob("*.safetensors"))
    newest.unlink()
    launch(calm)
    again = checkpoint.newest(run.checkpoints)
    assert whole is not None
    assert again is not None
    assert all(torch.equal(whole.tensors[name], again.tensors[name]) for name in whole.tensors)
    logged = [{k: line[k] for k in ("epoch", "train_loss", "metrics")} for line in lines]
    repeated = run.read_metrics()
    assert [{k: line[k] for k in ("epoch", "train_loss", "metrics")} for line in repeated] == logged
