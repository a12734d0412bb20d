"""Optimiser and schedule of a recipe, through timm."""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vitzoo.engine.recipe import OptimOptions, ScheduleOptions
from vitzoo.errors import InputError

# Functions of the update's number alone, so that resuming needs no state; timm's plateau is not.
SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh", "constant", "wsd", "rsqrt")


def build_optimizer(
    model: nn.Module, options: OptimOptions, *, images: int
) -> torch.optim.Optimizer:
    """The optimiser over the model's trainable parameters.

    Args:
        model: before any wrapping, so that names are the model's own.
        options: the recipe's section.
        images: images an update, over all processes.

    Raises:
        InputError: unknown optimiser, a pattern that finds no parameter, nothing to train.
    """
    if options.name.lower() not in list_optimizers():
        near = difflib.get_close_matches(options.name, list_optimizers(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"unknown optimiser optim.name={options.name}{hint}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("nothing to train: every parameter is frozen")
    lr = options.lr * batch_factor(options, images)
    groups = _multiply(model, _groups(model, options), options.lr_multipliers, lr)
    extra = {
        key: getattr(options, key)
        for key in ("betas", "eps", "momentum")
        if getattr(options, key) is not None
    }
    # Groups carry their own decay; timm would split only a bare model.
    return create_optimizer_v2(groups, options.name, lr=lr, weight_decay=0.0, **extra)


def batch_factor(options: OptimOptions, images: int) -> float:
    """What the recipe's rates are multiplied with at `images` an update."""
    return images / options.lr_batch if options.lr_batch else 1.0


def _groups(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    exempt: Any = getattr(model, "no_weight_decay", set)
    exempt = set() if options.decay_all else exempt()
    shared: dict[str, Any] = {
        "weight_decay": options.weight_decay,
        "no_weight_decay_list": exempt,
        "weight_decay_exclude_1d": not options.decay_all,
    }
    if options.layer_decay is not None:
        return param_groups_layer_decay(model, layer_decay=options.layer_decay, **shared)
    return param_groups_weight_decay(model, **shared)


def _multiply(
    model: nn.Module, groups: list[dict[str, Any]], multipliers: dict[str, float], lr: float
) -> list[dict[str, Any]]:
    """Split off the parameters that a pattern names into groups with their own `lr`.

    The factor goes into the group's base rate and not into timm's `lr_scale`, which would scale the
    schedule's floor too: at a factor of 0.01 and a floor of 0.01 x lr the rate stays constant.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for pattern, factor in multipliers.items():
        found = re.compile(pattern)
        split: list[dict[str, Any]] = []
        matched = False
        for group in groups:
            hits = [p for p in group["params"] if found.search(names[id(p)])]
            rest = [p for p in group["params"] if not found.search(names[id(p)])]
            if rest:
                split.append(group | {"params": rest})
            if hits:
                matched = True
                split.append(group | {"params": hits, "lr": lr * factor})
        if not matched:
            raise InputError(f"optim.lr_multipliers: no trainable parameter matches {pattern!r}")
        groups = split
    return groups


def build_schedule(
    optimizer: torch.optim.Optimizer,
    options: ScheduleOptions,
    *,
    updates_per_epoch: int,
    factor: float,
) -> tuple[Scheduler, int]:
    """timm's schedule and the number of epochs, cooldown included.

    Args:
        optimizer: whose groups it drives.
        options: the recipe's section.
        updates_per_epoch: optimiser updates.
        factor: what `warmup_lr` and `min_lr` are multiplied with.

    Raises:
        InputError: unknown schedule, a warm-up that cannot be.
    """
    warmup = _warmup(options, updates_per_epoch)
    if options.name not in SCHEDULES:
        raise InputError(
            f"unknown schedule schedule.name={options.name}; known: {', '.join(SCHEDULES)}"
        )
    prefix = warmup if options.warmup_prefix else 0
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=options.name,
            # timm adds the warm-up to these where it comes first.
            num_epochs=options.epochs - prefix,
            decay_epochs=options.decay_epochs,
            decay_milestones=options.decay_milestones,
            decay_rate=options.decay_rate,
            cooldown_epochs=options.cooldown_epochs,
            min_lr=options.min_lr * factor,
            warmup_lr=options.warmup_lr * factor,
            # May be a part of an epoch: the rate changes with every update then.
            warmup_epochs=warmup,
            warmup_prefix=options.warmup_prefix,
            step_on_epochs=options.by == "epoch",
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:
        raise InputError(f"schedule: {error}") from None
    if prefix:
        # A warm-up of part of an epoch gives timm's total a fraction, rounded down.
        cooldown = options.cooldown_epochs if hasattr(scheduler, "get_cycle_length") else 0
        epochs = options.epochs + cooldown
    return scheduler, epochs


def _warmup(options: ScheduleOptions, updates_per_epoch: int) -> float:
    """Epochs of warm-up, whichever way the recipe gives them."""
    warmup: float = options.warmup_epochs
    given = f"warmup_epochs={warmup}"
    if options.warmup_updates is not None:
        given = f"warmup_updates={options.warmup_updates}"
        if options.warmup_epochs or options.by == "epoch":
            raise InputError(
                f"schedule.{given} takes the place of schedule.warmup_epochs, and needs "
                "schedule.by=update"
            )
        warmup = options.warmup_updates / updates_per_epoch
    if warmup and warmup >= options.epochs > 0:
        raise InputError(f"schedule.{given} leaves nothing of schedule.epochs={options.epochs}")
    return warmup
