"""The page of a run: its curves, and what the model makes of each utterance of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from w2vbert_fast.report import Chart, Column, Fact, Findings, Page, Row, write_page
from w2vbert_fast.training.data import ManifestSource, UtteranceSource
from w2vbert_fast.training.evaluation import Evaluation, Prediction
from w2vbert_fast.training.manifest import Row as Recording
from w2vbert_fast.training.scores import align

REPORT_FILE = "report.html"


def write_report(
    folder: Path,
    log: Sequence[Mapping[str, Any]],
    score: str,
    outcome: Evaluation,
    source: UtteranceSource,
) -> Path:
    """Write `report.html` of a run, as it is after an evaluation.

    Args:
        folder: of the run.
        log: rows of `metrics.jsonl`.
        score: name of the score that chooses checkpoints.
        outcome: of the last evaluation.
        source: of its utterances; those of a manifest can be heard.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    scores = [name for name in outcome.scores if name != "loss"]
    has_texts = "reference" in outcome.predictions[0].outcome
    columns = (
        (
            *(Column("Utterance"), Column("Loss", "number"), Column("Errors", "number")),
            *(Column(score.upper(), "share"), Column("Said"), Column("Heard")),
        )
        if has_texts
        else (
            *(Column("Utterance"), Column("Loss", "number"), Column("Wrong", "number")),
            *(Column("Accuracy", "share"), Column("Decisions", "number"), Column("", small=True)),
        )
    )
    page = Page(
        f"fine-tuning: {folder.resolve().name}",
        (*columns, Column("Not scored", small=True), Column("Row", small=True)),
        sort=2,
        descending=True,
    )
    page.facts = [
        Fact("Step", f"{log[-1]['step']:,}"),
        Fact("Utterances", f"{len(outcome.predictions):,}"),
        Fact("Loss", f"{outcome.scores['loss']:.4g}"),
        *(Fact(_title(name), f"{100 * outcome.scores[name]:.2f} %") for name in scores),
    ]
    page.charts = [
        Chart(
            "Loss",
            "steps",
            "loss",
            {"training": _points(log, "loss"), "evaluation": _points(log, "eval_loss")},
        ),
        *(
            Chart(
                _title(name),
                "steps",
                "per cent",
                {name: [(x, 100 * y) for x, y in _points(log, f"eval_{name}")]},
            )
            for name in scores
        ),
        Chart(f"{columns[3].title} of utterances", "per cent", column=3),
    ]
    reasons: dict[str, list[str]] = {}
    for item in outcome.skipped:
        reasons.setdefault(item.reason, []).append(item.name)
    page.findings = [
        Findings(
            "What was not scored",
            [(reason, len(names), names[0]) for reason, names in reasons.items()],
            search=True,
        )
    ]
    path = folder / REPORT_FILE
    manifest = source.rows if isinstance(source, ManifestSource) else ()
    recordings = {row.name: row for row in manifest}
    write_page(path, page, _rows(outcome, score, has_texts, recordings))
    return path


def _title(name: str) -> str:
    return name.upper() if name in ("wer", "cer") else name.capitalize()


def _points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in log if row.get(name) is not None]


def _rows(
    outcome: Evaluation, score: str, has_texts: bool, recordings: Mapping[str, Recording]
) -> Iterator[Row]:
    predictions = outcome.predictions
    cells = _texts(predictions, score) if has_texts else _decisions(predictions)
    for prediction, values in zip(predictions, cells, strict=True):
        loss = prediction.loss / prediction.weight if prediction.weight else None
        found = (_finite(loss), *values, None)
        recording = recordings.get(prediction.name)
        if recording is None:
            yield Row((prediction.name, *found, None))
        else:
            audio, part = recording.audio, (recording.offset, recording.duration)
            yield Row((audio, *found, prediction.name), False, audio, *part)
    for item in outcome.skipped:
        yield Row((item.name, *[None] * 5, item.reason, None), failed=True)


def _finite(number: float | None) -> float | None:
    return number if number is not None and abs(number) < float("inf") else None


def _texts(predictions: Sequence[Prediction], score: str) -> Iterator[tuple[Any, ...]]:
    pairs = [(p.outcome["reference"], p.outcome["hypothesis"]) for p in predictions]
    for (said, heard), alignment in zip(pairs, align(pairs, score), strict=True):
        errors = len(alignment.edits)
        yield errors, errors / max(1, alignment.length), said, heard


def _decisions(predictions: Sequence[Prediction]) -> Iterator[tuple[Any, ...]]:
    for prediction in predictions:
        correct, decisions = (prediction.outcome[name] for name in ("correct", "decisions"))
        yield decisions - correct, correct / max(1, decisions), decisions, None
