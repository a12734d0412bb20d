"""The phases of a Sparsifiner's training: losses against the authors' code, and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from tests.golden_cases import GoldenCase, draw_input, draw_weight, load_case
from vitzoo.backbones.sparsifiner import Sparsifiner
from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.optim import build_optimizer
from vitzoo.engine.recipe import load_recipe, merge
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.tasks.sparsifiner import (
    DistillOptions,
    SparsifinerTask,
    attention_distance,
    phase_losses,
    soft_divergence,
    token_distillation,
)

NARROW = {"embed_dim": 96, "depth": 3, "num_heads": 3, "img_size": 112, "num_classes": 10}


def golden_run(case: GoldenCase, phase: str) -> tuple[Sparsifiner, dict[str, Tensor]]:
    student = Sparsifiner(**NARROW).train()
    student.load_state_dict(case.weights())
    teacher = Sparsifiner(**NARROW, predictor=False).eval()
    shapes = case.spec["connectivity"]["teacher_state_dict"]
    teacher.load_state_dict(
        {
            name: torch.from_numpy(draw_weight(name, tuple(shape), seed=1))
            for name, shape in shapes.items()
        }
    )
    student.set_phase(phase)
    # The authors' optimiser, not requires_grad, decides what is trained.
    student.requires_grad_(True)
    details = student.forward_details(case.input())
    with torch.no_grad():
        taught = teacher.forward_details(case.input())
    targets = draw_input((2, 10), seed=2).softmax(-1)
    cls = SoftTargetCrossEntropy()(details.logits, targets)
    return student, phase_losses(DistillOptions(phase=phase), details, cls, taught)


@pytest.mark.parametrize("phase", ["attn_recon", "cls_distill"])
def test_losses_and_gradients_are_the_authors(phase: str) -> None:
    case = load_case("sparsifiner", "sparsifiner_losses")
    student, losses = golden_run(case, phase)
    total = torch.stack(list(losses.values())).sum()
    case.check(f"{phase}.total", total[None])
    for output in case.outputs:
        group, _, term = output.partition(".")
        if group == phase and term.endswith("_loss"):
            found = losses.get(term.removesuffix("_loss"), total.new_zeros(()))
            case.check(output, found[None])
    total.backward()
    block = dict(student.blocks[1].attn.named_parameters())
    names = case.spec["outputs"][f"{phase}.grad_norms"]["what"].partition("order ")[2].split(", ")
    gradients = [block[name.removeprefix("blocks.1.attn.")].grad for name in names]
    norms = [total.new_zeros(()) if g is None else g.norm() for g in gradients]
    case.check(f"{phase}.grad_norms", torch.stack(norms))


def test_divergence_is_of_the_teacher_from_the_student() -> None:
    student, teacher = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p.log() - q.log())).sum() / 4
    torch.testing.assert_close(soft_divergence(student, teacher), expected)


def test_pruned_tokens_are_not_compared() -> None:
    student, teacher = torch.randn(2, 2, 5, 3)
    live = torch.tensor([[True, False, True, True, False], [True, True, False, True, False]])
    expected = (student - teacher)[live].square().mean()
    torch.testing.assert_close(token_distillation(student, teacher, live), expected)
    assert token_distillation(student, student, live, criterion="kl").abs() < 1e-6


def test_attention_distances() -> None:
    scores, weights = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 5, 5).softmax(-1)
    found = attention_distance([scores, scores], [weights, weights])
    torch.testing.assert_close(found, (scores - weights[:, :, 1:]).square().sum())
    exact = weights[:, :, 1:].log()
    assert attention_distance([exact], [weights], criterion="kl").abs() < 1e-5


TINY = {
    "task": "sparsifiner",
    "model": {
        "name": "vz_sparsifiner_deit_tiny",
        "args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 48},
    },
    "data": {"name": "sklearn/digits", "size": 48, "batch_size": 16, "workers": 0}
    | {"train_first": 48, "val_first": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
    "augment": {"enabled": False, "mixup": 0.2},
    "schedule": {"epochs": 1},
}


def run(folder: Path, name: str, *arguments: str) -> Path:
    places = [f"run.folder={folder}", f"run.name={name}", "run.device=cpu", "run.select=last"]
    return train(merge(TINY, [*places, *arguments])).folder.weights


def changed(before: Path, after: Path) -> set[str]:
    old, new = load_file(before), load_file(after)
    return {name for name in new if name not in old or not torch.equal(old[name], new[name])}


def test_phases_follow_each_other(tmp_path: Path) -> None:
    dense = run(
        tmp_path, "dense", "task=classification", "model.args.predictor=false", "optim.lr=1e-3"
    )
    start = [f"model.checkpoint={dense}", f"distill.teacher_checkpoint={dense}"]
    recon = run(tmp_path, "recon", "distill.phase=attn_recon", *start)
    assert all(".mask_predictor." in name for name in changed(dense, recon))
    tuned = run(
        tmp_path, "tuned", f"model.checkpoint={recon}", f"distill.teacher_checkpoint={dense}"
    )
    moved = changed(recon, tuned)
    assert "blocks.0.attn.qkv.weight" in moved
    assert "head.weight" in moved
    assert not any(".mask_predictor." in name for name in moved)


def test_joint_phase_needs_no_teacher(tmp_path: Path) -> None:
    without = ["distill.phase=joint", "distill.cls_distill=0", "distill.token_distill=0"]
    assert run(tmp_path, "joint", *without).is_file()


def test_lvvits_teacher_answers_with_the_class_token(tmp_path: Path) -> None:
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 48}
    dense = timm.create_model(
        "vz_sparsifiner_lvvit_small", predictor=False, num_classes=2, **arguments
    ).eval()
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    written = {
        "task": "sparsifiner",
        "model": {"name": "vz_sparsifiner_lvvit_small", "args": arguments},
        "distill": {"teacher_checkpoint": str(tmp_path / "dense.pth")},
    }
    task = SparsifinerTask(merge(written).options)
    task.labels = ("a", "b")
    task.model = task.build_model()
    task.train_mode()
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        taught = task._taught(x)
        tokens = dense.forward_features(x)
        torch.testing.assert_close(taught.logits, dense.head(tokens[:, 0]))
        torch.testing.assert_close(taught.features, dense.aux_head(tokens[:, 1:]))
        assert not torch.allclose(taught.logits, dense(x))


def test_teachers_that_cannot_teach(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give distill"):
        run(tmp_path, "none")
    with pytest.raises(InputError, match="1000 classes, the data has 10"):
        run(tmp_path, "other", "distill.teacher=vz_sparsifiner_deit_tiny.deit_start")
    with pytest.raises(InputError, match="no weights file"):
        run(tmp_path, "gone", f"distill.teacher_checkpoint={tmp_path}/gone.pth")
    other = {"task": "sparsifiner", "model": {"name": "vz_davit_tiny"}, "distill": {"phase": "cls"}}
    task = SparsifinerTask(merge(other).options)
    task.labels = ("a", "b")
    with pytest.raises(InputError, match="trains no vz_davit_tiny"):
        task.build_model()


def test_a_run_at_another_size_keeps_the_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = ["distill.phase=joint", "distill.cls_distill=0", "distill.token_distill=0"]
    large = run(tmp_path, "large", *joint, "model.args.img_size=96", "data.size=96")
    step, steps = SparsifinerTask.training_step, 0

    def killed(self: SparsifinerTask, batch: Any) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step(self, batch)

    tuning = [*joint, f"model.checkpoint={large}", "run.save_every=1", "ema.decay=0.9"]
    monkeypatch.setattr(SparsifinerTask, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "small", *tuning)
    # Neither a resumed run nor an evaluation reads the first file again.
    run(tmp_path, "small", *tuning)
    assert steps == 4
    weights = load_file(tmp_path / "small" / "weights.safetensors")
    # 9 patches and the class token; the rows of 36 patches.
    assert weights["blocks.0.attn.mask_predictor.proj_n"].shape == (10, 6)
    large.unlink()
    found = evaluate(str(tmp_path / "small"))
    assert "top1" in found


def test_fine_tuning_needs_no_teacher(tmp_path: Path) -> None:
    recipe = load_recipe("sparsifiner-finetune").merged
    # All of the recipe but its size and its published start.
    tiny = {key: TINY[key] for key in ("model", "data", "schedule")}
    tiny["augment"] = {"auto_augment": None}
    tuned = recipe | {key: recipe[key] | values for key, values in tiny.items()}
    tuned["model"]["pretrained"] = False
    places = [f"run.folder={tmp_path}", "run.device=cpu", "schedule.warmup_epochs=0"]
    merged = merge(tuned, places)
    assert train(merged).folder.weights.is_file()
    task = SparsifinerTask(merged.options)
    task.labels = ("a", "b")
    assert task.build_teacher() is None
    # Predictors and body learn at the same time, the predictors faster.
    model = task.build_model(pretrained=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    rates = {group["lr"] for group in build_optimizer(model, merged.optim, images=32).param_groups}
    assert rates == {merged.optim.lr, 4 * merged.optim.lr}


@pytest.mark.parametrize("name", ["sparsifiner-in1k-predictor", "sparsifiner-in1k"])
def test_recipes_are_the_authors_settings(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.task == "sparsifiner"
    first = name.endswith("predictor")
    assert recipe.options.distill.phase == ("attn_recon" if first else "cls_distill")
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs) == (5 if first else 45, 3)
    assert (recipe.optim.lr, recipe.schedule.min_lr) == ((3e-4, 2e-4) if first else (8e-5, 2e-6))
