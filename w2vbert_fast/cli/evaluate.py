"""The command `w2vbert-fast evaluate`: error rates on transcribed recordings."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from w2vbert_fast.cli import jobs
from w2vbert_fast.cli.messages import ITEMS_FAILED, log_shown, one_line, report, write_line
from w2vbert_fast.cli.options import COLUMNS, COLUMNS_METAVAR, REQUIRED, argument, option, values
from w2vbert_fast.cli.transcribe import Search

if TYPE_CHECKING:
    from w2vbert_fast.recordings.inputs import Inputs

SHORT = "Word and character error rates on transcribed recordings."
HELP = (
    "Score a model on transcribed recordings: word and character error rate with intervals, where "
    "the errors are, and which rows have most of them.\n\n"
    "DATA is a data set as finetune takes it. --model and --against may also be folders of "
    "transcribe --out, whose results are scored as they are. Two are compared on the rows that "
    "both have. Exit status: 0 all rows were scored, 1 some were left out, 2 none could be."
)


@dataclass(kw_only=True)
class Data:
    data: str = argument("Recordings with transcripts.", metavar="DATA")
    columns: str | None = option(None, COLUMNS, metavar=COLUMNS_METAVAR)

    def open(self) -> Inputs:
        """Survey it, and say what it was taken for."""
        return jobs.Inputs(inputs=[self.data], columns=self.columns).open()


@dataclass(kw_only=True)
class Systems:
    model: str = option(REQUIRED, "What is scored.", metavar="PATH|HUB_ID|DIR")
    against: str | None = option(None, "What it is compared with.", metavar="PATH|HUB_ID|DIR")


@dataclass(kw_only=True)
class Scoring:
    normalise: str = option(
        "auto",
        "What does not count: none, case, punctuation, case,punctuation; auto: what references or "
        "a model never have.",
        metavar="NAMES",
    )
    by: str | None = option(None, "Column to tell scores apart by.", metavar="COLUMN")
    resamples: int = option(1000, "Draws of the bootstrap.")
    seed: int = option(0, "Of the draws.")


@dataclass(kw_only=True)
class Computing:
    device: str | None = option(None, "cpu, cuda or cuda:N.")
    dtype: jobs.Dtype | None = option(None, "Of the weights.")


@dataclass(kw_only=True)
class Printing:
    out: str | None = option(
        None, "Folder for evaluation.json, utterances.jsonl and report.html.", metavar="DIR"
    )
    as_json: bool = option(False, "Print the numbers as JSON.", "--json")


def command(
    data: Data,
    systems: Systems,
    scoring: Scoring,
    printing: Printing,
    computing: Computing,
    search: Search,
    sound: jobs.Sound,
    chunks: jobs.Chunks,
    reading: jobs.Reading,
) -> int:
    """Score, and print the scores; the exit status."""
    from w2vbert_fast.evaluation import evaluate, write_report
    from w2vbert_fast.inference.runner import Flow
    from w2vbert_fast.recordings.rows import how_many

    with log_shown("w2vbert_fast.inference", below_progress=True):
        found = evaluate(
            data.open(),
            **values(systems, scoring),
            flow=Flow(**reading.flow(probe=False)),
            watch=_show if sys.stderr.isatty() else None,
            **{**values(computing, chunks), **sound.of_task(), **search.of_task()},
        )
    if printing.out is not None:
        found.save(printing.out)
        write_report(found, printing.out)
    if printing.as_json:
        write_line(json.dumps(found.summary(), ensure_ascii=False))
    else:
        for line in str(found).splitlines():
            write_line(one_line(line))
    if not found.left_out:
        return 0
    report(f"{how_many(len(found.left_out))} left out")
    return ITEMS_FAILED


def _show(name: str, done: int, total: int) -> None:
    """How far a model is, on the last line of a terminal."""
    end = "\n" if done == total else ""
    print(f"\r{one_line(name)}: {done} of {total} rows", end=end, file=sys.stderr, flush=True)
