"""The page of an evaluation: rates, where the errors are, and every row with what was heard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from w2vbert_fast.checkpoints.files import make_folder
from w2vbert_fast.evaluation.scoring import SCORES, Evaluation, Scored
from w2vbert_fast.report import Chart, Column, Fact, Findings, Page, Row, write_page

REPORT_FILE = "report.html"

_LENGTH, _ERRORS, _RATE = 1, 2, 3
_LISTED = 20


def write_report(evaluation: Evaluation, folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a folder.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    summary = evaluation.summary()
    metric = evaluation.metric
    names = evaluation.systems
    of = [""] if len(names) == 1 else [f" of {name}" for name in names]
    page = Page(
        f"evaluation: {' against '.join(names)}",
        (
            Column("Recording"),
            Column("Length", "seconds"),
            Column("Errors", "number"),
            *(Column(f"{metric.upper()}{one}", "share") for one in of),
            Column("Said"),
            *(Column(f"Heard{one}") for one in of),
            Column("Errors, one by one", small=True),
            Column(evaluation.by or "Group", small=True),
            Column("Left out", small=True),
        ),
        sort=_ERRORS,
        descending=True,
    )
    page.facts = [
        Fact("Rows", f"{summary['rows']:,}"),
        Fact("Left out", f"{len(summary['left_out']):,}"),
        Fact("Words", f"{summary['words']:,}"),
        Fact("Texts are compared in", summary["normalisation"]),
    ]
    for system, one in zip(summary["systems"], of, strict=True):
        for score in SCORES:
            low, high = system[f"{score}_interval"]
            value = f"{100 * system[score]:.2f} % ({100 * low:.2f} to {100 * high:.2f})"
            page.facts.append(Fact(f"{score.upper()}{one}, 95 % interval", value))
    compared = summary.get("comparison")
    if compared is not None:
        found = compared[metric]
        low, high = found["interval"]
        value = f"{100 * found['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        page.facts.append(Fact(f"Difference in {metric.upper()}, 95 % interval", value))
        value = f"in {100 * found['better']:.1f} % of {summary['resamples']:,} draws"
        page.facts.append(Fact(f"{names[1]} has the lower {metric.upper()}", value))
    page.charts = [
        *(
            Chart(f"{metric.upper()} of recordings{one}", "per cent", column=_RATE + i)
            for i, one in enumerate(of)
        ),
        Chart("Length of recordings", "seconds", column=_LENGTH),
    ]
    page.findings = [
        Findings(
            f"{metric.upper()} by {name}",
            [
                (g["value"], g["rows"], " and ".join(f"{100 * rate:.2f} %" for rate in g[metric]))
                for g in groups
            ],
            "rows",
        )
        for name, groups in summary["groups"].items()
    ]
    for edits, one in zip(summary["edits"], of, strict=True):
        entries = [(_edit(e["said"], e["heard"]), e["count"], "") for e in edits[:_LISTED]]
        page.findings.append(Findings(f"Most frequent errors{one}", entries, search=True))
    path = make_folder(folder) / REPORT_FILE
    write_page(path, page, _rows(evaluation))
    return path


def _rows(evaluation: Evaluation) -> Iterator[Row]:
    count, metric = len(evaluation.systems), evaluation.metric
    for row in evaluation.rows:
        errors = row.errors(metric)
        cells = (
            row.name,
            row.seconds,
            sum(errors),
            *(number / max(1, row.length(metric)) for number in errors),
            row.reference,
            *row.hypotheses,
            "\n".join(_edits(evaluation, row)),
            row.group,
            None,
        )
        audio = row.audio if os.path.isfile(row.audio) else None
        yield Row(cells, False, audio, row.offset, row.seconds or None, row.words)
    for name, reason in evaluation.left_out:
        empty = [None] * (2 + count)
        yield Row((name, *empty, None, *[None] * count, None, None, reason), failed=True)


def _edits(evaluation: Evaluation, row: Scored) -> Iterator[str]:
    for name, alignment in zip(evaluation.systems, row.alignments[evaluation.metric], strict=True):
        one = f"{name}: " if len(evaluation.systems) > 1 else ""
        for said, heard in alignment.edits:
            yield one + _edit(said, heard)


def _edit(said: str, heard: str) -> str:
    if not said:
        return f"“{heard}” is added"
    return f"“{said}” is heard as “{heard}”" if heard else f"“{said}” is lost"
