"""Recipes: YAML files and `key=value` arguments, merged into typed dataclasses by OmegaConf."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vitzoo.errors import InputError, missing_extra
from vitzoo.tasks import task_class


@dataclass(kw_only=True)
class OptimOptions:
    """The recipe's `optim` section.

    Attributes:
        name: one of timm's optimisers.
        lr: learning rate for `lr_batch` images.
        lr_batch: scale `lr`, `schedule.warmup_lr` and `schedule.min_lr` linearly from this many
            images an update to the actual number; no scaling if None.
        weight_decay: not on biases and one-dimensional parameters, nor on what the model exempts.
        decay_all: decay those too.
        betas, eps, momentum: the optimiser's own if None.
        clip: largest gradient norm.
        layer_decay: factor of the learning rate from one layer to the one below.
        lr_multipliers: regular expression -> factor of `lr` for the parameters whose name it finds;
            the schedule's floor and warm-up start stay as they are.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_batch: int | None = None
    weight_decay: float = 0.05
    decay_all: bool = False
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    clip: float | None = None
    layer_decay: float | None = None
    lr_multipliers: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class ScheduleOptions:
    """The recipe's `schedule` section; timm's schedulers.

    Attributes:
        name: `cosine`, `step`, `multistep`, `poly`, `tanh`, ...
        epochs: to the end of the curve, warm-up included.
        warmup_epochs, warmup_lr: linear warm-up and where it starts.
        warmup_updates: length of the warm-up in updates; `warmup_epochs` if None.
        warmup_prefix: start the curve at its top when the warm-up ends, in the epochs that are
            left; otherwise it has run from the first epoch on.
        cooldown_epochs: more epochs at `min_lr`.
        min_lr: the curve's floor.
        decay_epochs, decay_milestones, decay_rate: of the stepwise schedules.
        by: change the rate after every update or every epoch.
    """

    name: str = "cosine"
    epochs: int = 300
    warmup_epochs: int = 0
    warmup_updates: int | None = None
    warmup_prefix: bool = False
    warmup_lr: float = 1e-6
    cooldown_epochs: int = 0
    min_lr: float = 1e-5
    decay_epochs: float = 30
    decay_milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    by: Literal["update", "epoch"] = "update"


@dataclass(kw_only=True)
class EmaOptions:
    """The recipe's `ema` section: an average of the weights, evaluated and kept in their place.

    Attributes:
        decay: of the average; no average if None.
        warmup: raise the decay from 0, for short runs.
    """

    decay: float | None = None
    warmup: bool = False


@dataclass(kw_only=True)
class RunOptions:
    """The recipe's `run` section.

    Attributes:
        name: the run's folder under `folder`; the recipe's name if None.
        folder: where runs are kept.
        seed: of everything that is random.
        precision: `no`, `bf16` or `fp16`; what `accelerate launch` says, else `no`, if None.
        accumulate: batches an update.
        device: `cpu` to stay off an accelerator.
        save_every: updates between checkpoints inside an epoch; none inside if None. There is
            always one at the end of an epoch.
        keep_checkpoints: how many, at least two so that a torn one has a predecessor.
        eval_every: epochs between evaluations.
        select: keep the weights of the `last` or of the `best` epoch.
    """

    name: str | None = None
    folder: str = "runs"
    seed: int = 42
    precision: Literal["no", "bf16", "fp16"] | None = None
    accumulate: int = 1
    device: Literal["auto", "cpu"] = "auto"
    save_every: int | None = None
    keep_checkpoints: int = 2
    eval_every: int = 1
    select: Literal["last", "best"] = "best"


@dataclass(kw_only=True)
class Recipe:
    """A merged recipe.

    Attributes:
        task: the task's name.
        options: the task's own sections, an instance of its `options_type`.
        merged: all of it in YAML's types.
    """

    task: str
    options: Any
    optim: OptimOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    run: RunOptions
    merged: dict[str, Any]


_SECTIONS: dict[str, type] = {
    "optim": OptimOptions,
    "schedule": ScheduleOptions,
    "ema": EmaOptions,
    "run": RunOptions,
}


def configs_folders() -> list[Path]:
    """Where recipes are looked up by name: the repository's folder, then the wheel's copy."""
    package = Path(__file__).resolve().parents[1]
    return [
        folder for folder in (package.parent / "configs", package / "configs") if folder.is_dir()
    ]


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted({path.stem for folder in configs_folders() for path in folder.glob("*/*.yaml")})


def find_recipe(name: str) -> Path:
    """A recipe's file from a path, `davit-digits` or `classification/davit-digits`.

    Raises:
        InputError: there is none; the message offers the nearest names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    wanted = name.removesuffix(".yaml")
    for folder in configs_folders():
        for found in sorted(folder.glob("*/*.yaml")):
            if wanted in (found.stem, f"{found.parent.name}/{found.stem}"):
                return found
    near = difflib.get_close_matches(wanted, recipe_names(), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    known = "" if near else f" Recipes: {', '.join(recipe_names())}, or a path."
    raise InputError(f"no recipe {name!r}{hint}{known}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key=value` arguments, check every key and type.

    Args:
        name: a path or a name under `configs/`.
        overrides: such as `optim.lr=1e-3`.

    Raises:
        InputError: unknown key ("did you mean"), wrong type, missing value.
    """
    omegaconf = _omegaconf()
    path = find_recipe(name)
    try:
        written = omegaconf.OmegaConf.load(path)
    except Exception as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not omegaconf.OmegaConf.is_dict(written):
        raise InputError(f"{path} is no recipe: it must be a mapping of sections")
    try:
        recipe = merge(written, overrides, where=str(path))
    except InputError as error:
        asked = next((text for text in reversed(overrides) if text.startswith("task=")), None)
        own = f"task={written.get('task')}"
        if asked in (None, own) or "unknown task" in str(error):
            raise
        raise InputError(f"{path} has {own}, and does not fit {asked}: {error}") from None
    if recipe.run.name is None:
        recipe.run.name = recipe.merged["run"]["name"] = path.stem
    return recipe


def merge(written: Any, overrides: Sequence[str] = (), *, where: str = "the recipe") -> Recipe:
    """A recipe from a mapping and `key=value` arguments.

    Raises:
        InputError: see `load_recipe`.
    """
    omegaconf = _omegaconf()
    options_type: type = object
    for text in overrides:
        if "=" not in text or text.startswith("="):
            raise InputError(f"{text!r} is not key=value, such as optim.lr=1e-3")
        try:
            omegaconf.OmegaConf.from_dotlist([text])
        except Exception:
            raise InputError(f"{text!r} has a value that is not YAML") from None
    try:
        given = omegaconf.OmegaConf.from_dotlist(list(overrides))
        task = given.get("task") or omegaconf.OmegaConf.create(written).get("task")
        if task is None:
            raise InputError(f"{where} names no task: add a line such as 'task: classification'")
        options_type = task_class(str(task)).options_type
        config = omegaconf.OmegaConf.structured(_schema(options_type))
        config = omegaconf.OmegaConf.merge(config, written, given)
        typed = omegaconf.OmegaConf.to_object(config)
        merged = omegaconf.OmegaConf.to_container(config, resolve=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None))
        if any(text.partition("=")[0] == key for text in overrides):
            where = "the arguments"
        raise _explain(error, where, _keys(options_type)) from None
    _check_values(typed)
    sections = {f.name: getattr(typed, f.name) for f in dataclasses.fields(options_type)}
    return Recipe(
        task=str(task),
        options=options_type(**sections),
        merged=_plain(merged),
        **{name: getattr(typed, name) for name in _SECTIONS},
    )


# The smallest value of a recipe's numbers, where a task has them; None is always fine.
_LEAST = {
    "data.batch_size": 1,
    "data.eval_batch_size": 1,
    "data.workers": 0,
    "data.train_first": 1,
    "data.val_first": 1,
    "data.size": 1,
    "model.frozen_stages": 0,
    "model.num_classes": 1,
    "optim.lr": 0,
    "optim.lr_batch": 1,
    "optim.weight_decay": 0,
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "schedule.warmup_updates": 0,
    "schedule.cooldown_epochs": 0,
    "run.accumulate": 1,
    "run.save_every": 1,
    "run.keep_checkpoints": 1,
    "run.eval_every": 1,
}
_ONE_OF: dict[str, tuple[Any, ...]] = {
    "model.in_chans": (1, 3),
    "data.interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
}


def _check_values(recipe: Any) -> None:
    """Refuse numbers and words that OmegaConf's types let through.

    Raises:
        InputError: one is out of range; the message has the accepted ones.
    """

    def value_of(key: str) -> Any:
        section, _, name = key.partition(".")
        return getattr(getattr(recipe, section, None), name, None)

    for key, least in _LEAST.items():
        value = value_of(key)
        if isinstance(value, int | float) and not value >= least:
            raise InputError(f"{key}={value} is too small: give {least} or more")
    for key, accepted in _ONE_OF.items():
        value = value_of(key)
        if value is not None and value not in accepted:
            raise InputError(f"{key}={value}: give {', '.join(map(str, accepted))}")
    channels = value_of("model.in_chans")
    for key in ("data.mean", "data.std"):
        value = value_of(key)
        if value is not None and channels is not None and len(value) != channels:
            raise InputError(f"{key}={value} has {len(value)} numbers for {channels} channels")


def _keys(options_type: type) -> list[str]:
    """All recipe keys of a task, `section.name`."""
    sections = get_type_hints(options_type) | _SECTIONS
    return [
        f"{section}.{value.name}"
        for section, kind in sections.items()
        for value in dataclasses.fields(kind)
    ]


def _schema(options_type: type) -> type:
    """The dataclass of a whole recipe: the task's sections and the engine's."""
    kinds = get_type_hints(options_type) | _SECTIONS
    fields = [(name, kind, field(default_factory=kind)) for name, kind in kinds.items()]
    return dataclasses.make_dataclass("Recipe", [("task", str, "classification"), *fields])


def _plain(value: Any) -> Any:
    """Tuples as lists, so that what is merged equals what is read back from YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _explain(error: Any, where: str, known: Sequence[str]) -> InputError:
    key = getattr(error, "full_key", None)
    sentence = str(error).splitlines()[0].rstrip(".")
    if type(error).__name__ == "MissingMandatoryValue":
        return InputError(f"{key} is not set: give {key}=VALUE")
    if "Did you mean" in sentence:
        guess = sentence.partition("Did you mean: ")[2].strip("'?")
        parent = str(key).rpartition(".")[0]
        near = f"{parent}.{guess}" if parent else guess
        return InputError(f"unknown recipe key {key!r}; did you mean {near!r}?")
    if type(error).__name__ == "ConfigKeyError":
        meant = [repr(name) for name in known if name.endswith(f".{key}")]
        if meant:
            return InputError(f"unknown recipe key {key!r}; did you mean {' or '.join(meant)}?")
        return InputError(f"unknown recipe key {key!r} in {where}")
    return InputError(f"recipe key {key}: {sentence}" if key else f"{where}: {sentence}")


def _omegaconf() -> Any:
    try:
        import omegaconf
    except ImportError:
        raise missing_extra("train", "omegaconf") from None
    return omegaconf


def write_recipe(merged: dict[str, Any]) -> str:
    """A merged recipe as YAML."""
    text: str = _omegaconf().OmegaConf.to_yaml(merged)
    return text
