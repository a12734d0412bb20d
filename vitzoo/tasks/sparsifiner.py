"""The training phases of a Sparsifiner: first the connections, then the weights around them.

A phase is a run. `attn_recon` trains the predictors of a pretrained dense model to reconstruct its
attention; `cls_distill` starts from that run's weights and trains the body against the dense model
as a teacher (paper section 3.4; `src/main.py` and `src/losses.py` of lim142857/Sparsifiner).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.attention.connectivity import Connectivity
from vitzoo.backbones.sparsifiner import Details, Phase, Sparsifiner
from vitzoo.errors import InputError
from vitzoo.tasks._models import classes_in, create_model, has_other_labels
from vitzoo.tasks.classification import ClassificationOptions, ClassificationTask
from vitzoo.tasks.contract import Batch

Criterion = Literal["mse", "kl"]

# Terms of the loss in each phase; the others have no weight there.
TERMS: dict[Phase, tuple[str, ...]] = {
    "attn_recon": ("attn_recon",),
    "attn_self_distill": ("attn_self_distill",),
    "cls_distill": ("cls", "cls_distill", "token_distill"),
    "cls": ("cls",),
    "joint": ("cls", "cls_distill", "token_distill", "attn_self_distill"),
}
_OF_TEACHER = ("attn_recon", "cls_distill", "token_distill")


def soft_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of two sets of logits (B, ...), summed, over B."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_distillation(
    student: Tensor, teacher: Tensor, live: Tensor | None, *, criterion: Criterion = "mse"
) -> Tensor:
    """Distance of patch features (B, N, C), over the tokens that `live` (B, N) marks."""
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    if live is not None:
        alive = live.flatten()
        student, teacher = student[alive], teacher[alive]
    return soft_divergence(student, teacher) if criterion == "kl" else F.mse_loss(student, teacher)


def attention_distance(
    scores: Sequence[Tensor], targets: Sequence[Tensor], *, criterion: Criterion = "mse"
) -> Tensor:
    """Distance of connectivity scores from attention weights, a mean over the blocks.

    Args:
        scores: per block (B, heads, N-1, N), without the class token's query.
        targets: per block (B, heads, N, N).
        criterion: `mse` sums the squares over everything, batch included; `kl` takes the scores for
            logits and divides by the batch.
    """
    total = scores[0].new_zeros(())
    for score, target in zip(scores, targets, strict=True):
        target = target[:, :, 1:]
        if criterion == "kl":
            total = total + F.kl_div(score.log_softmax(-1), target, reduction="batchmean")
        else:
            total = total + F.mse_loss(score, target, reduction="sum")
    return total / len(scores)


def _connectivity(details: Details) -> list[Connectivity]:
    found = [block.connectivity for block in details.blocks]
    return [each for each in found if each is not None]


@dataclass(kw_only=True)
class DistillOptions:
    """The recipe's `distill` section.

    Attributes:
        phase: what is trained, and with which terms of the loss (`TERMS`).
        teacher: the dense model, a name with a weight tag; `model.name` if None.
        teacher_checkpoint: the teacher's weights, in place of those of its tag.
        cls, cls_distill, token_distill, attn_recon, attn_self_distill: weights of the terms; the
            teacher is left out where it has none.
        attn_criterion, token_criterion: distance of the attention and of the patch features.
    """

    phase: Literal["attn_recon", "attn_self_distill", "cls_distill", "cls", "joint"] = "cls_distill"
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    cls: float = 1.0
    cls_distill: float = 0.5
    token_distill: float = 0.5
    attn_recon: float = 0.01
    attn_self_distill: float = 0.002
    attn_criterion: Literal["mse", "kl"] = "mse"
    token_criterion: Literal["mse", "kl"] = "mse"

    def weights(self) -> dict[str, float]:
        """The terms that count in this phase."""
        own = asdict(self)
        return {term: own[term] for term in TERMS[self.phase] if own[term]}


def phase_losses(
    options: DistillOptions, student: Details, cls: Tensor | None, teacher: Details | None
) -> dict[str, Tensor]:
    """The weighted terms of a phase; their sum is the loss.

    Args:
        options: phase, weights and criteria.
        student: what it computed; with blocks where attention is compared.
        cls: the loss on labels, where the phase has one.
        teacher: the same of the dense model, without gradient.
    """
    found: dict[str, Tensor] = {}
    if cls is not None:
        found["cls"] = cls
    weights = options.weights()
    if "attn_self_distill" in weights:
        found["attn_self_distill"] = attention_distance(
            [each.score for each in _connectivity(student)],
            [block.attention for block in student.blocks],
            criterion=options.attn_criterion,
        )
    if teacher is not None:
        if "attn_recon" in weights:
            found["attn_recon"] = attention_distance(
                [each.score for each in _connectivity(student)],
                [block.attention for block in teacher.blocks],
                criterion=options.attn_criterion,
            )
        if "cls_distill" in weights:
            found["cls_distill"] = soft_divergence(student.logits, teacher.logits)
        if "token_distill" in weights:
            found["token_distill"] = token_distillation(
                student.features,
                teacher.features,
                student.live,
                criterion=options.token_criterion,
            )
    return {term: weight * found[term] for term, weight in weights.items()}


@dataclass(kw_only=True)
class SparsifinerOptions(ClassificationOptions):
    """The recipe's sections of this task."""

    distill: DistillOptions = field(default_factory=DistillOptions)


class SparsifinerTask(ClassificationTask):
    """Classification with a Sparsifiner, in one of its training phases."""

    options_type: ClassVar[type] = SparsifinerOptions

    options: SparsifinerOptions

    def __init__(self, options: SparsifinerOptions) -> None:
        super().__init__(options)
        self._teacher: nn.Module | None = None
        distill = options.distill
        self._weights = distill.weights()
        if options.model.frozen_stages or options.model.linear_probe:
            raise InputError(
                f"distill.phase={distill.phase} says what is trained: leave out model.frozen_stages"
                " and model.linear_probe"
            )
        taught = [term for term in self._weights if term in _OF_TEACHER]
        if taught and distill.teacher is None and distill.teacher_checkpoint is None:
            raise InputError(
                f"the phase {distill.phase} compares with a teacher: give distill.teacher=NAME.TAG"
                " or distill.teacher_checkpoint=FILE, or the weight 0 to distill."
                + ", distill.".join(taught)
            )

    def build_model(self, *, pretrained: bool = True) -> nn.Module:
        """The model with the phase's parameters trainable."""
        model = super().build_model(pretrained=pretrained)
        if not isinstance(model, Sparsifiner):
            raise InputError(f"the task sparsifiner trains no {self.options.model.name}")
        model.set_phase(self.options.distill.phase)
        attention = any(term.startswith("attn_") for term in self._weights)
        model.train_output = "attention" if attention else "tokens"
        return model

    def build_teacher(self) -> nn.Module | None:
        """The dense model that the phase compares with, frozen; None if it needs none.

        Raises:
            InputError: its file is missing, or made for other classes.
        """
        if not any(term in _OF_TEACHER for term in self._weights):
            return None
        distill, count = self.options.distill, len(self.labels)
        file = distill.teacher_checkpoint
        name = distill.teacher or self.options.model.name
        if file:
            classes = classes_in(Path(file).expanduser(), name)
        else:
            config = timm.get_pretrained_cfg(name)
            classes = None if config is None else config.num_classes
        if classes is not None and classes != count:
            raise InputError(f"the teacher knows {classes} classes, the data has {count}")
        if has_other_labels(file, self.labels):
            raise InputError(f"the teacher {file} was trained for other classes than the data's")
        options = replace(
            self.options.model,
            name=name,
            pretrained=True,
            checkpoint=distill.teacher_checkpoint,
            drop_rate=None,
            drop_path_rate=None,
            args=self.options.model.args | {"predictor": False, "pruning_blocks": ()},
            grad_checkpointing=False,
            compile=False,
        )
        teacher = create_model(options, self.labels, pretrained=True)
        teacher = teacher.eval().requires_grad_(False).to(self.device)
        # The authors' teacher answers with the class token's logits alone, as LV-ViT does in
        # training; in evaluation half of the patches' largest logits would be added.
        aux_head = getattr(teacher, "aux_head", None)
        if aux_head is not None:
            aux_head.train()
        return teacher

    def train_mode(self) -> None:
        """Training mode; the first time, the teacher is loaded."""
        super().train_mode()
        if self._teacher is None:
            self._teacher = self.build_teacher()

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """The phase's loss and its terms; the teacher sees the same mixed images."""
        images, targets = self.mix(batch)
        student = self.model(images)
        teacher = None
        if self._teacher is not None:
            with torch.no_grad():
                teacher = self._taught(images)
        cls = self.criterion(student.logits, targets) if "cls" in self._weights else None
        terms = phase_losses(self.options.distill, student, cls, teacher)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _taught(self, images: Tensor) -> Details:
        teacher: Any = self._teacher
        details: Details = teacher.forward_details(images, attention="attn_recon" in self._weights)
        return details

    def published(self) -> Mapping[str, float]:
        """Nothing: the starting weights are a dense model's."""
        return {}
