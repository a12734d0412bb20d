"""The training loop: a recipe in, a run's folder out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from vitzoo.engine import checkpoint, resume, states
from vitzoo.engine.curves import draw_curves
from vitzoo.engine.loaders import Batches, seed_everything
from vitzoo.engine.machine import fix_linear, make_accelerator
from vitzoo.engine.optim import batch_factor, build_optimizer, build_schedule
from vitzoo.engine.recipe import Recipe
from vitzoo.engine.report import Report
from vitzoo.engine.runfolder import RunFolder
from vitzoo.errors import InputError
from vitzoo.tasks import Task, all_reduce_sum, task_class


@dataclass
class Progress:
    """Where a run is; part of every checkpoint.

    Attributes:
        epoch: the one under way, from 0.
        step: batches of it that are done, of each process.
        update: optimiser updates since the start.
        loss_sum, loss_count: training loss of this epoch so far, over all processes.
        best, best_epoch: the task's metric where it was best.
        seconds: of training so far.
    """

    epoch: int = 0
    step: int = 0
    update: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        folder: what it left.
        metrics: of the weights kept.
        epoch: of the weights kept, from 0.
    """

    folder: RunFolder
    metrics: dict[str, float]
    epoch: int


def train(recipe: Recipe) -> Summary:
    """Run a recipe to its end, from its newest checkpoint if it has one.

    Raises:
        InputError: anything in the recipe, the data or the folder that a user can put right.
    """
    accelerator = make_accelerator(recipe)
    folder = RunFolder(Path(recipe.run.folder).expanduser() / str(recipe.run.name))
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return Trainer(recipe, accelerator, folder).run()
    with folder.locked():
        resume.same_recipe(folder, recipe)
        accelerator.wait_for_everyone()
        return Trainer(recipe, accelerator, folder).run()


class Trainer:
    """One process's part of a run."""

    def __init__(self, recipe: Recipe, accelerator: Any, folder: RunFolder) -> None:
        self.recipe, self.accelerator, self.folder = recipe, accelerator, folder
        self.task: Task = task_class(recipe.task)(recipe.options)
        self.task.device = accelerator.device
        self.progress = Progress()
        self.lines: list[dict[str, Any]] = []
        saved = checkpoint.newest(folder.checkpoints)
        if saved is None and any(folder.checkpoints.glob("update-*.safetensors")):
            raise InputError(
                f"no checkpoint in {folder.checkpoints} is whole, and a new start would replace "
                "the weights kept: give run.name=NAME for a new run, or remove the folder"
            )
        self.linear = fix_linear(saved.facts.get("linear") if saved is not None else None)
        seed_everything(recipe.run.seed)
        data = self.task.build_data()
        self.task.labels = data.labels
        self.samples = resume.count_samples(data.train, data.val)
        self.train_batches, self.val_batches = self._batches(data)
        self._build(pretrained=saved is None)
        if saved is not None:
            self._restore(saved)

    def _batches(self, data: Any) -> tuple[Batches, Batches]:
        options, run = self.recipe.options.data, self.recipe.run
        shared: dict[str, Any] = {
            "workers": options.workers,
            "on_error": options.on_error,
            "seed": run.seed,
            "rank": self.accelerator.process_index,
            "world": self.accelerator.num_processes,
        }
        train_batches = Batches(
            data.train, data.collate, batch_size=options.batch_size, train=True, **shared
        )
        if len(train_batches) < run.accumulate:
            raise InputError(
                f"run.accumulate={run.accumulate}, but an epoch has {len(train_batches)} batches"
            )
        val_batches = Batches(
            data.val,
            data.val_collate or data.collate,
            batch_size=options.eval_batch_size or options.batch_size,
            train=False,
            **shared,
        )
        return train_batches, val_batches

    def _build(self, *, pretrained: bool) -> None:
        """Model, EMA, optimiser and schedule, wrapped for this process."""
        recipe, accelerator = self.recipe, self.accelerator
        with accelerator.main_process_first():
            model = self.task.build_model(pretrained=pretrained)
        model.to(accelerator.device)
        sharded = str(accelerator.distributed_type).endswith("FSDP")
        if sharded and recipe.ema.decay is not None:
            raise InputError("ema.decay needs whole weights in each process: not with FSDP")
        run = recipe.run
        images = recipe.options.data.batch_size * accelerator.num_processes * run.accumulate
        optimizer = build_optimizer(model, recipe.optim, images=images)
        self.ema = None
        if recipe.ema.decay is not None:
            self.ema = ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.sharded = sharded
        self.updates_per_epoch = len(self.train_batches) // run.accumulate
        self.scheduler, self.epochs = build_schedule(
            self.optimizer.optimizer,
            recipe.schedule,
            updates_per_epoch=self.updates_per_epoch,
            factor=batch_factor(recipe.optim, images),
        )

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.progress = Progress(**saved.facts["progress"])
        resume.same_labels(self.folder.root, tuple(saved.facts["labels"]), self.task.labels)
        if "samples" in saved.facts:
            resume.same_samples(self.folder.root, saved.facts["samples"], self.samples)
        states.load(self.model, self.optimizer, saved, sharded=self.sharded)
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.part("ema."))
        scaler = self.accelerator.scaler
        if scaler is not None and saved.facts.get("scaler"):
            scaler.load_state_dict(saved.facts["scaler"])
        # What the log has of epochs that the checkpoint does not know is repeated.
        lines = self.folder.read_metrics()
        self.lines = [line for line in lines if line["epoch"] < self.progress.epoch]

    def run(self) -> Summary:
        """Train to the last epoch."""
        main = self.accelerator.is_main_process
        shown = self.task.shown
        with Report(self.epochs, self.task.metric, shown=shown, enabled=main) as report:
            self._greet(report)
            while self.progress.epoch < self.epochs:
                started = time.monotonic()
                before = self.progress.seconds
                self._train_epoch(report, started - before)
                self._end_epoch(report, started - before)
            kept = self._kept()
            metrics = kept.get("metrics", {})
            chosen = report.chosen(metrics).items()
            figures = ", ".join(f"{key} {value:.4g}" for key, value in chosen)
            report.line(
                f"done: epoch {kept['epoch'] + 1} kept ({figures}); see {self.folder.root}/"
            )
        self.accelerator.wait_for_everyone()
        return Summary(self.folder, metrics, kept["epoch"])

    def _greet(self, report: Report) -> None:
        model = self.accelerator.unwrap_model(self.model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report.line(
            f"{self.recipe.merged['model']['name']}: {trainable / 1e6:.2f} M trainable parameters, "
            f"{len(self.task.labels)} classes, {self.updates_per_epoch} updates an epoch, "
            f"{self.accelerator.device} -> {self.folder.root}/"
        )
        if self.progress.epoch >= self.epochs:
            report.line(
                "this run is finished: there is nothing left to train. For a new run from its "
                f"weights: run.name=NAME model.checkpoint={self.folder.weights}"
            )
        elif self.progress.update:
            report.line(f"going on after update {self.progress.update}")

    def _train_epoch(self, report: Report, origin: float) -> None:
        """The rest of the epoch under way; `origin` is the clock at which the run's time was 0."""
        progress, run = self.progress, self.recipe.run
        self.task.model = self.model
        self.task.train_mode()
        self._set_rates()
        batches = self._moved(self.train_batches.epoch(progress.epoch, skip=progress.step))
        report.start(f"epoch {progress.epoch + 1}", self.updates_per_epoch, done=self._done)
        device = self.accelerator.device
        loss_sum = torch.tensor(progress.loss_sum, device=device, dtype=torch.float64)
        if not self.accelerator.is_main_process:
            loss_sum.zero_()
        while self._done < self.updates_per_epoch:
            loss_sum += self._update(batches)
            note = f"loss {loss_sum.item() / progress.loss_count:.4f}" if report.wants_note else ""
            report.step(note)
            finished = self._done == self.updates_per_epoch
            if finished or (run.save_every and progress.update % run.save_every == 0):
                progress.loss_sum = all_reduce_sum(loss_sum, device).item()
                progress.seconds = time.monotonic() - origin
                self._check_loss()
            if not finished and run.save_every and progress.update % run.save_every == 0:
                self._save()

    @property
    def _done(self) -> int:
        """Updates of this epoch."""
        return self.progress.step // self.recipe.run.accumulate

    def _update(self, batches: Iterator[Any]) -> torch.Tensor:
        """One optimiser update over `accumulate` batches -> sum of their losses."""
        progress, run, accelerator = self.progress, self.recipe.run, self.accelerator
        losses = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        self.task.begin_update(progress.update)
        for _ in range(run.accumulate):
            batch = next(batches)
            seed_everything(run.seed, progress.epoch, progress.step, accelerator.process_index, 1)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss = self.task.training_step(batch)["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.recipe.optim.clip is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses += loss.detach()
            progress.step += 1
            progress.loss_count += accelerator.num_processes
        progress.update += 1
        if self.ema is not None:
            self.ema.update(accelerator.unwrap_model(self.model), step=progress.update)
        self._set_rates()
        return losses

    def _set_rates(self) -> None:
        if self.scheduler.t_in_epochs:
            self.scheduler.step(self.progress.epoch)
        else:
            self.scheduler.step_update(self.progress.update)

    def _check_loss(self) -> None:
        if not math.isfinite(self.progress.loss_sum):
            raise InputError(
                f"the training loss became {self.progress.loss_sum} in epoch "
                f"{self.progress.epoch + 1}: lower optim.lr, set optim.clip, or avoid fp16; the "
                "checkpoints before it are kept"
            )

    def _moved(self, batches: Iterator[Any]) -> Iterator[Any]:
        from accelerate.utils import send_to_device

        for batch in batches:
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)

    def _end_epoch(self, report: Report, origin: float) -> None:
        """Evaluate, log, keep weights, save."""
        progress, run = self.progress, self.recipe.run
        last = progress.epoch + 1 == self.epochs
        samples = self.recipe.options.data.batch_size * progress.loss_count
        facts: dict[str, Any] = {
            "epoch": progress.epoch,
            "update": progress.update,
            "train_loss": progress.loss_sum / progress.loss_count,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "seconds": round(progress.seconds, 3),
            "samples_per_second": self._rate(samples),
        }
        if last or (progress.epoch + 1) % run.eval_every == 0:
            facts["metrics"] = self.evaluate(report)
            skipped = len(self.val_batches.bad)
            if skipped:
                facts["unreadable"] = skipped
        self.lines.append(facts)
        report.epoch(facts)
        self._keep_weights(facts, last=last)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_count = 0.0, 0
        progress.seconds = time.monotonic() - origin
        if self.accelerator.is_main_process:
            self.folder.write_metrics(self.lines)
            draw_curves(
                self.lines,
                self.folder.curves,
                metric=self.task.metric,
                title=str(self.recipe.run.name),
            )
        self._save()

    def _rate(self, samples: int) -> float:
        before = self.lines[-1]["seconds"] if self.lines else 0.0
        return round(samples / max(1e-9, self.progress.seconds - before), 1)

    @torch.no_grad()
    def evaluate(self, report: Report) -> dict[str, float]:
        """Metrics of the average weights, or of the model where there is no average."""
        model = self._evaluated()
        self.task.model = model.eval()
        report.start("evaluation", len(self.val_batches))

        def stepping() -> Iterator[Any]:
            for batch in self._moved(iter(self.val_batches)):
                yield batch
                report.step()

        with self.accelerator.autocast():
            metrics = self.task.evaluate(stepping())
        if not metrics:
            raise InputError("nothing to evaluate on: no readable sample in the held-out split")
        return metrics

    def _evaluated(self) -> nn.Module:
        if self.ema is not None:
            return self.ema.module
        # DDP's wrapper would wait for processes with more batches; a sharded model is its own.
        return self.accelerator.unwrap_model(self.model)

    def _keep_weights(self, facts: dict[str, Any], *, last: bool) -> None:
        """Write `weights.safetensors` where this epoch's are the ones to keep."""
        progress, sign = self.progress, 1 if self.task.maximise else -1
        score = facts.get("metrics", {}).get(self.task.metric)
        better = score is not None and (
            progress.best is None or sign * score > sign * progress.best
        )
        if better:
            progress.best, progress.best_epoch = score, progress.epoch
        if not (better if self.recipe.run.select == "best" else last):
            return
        tensors = states.model_state(self._evaluated(), sharded=self.sharded)
        if self.accelerator.is_main_process:
            kept = {
                "task": self.recipe.task,
                "labels": list(self.task.labels),
                "recipe": self.recipe.merged,
                "epoch": progress.epoch,
                "metrics": facts.get("metrics", {}),
            }
            checkpoint.write(self.folder.weights, checkpoint.Checkpoint(tensors, kept))

    def _kept(self) -> dict[str, Any]:
        """The log's line of the epoch whose weights are kept."""
        wanted = self.epochs - 1
        if self.recipe.run.select == "best" and self.progress.best_epoch is not None:
            wanted = self.progress.best_epoch
        for line in self.lines:
            if line["epoch"] == wanted:
                return line
        return {"epoch": wanted, "metrics": {}}

    def _save(self) -> None:
        """Write a checkpoint; every process takes part where the model is sharded."""
        tensors, facts = states.collect(self.model, self.optimizer, sharded=self.sharded)
        if self.ema is not None:
            tensors |= {f"ema.{name}": t for name, t in self.ema.module.state_dict().items()}
        facts |= {"progress": asdict(self.progress), "labels": list(self.task.labels)}
        facts |= {"samples": self.samples, "linear": self.linear}
        scaler = self.accelerator.scaler
        if scaler is not None:
            facts["scaler"] = scaler.state_dict()
        if self.accelerator.is_main_process:
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
            path = checkpoint.path_of(self.folder.checkpoints, self.progress.update)
            checkpoint.write(path, checkpoint.Checkpoint(tensors, facts))
            checkpoint.prune(self.folder.checkpoints, max(2, self.recipe.run.keep_checkpoints))
        self.accelerator.wait_for_everyone()
