"""Whole models against a baseline: the zoo's speed bars, as JSON and as a table.

Usage: python benchmarks/models.py [NAME ...] [--pairs N] [--out benchmarks/models.json]

Every figure is a ratio from one process that times both sides in turn (`vitzoo.engine.bench`).
MAC rate: nominal multiply-adds per image times images per second, over the baseline's. Nominal,
because a dense form with a mask counts more multiply-adds and would otherwise score higher.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from vitzoo.engine.bench import Measurement, machine, measure

HERE = Path(__file__).parent
DEIT = "deit_small_patch16_224"
DEIT_GMACS = 4.60


@dataclass(frozen=True)
class Bar:
    """A measurement and the least ratio that it has to reach, by allocator setting."""

    measurement: Measurement
    measure: str
    quiet: float | None = None
    default: float | None = None

    def least(self, malloc: str) -> float | None:
        """The bar under this allocator; None where the figure is only reported."""
        return self.quiet if malloc == "quiet" else self.default


def _mac_rate(name: str, gmacs: float, bar: float) -> Bar:
    measurement = Measurement(model=name, baseline=DEIT, gmacs=gmacs, baseline_gmacs=DEIT_GMACS)
    return Bar(measurement, "mac_rate_ratio", quiet=bar)


def _against(name: str, baseline: str, **bars: float) -> Bar:
    size = 256 if "halonet" in name else 224
    return Bar(Measurement(model=name, baseline=baseline, size=size), "ratio", **bars)


_DAVIT = Measurement(model="vz_davit_tiny", baseline="davit_tiny")
BARS = [
    Bar(_DAVIT, "ratio", quiet=0.97, default=0.97),
    Bar(replace(_DAVIT, dtype="bfloat16"), "ratio", quiet=0.97, default=0.97),
    _mac_rate("vz_davit_tiny", 4.52, 0.95),
    _mac_rate("vz_litv2_small", 3.72, 0.88),
    _mac_rate("vz_biformer_tiny", 2.22, 0.78),
    _mac_rate("vz_biformer_small", 4.46, 0.78),
    _mac_rate("vz_nat_mini", 2.73, 0.70),
    _against("vz_sparsifiner_deit_small", DEIT, quiet=0.80),
    _against("vz_lookupvit_base", "vit_base_patch16_224", quiet=1.75),
    _against("vz_halonet_h1_timm", "halonet_h1", quiet=1.6, default=3.0),
    _against("vz_halonet26t", "halonet26t", quiet=1.3),
]


def run(bar: Bar, malloc: str) -> dict:
    """One measurement with its bar and verdict."""
    result = measure(replace(bar.measurement, malloc=malloc))
    figure, least = result[bar.measure], bar.least(malloc)
    return result | {
        "measure": bar.measure.removesuffix("_ratio"),
        "figure": figure,
        "bar": least,
        "reached": None if least is None else figure >= least,
    }


def table(report: dict) -> str:
    """The report as a Markdown table."""
    facts = report["machine"]
    lines = [
        "# Whole models on the CPU",
        "",
        f"{facts['processor']}, {facts['cores']} cores, {facts['capability']}; torch "
        f"{facts['torch']}, timm {facts['timm']}, {facts['date']}. Forward pass, eager, stock "
        "linear layers, both sides in one process, median of the pairs. Made by `make bench`.",
        "",
        "| model | baseline | dtype | size | malloc | measure | figure | ratio's quartiles | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["results"]:
        low, high = r["ratio_quartiles"]
        bar = "" if r["bar"] is None else f"{r['bar']} {'reached' if r['reached'] else 'MISSED'}"
        cells = [r["model"], r["baseline"], r["dtype"], r["size"], r["malloc"], r["measure"]]
        cells += [f"{r['figure']:.2f}", f"{low:.2f} to {high:.2f}", bar]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is asked for and write JSON and table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; all with a bar if none is given")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--malloc", choices=["quiet", "default"], nargs="*")
    parser.add_argument("--out", type=Path, default=HERE / "models.json")
    arguments = parser.parse_args()
    results = []
    for bar in BARS:
        if arguments.names and bar.measurement.model not in arguments.names:
            continue
        bar = replace(bar, measurement=replace(bar.measurement, pairs=arguments.pairs))
        for malloc in arguments.malloc or ["quiet", "default"]:
            r = run(bar, malloc)
            results.append(r)
            print(
                f"{r['model']} / {r['baseline']} {r['dtype']} {malloc}: "
                f"{r['measure']} {r['figure']:.3f} (bar {r['bar']})",
                flush=True,
            )
    report = {"machine": machine(), "results": results}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
