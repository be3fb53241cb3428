"""The command `w2vbert-fast finetune`: options to a `FinetuneConfig`."""

# No `from __future__ import annotations`: typer reads the annotations of the command.
import gc
import json
import logging
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from w2vbert_fast.training.config import FinetuneConfig

if TYPE_CHECKING:
    import typer

    from w2vbert_fast.training.trainer import FinetuneResult

HELP = (
    "Fine-tune a model on the recordings of a manifest.\n\n"
    'A manifest has one JSON object a line: {"audio": "a.flac", "text": "what is said"}; instead '
    'of "text" other tasks have "label", or "segments" with "start", "end" and "label". With '
    '"offset" and "duration" (seconds) a row is a part of a recording. CSV, TSV and Parquet do, '
    "too. Names are relative to the manifest.\n\n"
    "The same command goes on where a killed run has stopped. Several GPUs: accelerate launch -m "
    "w2vbert_fast.cli finetune ..."
)
_DEFAULTS = FinetuneConfig(model=".", train=".", eval=".", out=".")


def register(
    app: "typer.Typer", report: Callable[[str], None], fail: Callable[[Exception], Any]
) -> None:
    """Add the command to a typer app.

    Args:
        app: the app.
        report: prints a message for the user.
        fail: reports an error that leaves nothing to do, and ends the program.
    """
    import typer

    def option(help_text: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=help_text, **more)

    @app.command("finetune", short_help="Fine-tune a model on your recordings.", help=HELP)
    def finetune_command(
        model: Annotated[str, option("Where to start.", metavar="PATH|HUB_ID")],
        train: Annotated[str, option("Manifest to train on.", metavar="FILE")],
        eval_manifest: Annotated[str, option("Manifest to score.", "--eval", metavar="FILE")],
        out: Annotated[str, option("Folder for checkpoints, logs and state.", metavar="DIR")],
        task: Annotated[
            str, option("ctc, classification, frames or xvector.", metavar="TASK")
        ] = _DEFAULTS.task,
        lora: Annotated[
            int, option("Rank of LoRA adapters; 0 trains all weights.")
        ] = _DEFAULTS.lora,
        steps: Annotated[int, option("Optimiser steps.")] = _DEFAULTS.steps,
        epochs: Annotated[int | None, option("Passes over the data instead of --steps.")] = None,
        frame_budget: Annotated[
            int, option("20 ms frames in a batch of one process.")
        ] = _DEFAULTS.frame_budget,
        accumulate: Annotated[int, option("Batches in one step.")] = _DEFAULTS.accumulate,
        learning_rate: Annotated[float, option("Its peak.")] = _DEFAULTS.learning_rate,
        warmup: Annotated[
            int | None, option("Steps of warm-up. Default: a tenth of all steps.")
        ] = None,
        decay: Annotated[
            str, option("linear, cosine or constant.", metavar="SHAPE")
        ] = _DEFAULTS.decay,
        precision: Annotated[
            str, option("auto, bf16 or fp32.", metavar="DTYPE")
        ] = _DEFAULTS.precision,
        speeds: Annotated[
            str, option("Playback speeds to draw from, separated by commas; 1 for none.")
        ] = ",".join(map(str, _DEFAULTS.speeds)),
        vocabulary: Annotated[
            str, option("auto, keep or new: the checkpoint's, or one of the transcripts.")
        ] = _DEFAULTS.vocabulary,
        lower_case: Annotated[
            bool, option("Lower the case of transcripts.", "--lower-case")
        ] = False,
        average: Annotated[
            float | None, option("Decay of a moving average of the weights, such as 0.999.")
        ] = None,
        gradient_checkpointing: Annotated[
            str, option("none, layer, attention or auto: activations to recompute, for memory.")
        ] = "none",
        metric: Annotated[
            str,
            option("auto, wer or cer: what chooses the best checkpoint.", metavar="SCORE"),
        ] = _DEFAULTS.metric,
        evaluate_every: Annotated[
            int, option("Steps between evaluations.")
        ] = _DEFAULTS.evaluate_every,
        save_every: Annotated[
            int | None, option("Steps between saved states. Default: as --evaluate-every.")
        ] = None,
        log_every: Annotated[int, option("Steps between rows of the log.")] = _DEFAULTS.log_every,
        workers: Annotated[int, option("Processes that read audio.")] = _DEFAULTS.num_workers,
        device: Annotated[str | None, option("cpu, to leave a GPU alone.")] = None,
        seed: Annotated[int, option("Of all that is random.")] = _DEFAULTS.seed,
        overrides: Annotated[
            list[str] | None,
            option(
                "Entry of the model's configuration, such as layerdrop=0. Can be repeated.",
                "--set",
                metavar="NAME=VALUE",
            ),
        ] = None,
        options: Annotated[
            list[str] | None,
            option(
                "Any other field of FinetuneConfig, such as weight_decay=0. Can be repeated.",
                "--option",
                metavar="NAME=VALUE",
            ),
        ] = None,
        as_json: Annotated[bool, option("Print the result as JSON.", "--json")] = False,
    ) -> None:
        try:
            others = _entries("--option", options)
            unknown = sorted(set(others) - {field.name for field in fields(FinetuneConfig)})
            if unknown:
                raise ValueError(f"--option: FinetuneConfig has no field {', '.join(unknown)}")
            config = FinetuneConfig(
                **{
                    "model": model,
                    "train": train,
                    "eval": eval_manifest,
                    "out": out,
                    "task": task,
                    "lora": lora,
                    "steps": steps,
                    "epochs": epochs,
                    "frame_budget": frame_budget,
                    "accumulate": accumulate,
                    "learning_rate": learning_rate,
                    "warmup": warmup,
                    "decay": decay,
                    "precision": precision,
                    "speeds": _numbers("--speeds", speeds),
                    "vocabulary": vocabulary,
                    "lower_case": lower_case,
                    "average": average,
                    "gradient_checkpointing": gradient_checkpointing,
                    "metric": metric,
                    "evaluate_every": evaluate_every,
                    "save_every": save_every,
                    "log_every": log_every,
                    "num_workers": workers,
                    "device": device,
                    "seed": seed,
                    "model_overrides": _entries("--set", overrides),
                    **others,
                }
            )
            result = _run(config, report)
        except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
            fail(error)
            return
        if _is_main():
            _print(result, as_json)


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


def _run(config: FinetuneConfig, report: Callable[[str], None]) -> "FinetuneResult":
    from w2vbert_fast.training.trainer import finetune

    class Reporter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report(record.getMessage())

    # Utterances that are left out are named while the run goes on.
    log = logging.getLogger("w2vbert_fast")
    handler = Reporter(logging.INFO)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        return finetune(config)
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


def _print(result: "FinetuneResult", as_json: bool) -> None:
    content = {
        "score": result.score,
        "best_score": result.best_score,
        "best_step": result.best_step,
        "steps": result.steps,
        "skipped": result.skipped,
        "best": str(result.best),
        "last": str(result.last),
    }
    if as_json:
        print(json.dumps(content))
        return
    print(f"best {result.score} {100 * result.best_score:.2f} % at step {result.best_step}")
    print(f"best checkpoint: {result.best}")
    print(f"last checkpoint: {result.last}")
    if result.skipped:
        print(f"utterances left out: {result.skipped} times, see skipped.jsonl")


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
