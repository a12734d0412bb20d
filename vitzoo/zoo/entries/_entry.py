"""What the zoo knows about one set of weights, and the timm configuration made from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

State = Literal["unchecked", "available", "link dead", "account needed", "never published"]
Task = Literal["classification", "detection", "segmentation", "detection3d"]


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """One published set of weights; facts only, what is unknown stays None.

    Attributes:
        model: name in the zoo, without tag.
        tag: origin and data, `msft_in1k`.
        sources: where a file can be had, in order: an https address or `hf-hub:ORG/NAME[/FILE]`.
        state: what was found when somebody tried; `unchecked` until then.
        size, sha256: of the first source's file, where known.
        licence: of the weights, which need not be the code's.
        origin: page of whoever trained them.
        paper: arXiv number.
        task, dataset: what they were trained for and on.
        num_classes: outputs of the classifier in the file; 0 if it has none.
        input_size: (channels, height, width) of the evaluation.
        published: accuracy as the origin states it, name -> value.
        strict: whether every parameter of the model is in the file.
        arguments: what the model must be built with for these weights, beyond its variant's own
            arguments, name -> value.
        notes: anything a reader needs.
    """

    model: str
    tag: str
    sources: tuple[str, ...] = ()
    state: State = "unchecked"
    size: int | None = None
    sha256: str | None = None
    licence: str | None = None
    origin: str | None = None
    paper: str | None = None
    task: Task = "classification"
    dataset: str = "ImageNet-1K"
    num_classes: int = 1000
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    published: tuple[tuple[str, float], ...] = ()
    strict: bool = True
    arguments: tuple[tuple[str, Any], ...] = ()
    notes: str | None = None

    @property
    def name(self) -> str:
        """`model.tag`, as timm writes it."""
        return f"{self.model}.{self.tag}"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a family's images are prepared and where its first and last layers are."""

    first_conv: str
    classifier: str | tuple[str, ...]
    input_size: tuple[int, int, int] = (3, 224, 224)
    reduction: int = 32
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    fixed_input_size: bool = False
    licence: str | None = None

    def without_weights(self) -> dict[str, Any]:
        """timm's configuration of a variant that nobody published weights for."""
        return {
            "num_classes": 1000,
            "input_size": self.input_size,
            "pool_size": _pool_size(self.input_size, self.reduction),
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
            "fixed_input_size": self.fixed_input_size,
            "mean": self.mean,
            "std": self.std,
            "first_conv": self.first_conv,
            "classifier": self.classifier,
            "license": self.licence,
        }

    def of(self, entry: WeightEntry) -> dict[str, Any]:
        """timm's configuration of published weights."""
        cfg = self.without_weights() | {
            # The backbone of a detector or segmenter has no classifier, whatever its head counts.
            "num_classes": entry.num_classes if entry.task == "classification" else 0,
            "input_size": entry.input_size,
            "pool_size": _pool_size(entry.input_size, self.reduction),
            "crop_pct": entry.crop_pct,
            "crop_mode": entry.crop_mode,
            "interpolation": entry.interpolation,
            "mean": entry.mean,
            "std": entry.std,
            "license": entry.licence,
            "origin_url": entry.origin,
            "paper_ids": f"arXiv:{entry.paper}" if entry.paper else None,
        }
        for source in entry.sources[:1]:
            if source.startswith("hf-hub:"):
                cfg["hf_hub_id"] = source.removeprefix("hf-hub:")
            else:
                cfg["url"] = source
        return cfg


def _pool_size(input_size: tuple[int, int, int], reduction: int) -> tuple[int, int]:
    return (-(-input_size[1] // reduction), -(-input_size[2] // reduction))


def timm_configs(
    configs: dict[str, DataConfig], entries: Iterable[WeightEntry]
) -> dict[str, dict[str, Any]]:
    """timm's `default_cfgs` of a family.

    Args:
        configs: variant name -> how its images are prepared.
        entries: the family's weights; the first classifier of a variant is its default. Files that
            were never published get no configuration.
    """
    found: dict[str, dict[str, Any]] = {}
    entries = [
        entry
        for entry in entries
        if entry.task == "classification" or entry.state != "never published"
    ]
    for name, config in configs.items():
        mine = [entry for entry in entries if entry.model == name]
        default = next((entry for entry in mine if entry.task == "classification"), None)
        if default is None:
            found[name] = config.without_weights()
        for entry in mine:
            found[entry.name + ("*" if entry is default else "")] = config.of(entry)
    return found


def tag_arguments(entries: Iterable[WeightEntry], model: str, tag: Any) -> dict[str, Any]:
    """Arguments that the weights of `model.tag` ask for; none unless `tag` is a known tag.

    `tag` is what timm hands a builder as `pretrained_cfg`: the tag after the name's dot, a whole
    configuration (whose maker also gives the arguments), or None.
    """
    for entry in entries:
        if (entry.model, entry.tag) == (model, tag):
            return dict(entry.arguments)
    return {}
