"""`benchmarks/proof.md`, made from the proofs' JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitzoo._skeleton import without_memory
from vitzoo.engine.recipe import load_recipe
from vitzoo.tasks._models import create_model

HEAD = """# What was proven by training

Made by `make proof` from `benchmarks/results/proof/`. A proof that is not here has not been run.
"""
SAME_RECIPE = """
## One recipe for all families

Narrow models of one width class on the first 6,000 training and 1,000 test images of Fashion-MNIST,
from scratch: the same data, augmentation, optimiser and number of epochs (`configs/`). Sparsifiner
sees 112 pixels instead of 32, since its patches have 16. One seed: a point more means little.

| model | parameters, M | top-1 | logistic regression | CPU minutes |
|---|---|---|---|---|
"""


def render(results: Sequence[dict[str, Any]]) -> str:
    """All proofs, one line each, and the families' comparison.

    Args:
        results: contents of the JSON files.
    """
    lines = [HEAD, "| proof | required | seen | passed | CPU minutes |", "|---|---|---|---|---|"]
    for facts in sorted(results, key=lambda facts: facts["name"]):
        required = facts.get("required")
        # A lone number is about top-1 accuracy.
        bars = required if isinstance(required, dict) else {"top1": required} if required else {}
        bars = bars.get("at_least", {}) | {k: v for k, v in bars.items() if k != "at_least"}
        names = [key.removeprefix("at_most_") for key in bars]
        known = facts | facts.get("reached", {}) | facts.get("ahead_of_resnet18", {})
        seen = {name: known[name] for name in names if name in known}
        cells = [_figures(bars), _figures(seen), "yes" if facts["passed"] else "NO"]
        lines.append(f"| {facts['name']} | {' | '.join(cells)} | {_minutes(facts)} |")
    compared = [facts for facts in results if facts["name"].endswith("-fashion-mnist")]
    rows = [
        f"| `{facts['model']}` | {_parameters(facts['recipe']) / 1e6:.2f} | {facts['top1']:.1f} "
        f"| {facts['logistic_regression_top1']:.1f} | {_minutes(facts)} |"
        for facts in sorted(compared, key=lambda facts: -facts["top1"])
    ]
    return "\n".join(lines) + "\n" + SAME_RECIPE + "\n".join(rows) + "\n"


def _parameters(recipe: str) -> int:
    with without_memory():
        model = create_model(load_recipe(recipe).options.model, "0123456789", pretrained=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _figures(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in values.items())


def _minutes(facts: dict[str, Any]) -> str:
    return f"{facts['cpu_seconds'] / 60:.1f}"
