"""`vitzoo bench models`: whole models against a baseline, with the zoo's speed bars.

Every figure is a ratio from one process that times both sides in turn (`vitzoo.engine.bench`).
MAC rate: nominal multiply-adds per image times images per second, over the baseline's. Nominal,
because a dense form with a mask counts more multiply-adds and would otherwise score higher.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitzoo.engine.bench import Measurement, exponent, machine, measure, measure_memory
from vitzoo.engine.bench_ops import plot
from vitzoo.errors import InputError

DEIT = "deit_small_patch16_224"
DEIT_GMACS = 4.60
MALLOCS = ("quiet", "default")
SIZES = (32, 64, 128, 224, 448, 896, 1344)
# Below, the cost of single calls hides how a model grows.
FITTED_FROM = 224
SWEPT = (
    "vz_davit_tiny",
    "vz_litv2_small",
    "vz_biformer_tiny",
    "vz_halonet26t",
    "vz_uhalonet_tiny",
    "vz_nat_mini",
    "vz_sparsifiner_deit_small",
    "vz_lookupvit_base",
)


@dataclass(frozen=True)
class Bar:
    """A measurement and the least ratio that it has to reach, by allocator setting.

    Bars of measurements with `linear="auto"` hold on machines where that takes oneDNN.
    """

    measurement: Measurement
    measure: str
    quiet: float | None = None
    default: float | None = None

    def least(self, malloc: str, choices: dict[str, str] | None) -> float | None:
        """The bar under this allocator; None where the figure is only reported."""
        m = self.measurement
        phase = "inference" if m.mode == "forward" else "training"
        if m.linear == "auto" and (choices or {}).get(f"{phase}/wide") != "onednn":
            return None
        return self.quiet if malloc == "quiet" else self.default


def _mac_rate(name: str, gmacs: float, bar: float, linear: str = "reference") -> Bar:
    measurement = Measurement(
        model=name, baseline=DEIT, gmacs=gmacs, baseline_gmacs=DEIT_GMACS, linear=linear
    )
    return Bar(measurement, "mac_rate_ratio", quiet=bar)


def _against(name: str, baseline: str, linear: str = "reference", **bars: float) -> Bar:
    size = 256 if "halonet" in name else 224
    measurement = Measurement(model=name, baseline=baseline, size=size, linear=linear)
    return Bar(measurement, "ratio", **bars)


_DAVIT = Measurement(model="vz_davit_tiny", baseline="davit_tiny")
_DAVIT_AUTO = replace(_DAVIT, linear="auto")
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
    Bar(_DAVIT_AUTO, "ratio", quiet=1.5),
    Bar(replace(_DAVIT_AUTO, mode="train"), "ratio", quiet=1.5),
    Bar(replace(_DAVIT_AUTO, compile_baseline=True), "ratio", quiet=1.4),
    _mac_rate("vz_davit_tiny", 4.52, 1.5, "auto"),
    _mac_rate("vz_litv2_small", 3.72, 1.45, "auto"),
    _mac_rate("vz_biformer_tiny", 2.22, 1.12, "auto"),
    _mac_rate("vz_biformer_small", 4.46, 1.12, "auto"),
    _mac_rate("vz_nat_mini", 2.73, 1.05, "auto"),
    _against("vz_sparsifiner_deit_small", DEIT, "auto", quiet=1.2),
    _against("vz_lookupvit_base", "vit_base_patch16_224", "auto", quiet=3.0),
]


def run_bar(bar: Bar, malloc: str) -> dict[str, Any]:
    """One measurement with its bar and verdict."""
    measurement = replace(bar.measurement, malloc=malloc)  # type: ignore[arg-type]
    result = measure(measurement)
    if not measurement.compile_baseline:
        result |= measure_memory(measurement)
    figure = result[bar.measure]
    least = bar.least(malloc, result["linear_choices"])
    return result | {
        "measure": bar.measure.removesuffix("_ratio"),
        "figure": figure,
        "bar": least,
        "reached": None if least is None else figure >= least,
    }


def run_models(
    names: Sequence[str] = (),
    *,
    pairs: int = 15,
    mallocs: Sequence[str] = MALLOCS,
    linear: Sequence[str] = ("reference", "auto"),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the bars of these models, of all if none.

    Raises:
        InputError: a model without a bar, or an unknown allocator or linear setting.
    """
    known = {bar.measurement.model for bar in BARS}
    for given, allowed in ((names, known), (mallocs, MALLOCS), (linear, ("reference", "auto"))):
        for name in given:
            if name not in allowed:
                raise InputError(f"unknown {name!r}; known: {', '.join(sorted(allowed))}")
    results = []
    for bar in BARS:
        m = bar.measurement
        if (names and m.model not in names) or m.linear not in linear:
            continue
        for malloc in mallocs:
            r = run_bar(replace(bar, measurement=replace(m, pairs=pairs)), malloc)
            results.append(r)
            say(
                f"{m.model} / {m.baseline} {m.dtype} {m.mode}, linear {m.linear}, malloc {malloc}: "
                f"{r['measure']} {r['figure']:.3f} (bar {r['bar']})"
            )
    return {"machine": machine(), "results": results}


def run_sweep(
    names: Sequence[str] = (),
    *,
    sizes: Sequence[int] = SIZES,
    pairs: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time of one image from 32 to 1344 pixels beside DeiT-S, and how it grows with pixels.

    Args:
        names: models; one of each family if none.
        sizes: sides in pixels, multiples of 16.
        pairs: rounds of a size.
        say: gets a line per size.

    Raises:
        InputError: a side that DeiT's patches do not divide.
    """
    if any(size % 16 or size < 32 for size in sizes):
        raise InputError(f"sizes must be multiples of 16 from 32, got {list(sizes)}")
    sweeps = {}
    for name in names or SWEPT:
        rows = []
        for size in sizes:
            found = measure(
                Measurement(
                    model=name,
                    baseline=DEIT,
                    size=size,
                    batch=1,
                    pairs=pairs,
                    linear="auto",
                    malloc="quiet",
                )
            )
            rows.append({k: found[k] for k in ("size", "model_ms", "baseline_ms", "ratio")})
            say(f"{name} {size}: {found['model_ms']:.0f} ms, x {found['ratio']:.2f} over {DEIT}")
        fitted = [row for row in rows if row["size"] >= FITTED_FROM]
        slopes = {}
        if len(fitted) > 1:
            pixels = [row["size"] ** 2 for row in fitted]
            for side in ("model", "baseline"):
                slopes[side] = exponent(pixels, [row[f"{side}_ms"] for row in fitted])
            say(f"{name}: time grows as pixels ^ {slopes['model']:.2f}")
        sweeps[name] = {"baseline": DEIT, "rows": rows, "exponents": slopes}
    return {"machine": machine(), "sweeps": sweeps}


_KEY = ("model", "baseline", "dtype", "mode", "malloc", "linear", "compile_baseline", "measure")


def write(report: dict[str, Any], path: Path) -> None:
    """JSON, the table beside it as `.md`, and the growth as `.png`.

    What was not measured now stays with its date, if the file is of the same machine and versions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if _undated(before.get("machine")) != _undated(report["machine"]):
        before = {}
    for found in (before, report):
        for part in (*found.get("results", ()), *found.get("sweeps", {}).values()):
            part.setdefault("date", found["machine"]["date"])
    new = {tuple(r[k] for k in _KEY) for r in report.get("results", ())}
    kept = [r for r in before.get("results", ()) if tuple(r.get(k) for k in _KEY) not in new]
    merged = {
        "machine": report["machine"],
        "results": [*kept, *report.get("results", ())],
        "sweeps": before.get("sweeps", {}) | report.get("sweeps", {}),
    }
    path.write_text(json.dumps(merged, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(merged))
    if merged["sweeps"]:
        curves = {
            name: ([row["size"] for row in s["rows"]], [row["model_ms"] for row in s["rows"]])
            for name, s in merged["sweeps"].items()
        }
        rows = next(iter(merged["sweeps"].values()))["rows"]
        curves[DEIT] = ([r["size"] for r in rows], [r["baseline_ms"] for r in rows])
        plot(curves, path.with_suffix(".png"), xlabel="side in pixels", ylabel="ms")


def _undated(facts: dict[str, Any] | None) -> dict[str, Any] | None:
    return facts and {**facts, "date": None}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts = report["machine"]
    lines = [
        "# Whole models on the CPU",
        "",
        f"{facts['processor']}, {facts['cores']} cores, {facts['capability']}; torch "
        f"{facts['torch']}, timm {facts['timm']}. Eager, both sides in one process, median of the "
        "pairs. Made by `vitzoo bench models`. `linear`: stock layers (`reference`) or what `auto` "
        "takes; bars of `auto` hold where that is oneDNN, and were set where it takes half of the "
        "BLAS's time. Memory, with malloc's defaults in every row: what one pass needs "
        "beyond weights and images, over the baseline's; under oneDNN that holds a second, packed "
        "copy of the linear weights.",
        "",
        "| model | baseline | dtype | size | pass | linear | malloc | measure | figure "
        "| quartiles | bar | memory | date |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["results"]:
        # In the figure's unit: a rate is the ratio times a constant.
        low, high = (quartile * r["figure"] / r["ratio"] for quartile in r["ratio_quartiles"])
        bar = "" if r["bar"] is None else f"{r['bar']} {'reached' if r['reached'] else 'MISSED'}"
        baseline = r["baseline"] + (", compiled" if r["compile_baseline"] else "")
        cells = [r["model"], baseline, r["dtype"], r["size"], r["mode"], r["linear"], r["malloc"]]
        cells += [r["measure"], f"{r['figure']:.2f}", f"{low:.2f} to {high:.2f}", bar]
        memory = r.get("model_bytes")
        cells.append("" if memory is None else f"{memory / r['baseline_bytes']:.2f}")
        cells.append(r.get("date", facts["date"]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if report["sweeps"]:
        sizes = [row["size"] for row in next(iter(report["sweeps"].values()))["rows"]]
        lines += [
            "",
            f"One image, forward, ms (how many times {DEIT} at that size takes as long), linear "
            "layers as `auto` took them on that day; the exponent is that of time over pixels from "
            f"{FITTED_FROM} pixels.",
            "",
            f"| model | {' | '.join(map(str, sizes))} | exponent | date |",
            "|---" * (len(sizes) + 3) + "|",
        ]
        for name, s in report["sweeps"].items():
            cells = [f"{row['model_ms']:.0f} ({row['ratio']:.2f})" for row in s["rows"]]
            cells.append(f"{s['exponents']['model']:.2f}" if s["exponents"] else "")
            cells.append(s.get("date", facts["date"]))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
