"""`vitzoo bench ops`: every operator against its reference and the usual ways to write it.

All forms of a call are timed in turn in one process; a ratio is the median over the rounds. A form
that does not agree with the reference, on odd sizes or at the timed shape, gets no ratio.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vitzoo.engine import bench_cases as cases
from vitzoo.engine.bench import exponent, interleaved, machine, ratio
from vitzoo.engine.bench_cases import ODD, Case
from vitzoo.engine.bench_checks import DIRECTIONS, compare
from vitzoo.errors import InputError
from vitzoo.ops import OPERATORS
from vitzoo.ops.linear import linear_choices

DTYPES = ("float32", "bfloat16")
# Shapes of the families' stages at 224 pixels; bars are for float32.
TIMED: dict[str, tuple[Case, ...]] = {
    "window": (cases.window(56, 56), cases.window(14, 14, heads=12, batch=8)),
    "halo": (cases.halo(128, 128, forward=3.0), cases.halo(16, 16, heads=8, d=32, batch=8)),
    "neighborhood": (
        cases.neighborhood(56, 56, forward=3.0, both=5.0),
        cases.neighborhood(14, 14, heads=8),
    ),
    "routed": (
        cases.routed(28, grid=7, chosen=4, heads=4, batch=8),
        cases.routed(14, grid=7, chosen=16, heads=8, batch=8, forward=5.0),
    ),
    "grouped": (cases.grouped(10_000),),
    "attention": (cases.attention(196, batch=8),),
    "channel": (cases.channel(3136, batch=8),),
    "linear": (cases.linear(25_088, 96, 288), cases.linear(6272, 384, 1536)),
}
SIDES = (28, 56, 112, 224)
# At one region size and one number of chosen regions, whatever the map.
SWEPT: dict[str, Callable[[int], Case]] = {
    "window": lambda side: cases.window(side, side),
    "halo": lambda side: cases.halo(side, side, heads=4),
    "neighborhood": lambda side: cases.neighborhood(side, side),
    "routed": lambda side: cases.routed(side, grid=side // 7, chosen=4, heads=2),
    "grouped": lambda side: cases.grouped(side * side),
}
LARGEST_EXPONENT = 1.1


def run_ops(
    names: Sequence[str] = (),
    *,
    dtypes: Sequence[str] = DTYPES,
    directions: Sequence[str] = DIRECTIONS,
    sweep: bool = True,
    rounds: int = 15,
    seconds: float = 4.0,
    threads: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time operators; `names` of `TIMED`, all if none.

    Returns:
        machine, threads, what `linear` takes here, rows, and slopes by operator.

    Raises:
        InputError: an unknown operator, dtype or direction.
    """
    for given, known in ((names, TIMED), (dtypes, DTYPES), (directions, DIRECTIONS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
    torch.set_num_threads(threads)
    rows, slopes = [], {}
    for name in names or TIMED:
        for case in TIMED[name]:
            for dtype in dtypes:
                for direction in directions:
                    row = time_case(name, case, dtype, direction, rounds=rounds, seconds=seconds)
                    rows.append(row)
                    say(sentence(row))
        if sweep and name in SWEPT:
            slopes[name] = grow(name, rounds=rounds, seconds=seconds)
            say(f"{name}: seconds grow as tokens ^ {slopes[name]['exponent']:.2f}")
    return {
        "machine": machine(),
        "threads": threads,
        "linear_choices": linear_choices(),
        "rows": rows,
        "slopes": slopes,
    }


def time_case(
    name: str, case: Case, dtype: str, direction: str, *, rounds: int, seconds: float
) -> dict[str, Any]:
    """One call in all its forms: median milliseconds, and ratios where the forms agree."""
    kind, backward = getattr(torch, dtype), direction == "both"
    leaves = case.leaves(kind)
    chosen = OPERATORS[case.operator]
    row: dict[str, Any] = {
        "operator": name,
        "case": case.label,
        "dtype": dtype,
        "direction": direction,
        "backends": list(chosen.backends),
        "refused": disagreement(name, case, "auto", kind, backward=backward),
        "forms": {},
    }

    def call(form: str) -> Callable[[], object]:
        def step() -> None:
            if not backward:
                with torch.inference_mode():
                    case.run(leaves, form)
                return
            out = case.run(leaves, form)
            torch.autograd.grad(out, list(leaves.values()), out.detach())

        return step

    sides = {form: call(form) for form in ("auto", *case.forms)}
    times = interleaved(sides, rounds=rounds, warm_up=1, seconds=seconds)
    row["ms"] = 1e3 * statistics.median(times["auto"])
    for form in case.forms:
        found: dict[str, Any] = {"ms": 1e3 * statistics.median(times[form])}
        found["refused"] = (
            row["refused"] or compare(case, form, kind, backward=backward)["disagrees"]
        )
        if found["refused"] is None:
            found |= ratio(times[form], times["auto"])
            bar = case.bars.get((form, direction)) if dtype == "float32" else None
            if bar is not None:
                found |= {"bar": bar, "reached": found["ratio"] >= bar}
        row["forms"][form] = found
    return row


def disagreement(
    name: str, case: Case, form: str, dtype: torch.dtype, *, backward: bool
) -> str | None:
    """The first sentence by which a form differs from the reference, on odd sizes or on `case`."""
    for each in (*ODD[name], case):
        found = compare(each, form, dtype, backward=backward)["disagrees"]
        if found is not None:
            return found
    return None


def grow(name: str, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Median forward milliseconds in float32 from 28x28 to 224x224 tokens, and their slope."""
    swept = [SWEPT[name](side) for side in SIDES]
    sides: dict[str, Callable[[], object]] = {}
    for case in swept:
        leaves = case.leaves(torch.float32)
        sides[str(case.tokens)] = _forward(case, leaves)
    times = interleaved(sides, rounds=rounds, warm_up=1, seconds=seconds)
    medians = [statistics.median(found) for found in times.values()]
    tokens = [case.tokens for case in swept]
    slope = exponent(tokens, medians)
    return {
        "tokens": tokens,
        "ms": [1e3 * found for found in medians],
        "exponent": slope,
        "bar": LARGEST_EXPONENT,
        "reached": slope <= LARGEST_EXPONENT,
    }


def _forward(case: Case, leaves: dict[str, torch.Tensor]) -> Callable[[], object]:
    def step() -> None:
        with torch.inference_mode():
            case.run(leaves)

    return step


def sentence(row: dict[str, Any]) -> str:
    """A row in one line."""
    what = f"{row['operator']} {row['case']} {row['dtype']} {row['direction']}"
    if row["refused"]:
        return f"{what}: REFUSED, {row['refused']}"
    shown = [f"{form} x {f['ratio']:.2f}" for form, f in row["forms"].items() if "ratio" in f]
    return f"{what}: {row['ms']:.2f} ms; {', '.join(shown)}"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts = report["machine"]
    choices = ", ".join(f"{key} {value}" for key, value in report["linear_choices"].items())
    lines = [
        "# Operators on the CPU",
        "",
        f"{facts['processor']}, {facts['cores']} cores, {facts['capability']}, {report['threads']} "
        f"threads; torch {facts['torch']}, {facts['date']}. Made by `vitzoo bench ops`.",
        "",
        "`both` is forward with the gradients of all inputs. A form's column says how often our "
        "time fits into its time, median over the rounds and quartiles; the forms are those of "
        "`vitzoo/engine/bench_cases.py`. No ratio is given before both sides agree with the "
        f"reference. `linear` takes here: {choices}.",
        "",
        "| operator | case | dtype | direction | ms | eager | gather, SDPA | reference | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [row["operator"], row["case"], row["dtype"], row["direction"], f"{row['ms']:.2f}"]
        cells += [_cell(row["forms"].get(f)) for f in (*cases.FORMS, "reference")]
        bars = [f for f in row["forms"].values() if "bar" in f]
        cells.append(
            "; ".join(f"{f['bar']} {'reached' if f['reached'] else 'MISSED'}" for f in bars)
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Growth from 28x28 to 224x224 tokens, forward, float32 (`ops.png`):", ""]
    lines += ["| operator | ms | exponent | bar |", "|---|---|---|---|"]
    for name, found in report["slopes"].items():
        verdict = "reached" if found["reached"] else "MISSED"
        shown = ", ".join(f"{ms:.2f}" for ms in found["ms"])
        lines.append(f"| {name} | {shown} | {found['exponent']:.2f} | {found['bar']} {verdict} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["refused"]:
        return "refused"
    low, high = found["ratio_quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def write(report: dict[str, Any], path: Path) -> None:
    """JSON, the table beside it as `.md`, and the growth as `.png`.

    Rows of operators that were not run now stay, if the file is of the same machine and versions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        report = _join(json.loads(path.read_text()), report)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
    if report["slopes"]:
        curves = {
            f"{name} ({found['exponent']:.2f})": (found["tokens"], found["ms"])
            for name, found in report["slopes"].items()
        }
        plot(curves, path.with_suffix(".png"), xlabel="tokens", ylabel="ms")


def _join(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    settings = [{**r["machine"], "date": None, "threads": r["threads"]} for r in (before, now)]
    if settings[0] != settings[1]:
        return now
    measured = {(row["operator"], row["dtype"], row["direction"]) for row in now["rows"]}
    kept = [
        row
        for row in before["rows"]
        if (row["operator"], row["dtype"], row["direction"]) not in measured
    ]
    rows = sorted([*kept, *now["rows"]], key=lambda row: list(TIMED).index(row["operator"]))
    timed_linear = any(row["operator"] == "linear" for row in now["rows"])
    return now | {
        "rows": rows,
        "slopes": before["slopes"] | now["slopes"],
        "linear_choices": (now if timed_linear else before)["linear_choices"],
    }


def plot(curves: dict[str, Any], path: Path, *, xlabel: str, ylabel: str) -> None:
    """Curves (x, y) by name on logarithmic axes, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in curves.items():
        axes.loglog(x, y, marker="o", label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
