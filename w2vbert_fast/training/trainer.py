"""`finetune`: the training loop."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.files import make_folder, write_json
from w2vbert_fast.checkpoints.hub import make_repository, upload_folder
from w2vbert_fast.training.batches import BatchPlan
from w2vbert_fast.training.config import FinetuneConfig
from w2vbert_fast.training.data import (
    Batch,
    EpochDataset,
    ManifestSource,
    Skipped,
    UtteranceSource,
    pad_batch,
    to_batch,
)
from w2vbert_fast.training.evaluation import evaluate
from w2vbert_fast.training.logs import (
    PREDICTIONS_FILE,
    SKIPPED_FILE,
    JsonLines,
    RunLog,
    write_json_lines,
)
from w2vbert_fast.training.losses import (
    TrainingModule,
    UtteranceLosses,
    non_finite,
    stand_in,
    without_unusable,
)
from w2vbert_fast.training.model import save_checkpoint
from w2vbert_fast.training.report import write_report
from w2vbert_fast.training.scores import is_better
from w2vbert_fast.training.setup import autocast_dtype, make_optimizer, prepare
from w2vbert_fast.training.state import (
    Progress,
    find_state,
    is_sharded,
    load_state,
    read_trainer,
    save_state,
)
from w2vbert_fast.training.tasks import TASKS

logger = logging.getLogger(__name__)

MAX_IDLE_STEPS = 25
"""Steps in a row without a finite loss and gradient, after which a run gives up."""

_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class StepReport:
    """What `on_step` is told.

    Attributes:
        step: the optimiser step that was done, from 1.
        loss: the loss over all processes, NaN where no utterance was usable.
        grad_norm: norm of the gradient before clipping.
        learning_rate: the rate of this step.
        utterances: utterances that count in the loss.
        model: the model itself, as it is after the step.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    utterances: int
    model: torch.nn.Module


@dataclass(frozen=True)
class FinetuneResult:
    """The outcome of a run.

    Attributes:
        best: folder of the checkpoint with the best evaluation.
        last: folder of the checkpoint of the last step.
        score: name of the score that chose the best one: `wer`, `cer` or `accuracy`.
        best_score: its best value, a fraction.
        best_step: when that was.
        steps: optimiser steps.
        skipped: how often an utterance was left out, by all processes.
        uploaded: address of the commit on the hub; None: nothing was uploaded, or by another
            process.
    """

    best: Path
    last: Path
    score: str
    best_score: float
    best_step: int
    steps: int
    skipped: int
    uploaded: str | None = None


def finetune(
    config: FinetuneConfig,
    *,
    train: UtteranceSource | None = None,
    evaluation: UtteranceSource | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a model.

    In the folder `config.out` come to be: `best/` and `last/` (checkpoints that this library and
    transformers load), `metrics.jsonl`, `skipped.jsonl` (utterances that were left out, and why),
    `predictions.jsonl` (of the last evaluation), `curve.png`, `tensorboard/`, `finetune.json` (the
    configuration) and `state/`, from which the same call goes on after it was killed.

    Under `accelerate launch` every process calls this.

    Args:
        config: the configuration.
        train: data to train on instead of the manifest `config.train`, which is not read then. The
            vocabulary or the classes are those of the checkpoint.
        evaluation: likewise for `config.eval`.
        on_step: called after each step, in every process.

    Returns:
        Where the checkpoints are, and the best score.

    Raises:
        OSError: a file or the model cannot be found; or the hub cannot be reached, or refuses an
            upload, which the same call repeats.
        ManifestError: a manifest has rows that cannot be used.
        ValueError: model and data do not fit, or `config.out` holds the state of another run.
        ImportError: a package of the extra `train` is missing.
        FloatingPointError: 25 steps in a row had no finite loss and gradient.
    """
    for module in ("accelerate", "matplotlib", *TASKS[config.task].packages):
        require(module, "train")
    if config.tensorboard:
        require("tensorboard", "train")
    if config.lora:
        require("peft", "train")
    return _Run(config, train, evaluation, on_step).run()


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: FinetuneConfig,
        train: UtteranceSource | None,
        evaluation: UtteranceSource | None,
        on_step: Callable[[StepReport], None] | None,
    ) -> None:
        accelerate = require("accelerate", "train")
        self.config = config
        self.task = TASKS[config.task]
        self.on_step = on_step
        self.out = make_folder(config.out)
        if torch.distributed.is_available():
            # Its functions have the group that exists when they are first imported as a default.
            # So they would keep it, and its threads, when the group has been destroyed.
            importlib.import_module("torch.distributed.nn.functional")
        # LayerDrop and SpecAugment leave parameters out of a step.
        unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator: Any = accelerate.Accelerator(
            cpu=config.device == "cpu", kwargs_handlers=[unused]
        )
        if self.accelerator.scaler is not None:
            raise ValueError("Accelerate's mixed precision is fp16; say precision='fp16' instead")
        self.device: torch.device = self.accelerator.device
        # The head is drawn alike in every process.
        torch.manual_seed(config.seed)
        prepared = prepare(config, train, evaluation)
        self.parts, self.skipped_at_start = prepared.parts, prepared.skipped
        self.train_source, self.eval_source = prepared.train, prepared.evaluation
        self.core: Any = self.parts.core
        self.plan = BatchPlan(
            self.train_source,
            config.frame_budget,
            self.accelerator.num_processes,
            config.accumulate,
            config.seed,
        )
        self.total = self.plan.num_steps(config.epochs) if config.epochs else config.steps
        autocast = autocast_dtype(config, self.device)
        module = TrainingModule(self.parts.model, autocast)
        # Without fp16 it does nothing. It begins below its usual 65,536 for means, because what it
        # scales is a sum over the utterances of a batch.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=_LOSS_SCALE, enabled=autocast is torch.float16
        )
        if is_sharded(self.accelerator) and self.core.config.layerdrop:
            # Each process would draw other layers, and wait for the others at different ones.
            logger.warning("layerdrop is off: processes that share layers have to run the same")
            self.core.config.layerdrop = 0.0
        self.module, self.optimizer = self.accelerator.prepare(
            module, make_optimizer(config, module, self.device)
        )
        self.trained: list[Tensor] = [p for p in self.module.parameters() if p.requires_grad]
        self.average: list[Tensor] | None = None
        if config.average is not None:
            self.average = [parameter.detach().clone() for parameter in self.trained]
        self.score = self._choosing_score()
        # Dropout and masks differ between processes.
        torch.manual_seed(config.seed + self.accelerator.process_index)
        self.progress = self._restored()

    # Setting up.

    def _about(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "data": [self.train_source.fingerprint(), self.eval_source.fingerprint()],
            "num_processes": self.accelerator.num_processes,
            "steps": self.total,
            "score": self.score,
            "loss_scale": self.scaler.state_dict(),
        }

    def _choosing_score(self) -> str:
        sources = (self.train_source, self.eval_source)
        known = [source for source in sources if isinstance(source, ManifestSource)]
        targets = [row.target for source in known for row in source.rows] if known else None
        return self.task.chosen_score(self.config.metric, self.parts.tokenizer, targets)

    def _restored(self) -> Progress:
        folder = find_state(self.out)
        if folder is None:
            return Progress()
        progress, about = read_trainer(folder)
        differences = self.config.differences(about.get("config", {}))
        mine = self._about()
        differences += [
            f"{name}: {about.get(name)!r}, now {mine[name]!r}"
            for name in ("data", "num_processes", "steps")
            if about.get(name) != mine[name]
        ]
        if differences:
            raise ValueError(
                f"{self.out} holds the state of another run, which this one cannot go on with; "
                "take another folder, or delete its state/. What differs:\n  "
                + "\n  ".join(differences)
            )
        # A run goes on with the score that it was begun with.
        self.score = about.get("score", self.task.score)
        load_state(folder, self.accelerator, self.average)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(about["loss_scale"])
        logger.info("going on after step %d", progress.step)
        return progress

    # The loop.

    def run(self) -> FinetuneResult:
        config, progress = self.config, self.progress
        main = self.accelerator.is_main_process
        log = None
        if main:
            if config.push_to_hub is not None:
                # What the hub refuses, it refuses before the training.
                make_repository(config.push_to_hub, config.hub_private or None)
            write_json(self.out / "finetune.json", config.to_dict())
            log = RunLog(self.out, progress.step, self.total, self.score, config.tensorboard)
        rank = self.accelerator.process_index
        name = SKIPPED_FILE if rank == 0 else f"process-{rank}-{SKIPPED_FILE}"
        self.skipped_log = JsonLines(self.out / name, progress.step)
        try:
            if main and self.score == "cer" and config.metric == "auto":
                logger.info("no words between spaces: the best checkpoint is chosen by CER")
            if main and progress.step == 0:
                self._report_skipped(self.skipped_at_start, 1)
            self._loop(log)
        finally:
            self.skipped_log.close()
            if log is not None:
                log.close()
        uploaded = None
        if main and config.push_to_hub is not None:
            uploaded = upload_folder(self.out / "best", ["*"], repo_id=config.push_to_hub)
        assert progress.best_score is not None and progress.best_step is not None
        return FinetuneResult(
            self.out / "best",
            self.out / "last",
            self.score,
            progress.best_score,
            progress.best_step,
            progress.step,
            int(self._summed([float(progress.skipped)])[0]),
            uploaded,
        )

    def _loop(self, log: RunLog | None) -> None:
        config, progress = self.config, self.progress
        save_every = config.save_every or config.evaluate_every
        self.module.train()
        batches = self._batches()
        started = time.monotonic()
        while progress.step < self.total:
            report = self._step(next(batches))
            at_end = progress.step == self.total
            if log is not None:
                log.advance(progress.step)
            if progress.step % config.log_every == 0 or at_end:
                row = self._row(report, time.monotonic() - started)
                started = time.monotonic()
                if log is not None:
                    log.write(row)
            if progress.step % config.evaluate_every == 0 or at_end:
                self._evaluate(log)
                started = time.monotonic()
            if progress.step % save_every == 0 or at_end:
                self._save()
            if self.on_step is not None:
                self.on_step(report)

    def _batches(self) -> Iterator[list[Batch]]:
        """The batches of this process for each step, from where the run stands."""
        epoch, done = self.progress.epoch, self.progress.done
        while True:
            keys = list(self.plan.keys(self.accelerator.process_index, epoch, done))
            loader: Any = torch.utils.data.DataLoader(
                EpochDataset(self.train_source),
                batch_sampler=keys,
                collate_fn=to_batch,
                num_workers=self.config.num_workers,
                # Or it draws from the global generator, and a resumed run draws once more.
                generator=torch.Generator().manual_seed(0),
            )
            loaded = iter(loader)
            for _ in range(len(keys) // self.config.accumulate):
                yield [next(loaded) for _ in range(self.config.accumulate)]
            epoch, done = epoch + 1, 0

    def _step(self, batches: list[Batch]) -> StepReport:
        """One optimiser step.

        The gradient of the sum of all losses is divided by the sum of all weights at the end:
        only then it is known how many utterances count.
        """
        config, progress = self.config, self.progress
        rate = config.learning_rate_at(progress.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss_sum = weight_sum = 0.0
        utterances = frames = 0
        skipped: list[Skipped] = []
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                result, batch = self._losses(batch)
                counts = 1.0 if batch.utterances else 0.0
                self.accelerator.backward(self.scaler.scale(result.losses.sum() * counts))
            skipped += batch.skipped
            if batch.utterances:
                loss_sum += float(result.losses.detach().sum())
                weight_sum += float(result.weights.sum())
                utterances += len(batch.utterances)
                frames += sum(len(u.input_features) for u in batch.utterances)
        self._report_skipped(skipped, progress.step + 1)
        sums = self._summed([loss_sum, weight_sum, utterances, frames, len(skipped)])
        loss = sums[0] / sums[1] if sums[1] else math.nan
        norm = self._update(sums[1])
        self._advance(sums, norm)
        return StepReport(progress.step, loss, norm, rate, int(sums[2]), self.core)

    def _losses(self, batch: Batch) -> tuple[UtteranceLosses, Batch]:
        """Losses of the utterances that have finite ones, and these utterances.

        A NaN spreads to every weight's gradient even when its loss counts as zero. So the
        utterance has to go and the others are computed again, in all processes at once.
        """
        batch = without_unusable(batch, self.core, self.task)
        while True:
            utterances = batch.utterances or [stand_in(self.core, self.task)]
            result: UtteranceLosses = self.module(**pad_batch(utterances, self.device))
            bad = non_finite(result) if batch.utterances else {}
            if not self._summed([float(len(bad))])[0]:
                return result, batch
            batch = batch.without(bad)

    def _update(self, weight: float) -> float:
        """Scale and clip the gradients and change the weights; the norm before clipping."""
        norm = math.nan
        if weight:
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for p in self.trained if p.grad is not None]
            # Processes average their gradients.
            torch._foreach_mul_(gradients, self.accelerator.num_processes / weight)
            norm = float(self.accelerator.clip_grad_norm_(self.trained, self.config.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            self.progress.idle_steps += 1
            step = self.progress.step + 1
            logger.warning("step %d changes nothing: its gradient's norm is %s", step, norm)
            if weight and self.scaler.is_enabled():
                self.scaler.update()
                logger.info("the loss is scaled by %g now", self.scaler.get_scale())
            if self.progress.idle_steps >= MAX_IDLE_STEPS:
                raise FloatingPointError(
                    f"{MAX_IDLE_STEPS} steps in a row, up to step {step}, had no finite loss and "
                    f"gradient; {SKIPPED_FILE} names the utterances. A lower learning rate or a "
                    "longer warm-up may help"
                )
            return norm
        self.progress.idle_steps = 0
        self.optimizer.step()
        self.scaler.update()
        if self.average is not None:
            assert self.config.average is not None
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.trained, 1.0 - self.config.average)
        return norm

    def _advance(self, sums: list[float], norm: float) -> None:
        progress = self.progress
        for name, value in (
            *zip(("loss", "weight", "utterances", "frames", "skipped"), sums, strict=True),
            ("norm", norm if math.isfinite(norm) else 0.0),
            ("updates", float(math.isfinite(norm))),
        ):
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.step += 1
        progress.done += 1
        if progress.done == len(self.plan.steps(progress.epoch)):
            progress.epoch, progress.done = progress.epoch + 1, 0

    def _row(self, report: StepReport, seconds: float) -> dict[str, Any]:
        """A row of the log: means over the steps since the last one."""
        sums, self.progress.sums = self.progress.sums, {}
        fraction = self.progress.done / len(self.plan.steps(self.progress.epoch))
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        return {
            "step": report.step,
            "epoch": round(self.progress.epoch + fraction, 4),
            "loss": sums["loss"] / sums["weight"] if sums["weight"] else math.nan,
            "grad_norm": sums["norm"] / sums["updates"] if sums["updates"] else math.nan,
            "learning_rate": report.learning_rate,
            "utterances": int(sums["utterances"]),
            "frames": int(sums["frames"]),
            "skipped": int(sums["skipped"]),
            **scale,
            "seconds": round(seconds, 3),
        }

    def _report_skipped(self, skipped: list[Skipped], step: int) -> None:
        for item in skipped:
            logger.warning("%s is left out: %s", item.name, item.reason)
            self.skipped_log.write({"step": step, "utterance": item.name, "reason": item.reason})
        self.progress.skipped += len(skipped)

    def _summed(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        summed: list[float] = self.accelerator.reduce(total, "sum").tolist()
        return summed

    # Evaluating and saving.

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the moving average in the place of the weights, and bring these back unchanged."""
        if self.average is None:
            yield
            return
        self._swap(self.average)
        try:
            yield
        finally:
            self._swap(self.average)

    @torch.no_grad()
    def _swap(self, others: list[Tensor]) -> None:
        for parameter, other in zip(self.trained, others, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(held)

    def _evaluate(self, log: RunLog | None) -> None:
        config, progress = self.config, self.progress
        started = time.monotonic()
        with self._averaged():
            outcome = evaluate(
                self.module,
                self.core,
                self.eval_source,
                self.task,
                config.frame_budget,
                self.accelerator,
                self.parts.tokenizer,
                config.num_workers,
            )
            score = outcome.scores[self.score]
            if is_better(self.score, score, progress.best_score):
                progress.best_score, progress.best_step = score, progress.step
                self._save_checkpoint("best")
        if log is None:
            return
        for item in outcome.skipped:
            logger.warning("%s is not scored: %s", item.name, item.reason)
        row: dict[str, Any] = {"step": progress.step}
        row |= {f"eval_{name}": value for name, value in outcome.scores.items()}
        row["eval_skipped"] = len(outcome.skipped)
        row["eval_seconds"] = round(time.monotonic() - started, 3)
        log.write(row)
        write_json_lines(self.out / PREDICTIONS_FILE, [p.row() for p in outcome.predictions])
        log.draw()
        write_report(self.out, log.metrics.rows, self.score, outcome, self.eval_source)

    def _save(self) -> None:
        with self._averaged():
            self._save_checkpoint("last")
        save_state(self.out, self.accelerator, self.progress, self._about(), self.average)

    def _save_checkpoint(self, name: str) -> None:
        # Shards of all processes come together, in the main one at least.
        state = {
            name.removeprefix("model."): getattr(tensor, "full_tensor", lambda t=tensor: t)().cpu()
            for name, tensor in self.accelerator.get_state_dict(self.module).items()
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.out / name, self.parts, self.config, state)
        self.accelerator.wait_for_everyone()
