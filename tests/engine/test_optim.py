"""Parameter groups and schedules of recipes."""

from __future__ import annotations

import math

import pytest
import timm
import torch

import vitzoo  # noqa: F401 - registers the models
from vitzoo.engine.optim import build_optimizer, build_schedule
from vitzoo.engine.recipe import OptimOptions, ScheduleOptions, load_recipe
from vitzoo.errors import InputError
from vitzoo.tasks._models import freeze

NARROW = {
    "depths": (1, 1, 1, 1),
    "embed_dims": (8, 16, 16, 32),
    "num_heads": (1, 2, 2, 4),
    "num_classes": 3,
}


def group_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, name: str) -> dict:
    parameter = model.get_parameter(name)
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def test_litv2_offsets_learn_at_a_hundredth_and_stay_there() -> None:
    recipe = load_recipe("litv2-in1k")
    model = timm.create_model("vz_litv2_small", **NARROW)
    optimizer = build_optimizer(model, recipe.optim, images=1024)
    scheduler, epochs = build_schedule(
        optimizer, recipe.schedule, updates_per_epoch=10, factor=1024 / 512
    )
    assert epochs == 300
    names = [n for n, _ in model.named_parameters() if "conv_offset" in n]
    weight, bias = (next(n for n in names if n.endswith(end)) for end in ("weight", "bias"))
    other = next(n for n, p in model.named_parameters() if p.ndim == 2 and n not in names)

    def rates(update: int) -> list[float]:
        scheduler.step_update(update)
        return [group_of(model, optimizer, name)["lr"] for name in (weight, bias, other)]

    assert rates(0) == pytest.approx([1e-6, 1e-6, 1e-6])
    assert rates(200) == pytest.approx([1e-5, 1e-3, 1e-3], rel=0.02)
    assert rates(1600) == pytest.approx([1e-5, 5e-4, 5e-4], rel=0.1)
    assert rates(2999) == pytest.approx([1e-5, 1e-5, 1e-5], rel=0.01)
    assert group_of(model, optimizer, weight)["weight_decay"] == 0.05
    assert group_of(model, optimizer, bias)["weight_decay"] == 0.0
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(model.parameters()))


def test_the_rate_follows_the_images_of_an_update() -> None:
    model = torch.nn.Linear(2, 2)
    options = OptimOptions(lr=1e-3, lr_batch=1024)
    assert build_optimizer(model, options, images=512).param_groups[0]["lr"] == 5e-4


def test_layer_decay_lowers_the_rate_towards_the_stem() -> None:
    model = timm.create_model("vz_davit_tiny", **NARROW)
    optimizer = build_optimizer(model, OptimOptions(layer_decay=0.5), images=8)
    schedule = ScheduleOptions(epochs=2)
    scheduler, _ = build_schedule(optimizer, schedule, updates_per_epoch=4, factor=1.0)
    scheduler.step_update(0)
    names = ("head.fc.weight", "stages.3.blocks.0.0.attn.qkv.weight", "stem.conv.weight")
    found = [
        group_of(model, optimizer, name)["lr"]
        for name in names
        if name in dict(model.named_parameters())
    ]
    assert found[0] == 1e-3
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.1 * found[0]


def test_a_warm_up_in_updates_ends_inside_an_epoch() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimOptions(lr=1e-4), images=1)
    schedule = ScheduleOptions(
        name="multistep",
        epochs=12,
        decay_milestones=[8, 11],
        warmup_updates=500,
        warmup_lr=1e-7,
    )
    scheduler, epochs = build_schedule(optimizer, schedule, updates_per_epoch=7330, factor=1.0)
    assert epochs == 12
    found = []
    for update in (0, 250, 500, 8 * 7330 - 2, 8 * 7330, 11 * 7330, 12 * 7330):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1e-7, 5.005e-5, 1e-4, 1e-4, 1e-5, 1e-6, 1e-6])


def rates(schedule: ScheduleOptions, at: list[int], updates_per_epoch: int = 10) -> list[float]:
    """The rate at some updates of a schedule whose top is 1, which lasts `schedule.epochs`."""
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimOptions(lr=1.0), images=1)
    scheduler, epochs = build_schedule(
        optimizer, schedule, updates_per_epoch=updates_per_epoch, factor=1.0
    )
    assert epochs == schedule.epochs + schedule.cooldown_epochs
    found = []
    for moment in at:
        if schedule.by == "epoch":
            scheduler.step(moment)
        else:
            scheduler.step_update(moment)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_a_whole_curve_after_the_warm_up() -> None:
    shape = {"epochs": 10, "warmup_epochs": 4, "warmup_lr": 0.0, "min_lr": 0.2}
    whole = ScheduleOptions(**shape, warmup_prefix=True)
    assert rates(whole, [0, 20, 40, 55, 70, 100]) == pytest.approx([0, 0.5, 1, 0.882843, 0.6, 0.2])
    # Without, the curve has run for the warm-up's four epochs already.
    cut = 0.2 + 0.4 * (1 + math.cos(0.4 * math.pi))
    assert rates(ScheduleOptions(**shape), [0, 20, 40, 100]) == pytest.approx([0, 0.5, cut, 0.2])
    by_epoch = ScheduleOptions(**shape, warmup_prefix=True, by="epoch", cooldown_epochs=2)
    assert rates(by_epoch, [2, 4, 7, 10, 11]) == pytest.approx([0.5, 1, 0.6, 0.2, 0.2])
    shape["warmup_epochs"] = 0
    plain, same = (ScheduleOptions(**shape, warmup_prefix=prefix) for prefix in (False, True))
    assert rates(plain, [0, 33, 99]) == rates(same, [0, 33, 99])


@pytest.mark.parametrize("updates", [1, 7, 500, 7329])
def test_a_warm_up_of_part_of_an_epoch_costs_no_epoch(updates: int) -> None:
    shape = {"epochs": 12, "warmup_updates": updates, "warmup_lr": 0.0, "min_lr": 0.0}
    for cooldown in (0, 3):
        options = ScheduleOptions(**shape, warmup_prefix=True, cooldown_epochs=cooldown)
        found = rates(options, [updates, 12 * 7330], updates_per_epoch=7330)
        assert found == pytest.approx([1, 0])


@pytest.mark.parametrize("name", ["step", "multistep", "poly", "tanh", "constant", "wsd"])
def test_other_curves_start_after_the_warm_up(name: str) -> None:
    options = ScheduleOptions(
        name=name,
        epochs=10,
        warmup_epochs=4,
        warmup_prefix=True,
        decay_epochs=2,
        decay_milestones=[2],
        min_lr=0.0,
    )
    assert rates(options, [40]) == pytest.approx([1])


@pytest.mark.parametrize(
    "name", ["sparsifiner-in1k-predictor", "sparsifiner-in1k", "uhalonet-in1k"]
)
def test_authors_whose_curve_starts_after_the_warm_up(name: str) -> None:
    schedule, lr = load_recipe(name).schedule, load_recipe(name).optim.lr
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimOptions(lr=lr), images=1)
    scheduler, epochs = build_schedule(optimizer, schedule, updates_per_epoch=10, factor=1.0)
    found = []
    for epoch in (schedule.warmup_epochs, epochs):
        scheduler.step_update(10 * epoch)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([lr, schedule.min_lr])


def test_what_cannot_be_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="no trainable parameter matches 'ofset'"):
        build_optimizer(model, OptimOptions(lr_multipliers={"ofset": 0.1}), images=1)
    with pytest.raises(InputError, match="unknown optimiser"):
        build_optimizer(model, OptimOptions(name="adamm"), images=1)
    optimizer = build_optimizer(model, OptimOptions(), images=1)
    for options in (
        ScheduleOptions(name="cosin"),
        ScheduleOptions(epochs=3, warmup_epochs=3),
        ScheduleOptions(epochs=3, warmup_epochs=3, warmup_prefix=True),
        ScheduleOptions(epochs=3, warmup_updates=6),
        ScheduleOptions(epochs=3, warmup_epochs=1, warmup_updates=2),
        ScheduleOptions(epochs=3, warmup_updates=2, by="epoch"),
    ):
        with pytest.raises(InputError):
            build_schedule(optimizer, options, updates_per_epoch=2, factor=1.0)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        build_optimizer(model, OptimOptions(), images=1)


@pytest.mark.parametrize("name", ["vz_davit_tiny", "vz_litv2_small"])
def test_freezing(name: str) -> None:
    model = timm.create_model(name, **NARROW)
    freeze(model, stages=2, linear_probe=False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert any(n.startswith("stem") for n in frozen)
    assert {n.split(".")[1] for n in frozen if n.startswith("stages")} == {"0", "1"}
    assert not any(n.startswith("head") for n in frozen)
    model = timm.create_model(name, **NARROW)
    resting = freeze(model, stages=0, linear_probe=True)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"head.fc.weight", "head.fc.bias"}
    assert model.head.fc not in resting
    assert model.stages[0] in resting
    with pytest.raises(InputError, match="4 stages to freeze"):
        freeze(model, stages=9, linear_probe=False)
