"""Exported graphs of DaViT-tiny against timm's davit_tiny in eager mode on the CPU, as JSON.

Usage: python benchmarks/export.py [--rounds N] [--batch B] [--out benchmarks/export.json]
       python benchmarks/export.py --accuracy [--epochs N] [--out benchmarks/export_accuracy.json]

One process and one set of weights; eager and graphs run in turn, and a figure is the median over
the rounds. A graph whose logits differ from timm's by more than 1e-4 is not timed.

With --accuracy: what float16 and int8 cost a narrow DaViT that is trained on scikit-learn's digits,
top-1 on its 360 held-out samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import vitzoo  # noqa: F401  (registers the names)
from vitzoo.engine.bench import interleaved, machine, ratio
from vitzoo.engine.export import export
from vitzoo.engine.graphs import SUFFIXES, run_graph, write_graph
from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.traced import Network, trace
from vitzoo.engine.train import train

SIZE = 224
BOUND = 1e-4


def sides(
    batch: int, formats: Sequence[str], folder: Path
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Name -> one pass, and the graphs' largest differences to timm's logits."""
    torch.manual_seed(0)
    theirs = timm.create_model("davit_tiny").eval()
    ours = timm.create_model("vz_davit_tiny").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, 3, SIZE, SIZE)
    expected = theirs(x)
    dynamic = ("batch",) if batch > 1 else ()
    passes = {"timm davit_tiny, eager": lambda: theirs(x), "vz_davit_tiny, eager": lambda: ours(x)}
    network = Network(ours, (3, SIZE, SIZE), {}, ("logits",))
    program = trace(ours, network.shape, dynamic)
    apart = {}
    for to in formats:
        path = folder / f"graph{SUFFIXES[to]}"
        write_graph(program, network, to, path, int8=False, dynamic=dynamic)
        run = run_graph(path, to)
        name = f"vz_davit_tiny, {to}"
        apart[name] = (run(x)[0] - expected).abs().max().item()
        if apart[name] <= BOUND:
            passes[name] = lambda run=run: run(x)
    return passes, apart


@torch.no_grad()
def measure(batch: int, formats: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of every side, and how often it fits into timm's eager pass."""
    with tempfile.TemporaryDirectory() as folder:
        passes, apart = sides(batch, formats, Path(folder))
        for step in passes.values():
            step()
        found = interleaved(passes, rounds=rounds, seconds=40)
    baseline = found["timm davit_tiny, eager"]
    return {
        "batch": batch,
        "apart": apart,
        "sides": {
            name: {"ms": 1e3 * statistics.median(times), **ratio(baseline, times)}
            for name, times in found.items()
        },
    }


def accuracy(formats: Sequence[str], epochs: int, folder: Path) -> dict[str, Any]:
    """Top-1 of eager and of every graph, sizes, and the largest difference of logits."""
    values = [f"schedule.epochs={epochs}", f"run.folder={folder}", "run.name=digits"]
    train(load_recipe("davit-digits", [*values, "run.device=cpu", 'run.precision="no"']))
    lines = []
    for to in formats:
        for options in ({}, {"half": True}, {"int8": True}):
            made = export(str(folder / "digits"), to, dynamic=("batch",), **options)  # type: ignore[arg-type]
            print(made.report())
            line = {"format": to, "precision": made.precision, "apart": made.parity.worst}
            line |= {"bound": made.bound, "megabytes": made.megabytes, "accuracy": made.accuracy}
            lines.append(line)
    return {"recipe": "davit-digits", "epochs": epochs, "results": lines}


def write_accuracy(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = accuracy(given.formats, given.epochs, Path(folder))
    report = {"machine": machine(), "threads": given.threads} | found
    out = given.out or Path("benchmarks/export_accuracy.json")
    out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--formats", nargs="+", default=list(SUFFIXES), choices=list(SUFFIXES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.accuracy:
        write_accuracy(given)
        return
    results = [measure(batch, given.formats, given.rounds) for batch in given.batch]
    report = {"machine": machine(), "threads": given.threads, "size": SIZE, "results": results}
    out = given.out or Path("benchmarks/export.json")
    out.write_text(json.dumps(report, indent=1) + "\n")
    for result in results:
        for name, side in result["sides"].items():
            print(f"batch {result['batch']}, {name}: {side['ms']:.0f} ms, {side['ratio']:.2f}x")


if __name__ == "__main__":
    main()
