"""MODEL_CARDS.md, made from the models' records and the weights table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.files import digits_in_name

HEAD = """# Model cards

Made by `make cards` from the models' records (`vitzoo.info`) and the weights table
(`vitzoo/zoo/entries/`); do not edit. Accuracy under *published* is what the origin of the weights
states. Nothing has been measured here on the data sets that the weights were trained for, so there
is nothing in the column *measured here* yet. Numbers of one column come from one place.

*Checked against* says what a file's content is compared with after the download and when it is
first opened from the cache: a sha256 (of this table, or published by the hub), its first digits in
the file's name, or, where nothing is published, the hash of the first download, recorded then.
"""

_DENSITIES = {"uniform": "uniform", "range_squared": "falling with the square of the range"}

FAMILIES = {
    "davit": (
        "DaViT",
        "Attention inside windows and between channels in turn, both linear in the image's area. "
        "A good first choice: no settings to tune, any size, timm's weights.",
    ),
    "litv2": (
        "LITv2 (HiLo)",
        "No attention in the first two stages; then some heads see small windows and the others an "
        "average-pooled map. For speed at moderate sizes.",
    ),
    "biformer": (
        "BiFormer",
        "Each region attends to the few regions that it is most alike. For dense prediction with "
        "content-dependent reach.",
    ),
    "halonet": (
        "HaloNet",
        "A convolutional frame whose blocks attend to themselves and a halo around them. timm's "
        "weights, and the paper's H0 to H7 without weights.",
    ),
    "uhalonet": (
        "U-HaloNet",
        "HaloNet's attention in a Swin-like frame, borders masked: the HaloNet weights with modern "
        "accuracy and detection results.",
    ),
    "nat": (
        "NAT and DiNAT",
        "Every query sees the neighborhood around itself, dilated in DiNAT. For dense prediction; "
        "dilations can be changed at run time.",
    ),
    "sparsifiner": (
        "Sparsifiner",
        "A plain ViT that learns which tokens each token connects to. Starts from DeiT weights.",
    ),
    "lookupvit": (
        "LookupViT",
        "Most work happens on a small grid of compressed tokens, whose size can be changed at run "
        "time. Starts from ViT weights.",
    ),
    "flatformer": (
        "FlatFormer",
        "LiDAR pillars sorted along windows and attended to in groups of equal size.",
    ),
}


def render(
    records: Sequence[Any],
    entries: Iterable[WeightEntry],
    speed: Mapping[str, Any] | None = None,
    points: Mapping[str, Any] | None = None,
    gpu: Mapping[str, Any] | None = None,
) -> str:
    """The cards as Markdown.

    Args:
        records: `ModelInfo` of every model, in the order of registration.
        entries: the whole weights table.
        speed: content of `benchmarks/models.json`, if it is there.
        points: content of `benchmarks/flatformer.json`, if it is there.
        gpu: content of `benchmarks/gpu.json`, if it is there.
    """
    entries = list(entries)
    families = list(dict.fromkeys(record.family for record in records))
    parts = [HEAD]
    for family in families:
        mine = [record for record in records if record.family == family]
        names = {record.name for record in mine}
        weights = [entry for entry in entries if entry.model in names]
        measured = _measured(mine, speed or {}) + _measured_on_gpu(names, gpu or {})
        if points and mine[0].modality == "points":
            measured = _measured_on_points(points)
        parts.append(_card(family, mine, weights, measured))
    return "\n".join(parts)


def _card(
    family: str,
    records: Sequence[Any],
    weights: Sequence[WeightEntry],
    measured: Sequence[str],
) -> str:
    title, text = FAMILIES[family]
    first = records[0]
    lines = [
        f"## {title}",
        "",
        text,
        "",
        f"![Which keys one query of {title} sees](docs/pictures/{family}.svg)",
        "",
        f"Paper: [arXiv {first.paper}](https://arxiv.org/abs/{first.paper}). Follows "
        f"{', '.join(dict.fromkeys(f'{r.code} ({r.code_licence})' for r in records))}.",
        "",
        "| model | parameters, M | GMACs | at | strides | channels |",
        "|---|---|---|---|---|---|",
        *(_variant(record) for record in records),
        "",
        *_limits(records),
        *measured,
        *_weights(weights),
        *_citation(records),
    ]
    return "\n".join(lines)


def _variant(record: Any) -> str:
    params = "" if record.params is None else f"{record.params / 1e6:.2f}"
    cost = "" if record.gmacs is None else f"{record.gmacs:.2f}"
    size = "points"
    if record.modality == "image":
        size = f"{record.input_size[1]}x{record.input_size[2]}"
        size += " only" if record.fixed_input_size else ""
    strides = ", ".join(map(str, record.strides))
    channels = ", ".join(map(str, record.channels))
    return f"| `{record.name}` | {params} | {cost} | {size} | {strides} | {channels} |"


def _limits(records: Sequence[Any]) -> list[str]:
    reasons = dict.fromkeys(
        f"- {check.replace('_', ' ')}: {reason}"
        for record in records
        for check, reason in record.limits.items()
    )
    reasons |= dict.fromkeys(f"- choices: {r.choices}" for r in records if r.choices)
    return ["Limits:", "", *reasons, ""] if reasons else []


def _checked_against(entry: WeightEntry) -> str:
    if not entry.sources:
        return ""
    if entry.sha256:
        return "sha256 of this table"
    if entry.sources[0].startswith("hf-hub:"):
        return "sha256 of the hub"
    if digits_in_name(entry.sources[0].rpartition("/")[2]):
        return "digits in the file's name"
    return "first download's hash"


def _measured(records: Sequence[Any], speed: Mapping[str, Any]) -> list[str]:
    """Times that `benchmarks/models.py` measured for these models, against what."""
    names = {record.name for record in records}
    rows = [row for row in speed.get("results", ()) if row.get("model") in names]
    if not rows:
        return ["Speed and memory: not measured yet.", ""]
    machine = speed["machine"]
    lines = [
        f"Measured on {machine['processor']}, torch {machine['torch']}, {machine['date']} "
        "(`benchmarks/models.json`). Times are medians; the ratio is the median over rounds of the "
        "baseline's time over the model's, one right after the other. Memory: what one pass needs "
        "beyond weights and images. Allocator: glibc's as it is, or told to keep memory (quiet).",
        "",
        "| model | baseline | precision | size | batch | threads | pass | linear | allocator | ms "
        "| baseline ms | ratio | MB | baseline MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = ("model", "baseline", "dtype", "size", "batch", "threads", "mode", "linear", "malloc")
    for row in rows:
        baseline = str(row.get("baseline", "")) + ", compiled" * bool(row.get("compile_baseline"))
        cells = [(row | {"baseline": baseline}).get(key, "") for key in shown]
        cells += [_number(row.get(key), 1) for key in ("model_ms", "baseline_ms")]
        cells += [_number(row.get("ratio"), 2)]
        cells += [_number(row.get(key), 0, 1e-6) for key in ("model_bytes", "baseline_bytes")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _measured_on_gpu(names: set[str], gpu: Mapping[str, Any]) -> list[str]:
    """Images per second that `vitzoo bench gpu` measured for these models."""
    rows = [row for row in gpu.get("models", ()) if row["model"] in names]
    if not rows:
        return []
    machine = gpu["machine"]
    lines = [
        f"On {machine['device']}, torch {machine['torch']}, {machine['date']} "
        "(`benchmarks/gpu.json`), in bfloat16, inference by CUDA graph, with the zoo's kernels and "
        "without; memory of a training step beyond weights and images.",
        "",
        "| model | size | batch | images/s | without kernels | MB | without kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sides = [row[name] for name in ("triton", "portable")]
        cells = [row[key] for key in ("model", "size", "batch")]
        cells += [_number(side["images_per_second"], 0) for side in sides]
        cells += [_number(side["train"].get("peak_bytes"), 0, 1e-6) for side in sides]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _measured_on_points(speed: Mapping[str, Any]) -> list[str]:
    """Times of the backbone that `benchmarks/flatformer.py` measured against padded windows."""
    machine, exponents = speed["machine"], speed["exponents"]
    growth = ", ".join(
        f"{exponents[density]:.2f} ({_DENSITIES[density]})" for density in sorted(exponents)
    )
    lines = [
        f"Measured on {machine['processor']}, torch {machine['torch']}, {machine['date']}, "
        f"{machine['threads']} threads, float32 (`benchmarks/flatformer.json`): one frame through "
        "the backbone, and through attention in equal windows padded to the fullest one, with the "
        f"same weights. Time grows with pillars to the power {growth}. Memory: not measured yet.",
        "",
        "| pillars | density | ms | padded windows, ms | ratio | lowest and highest ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in speed["rows"]:
        seconds, spread = row["seconds"], row["ratio_range"]
        cells = [row["pillars"], _DENSITIES[row["density"]]]
        cells += [_number(seconds[side], 0, 1e3) for side in ("backbone", "padded")]
        cells += [_number(row["padded_over_flattened"], 2)]
        cells += [f"{spread[0]:.2f} to {spread[1]:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def _citation(records: Sequence[Any]) -> list[str]:
    papers = dict.fromkeys(record.paper for record in records)
    cited = ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    return [f"Please cite {cited}.", ""]


def _weights(weights: Sequence[WeightEntry]) -> list[str]:
    if not weights:
        return ["No weights are known.", ""]
    lines = [
        "| weights | task | data | licence | state of the source | checked against | published "
        "| measured here |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in weights:
        published = ", ".join(f"{name} {value:g}" for name, value in entry.published)
        licence = entry.licence or "not stated"
        cells = [f"`{entry.name}`", entry.task, entry.dataset, licence, entry.state]
        cells += [_checked_against(entry), published, "not measured"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
