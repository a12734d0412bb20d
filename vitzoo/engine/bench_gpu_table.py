"""The report of `vitzoo bench gpu` as JSON and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The usual ways to write an operator, beside the kernels and the portable path.
FORMS = ("triton", "portable", "gather_sdpa", "eager", "dense_sdpa", "flex", "natten", "xformers")


def write(report: dict[str, Any], path: Path) -> None:
    """JSON, and a table beside it as `.md`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts = report["machine"]
    wrong = [row for row in report["checks"] if row["problem"] is not None]
    lines = [
        "# Attention operators and models on a GPU",
        "",
        f"{facts['device']}, compute capability {facts['capability']}; torch {facts['torch']}, "
        f"triton {facts.get('triton')}, Python {facts['python']}, {facts['date']}. Made by "
        "`vitzoo bench gpu`.",
        "",
        f"{len(report['checks']) - len(wrong)} of {len(report['checks'])} checks (operator, "
        "backend, dtype, direction) agree with the reference in float64 on odd sizes, outputs and "
        "gradients.",
        *[f"- {r['operator']} {r['backend']} {r['dtype']}: {r['problem']}" for r in wrong],
        *[f"\n{note}" for note in report.get("notes", ())],
        "",
        "Microseconds of the device by CUDA graph, and in brackets what a call takes from Python "
        "where that is longer (`called`: no graph could be captured, Python's time is in it); peak "
        "MiB beyond the inputs in the last columns. `both` is forward with all gradients; the "
        "floor is each input read and the output written once, at the speed of a copy. "
        "`gather_sdpa` copies keys beside the tiles of queries that they serve and calls torch's "
        "fused attention, `eager` keeps the probabilities; neighborhoods are gathered query by "
        "query there, tile by tile in `portable`. An empty column: not installed, not run, or not "
        "the same function.",
        "",
        f"| operator | case | dtype | direction | floor | {' | '.join(FORMS)} "
        "| over gather_sdpa | over the floor | MiB triton | MiB gather_sdpa |",
        "|" + "---|" * (9 + len(FORMS)),
    ]
    lines += [_row(row) for row in report["rows"]]
    lines += [
        "",
        "Whole models in bfloat16: images per second in inference, milliseconds and peak MiB of a "
        "training step's forward and backward, by CUDA graph, in brackets called from Python.",
        "",
        "| model | size | batch | images/s triton | portable | train ms triton | portable "
        "| train MiB triton | portable |",
        "|" + "---|" * 9,
    ]
    lines += [_model(row) for row in report["models"]]
    return "\n".join(lines) + "\n"


def sentence(row: dict[str, Any]) -> str:
    """A row of timings in one line, in the cells of the table."""
    shown = ", ".join(f"{form} {_cell(found)}" for form, found in row["forms"].items())
    return f"{row['operator']} {row['case']} {row['dtype']} {row['direction']}, us: {shown}"


def model_sentence(row: dict[str, Any]) -> str:
    """A model in one line."""
    shown = ", ".join(f"{name} {_rate(row, name)}" for name in ("triton", "portable"))
    return f"{row['model']} {row['size']}, images/s: {shown}"


def _rate(row: dict[str, Any], name: str) -> str:
    """Images per second, and in brackets those of calls from Python where they are fewer."""
    rate, called = row[name]["images_per_second"], row[name]["forward"].get("ms")
    if rate is None:
        return ""
    slower = called is not None and 1e3 * row["batch"] / called < rate / 1.2
    return f"{rate:.0f}" + (f" ({1e3 * row['batch'] / called:.0f})" if slower else "")


def _best(found: dict[str, Any] | None) -> float | None:
    """Microseconds of the device, or of the call where no graph could be captured."""
    if found is None or "ms" not in found:
        return None
    return 1e3 * (found["graph_ms"] or found["ms"])


def _cell(found: dict[str, Any] | None, *, digits: int = 0, unit: float = 1.0) -> str:
    best = _best(found)
    if found is None or best is None:
        return "" if found is None or "failed" in found else "refused"
    shown, called = (f"{x * unit:.{digits}f}" for x in (best, 1e3 * found["ms"]))
    if found["graph_ms"] is None:
        return f"{called} called"
    return shown + (f" ({called})" if 1e3 * found["ms"] > 1.2 * best else "")


def _row(row: dict[str, Any]) -> str:
    forms = row["forms"]
    ours, theirs = _best(forms.get("triton")), _best(forms.get("gather_sdpa"))
    floor = 1e3 * row["floor_ms"] if "floor_ms" in row else None
    cells = [row["operator"], row["case"], row["dtype"], row["direction"]]
    cells.append("" if floor is None else f"{floor:.0f}")
    cells += [_cell(forms.get(form)) for form in FORMS]
    graphs = all(forms.get(f, {}).get("graph_ms") for f in ("triton", "gather_sdpa"))
    cells.append(f"{theirs / ours:.1f}{'' if graphs else ' called'}" if ours and theirs else "")
    cells.append(f"{ours / floor:.1f}" if ours and floor else "")
    cells += [_mib(forms.get(form)) for form in ("triton", "gather_sdpa")]
    return f"| {' | '.join(cells)} |"


def _mib(found: dict[str, Any] | None) -> str:
    return f"{found['peak_bytes'] / 2**20:.0f}" if found and "peak_bytes" in found else ""


def _model(row: dict[str, Any]) -> str:
    sides = [row[name] for name in ("triton", "portable")]
    cells = [row["model"], str(row["size"]), str(row["batch"])]
    cells += [_rate(row, name) for name in ("triton", "portable")]
    cells += [_cell(side["train"], digits=1, unit=1e-3) for side in sides]
    cells += [_mib(side["train"]) for side in sides]
    return f"| {' | '.join(cells)} |"
