"""The command `w2vbert-fast finetune`: options to a `FinetuneConfig`."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from w2vbert_fast.cli.messages import log_shown
from w2vbert_fast.cli.options import COLUMNS, COLUMNS_METAVAR, REQUIRED, option, values
from w2vbert_fast.recordings.manifest import ColumnNames
from w2vbert_fast.recordings.rows import how_many
from w2vbert_fast.training.config import FinetuneConfig
from w2vbert_fast.training.tasks import TASKS

if TYPE_CHECKING:
    from w2vbert_fast.training.trainer import FinetuneResult

SHORT = "Fine-tune a model on your recordings."
HELP = (
    "Fine-tune a model on the recordings of a data set.\n\n"
    'A manifest has one JSON object a line: {"audio": "a.flac", "text": "what is said"}; instead '
    'of "text" other tasks have "label", or "segments" with "start", "end" and "label". With '
    '"offset" and "duration" (seconds) a row is a part of a recording. CSV, Parquet, '
    "WebDataset, AudioFolder, Common Voice and Kaldi do, too (docs/use/datasets.md).\n\n"
    "The same command goes on where a killed run has stopped. Several GPUs: accelerate launch -m "
    "w2vbert_fast.cli finetune ..."
)
_DEFAULT = FinetuneConfig(model=".", train=".", eval=".", out=".")


@dataclass(kw_only=True)
class Fields:
    """Fields of `FinetuneConfig`, with their names there."""

    model: str = option(REQUIRED, "Where to start.", metavar="PATH|HUB_ID")
    train: str = option(REQUIRED, "Data set to train on.", metavar="DATA")
    eval: str = option(REQUIRED, "Data set to score.", metavar="DATA")
    out: str = option(REQUIRED, "Folder for checkpoints, logs and state.", metavar="DIR")
    columns: str | None = option(None, COLUMNS, metavar=COLUMNS_METAVAR)
    eval_columns: str | None = option(
        None, "Those of --eval. Default: as --columns.", metavar=COLUMNS_METAVAR
    )
    task: str = option(_DEFAULT.task, f"{', '.join(TASKS)}.", metavar="TASK")
    lora: int = option(_DEFAULT.lora, "Rank of LoRA adapters; 0 trains all weights.")
    steps: int = option(_DEFAULT.steps, "Optimiser steps.")
    epochs: int | None = option(None, "Passes over the data instead of --steps.")
    frame_budget: int = option(_DEFAULT.frame_budget, "20 ms frames in a batch of one process.")
    accumulate: int = option(_DEFAULT.accumulate, "Batches in one step.")
    learning_rate: float = option(_DEFAULT.learning_rate, "Its peak.")
    warmup: int | None = option(None, "Steps of warm-up. Default: a tenth of all steps.")
    decay: str = option(_DEFAULT.decay, "linear, cosine or constant.", metavar="SHAPE")
    precision: str = option(_DEFAULT.precision, "auto, bf16, fp16 or fp32.", metavar="DTYPE")
    speeds: str = option(
        ",".join(map(str, _DEFAULT.speeds)),
        "Playback speeds to draw from, separated by commas; 1 for none.",
    )
    vocabulary: str = option(
        _DEFAULT.vocabulary, "auto, keep or new: the checkpoint's, or one of the transcripts."
    )
    lower_case: bool = option(False, "Lower the case of transcripts.")
    average: float | None = option(None, "Decay of a moving average of the weights, such as 0.999.")
    freeze: str = option(
        str(_DEFAULT.freeze),
        "First layers to leave as they are; encoder: all of them.",
        metavar="N|encoder",
    )
    gradient_checkpointing: str = option(
        "none", "none, layer, attention or auto: activations to recompute, for memory."
    )
    metric: str = option(
        _DEFAULT.metric,
        "auto, wer or cer: what chooses the best checkpoint.",
        metavar="SCORE",
    )
    evaluate_every: int = option(_DEFAULT.evaluate_every, "Steps between evaluations.")
    save_every: int | None = option(
        None, "Steps between saved states. Default: as --evaluate-every."
    )
    log_every: int = option(_DEFAULT.log_every, "Steps between rows of the log.")
    num_workers: int = option(_DEFAULT.num_workers, "Processes that read audio.", "--workers")
    push_to_hub: str | None = option(
        None, "Repository of the hub to upload the best checkpoint to.", metavar="HUB_ID"
    )
    device: str | None = option(None, "cpu, to leave a GPU alone.")
    seed: int = option(_DEFAULT.seed, "Of all that is random.")
    model_overrides: list[str] | None = option(
        None,
        "Entry of the model's configuration, such as layerdrop=0. Can be repeated.",
        "--set",
        metavar="NAME=VALUE",
    )


@dataclass(kw_only=True)
class Others:
    options: list[str] | None = option(
        None,
        "Any other field of FinetuneConfig, such as weight_decay=0. Can be repeated.",
        "--option",
        metavar="NAME=VALUE",
    )
    as_json: bool = option(False, "Print the result as JSON.", "--json")


def command(chosen: Fields, others: Others) -> int:
    """Fine-tune, and print the score; the exit status."""
    from w2vbert_fast.inference.tasks.base import source_of

    more = _entries("--option", others.options)
    unknown = sorted(set(more) - {entry.name for entry in fields(FinetuneConfig)})
    if unknown:
        raise ValueError(f"--option: FinetuneConfig has no field {', '.join(unknown)}")
    config: dict[str, Any] = {
        **values(chosen),
        "model": os.fspath(source_of(chosen.model)),
        "columns": ColumnNames.parse(chosen.columns).by_meaning,
        "eval_columns": None
        if chosen.eval_columns is None
        else ColumnNames.parse(chosen.eval_columns).by_meaning,
        "speeds": _numbers("--speeds", chosen.speeds),
        "freeze": int(chosen.freeze) if chosen.freeze.isdecimal() else chosen.freeze,
        "model_overrides": _entries("--set", chosen.model_overrides),
        **more,
    }
    # Utterances that are left out are named while the run goes on.
    with log_shown("w2vbert_fast"):
        from w2vbert_fast.training.trainer import finetune

        result = finetune(FinetuneConfig(**config))
    if _is_main():
        _print(result, others.as_json)
    return 0


def _is_main() -> bool:
    """Whether this is the process that speaks; of several, the others leave their group here."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return True
    rank = dist.get_rank()
    # Nothing may hold the group any more: one of its threads that lets go of a tensor while the
    # interpreter ends would abort the process.
    gc.collect()
    dist.destroy_process_group()
    return rank == 0


def _print(result: FinetuneResult, as_json: bool) -> None:
    content = {
        "score": result.score,
        "best_score": result.best_score,
        "best_step": result.best_step,
        "steps": result.steps,
        "skipped": result.skipped,
        "best": str(result.best),
        "last": str(result.last),
        "uploaded": result.uploaded,
    }
    if as_json:
        print(json.dumps(content))
        return
    print(f"best {result.score} {100 * result.best_score:.2f} % at step {result.best_step}")
    print(f"best checkpoint: {result.best}")
    print(f"last checkpoint: {result.last}")
    if result.uploaded is not None:
        print(f"uploaded: {result.uploaded}")
    if result.skipped:
        print(f"utterances left out: {how_many(result.skipped, 'time')}, see skipped.jsonl")


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be numbers separated by commas, got {text!r}") from None


def _entries(name: str, pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON, or else a string."""
    entries: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{name} must be NAME=VALUE, got {pair!r}")
        try:
            entries[key.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            entries[key.replace("-", "_")] = value
    return entries
