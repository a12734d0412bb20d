"""The card of one set of weights (README.md beside them), as the hub reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from vitzoo.zoo.entries import WeightEntry
from vitzoo.zoo.errors import WeightsError

_METRICS = {"top1": "accuracy", "top5": "accuracy"}


def write_card(
    target: Path, model: nn.Module, entry: WeightEntry | None, source: Path | None = None
) -> None:
    """Write README.md: what the weights are, how to load them, and what their origin states.

    Args:
        target: the folder.
        model: built; its timm configuration says how images are prepared.
        entry: of the weights table, if the weights are certain to be those; None for all others.
        source: the file that they were converted from.
    """
    config: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    name = entry.name if entry else str(config["architecture"])
    head = _yaml(name, entry, getattr(model, "num_classes", 0))
    lines = [
        f"# {name}",
        "",
        _origin(entry, source),
        "",
        "The architecture is registered by [vitzoo](https://github.com/vitzoo/vitzoo): import it "
        "before timm builds the model.",
        "",
        "```python",
        "import timm",
        "import vitzoo  # registers the name; pip install vitzoo",
        "",
        'model = timm.create_model("hf-hub:ORG/NAME", pretrained=True).eval()',
        "```",
        "",
        f"- classes: {getattr(model, 'num_classes', 0)}",
        f"- parameters: {sum(p.numel() for p in model.parameters()):,}",
        f"- input: {'x'.join(map(str, config['input_size']))}, mean {config.get('mean')}, "
        f"std {config.get('std')}, {config.get('interpolation')}, crop {config.get('crop_pct')}",
    ]
    if entry and entry.published:
        figures = ", ".join(f"{key} {value:g}" for key, value in entry.published)
        whole = entry.task == "classification"
        of = "" if whole else f", of the whole {entry.task} model whose backbone this is"
        lines.append(f"- published on {entry.dataset}{of}, not measured here: {figures}")
    if entry and entry.notes:
        lines.append(f"- {entry.notes}")
    (target / "README.md").write_text(head + "\n" + "\n".join(lines) + "\n")


def _origin(entry: WeightEntry | None, source: Path | None) -> str:
    if entry is None:
        how = f"Converted from `{source.name}`" if source else "Trained with vitzoo"
        return f"{how}; origin and licence of the weights: not stated."
    paper = f", [arXiv {entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else ""
    return (
        f"Weights of {entry.origin}{paper}, trained on {entry.dataset}; licence of the weights: "
        f"{entry.licence or 'not stated'}."
    )


def _yaml(name: str, entry: WeightEntry | None, classes: int) -> str:
    """The card's head; the model-index holds published figures as unverified."""
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-classification" if classes else "image-feature-extraction"
    results = []
    if entry and entry.task == "classification":
        results = [
            EvalResult(
                task_type=task,
                dataset_type=_slug(entry.dataset),
                dataset_name=entry.dataset,
                metric_type=_METRICS.get(metric, metric),
                metric_name=metric,
                metric_value=value,
                verified=False,
            )
            for metric, value in entry.published
        ]
    data = ModelCardData(
        license=entry.licence if entry else None,
        library_name="timm",
        tags=["vitzoo", "timm", task],
        datasets=[_slug(entry.dataset)] if entry else None,
        pipeline_tag=task,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _slug(dataset: str) -> str:
    return dataset.lower().replace(" ", "-")


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a converted folder, with its card, to the hub; returns the repository's address.

    Args:
        folder: as `vitzoo weights convert` writes it.
        repo: `ORG/NAME`; made if it does not exist.
        private: make it so.

    Raises:
        WeightsError: not such a folder, or the hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = ("model.safetensors", "config.json", "README.md")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} has no {missing[0]}: make the folder with `vitzoo weights convert` first"
        )
    if "architecture" not in json.loads((folder / "config.json").read_text()):
        raise WeightsError(f"{folder / 'config.json'} names no architecture")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("hf-hub:ORG/NAME", f"hf-hub:{repo}"))
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Add weights, configuration and card",
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise WeightsError(f"the hub refused {repo}: {error}") from error
    except Exception as error:
        # The hub's client hands on whatever its transport raises (httpx, requests, sockets).
        raise WeightsError(f"{repo} was not uploaded, the hub does not answer: {error}") from error
    return str(address)
